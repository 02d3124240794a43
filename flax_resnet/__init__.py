"""Deep residual learning (He et al. 2015) in JAX, checked against PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time each name is imported when asked for
    from flax_resnet.config import Experiment as Experiment
    from flax_resnet.config import ResNetConfig as ResNetConfig
    from flax_resnet.config import Shortcut as Shortcut
    from flax_resnet.data.pixels import Batch as Batch
    from flax_resnet.resnet import BasicBlock as BasicBlock
    from flax_resnet.resnet import ResNet as ResNet
    from flax_resnet.step import TrainState as TrainState
    from flax_resnet.step import eval_step as eval_step
    from flax_resnet.step import train_step as train_step
    from flax_resnet.training.loop import fit as fit
    from flax_resnet.weights.files import from_torch as from_torch
    from flax_resnet.weights.files import to_torch as to_torch
    from flax_resnet.weights.layouts import Layout as Layout
    from flax_resnet.weights.pretrained import load_pretrained as load_pretrained

# The public names and their modules. `fit` alone needs Orbax and TensorFlow Datasets, which cost
# as long to import as JAX does.
_MODULES = {
    "BasicBlock": "resnet",
    "Batch": "data.pixels",
    "Experiment": "config",
    "Layout": "weights.layouts",
    "ResNet": "resnet",
    "ResNetConfig": "config",
    "Shortcut": "config",
    "TrainState": "step",
    "eval_step": "step",
    "fit": "training.loop",
    "from_torch": "weights.files",
    "load_pretrained": "weights.pretrained",
    "to_torch": "weights.files",
    "train_step": "step",
}

__all__ = [
    "BasicBlock",
    "Batch",
    "Experiment",
    "Layout",
    "ResNet",
    "ResNetConfig",
    "Shortcut",
    "TrainState",
    "eval_step",
    "fit",
    "from_torch",
    "load_pretrained",
    "to_torch",
    "train_step",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
