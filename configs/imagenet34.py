"""ResNet-34 for ImageNet, 224 px, option A (paper, table 2: 25.03 % top-1 error, 10 crops).

python scripts/train_flax.py --config configs/imagenet34.py --config.data.dir=DIR
"""

from flax_resnet.config import Experiment
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.imagenet(34)
