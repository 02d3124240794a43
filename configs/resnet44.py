"""ResNet-44 with zero-padded shortcuts (paper, section 4.2, table 6: 7.17 % test error).

python scripts/train_flax.py --config configs/resnet44.py
"""

from flax_resnet.config import Experiment


def get_config() -> Experiment:
    config = Experiment()
    config.model.depth = 44
    return config
