"""torchvision's ResNet-50 and its recipe for ImageNet (its V1: 23.87 % top-1 error, 1 crop).

python scripts/train_flax.py --config configs/torchvision50.py --config.data.dir=DIR
"""

from flax_resnet.config import Experiment
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.torchvision(50)
