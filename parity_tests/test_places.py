"""Claim: a place is what its user means, a path or a bucket's URL, or else one line of error."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flax_resnet import config_file
from flax_resnet.config import Experiment
from flax_resnet.errors import ConfigError
from flax_resnet.places import Url, local_path, place
from flax_resnet.training.loop import fit
from flax_resnet.training.mirror import local_copy

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("scripts/*.py") if path.stem != "mutation")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("a/~/b", "a/~/b"),
        ("$HOME/x", "$HOME/x"),  # the shell's affair
        ("file:///a%20b/c", "/a b/c"),
        ("file://localhost/a", "/a"),
        ("file:/a", "/a"),
        (Path("file:///a"), "/a"),
        ("C:/x", "C:/x"),
    ],
)
def test_a_local_path(text: str | Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert place(text, "--workdir") == local_path(text, "--workdir") == Path(path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("gs://bucket/run", "gs://bucket/run"),
        ("GS://bucket/a//run/", "gs://bucket/a/run"),
        ("s3://my.bucket/a run", "s3://my.bucket/a run"),
    ],
)
def test_a_bucket(text: str, path: str) -> None:
    found = place(text, "--workdir")
    assert isinstance(found, Url)
    assert str(found) == path
    with pytest.raises(ConfigError, match=rf"^--out must be a local path, got {text}$"):
        local_path(text, "--out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a path, got ''"),
        ("~nobody-of-that-name/x", "must be a path of a home that is known, got ~nobody-of"),
        ("gs://bucket", "must be gs://BUCKET/NAME, got gs://bucket"),
        ("gs:/bucket/run", "must be gs://BUCKET/NAME, got gs:/bucket/run"),
        (Path("s3://bucket/run"), "must be s3://BUCKET/NAME, got s3:/bucket/run"),
        ("s3://bucket/../run", "must be s3://BUCKET/NAME, got"),
        ("s3://bucket/run?versionId=1", "must be s3://BUCKET/NAME, got"),
        ("file://server/x", "must be file:///PATH, of this machine, got file://server/x"),
        ("file:///x?y", "must be file:///PATH, of this machine, got file:///x?y"),
        ("az://container/run", "must be a local path, or a URL of gs:// or s3://, got az://"),
    ],
)
def test_what_is_none(text: str | Path, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        place(text, "--workdir")
    assert str(error.value).startswith(f"--workdir {message}")
    assert "\n" not in str(error.value)


def test_two_urls_have_two_local_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    one, other = (local_copy(Url(scheme, "bucket/run")) for scheme in ("gs", "s3"))
    assert one != other
    assert one.parent == other.parent == Path("/cache/flax-resnet/runs")
    assert one.name.startswith("run-")


def test_a_setting_and_an_argument_of_python(tmp_path: Path) -> None:
    config = Experiment()
    config.data.dir = "gs://bucket/tfds"
    with pytest.raises(ConfigError, match=r"^data\.dir must be a local path, got gs://bucket/tfds"):
        config.validate()
    with pytest.raises(ConfigError, match=r"^workdir must be a local path, got gs:/bucket/run"):
        fit(Experiment(), Path("gs://bucket/run"))


def test_a_config_by_its_path_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_file.find("~/mine.py") == tmp_path / "mine.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_takes_a_path_past_that(script: Path) -> None:
    """Neither a flag's value nor an argument of the command line becomes a Path by itself."""
    tree = ast.parse(script.read_text())
    (main,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "main")
    arguments = {x.arg for x in [*main.args.args, *filter(None, [main.args.vararg])]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), " ".join(map(ast.unparse, node.args))
            if called == "flags.DEFINE_string":
                assert not re.search(r"'[^']*\b(file|folder|directory)\b", given), given
            if called in ("Path", "map"):
                given = re.sub(r"f'.*'|f\".*\"", "", given)  # a name of ours with a value in it
                assert not arguments & set(re.findall(r"\w+", given)), given
                assert not re.search(r"[A-Z]\.value", given), given


def test_a_flag_on_the_command_line(tmp_path: Path) -> None:
    """One line, before any work."""
    command = [sys.executable, str(ROOT / "scripts/train_flax.py"), "--workdir=gs:/bucket/x"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    told = "error: flag --workdir=gs:/bucket/x: it must be gs://BUCKET/NAME, got gs:/bucket/x\n"
    assert done.stderr == told
    assert not list(tmp_path.iterdir())
