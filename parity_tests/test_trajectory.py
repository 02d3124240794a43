"""Claim: the two training programs stay together for 200 steps on the same augmented batches.

Both are the whole program: preprocessing, crop, flip, forward, backward, SGD with warm-up and both
drops. Depth 8 and batches of 4 (float32: 8) are what two cores can afford, and the rates are a
tenth of the paper's: linear scaling of 0.1 at 128 would give 0.003 at 4. With the paper's own the
claim is at the mercy of chaos: measured between 1e-11 and 1.5e-7, by how long the rate stays high.

float64: weights, momentum and running statistics within 1e-9 relative, each tensor by its largest
value (measured: 1.8e-13, 3.3e-12, 2.2e-12). The mildest mutant, an epsilon of 1.01e-5, is 3.4e-7
away after 20 steps.

float32: a rounding puts an activation on the other side of a ReLU's kink, its gradient is then no
rounding away, and chaos does the rest; PyTorch parts from itself no less, when its first weights
are moved by a rounding. So two statements. In the first 10 steps the losses stay within 2e-4 of one
another (measured: 4.8e-7 on CIFAR-10, 6.7e-6 on digits, never above 4.3e-5 in six trials; a
momentum or rate one part in a hundred off gives 5.5e-4 or more). In the 150 steps after the
warm-up, where chaos has spread them, our mean |loss difference| from such runs of PyTorch is at
most 4 times theirs from one another (measured: 1.8, which is 0.027 of a loss of 2; digits 1.4).

The networks with ImageNet's stages, 18 to 152, kuangliu's and tanjeffreyz's of one channel: 20
steps in float64, within 1e-10 (measured: 2.1e-14 to 6.1e-12).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.config import (
    DataConfig,
    Dataset,
    DType,
    Experiment,
    OptimConfig,
    ResNetConfig,
    Shortcut,
    TrainConfig,
)
from flax_resnet.data import order, pixels, source
from flax_resnet.data.examples import Examples
from flax_resnet.data.order import Draw
from flax_resnet.nn.scan import stack, unstack
from flax_resnet.optim import make_optimizer
from flax_resnet.resnet import abstract
from flax_resnet.step import Metrics, Program, TrainState, init, train_step
from flax_resnet.weights.state_dict import to_state_dict
from flax_resnet.weights.trees import tree_to_torch
from parity_tests.data_sets import find_cifar10
from parity_tests.pair import LARGE, images, make_pair, open_relus, to_torch, torch
from torch_ref import pixels as torch_pixels
from torch_ref import step as torch_step

REAL = find_cifar10()
STEPS = 200
RATES = OptimConfig(peak_lr=0.01, warmup_lr=0.001, warmup_steps=50, boundaries=(100, 150))
BATCH_SIZE = {DType.FLOAT64: 4, DType.FLOAT32: 8}


@pytest.fixture(
    scope="module",
    params=[Dataset.CIFAR10 if REAL else Dataset.DIGITS],
    ids=lambda dataset: dataset.value,
)
def examples(request: pytest.FixtureRequest) -> Examples:
    """Real photographs where they are, else scikit-learn's digits."""
    config = DataConfig(name=request.param, dir=str(REAL))
    return source.load(config, ("test",))["test"]  # fewer to decode


def experiment(shortcut: Shortcut, dtype: DType, **changed_rates: float) -> Experiment:
    return Experiment(
        model=ResNetConfig.paper(8, shortcut, dtype=dtype),
        optim=dataclasses.replace(RATES, **changed_rates),
        train=TrainConfig(batch_size=BATCH_SIZE[dtype]),
    )


def make_twin(config: Experiment, ours: TrainState, nudge: int = 0) -> torch_step.TrainState:
    """PyTorch's program with our first weights, each moved by a rounding or not if `nudge`."""
    twin = torch_step.init(config)
    state = to_state_dict(config.model.architecture, ours.params, ours.batch_stats)
    twin.model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    if nudge:
        rng = np.random.default_rng(nudge)
        for p in twin.model.parameters():
            moved = np.nextafter(p.detach().numpy(), np.inf)
            up = torch.from_numpy(rng.random(p.shape) < 0.5)
            p.data = torch.where(up, torch.from_numpy(moved), p.data)
    return twin


