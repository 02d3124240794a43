"""Plain-32: ResNet-32 without its shortcuts (paper, section 4.2, figure 6 left).

python scripts/train_flax.py --config configs/plain32.py
"""

from flax_resnet.config import Experiment, Shortcut
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.paper(32, Shortcut.PLAIN)
