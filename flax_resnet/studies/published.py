"""What others published about these networks: test errors, and tanjeffreyz's test curves."""

from pathlib import Path

import numpy as np

from flax_resnet.errors import ResultsError

STEPS_PER_EPOCH = 391  # of 128 out of 50,000
PAPER, AKAMASTER, TANJEFFREYZ = "paper", "akamaster", "tanjeffreyz"
# Test errors in % on CIFAR-10. The paper's: table 6 (ResNet-110: the best of 5, whose mean is
# 6.61). akamaster's: README of github.com/akamaster/pytorch_resnet_cifar10, one run each. The
# tanjeffreyz's: its 12 published runs, last epoch, tested with BatchNorm in training mode.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    PAPER: {
        "ResNet-20 A": (8.75,),
        "ResNet-32 A": (7.51,),
        "ResNet-44 A": (7.17,),
        "ResNet-56 A": (6.97,),
        "ResNet-110 A": (6.43,),
        "ResNet-1202 A": (7.93,),
    },
    AKAMASTER: {
        "ResNet-20 A": (8.27,),
        "ResNet-32 A": (7.37,),
        "ResNet-44 A": (6.90,),
        "ResNet-56 A": (6.61,),
        "ResNet-110 A": (6.32,),
        "ResNet-1202 A": (6.18,),
    },
    TANJEFFREYZ: {
        "plain-20": (12.42,),
        "plain-32": (12.76,),
        "plain-44": (15.34,),
        "plain-56": (15.82,),
        "ResNet-20 A": (11.16,),
        "ResNet-32 A": (10.15,),
        "ResNet-44 A": (9.89,),
        "ResNet-56 A": (10.91, 9.77),
        "ResNet-20 B": (10.76,),
        "ResNet-32 B": (10.73, 10.83),
    },
}


def read_published_curves(directory: Path) -> dict[str, list[np.ndarray]]:
    """The published test curves of tanjeffreyz, by label: steps and errors in %, (2, tests) each.

    Args:
        directory: of its metrics, holding such as CifarResNet-20-R-A-DATE/test_errors.npy, whose
            rows are epochs from 0 and fractions.

    Raises:
        ResultsError: there are none.
    """
    curves: dict[str, list[np.ndarray]] = {}
    for path in sorted(directory.glob("CifarResNet-*/test_errors.npy")):
        _, depth, kind, shortcut, *_ = path.parent.name.split("-")
        name = f"plain-{depth}" if kind == "P" else f"ResNet-{depth} {shortcut}"
        epochs, errors = np.load(path)
        curves.setdefault(name, []).append(np.stack([(epochs + 1) * STEPS_PER_EPOCH, 100 * errors]))
    if not curves:
        raise ResultsError(f"{directory} has no CifarResNet-*/test_errors.npy")
    return curves
