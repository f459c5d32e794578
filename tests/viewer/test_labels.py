"""Labels: what is saved is there again, atomically, and nothing else is."""

from __future__ import annotations

import json

import pytest

from ksparse.errors import CorruptError, InputError
from ksparse.viewer.labels import Labels


@pytest.fixture
def labels(tmp_path):
    from ksparse.runs import RunFolder

    return Labels(RunFolder(tmp_path), 100)


def test_a_label_is_there_again(labels):
    labels.set(17, "  lists of numbers ", True)
    labels.set(3, "", True)
    assert labels.all() == {"3": {"label": "", "star": True}, "17": {"label": "lists of numbers", "star": True}}
    assert json.loads(labels.file.read_text())["format"] == 1
    assert {file.name for file in labels.file.parent.iterdir()} == {"labels.json", ".labels.lock"}


def test_an_empty_label_without_a_star_is_removed(labels):
    labels.set(17, "x", False)
    labels.set(17, " ", False)
    assert labels.all() == {}


@pytest.mark.parametrize("latent, label, star, why", [
    (100, "x", True, "latent 100 is not one of 0 to 99"), (-1, "x", True, "not one of"), (True, "x", True, "not one of"), ("1", "x", True, "not one of"),
    (1.0, "x", True, "not one of"), (1, None, True, "a label is a text"), (1, "x", 1, "a star true or false"), (1, "x" * 1001, False, "1,001 characters")])
def test_what_is_no_label_is_refused(labels, latent, label, star, why):
    with pytest.raises(InputError, match=why):
        labels.set(latent, label, star)
    assert not labels.file.exists()


def test_half_a_character_does_not_break_the_file(labels):
    labels.set(1, "\ud800 x", False)
    assert labels.all()["1"]["label"] == "? x"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "latents": {}}', '{"format": 1, "latents": []}', '{"format": 1, "latents": {"1": "x"}}'])
def test_a_damaged_file_is_named_and_not_overwritten(labels, content):
    labels.file.write_text(content)
    with pytest.raises(CorruptError, match=r"labels\.json"):
        labels.set(1, "x", True)
    assert labels.file.read_text() == content
