"""Plain-110: ResNet-110 without its shortcuts (paper, section 4.2: its error stays above 60 %).

python scripts/train_flax.py --config configs/plain110.py
"""

from flax_resnet.config import Experiment, Shortcut


def get_config() -> Experiment:
    config = Experiment()
    config.model.depth = 110
    config.model.shortcut = Shortcut.PLAIN
    config.optim.warmup_steps = 400  # as for ResNet-110
    return config
