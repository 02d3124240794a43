"""What an experiment is made of. Every default is the paper's (arXiv:1512.03385, section 4.2).

A field takes values of its own type only (`settings.py`). What else must hold, of a value or of
several together, `validate` says; since fields may be assigned one after another, it is called by
whoever consumes them.
"""

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any

from flax_resnet import data_config
from flax_resnet.data_config import SIDE
from flax_resnet.data_config import Crop as Crop
from flax_resnet.data_config import DataConfig as DataConfig
from flax_resnet.data_config import Dataset as Dataset
from flax_resnet.data_config import Interpolation as Interpolation
from flax_resnet.data_config import Placement as Placement
from flax_resnet.data_config import Preprocess as Preprocess
from flax_resnet.errors import ConfigError
from flax_resnet.settings import Settings, as_given, from_mapping, require, require_float32


class Shortcut(enum.Enum):
    """What carries x past the residual function (paper, section 3.3 and figure 3)."""

    PLAIN = "plain"  # nothing: not a residual network
    A = "A"  # identity; new channels are zero
    B = "B"  # identity; a 1x1 projection where the shape changes
    C = "C"  # a 1x1 projection at every block


class ChannelPad(enum.Enum):
    """Where option A puts the zero channels."""

    END = "end"  # after the old ones: the paper, tanjeffreyz
    CENTRE = "centre"  # half before, half after: akamaster


class Projection(enum.Enum):
    """What a projection shortcut is made of."""

    CONV_BN = "conv_bn"
    CONV_BIAS = "conv_bias"  # tanjeffreyz


class Init(enum.Enum):
    """How 3x3 convolutions and the classifier start."""

    KAIMING = "kaiming"  # every kernel normal, of deviation sqrt(2 / fan in); every bias zero
    TORCH = "torch"  # 3x3 kernels likewise, all else as PyTorch's layers start: tanjeffreyz


class ProjectionInit(enum.Enum):
    """How a projection's kernel starts."""

    KAIMING = "kaiming"
    AVERAGE = "average"  # every weight 1 / C_in, so that it averages its input: tanjeffreyz


class Stem(enum.Enum):
    """What stands before the first stage."""

    CONV_BN_RELU = "conv_bn_relu"
    CONV = "conv"  # tanjeffreyz: a bare convolution
    CONV7_BN_RELU_POOL = "conv7_bn_relu_pool"  # 7x7 and a max-pool, of stride 2 each: ImageNet's
    CONV7_POOL = "conv7_pool"  # tanjeffreyz's for ImageNet: without BatchNorm and ReLU


TANJEFFREYZ_STEMS = (Stem.CONV, Stem.CONV7_POOL)


class Stages(enum.Enum):
    """The paper's two kinds of network, which say what a depth means."""

    CIFAR = "cifar"  # section 4.2: three stages of 16, 32, 64 channels; depth 6n + 2
    IMAGENET = "imagenet"  # table 1: four of 64, 128, 256, 512; depth 18, 34, 50, 101 or 152


class Block(enum.Enum):
    """What a stage is made of (paper, figure 5)."""

    BASIC = "basic"  # two 3x3 convolutions
    BOTTLENECK = "bottleneck"  # 1x1, 3x3 and 1x1, the last with four times the channels


class Stride(enum.Enum):
    """Which convolution of a bottleneck halves the image where a stage begins."""

    CONV1X1 = "conv1x1"  # the first: the paper
    CONV3X3 = "conv3x3"  # the second: torchvision, timm, kuangliu


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


class Schedule(enum.Enum):
    """How the learning rate goes on after the warm-up."""

    PIECEWISE = "piecewise"  # peak_lr, times decay_factor at each of boundaries: the paper
    COSINE = "cosine"  # from peak_lr down half a cosine, to reach final_lr after the last step


class Warmup(enum.Enum):
    """What the learning rate does in the warm-up."""

    CONSTANT = "constant"  # stays at warmup_lr: the paper
    LINEAR = "linear"  # rises by equal steps from warmup_lr to peak_lr


STEM = "stem"  # for what a network has before its first stage: conv1, and bn1 where there is one


