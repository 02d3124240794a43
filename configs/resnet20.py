"""ResNet-20 with zero-padded shortcuts (paper, section 4.2, table 6: 8.75 % test error).

python scripts/train_flax.py --config configs/resnet20.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(20, Shortcut.A)
