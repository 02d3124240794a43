"""Claim: a named experiment's runs are the config files' recipes, and with fewer steps the learning
rate falls at the same fractions of the whole.
"""

from pathlib import Path

import pytest

from flax_resnet.config import (
    Crop,
    Experiment,
    Preprocess,
    ProjectionInit,
    ResNetConfig,
    Shortcut,
    Stride,
)
from flax_resnet.errors import ConfigError
from flax_resnet.studies.recipes import STUDIES, Job, make_jobs, parse_seeds

CONFIGS = Path(__file__).parent.parent / "configs"


def recipe(config: Experiment) -> tuple[object, ...]:
    """What decides the result, but for the seed."""
    settings = config.train
    sizes = settings.steps, settings.batch_size
    return config.model, config.data, config.optim, sizes, config.parallel, config.batch_norm


def of_file(name: str) -> Experiment:
    scope: dict[str, object] = {}
    exec((CONFIGS / f"{name}.py").read_text(), scope)
    return scope["get_config"]()


def find(jobs: list[Job], name: str) -> Experiment:
    return next(job.config for job in jobs if job.name == name)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110, 1202])
@pytest.mark.parametrize(("name", "shortcut"), [("resnet", Shortcut.A), ("plain", Shortcut.PLAIN)])
def test_the_config_files_are_the_papers_networks_and_schedule(
    name: str, shortcut: Shortcut, depth: int
) -> None:
    if (name, depth) == ("plain", 1202):  # which the paper did not train
        assert not (CONFIGS / "plain1202.py").exists()
        return
    config = of_file(f"{name}{depth}")
    assert config.model == ResNetConfig(depth=depth, shortcut=shortcut)
    optim, settings = config.optim, config.train
    assert (optim.peak_lr, optim.boundaries, optim.decay_factor) == (0.1, (32_000, 48_000), 0.1)
    assert (optim.warmup_steps, optim.warmup_lr) == (400 if depth >= 110 else 0, 0.01)
    assert (optim.momentum, optim.weight_decay) == (0.9, 1e-4)
    assert (settings.steps, settings.batch_size) == (64_000, 128)
    assert (config.data.pad, config.data.flip, config.data.validation) == (4, True, 0)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_the_config_files_for_imagenet_are_the_papers(depth: int) -> None:
    """Section 3.4; option A in table 2, B of bottlenecks, whose first 1x1 has the stride."""
    config = of_file(f"imagenet{depth}")
    config.validate()
    shortcut = Shortcut.A if depth < 50 else Shortcut.B
    assert config.model == ResNetConfig.imagenet(depth, shortcut)
    assert (config.model.num_classes, config.model.stride) == (1000, Stride.CONV1X1)
    optim, settings = config.optim, config.train
    assert (optim.peak_lr, optim.decay_factor, optim.warmup_steps) == (0.1, 0.1, 0)
    assert (optim.momentum, optim.weight_decay) == (0.9, 1e-4)
    assert (settings.steps, settings.batch_size) == (600_000, 256)
    assert optim.boundaries == (150_000, 300_000, 450_000)
    data = config.data
    assert (data.view, data.jitter) == ((256, 224, Crop.SCALE_JITTER), (256, 480))
    assert (data.preprocess, data.flip, data.colour) == (Preprocess.MEAN_IMAGE, True, 0.1)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_the_config_files_for_torchvision_are_its_networks_and_90_epochs(depth: int) -> None:
    """Of 1,281,167 images in batches of 256, the last of each epoch a smaller one: 5,005."""
    config = of_file(f"torchvision{depth}")
    config.validate()
    assert config.model == ResNetConfig.imagenet(depth, stride=Stride.CONV3X3)
    optim, settings, data = config.optim, config.train, config.data
    assert (optim.peak_lr, optim.decay_factor, optim.warmup_steps) == (0.1, 0.1, 0)
    assert (optim.momentum, optim.weight_decay) == (0.9, 1e-4)
    assert (settings.steps, settings.batch_size) == (90 * 5005, 256)
    assert optim.boundaries == (30 * 5005, 60 * 5005)
    assert (data.view, data.area) == ((256, 224, Crop.RANDOM_RESIZED), (0.08, 1.0))
    assert (data.preprocess, data.flip, data.colour) == (Preprocess.IMAGENET, True, 0)


def test_the_config_file_for_fine_tuning_wants_weights_and_images() -> None:
    config = of_file("finetune")
    config.validate()
    with pytest.raises(ConfigError, match=r"^data.dir must be the directory with train/CLASS/"):
        config.require_given()
    config.data.dir = "photos"
    with pytest.raises(ConfigError, match=r"^init must be given with init_model: .*, got None$"):
        config.require_given()
    config.init = "resnet18.pth"
    config.require_given()
    for setting in ("model.depth", "model.shortcut", "model.num_classes"):
        assert config.idle()[setting] == "with init_model the network is that of init"
    assert not {"model.dtype", "model.scan_blocks", "model.remat"} & config.idle().keys()


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_is_the_config_files(depth: int) -> None:
    jobs = make_jobs(STUDIES["depth"], seeds=(3,))
    for kind, name in (("A", "resnet"), ("plain", "plain")):
        config = find(jobs, f"{kind}-{depth}-s3")
        assert recipe(config) == recipe(of_file(f"{name}{depth}"))
        assert config.seed == 3


def test_tanjeffreyz_is_its_config_file() -> None:
    config = find(make_jobs(STUDIES["tanjeffreyz"]), "A-20-s0")
    assert recipe(config) == recipe(of_file("tanjeffreyz_resnet20"))


def test_paper_holds_out_5000() -> None:
    assert {job.config.data.validation for job in make_jobs(STUDIES["paper"])} == {5000}


def test_projection_init_compares_kaiming_with_the_average() -> None:
    kaiming, average = (job.config for job in make_jobs(STUDIES["projection-init"]))
    assert kaiming.model.projection_init is ProjectionInit.KAIMING
    average.model.projection_init, was = ProjectionInit.KAIMING, average.model.projection_init
    assert was is ProjectionInit.AVERAGE
    assert average == kaiming


@pytest.mark.parametrize(
    ("steps", "boundaries", "warmup"),
    [(64_000, (32_000, 48_000), 400), (1500, (750, 1125), 150), (10, (5, 7), 1), (4, (2, 3), 0)],
)
def test_fewer_steps_scale_the_schedule(
    steps: int, boundaries: tuple[int, int], warmup: int
) -> None:
    optim = make_jobs(STUDIES["depth"], ["A-110"], steps=steps)[0].config.optim
    assert (optim.boundaries, optim.warmup_steps) == (boundaries, warmup)


def test_all_networks_come_before_the_next_seed() -> None:
    jobs = make_jobs(STUDIES["depth"], ["A-8", "plain-8"], (0, 4))
    assert [job.name for job in jobs] == ["A-8-s0", "plain-8-s0", "A-8-s4", "plain-8-s4"]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("D-20", "a network must be plain, A, B or C and a depth"),
        ("A-21", "model.depth must be 6n\\+2"),
        ("A-20-average", "only B and C have projections"),
    ],
)
def test_a_network_that_is_none(network: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_jobs(STUDIES["depth"], [network])


def test_seeds() -> None:
    assert parse_seeds("5") == parse_seeds("0..4") == [0, 1, 2, 3, 4]
    assert parse_seeds("0,3") == [0, 3]
    for text in ("", "0", "a", "4..2", "1-2"):
        with pytest.raises(ConfigError, match="seeds must be a number of seeds"):
            parse_seeds(text)
