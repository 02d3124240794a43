"""ResNet-44 with zero-padded shortcuts (paper, section 4.2, table 6: 7.17 % test error).

python scripts/train_flax.py --config configs/resnet44.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(44, Shortcut.A)
