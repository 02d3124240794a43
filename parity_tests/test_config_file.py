"""Claim: a config file is read as it stands, or refused in one line that says where in it."""

import sys
import textwrap
from pathlib import Path

import pytest

from flax_resnet import config_file
from flax_resnet.config import ChannelPad, Dataset, Experiment, ResNetConfig, Shortcut
from flax_resnet.errors import ConfigError

ROOT = Path(__file__).parent.parent
HEAD = (
    "from flax_resnet.config import Experiment\n\n\ndef get_config():\n    config = Experiment()\n"
)


def write(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(textwrap.dedent(text))
    return path


def with_line(directory: Path, line: str) -> Path:
    """A config file whose line 6 is `line`."""
    return write(directory, f"{HEAD}    {line}\n    return config\n")


def test_names_in_a_file_are_the_values_that_they_name(tmp_path: Path) -> None:
    line = 'config.model.channel_pad, config.data.name, config.seed = "centre", "digits", 3'
    config = config_file.load(with_line(tmp_path, line))
    assert config.model.channel_pad is ChannelPad.CENTRE
    assert config.data.name is Dataset.DIGITS
    assert config.seed == 3


@pytest.mark.parametrize(
    "returned",
    [
        '{"model": {"depth": 8, "shortcut": "B"}, "optim": {"boundaries": [1, 2]}}',
        'ConfigDict({"model": {"depth": 8, "shortcut": "B"}, "optim": {"boundaries": (1, 2)}})',
        'Experiment(model={"depth": 8, "shortcut": "B"}, optim={"boundaries": [1, 2]})',
    ],
)
def test_a_dictionary_is_an_experiment_too(returned: str, tmp_path: Path) -> None:
    imports = "from ml_collections import ConfigDict\nfrom flax_resnet.config import Experiment\n"
    path = write(tmp_path, f"{imports}def get_config():\n    return {returned}\n")
    expected = Experiment(model=ResNetConfig(8, Shortcut.B))
    expected.optim.boundaries = (1, 2)
    assert config_file.load(path) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model.dpeth = 20", "no such setting: model.dpeth; did you mean model.depth?"),
        ("config.steps = 20", "no such setting: steps; did you mean train.steps?"),
        ('config.model.channel_pad = "center"', "model.channel_pad must be one of 'end', 'centre'"),
        ('config.train.steps = "4"', "train.steps must be an integer, got '4'"),
        ("config.optim.boundaries = (0.5, 0.75)", "optim.boundaries must be a list of integers"),
        ('config.optim.peak_lr = float("nan")', "optim.peak_lr must be a finite number, got nan"),
        ("config.modle.depth = 8", "AttributeError: 'Experiment' object has no attribute 'modle'"),
        ('raise KeyError("boom")', "KeyError: 'boom'"),
        ('open("nowhere/at/all")', "FileNotFoundError: [Errno 2] No such file"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    ],
)
def test_what_a_line_does_wrong_is_told_with_the_line(
    line: str, message: str, tmp_path: Path
) -> None:
    path = with_line(tmp_path, line)
    with pytest.raises(ConfigError) as error:
        config_file.load(path)
    assert str(error.value).startswith(f"{path}:6: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 1", "it must have a function get_config, which returns an Experiment"),
        ("get_config = 3", "it must have a function get_config, which returns an Experiment"),
        (
            "def get_config(depth):\n    pass",
            "get_config must do without arguments; missing a required argument: 'depth'",
        ),
        (
            "def get_config():\n    pass",
            "get_config must return an Experiment or a dictionary, got None; is there a `return`?",
        ),
        (
            "def get_config():\n    return 3",
            "get_config must return an Experiment or a dictionary, got 3",
        ),
        (
            "from flax_resnet.config import ResNetConfig as get_config",
            "get_config must return an Experiment or a dictionary, got a ResNetConfig",
        ),
        (
            'def get_config():\n    return {"model": {"dpeth": 8}}',
            "no such setting: model.dpeth; did you mean model.depth?",
        ),
        ('def get_config():\n    return {"seed": "0"}', "seed must be an integer, got '0'"),
    ],
)
def test_a_file_that_gives_no_experiment(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        config_file.load(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("content", [b"def get_config(:\n", b"x = 'a\0b'\n", bytes(range(256))])
def test_a_file_that_is_not_python(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        config_file.load(path)
    assert str(error.value).startswith(str(path))
    assert "Error: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_imports_what_lies_beside_it(tmp_path: Path) -> None:
    """At its top and in `get_config`; and a mistake there is told by its own file and line."""
    before = list(sys.path)
    write(tmp_path, f"{HEAD}    config.seed = 5\n    return config\n", "beside_this_test.py")
    late = "def get_config():\n    from beside_this_test import get_config as of\n    return of()\n"
    for text in ("from beside_this_test import get_config\n", late):
        sys.modules.pop("beside_this_test", None)
        assert config_file.load(write(tmp_path, text)).seed == 5
    write(tmp_path, "x = 1\ny = x / 0\n", "wrong_beside_this_test.py")
    with pytest.raises(ConfigError) as error:
        config_file.load(write(tmp_path, "import wrong_beside_this_test\n"))
    told = f"{tmp_path / 'wrong_beside_this_test.py'}:2: ZeroDivisionError: division by zero"
    assert str(error.value) == told
    assert sys.path == before


def test_a_file_is_read_as_it_stands_each_time(tmp_path: Path) -> None:
    """Python's own cache takes a file of the same size and second for the old one."""
    for seed in (3, 4, 5):
        assert config_file.load(with_line(tmp_path, f"config.seed = {seed}")).seed == seed
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"mine\.py: PermissionError: .*Permission denied"):
        config_file.load(write(tmp_path, ""))


def test_a_name_is_the_librarys_and_a_file_ends_in_py(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = ", ".join(sorted(path.stem for path in ROOT.glob("configs/*.py")))
    (tmp_path / "resnet20").mkdir()
    assert config_file.find("resnet20") == ROOT / "configs/resnet20.py"
    assert config_file.find(str(write(tmp_path, ""))) == tmp_path / "mine.py"
    write(tmp_path, "hello", "notes.txt")
    (tmp_path / "folder.py").mkdir()
    for name, told in [
        ("notes.txt", "the file 'notes.txt' does not end in .py"),
        ("folder.py", "'folder.py' is a directory"),
        ("resnet21", "there is no file 'resnet21'"),
        ("configs/resnet21.py", "there is no file 'configs/resnet21.py'"),
        ("", "it is empty"),
    ]:
        with pytest.raises(ConfigError) as error:
            config_file.find(name)
        assert str(error.value) == f"--config must be a file or one of {known}; {told}"


def test_a_config_dict_whose_value_is_still_missing(tmp_path: Path) -> None:
    text = """
    from ml_collections import ConfigDict
    from ml_collections.config_dict import required_placeholder

    def get_config():
        return ConfigDict({"seed": required_placeholder(int)})
    """
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"mine\.py: RequiredValueError: "):
        config_file.load(path)
