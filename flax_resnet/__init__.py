"""Deep residual learning (He et al. 2015) in JAX, checked against PyTorch."""

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