def lockstep(
    config: Experiment,
    examples: Examples,
    twins: list[torch_step.TrainState],
    steps: int = STEPS,
) -> tuple[TrainState, np.ndarray]:
    """Our state after the steps, and the mean loss by (program, step), ours first."""
    dtype, batch_size = config.model.dtype.value, config.train.batch_size
    constants = pixels.make_normalization(config.data.preprocess, examples.image)
    program, ours = init(config)
    on_device = jax.device_put(examples)

    @jax.jit
    def step_fn(state: TrainState, examples: Examples, drawn: Draw) -> tuple[TrainState, Metrics]:
        batch = pixels.training_batch(examples, drawn, constants, config.data.pad, jnp.dtype(dtype))
        return train_step(program, state, batch)

    losses = []
    for step in range(steps):
        drawn = order.draw(config.data, config.seed, step, batch_size, len(examples.label))
        ours, metrics = step_fn(ours, on_device, drawn)  # runs while PyTorch does
        image = torch_pixels.normalize(
            examples.image[drawn.indices], *constants, getattr(torch, dtype)
        )
        image = torch_pixels.crop_and_flip(image, drawn.offset, drawn.flip, config.data.pad)
        label = torch.tensor(examples.label[drawn.indices], dtype=torch.int64)
        theirs = [torch_step.train_step(t, torch_pixels.Batch(image, label)) for t in twins]
        losses.append([metrics.loss, *(float(m.loss) for m in theirs)])
    return ours, np.array(jax.device_get(losses), np.float64).T / batch_size


def difference(ours: TrainState, twin: torch_step.TrainState) -> dict[str, float]:
    """The largest of any tensor of each kind, relative to that tensor's largest value."""
    theirs = {name: p.detach() for name, p in twin.model.named_parameters()}
    momentum = {
        name: twin.optimizer.state[p]["momentum_buffer"]
        for name, p in twin.model.named_parameters()
    }
    pairs = {
        "weights": (ours.params, theirs),
        "momentum": (ours.opt_state[1].trace, momentum),
        "statistics": (ours.batch_stats, dict(twin.model.named_buffers())),
    }
    return {
        kind: max(
            float(np.abs(array - b[name].numpy()).max() / np.abs(b[name].numpy()).max())
            for name, array in tree_to_torch(tree).items()
        )
        for kind, (tree, b) in pairs.items()
    }


@pytest.mark.parametrize(
    "shortcut",
    [
        pytest.param(s, id=s.value, marks=() if s is Shortcut.C else pytest.mark.slow)
        for s in Shortcut
    ],
)
def test_float64_weights_are_pytorchs_after_200_steps(
    examples: Examples, shortcut: Shortcut
) -> None:
    config = experiment(shortcut, DType.FLOAT64)
    twin = make_twin(config, init(config)[1])
    ours, (our_loss, their_loss) = lockstep(config, examples, [twin])
    assert max(difference(ours, twin).values()) <= 1e-9
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-9)


@pytest.mark.slow
def test_float32_losses_stay_together_as_pytorchs_own_do(examples: Examples) -> None:
    config = experiment(Shortcut.A, DType.FLOAT32)
    state = init(config)[1]
    twins = [make_twin(config, state, nudge) for nudge in range(4)]
    mutants = [
        make_twin(experiment(Shortcut.A, DType.FLOAT32, **change), state)
        for change in ({"momentum": 0.909}, {"warmup_lr": 0.00101})
    ]
    _, losses = lockstep(config, examples, twins)
    apart = np.abs(losses[:, None] - losses)  # program, other program, step
    ours, theirs = 0, slice(1, None)
    assert apart[ours, theirs, :10].max() <= 2e-4
    _, early = lockstep(config, examples, mutants, steps=10)
    assert np.abs(early[ours] - early[1:]).max(-1).min() > 2e-4

    late = apart[:, :, RATES.warmup_steps :].mean(-1)
    among_theirs = late[theirs, theirs].sum() / (len(twins) * (len(twins) - 1))
    assert late[ours, theirs].mean() <= 4 * among_theirs


