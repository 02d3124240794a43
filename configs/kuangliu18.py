"""kuangliu/pytorch-cifar's ResNet-18: ImageNet's stages on CIFAR-10, with the paper's recipe.

python scripts/train_flax.py --config configs/kuangliu18.py
"""

from flax_resnet.config import Experiment, ResNetConfig


def get_config() -> Experiment:
    return Experiment(model=ResNetConfig.kuangliu(18))
