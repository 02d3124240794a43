"""What an experiment is made of. Every default is the paper's (arXiv:1512.03385, section 4.2).

The classes are mutable because `ml_collections.config_flags` writes command line overrides into
them; since overrides land after `__post_init__`, `validate` is called by whoever consumes them.
"""

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any

from flax_resnet.errors import ConfigError


class Shortcut(enum.Enum):
    """What carries x past the residual function (paper, section 3.3 and figure 3)."""

    PLAIN = "plain"  # nothing: not a residual network
    A = "A"  # identity; new channels are zero
    B = "B"  # identity; a 1x1 projection where the shape changes
    C = "C"  # a 1x1 projection at every block


class ChannelPad(enum.Enum):
    """Where option A puts the zero channels."""

    END = "end"  # after the old ones: the paper, the reference
    CENTRE = "centre"  # half before, half after: akamaster


class Projection(enum.Enum):
    """What a projection shortcut is made of."""

    CONV_BN = "conv_bn"
    CONV_BIAS = "conv_bias"  # the reference


class ProjectionInit(enum.Enum):
    """How a projection's kernel starts."""

    KAIMING = "kaiming"
    AVERAGE = "average"  # every weight 1 / C_in, so that it averages its input: the reference


class Stem(enum.Enum):
    """What stands before the first stage."""

    CONV_BN_RELU = "conv_bn_relu"
    CONV = "conv"  # the reference: a bare convolution


class Statistics(enum.Enum):
    """Over which images BatchNorm takes its statistics while it trains."""

    GLOBAL = "global"  # the whole batch, however many devices share it
    REPLICA = "replica"  # each device's share, as in the paper's two-GPU runs


class DType(enum.Enum):
    """Compute type. Parameters and statistics are float32, or float64 with FLOAT64."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"


class Parallel(enum.Enum):
    """How a step is spread over several devices."""

    JIT = "jit"  # one program for the whole batch, which the compiler splits
    PMAP = "pmap"  # one program per device for its share


class Dataset(enum.Enum):
    CIFAR10 = "cifar10"  # 32x32 colour photographs in 10 classes
    DIGITS = "digits"  # scikit-learn's 8x8 handwritten digits, enlarged to 32x32x3


class Preprocess(enum.Enum):
    """How pixels become numbers, by who does it so."""

    PAPER = "paper"  # 0..255, less the training set's mean image
    REFERENCE = "reference"  # 0..1, less each image's own mean of each channel
    AKAMASTER = "akamaster"  # 0..1, standardised by ImageNet's channel mean and deviation
    STANDARDIZE = "standardize"  # 0..1, standardised by the training set's own


@dataclass
class ResNetConfig:
    """A CIFAR network of the paper's section 4.2, or one of its relatives."""

    depth: int = 20
    shortcut: Shortcut = Shortcut.A
    channel_pad: ChannelPad = ChannelPad.END
    projection: Projection = Projection.CONV_BN
    projection_init: ProjectionInit = ProjectionInit.KAIMING
    stem: Stem = Stem.CONV_BN_RELU
    conv_bias: bool = False
    num_classes: int = 10
    dtype: DType = DType.FLOAT32
    batch_norm: Statistics = Statistics.GLOBAL
    scan_blocks: bool = False  # compile one block of a stage and scan over the rest
    remat: bool = False  # compute a block again for its gradient: less memory, a third more work

    @classmethod
    def paper(
        cls, depth: int = 20, shortcut: Shortcut = Shortcut.A, **overrides: Any
    ) -> "ResNetConfig":
        """The paper's network: the defaults."""
        return cls(depth=depth, shortcut=shortcut, **overrides)

    @classmethod
    def reference(
        cls, depth: int = 20, shortcut: Shortcut = Shortcut.A, **overrides: Any
    ) -> "ResNetConfig":
        """The network of the PyTorch system that this project reimplements."""
        settings: dict[str, Any] = {
            "stem": Stem.CONV,
            "conv_bias": True,
            "projection": Projection.CONV_BIAS,
            "projection_init": ProjectionInit.AVERAGE,
        }
        return cls(depth=depth, shortcut=shortcut, **(settings | overrides))

    @classmethod
    def akamaster(
        cls, depth: int = 20, shortcut: Shortcut = Shortcut.A, **overrides: Any
    ) -> "ResNetConfig":
        """The network of akamaster/pytorch_resnet_cifar10: option A pads half on each side."""
        settings: dict[str, Any] = {"channel_pad": ChannelPad.CENTRE}
        return cls(depth=depth, shortcut=shortcut, **(settings | overrides))

    def block_by_block(self) -> "ResNetConfig":
        """The same network, with every block a module of its own that stores what it computes."""
        return dataclasses.replace(self, scan_blocks=False, remat=False)

    @property
    def blocks_per_stage(self) -> int:
        """n of depth = 6n + 2."""
        return (self.depth - 2) // 6

    def validate(self) -> None:
        """Raises ConfigError unless depth is 6n + 2 with n >= 1, and num_classes >= 1."""
        if self.depth < 8 or self.depth % 6 != 2:
            raise ConfigError(
                f"model.depth must be 6n+2 (8, 20, 32, 44, 56, 110, 1202, ...), got {self.depth}"
            )
        require(self.num_classes >= 1, "model.num_classes", "at least 1", self.num_classes)


