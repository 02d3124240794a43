"""Plain-110: ResNet-110 without its shortcuts (paper, section 4.2: its error stays above 60 %).

python scripts/train_flax.py --config configs/plain110.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(110, Shortcut.PLAIN)
