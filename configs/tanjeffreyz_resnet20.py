"""ResNet-20 A with the network and the recipe of tanjeffreyz/deep-residual-learning.

python scripts/train_flax.py --config configs/tanjeffreyz_resnet20.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.tanjeffreyz(20, Shortcut.A)
