"""Where the files are that come with the library: scripts/, configs/ and results/weights/.

In a checkout they lie beside the library. A wheel carries copies of them inside the package, in a
folder that `setup.py` makes.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
IN_WHEEL = (_PACKAGE / "checkout").is_dir()
ROOT = _PACKAGE / "checkout" if IN_WHEEL else _PACKAGE.parent
SCRIPTS = ROOT / "scripts"
CONFIGS = ROOT / "configs"
WEIGHTS = ROOT / "results" / "weights"

# The commands of `flax-resnet`, and the script that each one runs.
COMMANDS = {
    "train": "train_flax",
    "evaluate": "evaluate",
    "predict": "predict",
    "convert": "convert",
    "identify": "identify",
    "export": "export",
    "describe": "describe",
    "compile-for": "compile_for",
    "check-data": "check_data",
    "plot": "plot",
    "reproduce": "reproduce",
    "benchmark": "benchmark",
    "parity-report": "parity_report",
}
