"""ResNet-8 on scikit-learn's handwritten digits: no download, about a minute on two cores.

python scripts/train_flax.py --config configs/quickstart.py
"""

from flax_resnet.config import Dataset, Experiment


def get_config() -> Experiment:
    config = Experiment()
    config.model.depth = 8
    config.data.name = Dataset.DIGITS
    config.data.flip = False  # a mirrored 2 is no digit
    config.optim.boundaries = (200, 260)
    config.train.steps = 300
    config.train.log_every = 10
    config.train.evaluate_every = 50
    config.train.checkpoint_every = 50
    return config
