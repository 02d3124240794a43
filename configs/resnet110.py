"""ResNet-110 with zero-padded shortcuts (paper, section 4.2, table 6: 6.43 % test error).

python scripts/train_flax.py --config configs/resnet110.py
"""

from flax_resnet.config import Experiment


def get_config() -> Experiment:
    config = Experiment()
    config.model.depth = 110
    # At 0.1 it hardly starts to converge, so the paper begins with 400 steps at 0.01.
    config.optim.warmup_steps = 400
    return config
