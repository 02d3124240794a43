"""Runs the snippets of the README and of these pages, as a plugin of pytest built on Sybil:

    python -m pytest -p docs.snippets README.md docs

Every block of Python or Bash is a test. The blocks of a page run in order, in a fresh copy of the
checkout that is their working directory; the Python blocks share their variables. A block that
cannot run here has a comment before it that says why: `<!-- skip: next "needs a TPU" -->`.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

CHECKOUT = Path(__file__).parents[1]
SECONDS = 900  # for one block: far more than any takes, so that none hangs for ever
open_pages: dict[int, contextlib.ExitStack] = {}  # by the identity of their variables


def pytest_configure(config: pytest.Config) -> None:
    """Gives all pages one new cache of compiled programs, in the worker processes too."""
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="flax-resnet-docs-cache-")
        os.environ["XDG_CACHE_HOME"] = cache.name
        config.add_cleanup(cache.cleanup)


def enter_page(variables: dict[str, Any]) -> None:
    """Makes a copy of the checkout, and goes there."""
    page = open_pages[id(variables)] = contextlib.ExitStack()
    directory = Path(page.enter_context(tempfile.TemporaryDirectory(prefix="flax-resnet-docs-")))
    copy = directory / "flax-resnet"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (CHECKOUT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, copy / name)
    environment = pytest.MonkeyPatch()
    page.callback(environment.undo)
    environment.setenv("PYTHONPATH", str(copy))
    page.enter_context(contextlib.chdir(copy))


def leave_page(variables: dict[str, Any]) -> None:
    open_pages.pop(id(variables)).close()


def run_bash(example: Example) -> None:
    """Fails with what the block printed, unless every command in it ends well."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", str(example.parsed)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    print(done.stdout)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{example.parsed}", pytrace=False)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", run_bash), SkipParser()],
    path=str(CHECKOUT),
    patterns=["README.md", "docs/*.md"],
    setup=enter_page,
    teardown=leave_page,
).pytest()