def test_a_mutant_fails(examples: Examples) -> None:
    """One part in a hundred of any constant shows within 20 steps."""
    config = experiment(Shortcut.A, DType.FLOAT64)
    state = init(config)[1]
    changes: dict[str, dict[str, float]] = {
        "nothing": {},
        "weight decay": {"weight_decay": 1.01e-4},
        "momentum": {"momentum": 0.909},
        "rate": {"warmup_lr": 0.00101},
        "momentum of the statistics": {},
        "epsilon": {},
    }
    twins = {
        name: make_twin(experiment(Shortcut.A, DType.FLOAT64, **change), state)
        for name, change in changes.items()
    }
    for name, attribute, value in [
        ("momentum of the statistics", "momentum", 0.101),
        ("epsilon", "eps", 1.01e-5),
    ]:
        for module in twins[name].model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                setattr(module, attribute, value)
    ours, _ = lockstep(config, examples, list(twins.values()), steps=20)
    worst = {name: max(difference(ours, twin).values()) for name, twin in twins.items()}
    assert worst.pop("nothing") <= 1e-9
    assert min(worst.values()) > 1e-8, worst


# --- The networks with ImageNet's stages ----------------------------------------------------------

# The deeper a network, the smaller the rate at which a rounding grows little in 20 steps.
LOCKSTEP = {
    "18-B": 1e-5,
    "34-plain": 1e-7,
    "50-B": 1e-5,
    "50-B, stride on 3x3": 1e-5,
    "101-B": 1e-7,
    "152-B": 1e-7,
    "kuangliu-18": 1e-5,
    "tanjeffreyz-18-B": 1e-5,  # one channel
}


def large_lockstep(name: str, momenta: tuple[float, ...] = (0.9,)) -> list[float]:
    """How far PyTorch's programs with these momenta are from ours after 20 steps.

    On pixels at random, no two of which are equal: where two in a max-pool's window differ by a
    rounding alone, each side may take another one. And at a small rate: at 1e-3 ResNet-50 does not
    learn from 8 images, and a rounding grows fivefold with every step. All scan over their blocks,
    so that one of a stage is compiled for all; ResNet-50 computes them again, too.
    """
    slow = dataclasses.replace(RATES, warmup_lr=LOCKSTEP[name])
    model = dataclasses.replace(LARGE[name], scan_blocks=True, remat=name == "50-B")
    config = Experiment(model=model, optim=slow)
    pair = open_relus(make_pair(LARGE[name]))
    optimizer = make_optimizer(config.optim, config.train.steps)
    program = Program(abstract(config.model)[0], optimizer, None, 0.0, 1)
    params, batch_stats = stack((pair.params, pair.batch_stats))
    start = jnp.zeros((), jnp.int32)
    ours = TrainState(start, params, batch_stats, optimizer.init(params), Metrics.zeros())
    rates = [dataclasses.replace(slow, momentum=momentum) for momentum in momenta]
    twins = [make_twin(dataclasses.replace(config, optim=x), unstack(ours)) for x in rates]
    step_fn = jax.jit(partial(train_step, program))
    side = 8 if name == "kuangliu-18" else 16  # its stem halves nothing
    for step in range(20):
        image = images(8, step, size=side, channels=model.image_channels)
        label = np.random.default_rng(step).integers(0, 10, 8)
        ours, _ = step_fn(ours, pixels.Batch(jnp.asarray(image), jnp.asarray(label, jnp.int32)))
        for twin in twins:
            torch_step.train_step(twin, torch_pixels.Batch(to_torch(image), torch.tensor(label)))
    return [max(difference(unstack(ours), twin).values()) for twin in twins]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOCKSTEP if name != "18-B"])
def test_a_large_network_stays_with_pytorchs(name: str) -> None:
    (found,) = large_lockstep(name)
    assert found <= 1e-10


@pytest.mark.slow
def test_resnet_18_stays_with_pytorchs_of_the_same_momentum() -> None:
    found, mutant = large_lockstep("18-B", (0.9, 0.909))
    assert found <= 1e-10
    assert mutant > 1e-6
