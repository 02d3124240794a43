"""The named experiments: which networks, by which recipe, and how a recipe is cut to fewer steps.

A network's name is its shortcut and depth, `plain-20` or `A-20`; `B-20-average` and `B-20-kaiming`
say how its projections start, where that is not the recipe's own way.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flax_resnet.config import (
    Crop,
    Dataset,
    Experiment,
    OptimConfig,
    Preprocess,
    ProjectionInit,
    ResNetConfig,
    Schedule,
    Shortcut,
    Stride,
    TrainConfig,
    Warmup,
)
from flax_resnet.errors import ConfigError

Recipe = Callable[[int, Shortcut], Experiment]

TANJEFFREYZ_STEPS = 62_560  # 160 epochs of 391 batches
IMAGENET_IMAGES = 1_281_167  # of its training split
MOST_SEEDS = 10_000
MIN_STEPS = 4  # below, the two drops of the learning rate fall together
NAME = re.compile(r"(plain|A|B|C)-(\d+)(?:-(average|kaiming))?")


@dataclass(frozen=True)
class Study:
    """A named experiment."""

    title: str
    networks: tuple[str, ...]  # in the order in which they are worth their time
    recipe: Recipe
    batch_statistics: bool = False  # test also with BatchNorm in training mode, as tanjeffreyz


class Job(NamedTuple):
    """One run."""

    name: str  # such as A-20-s0
    config: Experiment


def paper(depth: int, shortcut: Shortcut) -> Experiment:
    """The paper's recipe (section 4.2), trained on all images."""
    config = Experiment(model=ResNetConfig.paper(depth, shortcut))
    # At 0.1 a network of 110 layers hardly starts to converge, so the paper begins at 0.01.
    config.optim.warmup_steps = 400 if depth >= 110 else 0
    return config


def paper_split(depth: int, shortcut: Shortcut) -> Experiment:
    """The same with 5,000 training images held out: the paper's 45k/5k split."""
    config = paper(depth, shortcut)
    config.data.validation = 5000
    return config


def tanjeffreyz(depth: int, shortcut: Shortcut) -> Experiment:
    """The network and recipe of the PyTorch system that this project reimplements."""
    config = Experiment(model=ResNetConfig.tanjeffreyz(depth, shortcut))
    config.data.preprocess = Preprocess.OWN_MEAN
    config.data.flip = False
    config.train.steps = TANJEFFREYZ_STEPS
    config.optim.warmup_steps = 391 if depth >= 56 else 0  # its first epoch
    return config


def imagenet(depth: int) -> Experiment:
    """The paper's recipe for ImageNet (section 3.4), with its shortcuts: A, or B of bottlenecks.

    The short side is resized to a random 256 to 480 pixels, a random 224 x 224 crop is mirrored or
    not, the mean image is subtracted, and the colours are shifted as in AlexNet. The paper divides
    the rate by 10 "when the error plateaus", within 60e4 iterations. Here that is after each
    quarter of them.
    """
    shortcut = Shortcut.A if depth < 50 else Shortcut.B
    config = Experiment(model=ResNetConfig.imagenet(depth, shortcut))
    config.data.name, config.data.train_crop = Dataset.FOLDER, Crop.SCALE_JITTER
    config.data.preprocess, config.data.colour = Preprocess.MEAN_IMAGE, 0.1
    config.train.batch_size, config.train.steps = 256, 600_000
    config.optim.boundaries = (150_000, 300_000, 450_000)
    return config


def torchvision(depth: int) -> Experiment:
    """torchvision's network and recipe for ImageNet: 90 epochs, a tenth of the rate after each 30.

    As its references/classification/train.py has it by default, of its first weights: batches of
    256 (32 on each of 8 devices, with statistics of their own: `batch_norm=replica` on as many),
    a random part of an image resized to 224 x 224, mirrored or not.
    """
    model = ResNetConfig.imagenet(depth, stride=Stride.CONV3X3)
    config = Experiment(model=model)
    config.data.name, config.data.preprocess = Dataset.FOLDER, Preprocess.IMAGENET
    config.data.train_crop = Crop.RANDOM_RESIZED
    config.train.batch_size = 256
    epoch = math.ceil(IMAGENET_IMAGES / config.train.batch_size)
    config.train.steps = 90 * epoch
    config.optim.boundaries = (30 * epoch, 60 * epoch)
    return config


def finetune() -> Experiment:
    """Other weights' network on a folder of the user's own images, with a new classifier.

    Stem and first stage stay as they are: their edges and colours serve any photograph (Yosinski et
    al. 2014), the statistics of small batches do not disturb them, and the largest maps need no
    gradient. The rest learns at a tenth of the classifier's rate, which begins with random weights.
    """
    config = Experiment(init_model=True, init_fresh=("fc",))
    config.data.name = Dataset.FOLDER
    config.optim = OptimConfig(
        schedule=Schedule.COSINE,
        peak_lr=0.01,
        warmup=Warmup.LINEAR,
        warmup_lr=0.001,
        warmup_steps=50,
        body_lr_factor=0.1,
    )
    config.train = TrainConfig(
        steps=1000,
        batch_size=32,
        label_smoothing=0.1,
        log_every=10,
        evaluate_every=100,
        checkpoint_every=100,
        frozen=("stem", "stages.0"),
    )
    return config


