"""Deep residual learning (He et al. 2015) in JAX, checked against PyTorch."""

from flax_resnet.config import Experiment as Experiment
from flax_resnet.config import ResNetConfig as ResNetConfig
from flax_resnet.config import Shortcut as Shortcut
from flax_resnet.data import Batch as Batch
from flax_resnet.loop import fit as fit
from flax_resnet.pretrained import load_pretrained as load_pretrained
from flax_resnet.resnet import BasicBlock as BasicBlock
from flax_resnet.resnet import ResNet as ResNet
from flax_resnet.torch_files import from_torch as from_torch
from flax_resnet.torch_files import to_torch as to_torch
from flax_resnet.torch_layouts import Layout as Layout
from flax_resnet.train import TrainState as TrainState
from flax_resnet.train import eval_step as eval_step
from flax_resnet.train import train_step as train_step
