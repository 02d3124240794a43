"""ResNet-110 with zero-padded shortcuts (paper, section 4.2, table 6: 6.43 % test error).

python scripts/train_flax.py --config configs/resnet110.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(110, Shortcut.A)
