"""Claim: imports point one way, and neither PyTorch nor the tests are needed by the library.

Every import in the source counts, also one within a function, but where it says "at module level".
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

# What stands on a floor imports what stands below it, and nothing beside it.
FLOORS = (
    {"errors", "platforms", "shipped", "streams"},
    {"settings", "json_files", "drawing", "surroundings", "places"},
    {"data_config"},
    {"config"},
    {"data", "nn"},
    {"parallel"},
    {"optim", "resnet"},
    {"step", "weights"},
    {"training"},
    {"studies"},
    {"config_file", "help", "setting_flags"},
    {"cli"},
    {"subject"},
    {"__main__"},
)
LEVELS = {room: level for level, floor in enumerate(FLOORS) for room in floor}

# Rooms above them that do without them, so that each can be read, and used, alone.
APART = {("parallel", "data"), ("weights", "parallel"), ("weights", "data")}
EXCEPTIONS = {"flax_resnet.data.pixels": "a card's normalisation"}  # for weights


class Import(NamedTuple):
    """One module that a file imports."""

    file: Path  # from ROOT
    module: str  # such as "flax_resnet.data.pixels"
    at_module_level: bool

    @property
    def room(self) -> str:
        """The file's: a folder of flax_resnet/, or a file beside the folders."""
        return Path(self.file.parts[1]).stem

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def imports(*folders: str) -> Iterator[Import]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            inner = {
                id(node)
                for function in ast.walk(tree)
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
                for node in ast.walk(function)
            }
            for node in ast.walk(tree):
                for module in modules(node):
                    yield Import(path.relative_to(ROOT), module, id(node) not in inner)


def modules(node: ast.AST) -> list[str]:
    """What a statement imports; of `from package import name`, the module if `name` is one."""
    match node:
        case ast.Import(names=aliases):
            return [alias.name for alias in aliases]
        case ast.ImportFrom(module=str(package), level=0, names=aliases):
            return [
                f"{package}.{alias.name}" if is_module(f"{package}.{alias.name}") else package
                for alias in aliases
            ]
        case ast.ImportFrom():
            raise AssertionError(f"line {node.lineno}: a relative import, which hides its room")
    return []


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def of_library() -> list[Import]:
    """Those within flax_resnet, but for its `__init__.py`, which names what is in every room."""
    return [
        found
        for found in imports("flax_resnet")
        if found.module.startswith("flax_resnet.") and found.room != "__init__"
    ]


def test_every_file_has_its_floor() -> None:
    rooms = {Path(path.name).stem for path in (ROOT / "flax_resnet").iterdir()}
    assert rooms - {"__pycache__", "__init__", "py"} == LEVELS.keys()  # py.typed


def test_imports_point_down() -> None:
    found = of_library()
    assert len(found) > 100
    for each in found:
        above, below = each.room, each.module.split(".")[1]
        assert above == below or LEVELS[above] > LEVELS[below], str(each)


def test_data_weights_and_parallel_stand_apart() -> None:
    for each in of_library():
        if (each.room, each.module.split(".")[1]) in APART:
            assert each.room == "weights", str(each)
            assert each.module in EXCEPTIONS, str(each)


def test_the_package_itself_is_imported_by_none_of_its_files() -> None:
    """`from flax_resnet import ResNet` within the library would hide where it comes from."""
    assert [str(x) for x in imports("flax_resnet", "torch_ref") if x.module == "flax_resnet"] == []


def test_the_library_does_without_torch() -> None:
    for each in imports("flax_resnet"):
        top = each.module.split(".")[0]
        assert top != "torch_ref", str(each)
        assert top != "torch" or not each.at_module_level, str(each)


def test_nothing_imports_the_tests_but_the_tests() -> None:
    folders = ("flax_resnet", "torch_ref", "scripts", "configs")
    found = [str(x) for x in imports(*folders) if x.module.split(".")[0] == "parity_tests"]
    assert found == []
