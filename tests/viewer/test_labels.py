"""Labels: what is saved is there again, atomically, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic
from ksparse.viewer import labels as module
from ksparse.viewer.labels import Labels


@pytest.fixture
def labels(tmp_path):
    from ksparse.storage.run_folder import RunFolder

    return Labels(RunFolder(tmp_path), 100)


def test_a_label_is_there_again(labels):
    labels.set(17, "  lists of numbers ", True)
    labels.set(3, "", True)
    assert labels.all() == {
        "3": {"label": "", "star": True},
        "17": {"label": "lists of numbers", "star": True},
    }
    assert json.loads(labels.file.read_text())["format"] == 1
    assert {file.name for file in labels.file.parent.iterdir()} == {"labels.json", ".labels.lock"}


def test_an_empty_label_without_a_star_is_removed(labels):
    labels.set(17, "x", False)
    labels.set(17, " ", False)
    assert labels.all() == {}


@pytest.mark.parametrize(
    "latent, label, star, why",
    [
        (100, "x", True, "latent 100 is not one of 0 to 99"),
        (-1, "x", True, "not one of"),
        (True, "x", True, "not one of"),
        ("1", "x", True, "not one of"),
        (1.0, "x", True, "not one of"),
        (1, None, True, "a label must be a text"),
        (1, "x", 1, "a star true or false"),
        (1, "x" * 1001, False, "1,001 characters"),
    ],
)
def test_what_is_no_label_is_refused(labels, latent, label, star, why):
    with pytest.raises(InputError, match=why):
        labels.set(latent, label, star)
    assert not labels.file.exists()


def test_half_a_character_does_not_break_the_file(labels):
    labels.set(1, "\ud800 x", False)
    assert labels.all()["1"]["label"] == "? x"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 2, "latents": {}}',
        '{"format": 1, "latents": []}',
        '{"format": 1, "latents": {"1": "x"}}',
    ],
)
def test_a_damaged_file_is_named_and_not_overwritten(labels, content):
    labels.file.write_text(content)
    with pytest.raises(CorruptError, match=r"labels\.json"):
        labels.set(1, "x", True)
    assert labels.file.read_text() == content


def test_two_viewers_keep_every_label(labels):
    code = (
        "import sys; from pathlib import Path; from ksparse.storage.run_folder import RunFolder; from ksparse.viewer.labels import Labels\n"
        "for i in range(int(sys.argv[2]), 200, 2): Labels(RunFolder(Path(sys.argv[1])), 200).set(i, f'label {i}', True)"
    )
    two = [
        subprocess.Popen([sys.executable, "-c", code, str(labels.file.parent), str(first)])
        for first in range(2)
    ]
    assert [process.wait(60) for process in two] == [0, 0]
    assert Labels(module.RunFolder(labels.file.parent), 200).all() == {
        str(i): {"label": f"label {i}", "star": True} for i in range(200)
    }


def test_many_clients_keep_every_label(labels):
    threads = [threading.Thread(target=labels.set, args=(i, "x", False)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(labels.all()) == 50


def test_a_viewer_that_does_not_let_go_is_named(labels, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with (
        atomic.locked(labels.folder, ".labels.lock"),
        pytest.raises(InputError, match=f"is in use by process {os.getpid()}; try again"),
    ):
        labels.set(1, "x", True)


def test_what_was_written_by_hand_is_kept_and_not_shown(labels):
    strange = {
        "1" * 5_000: {"label": "many digits"},
        "\u0661": {"label": "no digit of ours"},
        "017": {"star": True},
        "x": {"label": "x"},
        "100": {"label": "beyond"},
        "-1": {"star": True},
        "5": {"label": "\ud800 half", "mood": [1]},
        "6": {"label": 7, "star": "yes"},
        "\udfff": {},
        "__proto__": {"label": "x", "star": True},
    }
    labels.file.write_text(json.dumps({"format": 1, "latents": strange}))
    labels.set(3, "numbers", True)
    assert json.loads(labels.file.read_text())["latents"] == strange | {
        "3": {"label": "numbers", "star": True}
    }
    assert labels.all() == {
        "3": {"label": "numbers", "star": True},
        "5": {"label": "\ud800 half", "star": False},
    }


def test_a_file_that_is_read_but_nested_too_deep_to_be_written_is_left_as_it_is(labels):
    content = '{"format": 1, "latents": {"1": {"mood": %s1%s}}}' % ("[" * 900, "]" * 900)
    labels.file.write_text(content)
    try:
        labels.set(2, "x", True)
    except CorruptError as error:
        assert "labels.json" in str(error) and labels.file.read_text() == content
    assert json.loads(labels.file.read_text())["latents"].keys() >= {"1"}


@pytest.mark.parametrize("name", ["labels.json", ".labels.lock"])
def test_a_link_is_neither_read_nor_written(labels, name, tmp_path):
    outside = tmp_path.parent / "outside.json"
    outside.write_text('{"format": 1, "latents": {}}')
    labels.file.with_name(name).symlink_to(outside)
    with pytest.raises(InputError, match="leads out of"):
        labels.set(1, "x", True)
    assert outside.read_text() == '{"format": 1, "latents": {}}'
