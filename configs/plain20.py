"""Plain-20: ResNet-20 without its shortcuts (paper, section 4.2, figure 6 left).

python scripts/train_flax.py --config configs/plain20.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(20, Shortcut.PLAIN)