def written_out(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of modules, without the name `stem`."""
    return tuple(part for name in names for part in (("conv1", "bn1") if name == STEM else (name,)))


WIDTHS = {Stages.CIFAR: (16, 32, 64), Stages.IMAGENET: (64, 128, 256, 512)}
# Blocks of each stage by depth (paper, table 1).
TABLE_1 = {
    18: (Block.BASIC, (2, 2, 2, 2)),
    34: (Block.BASIC, (3, 4, 6, 3)),
    50: (Block.BOTTLENECK, (3, 4, 6, 3)),
    101: (Block.BOTTLENECK, (3, 4, 23, 3)),
    152: (Block.BOTTLENECK, (3, 8, 36, 3)),
}


def stages_of(stages: Stages, depth: int) -> tuple[Block, tuple[int, ...], tuple[int, ...]]:
    """The kind of block, and the widths and numbers of blocks of the stages.

    Args:
        depth: one that there is.
    """
    if stages is Stages.IMAGENET:
        block, blocks = TABLE_1[depth]
        return block, WIDTHS[stages], blocks
    return Block.BASIC, WIDTHS[stages], ((depth - 2) // 6,) * 3


# Numbers beyond these would silently become others.
LAST_STEP = 2**31 - 1  # steps, errors and images are counted in int32
MOST_IMAGES = 2**24  # of a batch: float32, which divides the loss, has all integers to here
MOST_SUMMANDS = 2**16  # of a sum in float32: 2^18 equal ones are 0.2 % off, as many 0.01 %
ROUNDED_TO_1 = 1 - 2**-25  # by float32


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint fixes of a network: enough to build it around the checkpoint's arrays.

    How the network is computed (compute type, scan, rematerialisation) and how its weights began
    are no part of it.
    """

    image_channels: int
    stem: Stem
    block: Block
    widths: tuple[int, ...]  # of each stage: channels of a block's 3x3 convolutions
    blocks: tuple[int, ...]  # of each stage
    stride: Stride | None  # None: its blocks are no bottlenecks
    shortcut: Shortcut
    channel_pad: ChannelPad
    projection: Projection
    conv_bias: bool
    batch_norm_epsilon: float
    num_classes: int


@dataclass
class ResNetConfig(Settings, group="model"):
    """A network of the paper, or one of its relatives."""

    depth: int = 20
    shortcut: Shortcut = Shortcut.A
    stages: Stages = Stages.CIFAR
    channel_pad: ChannelPad = ChannelPad.END
    projection: Projection = Projection.CONV_BN
    projection_init: ProjectionInit = ProjectionInit.KAIMING
    init: Init = Init.KAIMING
    stem: Stem = Stem.CONV_BN_RELU
    stride: Stride = Stride.CONV1X1  # of bottlenecks alone
    conv_bias: bool = False
    batch_norm_epsilon: float = 1e-5  # added to a variance; the paper has no number: PyTorch's
    batch_norm_momentum: float = 0.1  # a new batch's weight in the running statistics: PyTorch's
    image_channels: int = 3
    num_classes: int = 10
    dtype: DType = DType.FLOAT32
    scan_blocks: bool = False  # compile one block of a stage and scan over the rest
    remat: bool = False  # compute a block again for its gradient: less memory, a third more work

    @classmethod
    def paper(
        cls, depth: int = 20, shortcut: Shortcut = Shortcut.A, **overrides: Any
    ) -> "ResNetConfig":
        """The paper's network: the defaults."""
        return cls(depth=depth, shortcut=shortcut, **overrides)

    @classmethod
    def imagenet(
        cls, depth: int = 50, shortcut: Shortcut = Shortcut.B, **overrides: Any
    ) -> "ResNetConfig":
        """The paper's network for ImageNet (table 1), with option B, as its deeper ones have.

        A bottleneck's first 1x1 convolution has the stride. torchvision's networks are these with
        `stride=Stride.CONV3X3`.
        """
        settings: dict[str, Any] = {
            "stages": Stages.IMAGENET,
            "stem": Stem.CONV7_BN_RELU_POOL,
            "num_classes": 1000,
        }
        return cls(depth=depth, shortcut=shortcut, **(settings | overrides))

    @classmethod
    def kuangliu(
        cls, depth: int = 18, shortcut: Shortcut = Shortcut.B, **overrides: Any
    ) -> "ResNetConfig":
        """The network of kuangliu/pytorch-cifar: ImageNet's stages behind a stem for 32x32."""
        settings: dict[str, Any] = {"stages": Stages.IMAGENET, "stride": Stride.CONV3X3}
        return cls(depth=depth, shortcut=shortcut, **(settings | overrides))

    @classmethod
    def tanjeffreyz(
        cls, depth: int = 20, shortcut: Shortcut = Shortcut.A, **overrides: Any
    ) -> "ResNetConfig":
        """The network of the PyTorch system that this project reimplements.

        With `stages=Stages.IMAGENET` its ImageNetResNet, whose images have one channel.
        """
        is_large = overrides.get("stages") is Stages.IMAGENET
        settings: dict[str, Any] = {
            "stem": Stem.CONV7_POOL if is_large else Stem.CONV,
            "image_channels": 1 if is_large else 3,
            "num_classes": 1000 if is_large else 10,
            "conv_bias": True,
            "projection": Projection.CONV_BIAS,
            "projection_init": ProjectionInit.AVERAGE,
            "init": Init.TORCH,
        }
        return cls(depth=depth, shortcut=shortcut, **(settings | overrides))

    @classmethod
    def akamaster(
        cls, depth: int = 20, shortcut: Shortcut = Shortcut.A, **overrides: Any
    ) -> "ResNetConfig":
        """The network of akamaster/pytorch_resnet_cifar10: option A pads half on each side."""
        settings: dict[str, Any] = {"channel_pad": ChannelPad.CENTRE}
        return cls(depth=depth, shortcut=shortcut, **(settings | overrides))

    @classmethod
    def of(cls, architecture: Architecture, **overrides: Any) -> "ResNetConfig":
        """The config of a network that is there already.

        Args:
            overrides: what no architecture tells: how it is computed, how its weights began.

        Raises:
            ConfigError: no config has such stages.
        """
        stages = architecture.block, architecture.widths, architecture.blocks
        rows = [(Stages.CIFAR, 2 + 2 * sum(architecture.blocks))]
        rows += [(Stages.IMAGENET, depth) for depth in TABLE_1]
        found = [row for row in rows if stages_of(*row) == stages]
        if not found:
            raise ConfigError(
                "a network must have equally many blocks in three stages of "
                f"{WIDTHS[Stages.CIFAR]} channels, basic ones, or the stages of ResNet-18, 34, 50, "
                f"101 or 152, got {stages[2]} {stages[0].value} blocks of {stages[1]} channels"
            )
        average = architecture.projection is Projection.CONV_BIAS
        usual: dict[str, Any] = {
            "projection_init": ProjectionInit.AVERAGE if average else ProjectionInit.KAIMING,
            "init": Init.TORCH if architecture.stem in TANJEFFREYZ_STEMS else Init.KAIMING,
        }
        if architecture.stride is not None:
            usual["stride"] = architecture.stride
        return cls(
            depth=found[0][1],
            stages=found[0][0],
            shortcut=architecture.shortcut,
            channel_pad=architecture.channel_pad,
            projection=architecture.projection,
            stem=architecture.stem,
            conv_bias=architecture.conv_bias,
            batch_norm_epsilon=architecture.batch_norm_epsilon,
            image_channels=architecture.image_channels,
            num_classes=architecture.num_classes,
            **(usual | overrides),
        )

    def block_by_block(self) -> "ResNetConfig":
        """The same network, with every block a module of its own that stores what it computes."""
        return dataclasses.replace(self, scan_blocks=False, remat=False)

    @property
    def architecture(self) -> Architecture:
        """What of this a checkpoint fixes. Raises ConfigError if there is no such network."""
        self.validate()
        block, widths, blocks = stages_of(self.stages, self.depth)
        return Architecture(
            image_channels=self.image_channels,
            stem=self.stem,
            block=block,
            widths=widths,
            blocks=blocks,
            stride=self.stride if block is Block.BOTTLENECK else None,
            shortcut=self.shortcut,
            channel_pad=self.channel_pad,
            projection=self.projection,
            conv_bias=self.conv_bias,
            batch_norm_epsilon=self.batch_norm_epsilon,
            num_classes=self.num_classes,
        )

    @property
    def label(self) -> str:
        """Such as "plain-20", "ResNet-20 B, 1/C_in" or "ResNet-20 A (tanjeffreyz)"."""
        plain = self.shortcut is Shortcut.PLAIN
        name = f"plain-{self.depth}" if plain else f"ResNet-{self.depth} {self.shortcut.value}"
        if self.shortcut in (Shortcut.B, Shortcut.C):
            average = self.projection_init is ProjectionInit.AVERAGE
            if average != (self.projection is Projection.CONV_BIAS):  # tanjeffreyz's usual
                name += ", 1/C_in" if average else ", Kaiming"
        if self.stem in TANJEFFREYZ_STEMS:
            name += " (tanjeffreyz)"
        elif self.shortcut is Shortcut.A and self.channel_pad is ChannelPad.CENTRE:
            name += " (akamaster)"
        return name

    def validate(self) -> None:
        """Raises ConfigError unless there is such a network.

        Nor may it be so large that the network of a stranger's config.json takes all memory.
        """
        if self.stages is Stages.CIFAR:
            depths = "6n+2 (8, 20, 32, 44, 56, 110, 1202, ...)"
            is_known = self.depth >= 8 and self.depth % 6 == 2
        else:
            *most, last = map(str, TABLE_1)
            depths = f"{', '.join(most)} or {last}"
            is_known = self.depth in TABLE_1
        require(is_known, "model.depth", depths, self.depth)
        require(self.depth <= 10_000, "model.depth", "at most 10000", self.depth)
        require_float32(self)
        epsilon, momentum = self.batch_norm_epsilon, self.batch_norm_momentum
        require(epsilon > 0, "model.batch_norm_epsilon", "above 0", epsilon)
        require(0 < momentum <= 1, "model.batch_norm_momentum", "above 0, at most 1", momentum)
        require(self.image_channels >= 1, "model.image_channels", "at least 1", self.image_channels)
        require(self.num_classes >= 1, "model.num_classes", "at least 1", self.num_classes)
        is_some = self.num_classes <= 100_000
        require(is_some, "model.num_classes", "at most 100000", self.num_classes)


@dataclass
class OptimConfig(Settings, group="optim"):
    """SGD with momentum, and a learning rate that changes with the step."""

    schedule: Schedule = Schedule.PIECEWISE
    peak_lr: float = 0.1
    boundaries: tuple[int, ...] = (32_000, 48_000)  # of a piecewise schedule, in steps
    decay_factor: float = 0.1  # of a piecewise schedule
    final_lr: float = 0.0  # of a cosine schedule
    warmup: Warmup = Warmup.CONSTANT
    warmup_steps: int = 0  # the paper's ResNet-110: 400
    warmup_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    # rate of everything but the classifier fc, as a multiple of fc's, which is the schedule's
    body_lr_factor: float = 1.0

    def validate(self, steps: int | None = None) -> None:
        """Raises ConfigError for rates, factors and boundaries that make no schedule.

        Args:
            steps: of the whole run, if they are known.
        """
        require_float32(self)
        require(self.peak_lr > 0, "optim.peak_lr", "above 0", self.peak_lr)
        require(self.warmup_lr > 0, "optim.warmup_lr", "above 0", self.warmup_lr)
        require(self.decay_factor > 0, "optim.decay_factor", "above 0", self.decay_factor)
        require(0 <= self.momentum < 1, "optim.momentum", "in [0, 1)", self.momentum)
        is_below = self.momentum < ROUNDED_TO_1
        require(is_below, "optim.momentum", "below 1 in float32, too", self.momentum)
        require(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        factor, rule = self.body_lr_factor, "above 0 (what is not to learn at all is train.frozen)"
        require(factor > 0, "optim.body_lr_factor", rule, factor)
        require(self.warmup_steps >= 0, "optim.warmup_steps", "0 or more", self.warmup_steps)
        rule = f"0 to optim.peak_lr ({self.peak_lr})"
        require(0 <= self.final_lr <= self.peak_lr, "optim.final_lr", rule, self.final_lr)
        if self.schedule is Schedule.COSINE:
            rule = f"below train.steps ({steps}) with optim.schedule=cosine"
            is_shorter = steps is None or self.warmup_steps < steps
            require(is_shorter, "optim.warmup_steps", rule, self.warmup_steps)
            return
        rule = "0 without optim.schedule=cosine"
        require(self.final_lr == 0, "optim.final_lr", rule, self.final_lr)
        before = (self.warmup_steps, *self.boundaries)
        if list(before) != sorted(set(before)):
            raise ConfigError(
                "optim.boundaries must rise, all after optim.warmup_steps "
                f"({self.warmup_steps}), got {self.boundaries}"
            )
        name = "optim.boundaries" if self.boundaries else "optim.warmup_steps"
        require(before[-1] <= LAST_STEP, name, f"at most {LAST_STEP}", before[-1])


@dataclass
class TrainConfig(Settings, group="train"):
    """How long, in which portions, and how often to look."""

    steps: int = 64_000
    steps_per_call: int | None = None  # in one program; None: 1 on a CPU, else up to a log line
    batch_size: int = 128  # images of a step
    accumulate: int = 1  # equal micro-batches that a batch is divided into, to need less memory
    label_smoothing: float = 0.0  # part of a label that is spread evenly over all classes
    eval_batch_size: int | None = None  # None: 1000 of 32 pixels, 128 of larger images
    log_every: int = 100
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    frozen: tuple[str, ...] = ()  # modules that do not train: stem, stages.0, stages.1.2, ...

    def validate(self) -> None:
        """Raises ConfigError for numbers out of range, or too large to count, and unequal parts."""
        require_float32(self)
        smoothing, rule = self.label_smoothing, "in [0, 1)"
        require(0 <= smoothing < 1, "train.label_smoothing", rule, smoothing)
        rule = "below 1 in float32, too"
        require(smoothing < ROUNDED_TO_1, "train.label_smoothing", rule, smoothing)
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int):
                require(value >= 1, f"train.{name}", "at least 1", value)
        require(self.steps <= LAST_STEP, "train.steps", f"at most {LAST_STEP}", self.steps)
        for name in ("batch_size", "eval_batch_size"):
            value = getattr(self, name)
            is_some = value is None or value <= MOST_IMAGES
            require(is_some, f"train.{name}", f"at most {MOST_IMAGES}", value)
        # What a line of the log sums up, when there are so many steps.
        most = min(MOST_SUMMANDS, LAST_STEP // self.batch_size)
        rule = f"at most {most}, over which a line of the log can be summed"
        require(min(self.log_every, self.steps) <= most, "train.log_every", rule, self.log_every)
        rule = f"a divisor of train.batch_size ({self.batch_size})"
        is_divisor = self.batch_size % self.accumulate == 0
        require(is_divisor, "train.accumulate", rule, self.accumulate)


@dataclass
class Experiment(Settings):
    """Everything that decides a run's result."""

    model: ResNetConfig = field(default_factory=ResNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    init: str | None = None  # whose weights to begin with: a run, a file, or a name; None: new ones
    init_fresh: tuple[str, ...] = ()  # modules that keep their new weights: fc, the classifier
    # the network, and how it sees images, is that of init, with a classifier for these classes
    init_model: bool = False
    parallel: Parallel = Parallel.JIT
    batch_norm: Statistics = Statistics.GLOBAL
    wandb: str | None = None  # project of Weights & Biases that the log is sent to as well

    def validate(self) -> None:
        """Raises ConfigError at the first setting that breaks a rule."""
        self.model.validate()
        self.data.validate()
        self.train.validate()
        self.optim.validate(self.train.steps)
        require(0 <= self.seed < 2**63, "seed", "0 to 2^63 - 1", self.seed)
        require(self.init != "", "init", "a work directory, a file or a name", self.init)
        rule = "empty without init, beside which all weights are new"
        is_beside = self.init is not None or self.init_model or not self.init_fresh
        require(is_beside, "init_fresh", rule, self.init_fresh)
        require(self.wandb != "", "wandb", "a project's name, or none", self.wandb)

    @property
    def eval_batch_size(self) -> int:
        """Images that an evaluation sees at once."""
        return self.train.eval_batch_size or (1000 if self.data.side <= SIDE else 128)

    def require_given(self) -> None:
        """Raises ConfigError unless it says which images and which weights, where it must.

        `validate` does not ask for them: a config file may leave them to the command line.
        """
        self.data.require_given()
        rule = "given with init_model: a work directory, a file or a name of published weights"
        require(self.init is not None or not self.init_model, "init", rule, self.init)

    def idle(self) -> dict[str, str]:
        """By path, the settings that change nothing beside the others, and why."""
        found: dict[str, str] = {}
        if self.init_model:
            taken = [f"model.{f.name}" for f in dataclasses.fields(self.model)]
            why = "with init_model the network is that of init"
            found |= {path: why for path in taken if path not in OF_THE_RUN}
        shortcut = self.model.shortcut
        if shortcut is not Shortcut.A:
            found["model.channel_pad"] = "only shortcut A pads channels"
        if shortcut not in (Shortcut.B, Shortcut.C):
            why = f"shortcut {shortcut.value} has no projections"
            found |= dict.fromkeys(("model.projection", "model.projection_init"), why)
        if stages_of(self.model.stages, self.model.depth)[0] is not Block.BOTTLENECK:
            found["model.stride"] = f"a network of depth {self.model.depth} has no bottlenecks"
        found |= self.data.idle()
        if self.optim.schedule is Schedule.COSINE:
            why = "optim.schedule is cosine"
            found |= dict.fromkeys(("optim.boundaries", "optim.decay_factor"), why)
        elif not self.optim.boundaries:
            found["optim.decay_factor"] = "there are no optim.boundaries"
        if not self.optim.warmup_steps:
            why = "optim.warmup_steps is 0"
            found |= dict.fromkeys(("optim.warmup", "optim.warmup_lr"), why)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The experiment as JSON knows it: enums by value, tuples as lists."""

        def factory(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: as_given(v) for k, v in items}

        return json.loads(json.dumps(dataclasses.asdict(self, dict_factory=factory)))

    @classmethod
    def from_dict(cls, tree: Any) -> "Experiment":
        """Inverse of `to_dict`, also of earlier versions'.

        Raises:
            ConfigError: an unknown field, or a value that it cannot have.
        """
        require(isinstance(tree, dict), "an experiment", "a dictionary", tree)
        return from_mapping(cls, upgrade(tree))


# Settings of the network that are the run's own where the network is that of other weights.
OF_THE_RUN = ("model.batch_norm_momentum", "model.dtype", "model.remat", "model.scan_blocks")

# Settings that decide how a run is computed and told, and nothing of its numbers: it may go on with
# others. (A scan and rematerialisation change nothing to the bit: parity_tests/test_scan.py.)
INCIDENTAL = (
    *data_config.INCIDENTAL,
    "model.remat",
    "model.scan_blocks",
    "train.checkpoint_every",
    "train.eval_batch_size",
    "train.evaluate_every",
    "train.log_every",
    "train.steps_per_call",
    "wandb",
)

# Settings that decide the learning rate of each step, and how many there are: a run may go on with
# others where the rates of the steps that are done would have been the same.
SCHEDULE = (
    "optim.boundaries",
    "optim.decay_factor",
    "optim.final_lr",
    "optim.peak_lr",
    "optim.schedule",
    "optim.warmup",
    "optim.warmup_lr",
    "optim.warmup_steps",
    "train.steps",
)

# Version 0.1 named a preprocessing by who does it so.
PREPROCESS_0_1 = {"paper": "mean_image", "reference": "own_mean", "akamaster": "imagenet"}


def upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of an experiment as today's fields have it, from that of any version."""
    tree = whole(tree, levels=3)  # experiment, group, list of numbers
    model, data = tree.get("model"), tree.get("data")
    if isinstance(model, dict) and "batch_norm" in model:
        tree["model"] = {name: value for name, value in model.items() if name != "batch_norm"}
        tree.setdefault("batch_norm", model["batch_norm"])
    if isinstance(data, dict) and isinstance(data.get("preprocess"), str):
        name = data["preprocess"]
        tree["data"] = data | {"preprocess": PREPROCESS_0_1.get(name, name)}
    if isinstance(data, dict) and data.get("dir") == "":  # which was the default
        tree["data"] = tree["data"] | {"dir": None}
    train = tree.get("train")
    if isinstance(train, dict) and isinstance(train.get("steps"), int):
        # "For ever" and "never", in numbers that could not be counted.
        largest = {"steps": LAST_STEP}
        if train["steps"] > MOST_SUMMANDS and isinstance(train.get("log_every"), int):
            largest["log_every"] = MOST_SUMMANDS
        tree["train"] = train | {name: min(train[name], x) for name, x in largest.items()}
    return tree


def whole(tree: Any, levels: int) -> Any:
    """A JSON tree with 4 in the place of 4.0: earlier versions stored what they were given."""
    if isinstance(tree, dict) and levels:
        return {name: whole(value, levels - 1) for name, value in tree.items()}
    if isinstance(tree, list) and levels:
        return [whole(value, levels - 1) for value in tree]
    return int(tree) if isinstance(tree, float) and tree.is_integer() else tree
