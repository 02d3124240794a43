"""Claim: names in a file of any form say which of a network's outputs a folder's class is."""

from pathlib import Path

import pytest

from flax_resnet.data.class_names import in_order, outputs_of, read
from flax_resnet.errors import ConfigError

FORMS = {
    "lines": "tench\nhen\nkit fox\n",
    "lines of Windows": "tench\r\nhen\r\nkit fox\r\n",
    "list": '["tench", "hen", "kit fox"]',
    "index": '{"0": "tench", "2": "kit fox", "1": "hen"}',
    "ImageNet's index": '{"0": ["n01", "tench"], "1": ["n02", "hen"], "2": ["n03", "kit fox"]}',
    "WordNet's lines": "n01440764 tench\nn01514668 hen\nn02119789 kit fox",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_understood(form: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text(FORMS[form], newline="")
    names = read(path, 3)
    assert [several[-1] for several in names] == ["tench", "hen", "kit fox"]
    assert outputs_of(["Kit_Fox", "tench"], names, "it") == [2, 0]


def test_a_folder_may_have_wordnets_number(tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text(FORMS["WordNet's lines"])
    assert outputs_of(["n01514668", "n01440764"], read(path, 3), "it") == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tench\nhen\n", "a name for each of the network's 3 classes, got 2"),
        (b"tench\n\nhen\n", "3 classes, got 3, 1 of them empty"),
        (b'{"0": "tench", "2": "hen"}', "or an index"),
        (b"[1, 2, 3]", "a list of names in JSON"),
        (b"[", "a list of names in JSON"),
        (b"\xff\xfe", "it is no text in UTF-8"),
    ],
)
def test_other_contents_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(path, 3)


def test_a_class_must_be_one_output() -> None:
    names = [("crane",), ("hen",), ("n3", "Crane")]
    with pytest.raises(ConfigError, match="got 2 that are not: fork, spoon"):
        outputs_of(["hen", "fork", "spoon"], names, "it")
    with pytest.raises(ConfigError, match=r"crane is the name of several .*, by it \(0, 2\)"):
        outputs_of(["crane"], names, "it")


def test_the_same_names_in_another_order_are_found() -> None:
    """Such as a network's own names, which need not be sorted as folders are."""
    assert in_order(["a", "b", "c"], ["c", "a", "b"]) == [1, 2, 0]
    assert in_order(["a", "b"], ["a", "b"]) is None
    assert in_order(["a", "b"], ["a", "c"]) is None
