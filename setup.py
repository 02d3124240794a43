"""What pyproject.toml cannot say: files of the checkout that a wheel carries inside the package.

They are copied to flax_resnet/checkout/, where `flax_resnet/shipped.py` looks for them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PATTERNS = (
    "scripts/*.py",
    "configs/*.py",
    "results/weights/*.safetensors",
    "results/weights/*.json",
)
# These need scripts/faults and parity_tests, which are for the project alone.
NOT_SHIPPED = ("scripts/torture.py", "scripts/mutation.py")


class BuildPy(build_py):
    """Setuptools' own, and then the copies. An editable install has the checkout and needs none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in shipped():
                target = Path(self.build_lib, "flax_resnet", "checkout", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(ROOT / name), str(target))

    def get_source_files(self) -> list[str]:
        """Also for the source distribution, from which a wheel may be built."""
        return [*super().get_source_files(), *shipped()]


def shipped() -> list[str]:
    paths = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return [name for name in names if name not in NOT_SHIPPED]


setup(cmdclass={"build_py": BuildPy})
