"""torchvision's ResNet-152 and its recipe for ImageNet (its V1: 21.69 % top-1 error, 1 crop).

python scripts/train_flax.py --config configs/torchvision152.py --config.data.dir=DIR
"""

from flax_resnet.config import Experiment
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.torchvision(152)
