"""ResNet-56 with zero-padded shortcuts (paper, section 4.2, table 6: 6.97 % test error).

python scripts/train_flax.py --config configs/resnet56.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(56, Shortcut.A)
