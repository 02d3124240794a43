"""Claim: `import flax_resnet` costs less than JAX, and has every public name when asked for it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import flax_resnet

HEAVY = ("orbax", "tensorflow_datasets", "matplotlib", "tensorboardX", "sklearn", "torch", "PIL")


def loaded_after(statement: str, modules: tuple[str, ...]) -> list[str]:
    """Which of the modules a fresh Python has loaded after the statement."""
    report = f"import json, sys; print(json.dumps([m for m in {modules} if m in sys.modules]))"
    command = [sys.executable, "-c", f"{statement}\n{report}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_package_alone_loads_nothing_large() -> None:
    assert loaded_after("import flax_resnet", ("jax", "flax", "numpy", *HEAVY)) == []


def test_every_name_but_fit_loads_no_more_than_jax_and_flax() -> None:
    names = ", ".join(name for name in flax_resnet.__all__ if name != "fit")
    assert loaded_after(f"from flax_resnet import {names}", HEAVY) == []


@pytest.mark.parametrize("name", flax_resnet.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    scope: dict[str, object] = {}
    exec(f"from flax_resnet import {name}", scope)
    assert getattr(scope[name], "__name__", None) == name
    assert name in dir(flax_resnet)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(flax_resnet.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.asname: statement.module.removeprefix("flax_resnet.")
        for statement in checked.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }
    assert told == flax_resnet._MODULES
    assert sorted(told) == flax_resnet.__all__


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'ResNext'"):
        flax_resnet.ResNext  # noqa: B018 (the question is the test)
    with pytest.raises(ImportError, match="ResNext"):
        exec("from flax_resnet import ResNext")
