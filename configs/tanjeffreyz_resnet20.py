"""ResNet-20 A with the network and the recipe of the PyTorch system that this project reimplements.

python scripts/train_flax.py --config configs/tanjeffreyz_resnet20.py
"""

from flax_resnet.config import Experiment, Preprocess, ResNetConfig


def get_config() -> Experiment:
    config = Experiment(model=ResNetConfig.tanjeffreyz(20))
    config.data.preprocess = Preprocess.OWN_MEAN
    config.data.flip = False
    config.train.steps = 62_560  # 160 epochs of 391 batches
    return config
