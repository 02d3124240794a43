"""ResNet-152 for ImageNet, 224 px, option B (paper, table 3: 21.43 % top-1 error, 10 crops).

python scripts/train_flax.py --config configs/imagenet152.py --config.data.dir=DIR
"""

from flax_resnet.config import Experiment
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.imagenet(152)
