"""Plain-44: ResNet-44 without its shortcuts (paper, section 4.2, figure 6 left).

python scripts/train_flax.py --config configs/plain44.py
"""

from flax_resnet.config import Experiment, Shortcut


def get_config() -> Experiment:
    config = Experiment()
    config.model.depth = 44
    config.model.shortcut = Shortcut.PLAIN
    return config