def both(*depths: int) -> tuple[str, ...]:
    return tuple(f"{shortcut}-{depth}" for depth in depths for shortcut in ("A", "plain"))


STUDIES = {
    "plain-vs-residual": Study(
        "Plain against residual, and the three shortcuts",
        ("A-20", "plain-20", "B-20", "C-20"),
        paper,
    ),
    "depth": Study("Plain and residual networks by depth", both(20, 56, 32, 44, 110), paper),
    "projection-init": Study(
        "Option B's projections, Kaiming against 1/C_in", ("B-20", "B-20-average"), paper
    ),
    "tanjeffreyz": Study(
        "tanjeffreyz's own networks and recipe",
        (*both(20, 56, 32, 44), "B-20", "B-32"),
        tanjeffreyz,
        batch_statistics=True,
    ),
    "paper": Study(
        "The paper's 45k/5k split",
        ("A-20", "A-56", "A-110", "A-32", "A-44"),
        paper_split,
    ),
}


def find_study(name: str) -> Study:
    """Raises ConfigError for an unknown name."""
    if name not in STUDIES:
        raise ConfigError(f"the experiment must be one of {', '.join(STUDIES)}, got {name!r}")
    return STUDIES[name]


def make_jobs(
    study: Study,
    networks: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
) -> list[Job]:
    """The runs of a study: every network with the first seed, then with the next.

    Args:
        networks: by name, in the place of the study's own.
        steps: in the place of the recipe's; see `shorten`.

    Raises:
        ConfigError: an unknown network, or too few steps.
    """
    return [
        Job(f"{network}-s{seed}", make_config(study, network, seed, steps))
        for seed in dict.fromkeys(seeds)
        for network in dict.fromkeys(networks or study.networks)
    ]


def make_config(study: Study, network: str, seed: int, steps: int | None) -> Experiment:
    match = NAME.fullmatch(network)
    if not match:
        raise ConfigError(
            "a network must be plain, A, B or C and a depth, such as plain-20, A-56 or "
            f"B-20-average, got {network!r}"
        )
    shortcut, depth, projection_init = match.groups()
    config = study.recipe(int(depth), Shortcut(shortcut))
    if projection_init:
        if config.model.shortcut not in (Shortcut.B, Shortcut.C):
            raise ConfigError(f"only B and C have projections to start: {network!r}")
        config.model.projection_init = ProjectionInit(projection_init)
    config.seed = seed
    if steps is not None:
        shorten(config, steps)
    pace(config)
    config.validate()
    return config


def shorten(config: Experiment, steps: int) -> None:
    """Cuts (or stretches) a recipe to `steps`.

    The drops of the learning rate keep their places as fractions of the whole: 1/2 and 3/4 of the
    paper's. A warm-up is there to bring the training error below 80 % (section 4.2), which takes
    steps and not a fraction, so it stays, but for at most a tenth of the whole.
    """
    if steps < MIN_STEPS:
        raise ConfigError(f"steps must be at least {MIN_STEPS}, got {steps}")
    optim, full = config.optim, config.train.steps
    optim.boundaries = tuple(steps * boundary // full for boundary in optim.boundaries)
    optim.warmup_steps = min(optim.warmup_steps, steps // 10)
    config.train.steps = steps


def pace(config: Experiment) -> None:
    """How often to look: about 640 times at the training error, 64 times at the test set.

    In short runs less often, every 250 steps: the 10,000 test images are 78 batches.
    """
    settings = config.train
    settings.log_every = max(1, min(settings.steps // 4, max(10, settings.steps // 640)))
    settings.evaluate_every = min(settings.steps, max(250, settings.steps // 64))
    settings.checkpoint_every = settings.evaluate_every


def parse_seeds(text: str) -> list[int]:
    """`5`: 0 to 4; `0..4`: the same; `0,3`: these two. Raises ConfigError for anything else."""
    seeds: Sequence[int] = []
    if match := re.fullmatch(r"(\d{1,19})\.\.(\d{1,19})", text):
        seeds = range(int(match[1]), int(match[2]) + 1)
    elif re.fullmatch(r"\d{1,19}", text):
        seeds = range(int(text))
    elif re.fullmatch(r"\d{1,19}(,\d{1,19})*,?", text):
        seeds = [int(part) for part in text.split(",") if part]
    if seeds[MOST_SEEDS:]:
        raise ConfigError(
            f"seeds must be at most {MOST_SEEDS}, got {text!r}; seed 5 alone is written 5..5 or 5,"
        )
    if not seeds:
        raise ConfigError(
            f"seeds must be a number of seeds (5), a range (0..4) or a list (0,3), got {text!r}"
        )
    return list(seeds)
