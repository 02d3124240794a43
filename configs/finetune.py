"""Fine-tuning: the network of other weights learns the classes of a folder of images.

python scripts/train_flax.py --config configs/finetune.py --config.init=FILE --config.data.dir=DIR
"""

from flax_resnet.config import Experiment
from flax_resnet.studies import recipes


def get_config() -> Experiment:
    return recipes.finetune()
