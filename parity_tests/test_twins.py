"""Claim: a file and its PyTorch twin have the same classes, attributes, functions and arguments.

In the same order, so that they can be laid side by side; but for what ONE_SIDED names, with the
reason. Both are read as syntax trees, not imported.
"""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TWINS = {
    "resnet": ("flax_resnet/resnet.py", "torch_ref/resnet.py"),
    "optim": ("flax_resnet/optim.py", "torch_ref/optim.py"),
    "step": ("flax_resnet/step.py", "torch_ref/step.py"),
    "pixels": ("flax_resnet/data/pixels.py", "torch_ref/pixels.py"),
}
FRAMEWORK = {"self", "cls", "rngs"}  # arguments that are the framework's own
SAME = {"forward": "__call__"}
HELD = "a PyTorch optimizer holds its parameters, and a schedule its optimizer"
STATE = "PyTorch's modules hold their arrays; in JAX they are a tree beside a static program"
LOG = "sums over a log's steps, which ours keeps on the device"
ONE_SIDED = {  # and why; a class or function stands for all that is in it
    "resnet": {
        "ResNet.remat": "the twin never computes a block again",
        "Identity": "PyTorch has one",
        "compute_dtype": "in PyTorch bfloat16 is autocast's business",
        "split": STATE,
        "abstract": STATE,
        "kaiming_normal": "fills a layer that is made; ours is an initializer given to the layer",
        "bias_init": "how PyTorch's layers start by themselves, or zero",
        "zero_bias": "what bias_init gives to a layer that is to be made",
    },
    "optim": {
        "make_schedule.optimizer": HELD,
        "linear": "PyTorch has one",
        "cosine": "PyTorch has one",
        "fraction": "likewise",
        "make_optimizer.steps": HELD,
        "make_optimizer.params": HELD,
        "make_optimizer.frozen": "PyTorch's parameters say themselves that they need no gradient",
        "make_optimizer.head": "a group of PyTorch's parameters; ours are told by their names",
    },
    "step": {
        "Metrics.zeros": LOG,
        "Metrics.plus": LOG,
        "Metrics.mean": LOG,
        "TrainState.step": "PyTorch's schedule counts",
        "TrainState.params": STATE,
        "TrainState.batch_stats": STATE,
        "TrainState.opt_state": STATE,
        "TrainState.metrics": LOG,
        "TrainState.model": STATE,
        "TrainState.optimizer": STATE,
        "TrainState.schedule": HELD,
        "TrainState.label_smoothing": "ours has it in the Program",
        "TrainState.accumulate": "likewise",
        "TrainState.frozen": "ours has it in the Program",
        "check_frozen": "the twin is given what ours has checked",
        "with_frozen": "PyTorch's requires_grad_ and eval",
        "Program": STATE,
        "key_of": "PyTorch's generator takes a seed of 64 bits as it is",
        "init.num_devices": "the twin has one device",
        "train_step.program": STATE,
        "accumulated_gradient": "PyTorch adds up gradients by itself",
        "eval_step.program": STATE,
        "eval_step.params": STATE,
        "eval_step.batch_stats": STATE,
        "eval_step.model": STATE,
    },
    "pixels": {
        "slice_each": "how a CPU is told to crop",
        "select_shifted": "how a TPU is told to crop",
        "Normalization": "made once, from NumPy's arrays, for both",
        "make_normalization": "likewise",
        "normalize.constants": "the fields of a Normalization, which the twin takes one by one",
        "normalize.scale": "likewise",
        "normalize.mean": "likewise",
        "normalize.std": "likewise",
        "table": "what PyTorch's quotients are, to the bit; XLA would rewrite them",
        "Seen": "images on their way to the compiled step",
        "Streamed": "likewise",
        "streamed_batch": "runs within the compiled step; PyTorch is given the images",
        "shift_colours.constants": "the fields of a Normalization, which the twin takes one by one",
        "shift_colours.scale": "likewise",
        "shift_colours.std": "likewise",
        "training_batch": "gathers within the compiled step; PyTorch is given the images",
        "evaluation_batch": "likewise",
    },
}


def names(path: Path) -> list[str]:
    """Such as "ResNet", "ResNet.conv1" (an attribute), "ResNet.head", "ResNet.head.x"."""
    return list(outline(ast.parse(path.read_text()).body, ""))


def outline(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        match node:
            case ast.ClassDef(name=name):
                yield prefix + name
                yield from outline(node.body, f"{prefix}{name}.")
            case ast.FunctionDef(name="__init__"):
                yield from arguments(node, f"{prefix}__init__.")
                yield from attributes(node, prefix)
            case ast.FunctionDef(name=name) if not name.startswith("_") or name == "__call__":
                yield prefix + SAME.get(name, name)
                yield from arguments(node, f"{prefix}{SAME.get(name, name)}.")
            case ast.AnnAssign(target=ast.Name(id=name)) if prefix:  # a NamedTuple's field
                yield prefix + name


def arguments(node: ast.FunctionDef, prefix: str) -> Iterator[str]:
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return (prefix + argument.arg for argument in given if argument.arg not in FRAMEWORK)


def attributes(node: ast.FunctionDef, prefix: str) -> Iterator[str]:
    """What `__init__` makes of `self`, each once."""
    found = {
        target.attr: None
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (
            statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        )
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }
    return (prefix + name for name in found if not name.startswith("_"))


@pytest.mark.parametrize("twins", TWINS)
def test_twins_have_the_same_outline(twins: str) -> None:
    ours, theirs = (names(ROOT / path) for path in TWINS[twins])
    one_sided = ONE_SIDED[twins]
    assert without(ours, one_sided) == without(theirs, one_sided)
    for name in one_sided:
        assert (name in ours) != (name in theirs), f"{name} is no exception"


def without(outline: list[str], exceptions: Collection[str]) -> list[str]:
    within = tuple(f"{name}." for name in exceptions)
    return [x for x in outline if x not in exceptions and not x.startswith(within)]