@dataclass
class DataConfig:
    """Which images, and what becomes of them before the network sees them."""

    name: Dataset = Dataset.CIFAR10
    dir: str | None = None  # of tensorflow-datasets; else $TFDS_DATA_DIR, else its own default
    preprocess: Preprocess = Preprocess.PAPER
    pad: int = 4  # zeros around a training image before the random crop; 0: no crop
    flip: bool = True
    validation: int = 0  # training examples held out; the paper's 45k/5k split: 5000

    def validate(self) -> None:
        """Raises ConfigError for negative numbers."""
        require(0 <= self.pad <= 32, "data.pad", "0 to 32 pixels", self.pad)
        require(self.validation >= 0, "data.validation", "0 or more examples", self.validation)


@dataclass
class OptimConfig:
    """SGD with momentum and a piecewise constant learning rate, in steps."""

    peak_lr: float = 0.1
    boundaries: tuple[int, ...] = (32_000, 48_000)
    decay_factor: float = 0.1
    warmup_steps: int = 0  # the paper's ResNet-110: 400
    warmup_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def validate(self) -> None:
        """Raises ConfigError for rates, factors and boundaries that make no schedule."""
        require(self.peak_lr > 0, "optim.peak_lr", "above 0", self.peak_lr)
        require(self.warmup_lr > 0, "optim.warmup_lr", "above 0", self.warmup_lr)
        require(self.decay_factor > 0, "optim.decay_factor", "above 0", self.decay_factor)
        require(0 <= self.momentum < 1, "optim.momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        require(self.warmup_steps >= 0, "optim.warmup_steps", "0 or more", self.warmup_steps)
        steps = (self.warmup_steps, *self.boundaries)
        if list(steps) != sorted(set(steps)):
            raise ConfigError(
                "optim.boundaries must rise, all after optim.warmup_steps "
                f"({self.warmup_steps}), got {self.boundaries}"
            )


@dataclass
class TrainConfig:
    """How long, in which portions, and how often to look."""

    steps: int = 64_000
    steps_per_call: int | None = None  # in one program; None: 1 on a CPU, else up to a log line
    batch_size: int = 128
    eval_batch_size: int = 1000
    log_every: int = 100
    evaluate_every: int = 1000
    checkpoint_every: int = 1000

    def validate(self) -> None:
        """Raises ConfigError unless every number is at least 1."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                require(value >= 1, f"train.{name}", "at least 1", value)


@dataclass
class Experiment:
    """Everything that decides a run's result."""

    model: ResNetConfig = field(default_factory=ResNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    parallel: Parallel = Parallel.JIT

    def validate(self) -> None:
        """Raises ConfigError at the first setting that breaks a rule."""
        self.model.validate()
        self.data.validate()
        self.optim.validate()
        self.train.validate()
        require(self.seed >= 0, "seed", "0 or more", self.seed)

    def to_dict(self) -> dict[str, Any]:
        """The experiment as JSON knows it: enums by value, tuples as lists."""

        def factory(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: v.value if isinstance(v, enum.Enum) else v for k, v in items}

        return json.loads(json.dumps(dataclasses.asdict(self, dict_factory=factory)))

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Experiment":
        """Inverse of `to_dict`. Raises ConfigError for an unknown field or value."""
        return _from_dict(cls, tree)


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raises ConfigError `name must be rule, got value` unless it holds."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def _from_dict(cls: type, tree: dict[str, Any]) -> Any:
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    unknown = sorted(tree.keys() - types.keys())
    if unknown:
        raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}")

    def parse(type_: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(type_):
            return _from_dict(type_, value)  # pyright: ignore[reportArgumentType]
        if isinstance(type_, type) and issubclass(type_, enum.Enum):
            try:
                return type_(value)
            except ValueError as e:
                raise ConfigError(
                    f"{type_.__name__} must be one of {[m.value for m in type_]}, got {value!r}"
                ) from e
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: parse(types[name], value) for name, value in tree.items()})
