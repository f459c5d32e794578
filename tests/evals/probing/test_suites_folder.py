"""A suite that is right is read as it is; whatever is wrong with one is said with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ksparse.errors import InputError
from ksparse.evals.probing.suites import LEAST, TextTask, read, write
from ksparse.storage import rows as rows_of

ROWS = [{"text": f"text number {i}", "label": i % 2} for i in range(2 * LEAST)]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder: Path, content: str | bytes, name: str = "task.jsonl") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_a_written_suite_is_read_back(tmp_path):
    write(tmp_path, "b_task", ROWS)
    write(tmp_path, "a-task.2", reversed(ROWS))
    texts = tuple(row["text"] for row in ROWS)
    assert read(tmp_path) == [
        TextTask("a-task.2", texts[::-1], (1, 0) * LEAST),
        TextTask("b_task", texts, (0, 1) * LEAST),
    ]


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    first = write(tmp_path / "one", "task", ROWS).read_bytes()
    assert first == write(tmp_path / "two", "task", ROWS).read_bytes()
    assert first[4:8] == bytes(4)  # the time of writing, of the gzip header
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["task.jsonl.gz"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write(tmp_path, "task", ROWS)
    before = path.read_bytes()
    with pytest.raises(InputError, match="task 'task', row 2: 'label' is 2; expected 0 or 1"):
        write(tmp_path, "task", [ROWS[0], {"text": "x", "label": 2}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["task.jsonl.gz"]


@pytest.mark.parametrize(
    "more",
    [{"x": float("nan")}, {"x": "\ud800"}, {"x": object()}, {"\ud800": 1}],
    ids=["nan", "half", "object", "half_key"],
)
def test_a_row_that_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, more):
    path = write(tmp_path, "task", ROWS)
    before = path.read_bytes()
    with pytest.raises(InputError, match="task 'task', row 2: cannot be written as JSON: "):
        write(tmp_path, "task", [ROWS[0], {"text": "x", "label": 1, **more}])
    assert path.read_bytes() == before


def test_lines_that_end_with_carriage_returns_are_lines(tmp_path):
    put(tmp_path, lines(ROWS).replace("\n", "\r"))
    assert len(read(tmp_path)[0].texts) == len(ROWS)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".x", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of a task"):
        write(tmp_path, name, ROWS)


def test_writing_beside_an_uncompressed_task_is_refused(tmp_path):
    put(tmp_path, lines(ROWS))
    with pytest.raises(InputError, match="is in .* already, as task.jsonl"):
        write(tmp_path, "task", ROWS)


def test_extra_keys_booleans_blank_lines_and_a_byte_order_mark_are_fine(tmp_path):
    rows = [{**row, "label": bool(row["label"]), "more": [1]} for row in ROWS]
    put(tmp_path, "\ufeff" + lines(rows).replace("\n", "\n\n"))
    (task,) = read(tmp_path)
    assert task.labels == (0, 1) * LEAST
    assert all(type(label) is int for label in task.labels)


def test_other_files_are_no_tasks(tmp_path):
    put(tmp_path, lines(ROWS))
    put(tmp_path, "[1", "index.json")
    put(tmp_path, "half", ".tmp-other.jsonl.gz-1")
    (tmp_path / "folder.jsonl").mkdir()
    assert [task.name for task in read(tmp_path)] == ["task"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "x", "label": 1', "not JSON"),
        ("[1, 2]", "list instead of a row"),
        ('{"label": 1}', "no 'text', only label"),
        ("{}", "no 'text', only nothing"),
        ('{"text": 3, "label": 1}', "'text' is int, not a string"),
        ('{"text": null, "label": 1}', "'text' is NoneType, not a string"),
        ('{"text": " \\n", "label": 1}', "'text' is empty"),
        ('{"text": "\\ud800", "label": 1}', "'text' holds half of a surrogate pair"),
        ('{"text": "x"}', "no 'label', only text"),
        ('{"text": "x", "label": 2}', "'label' is 2; expected 0 or 1"),
        ('{"text": "x", "label": "1"}', "'label' is '1'; expected 0 or 1"),
        ('{"text": "x", "label": 1.0}', "'label' is 1.0; expected 0 or 1"),
        ('{"text": "x", "label": null}', "'label' is None; expected 0 or 1"),
        ("[" * 50_000, "not JSON: maximum recursion depth"),
        ('{"a":' * 20_000, "not JSON: maximum recursion depth"),
        ('{"text": "x", "label": ' + "1" * 5_000 + "}", "not JSON: Exceeds the limit"),
        ('{"text": "x", "label": ' + "1" * 4_000 + "}", "'label' is 11111"),
        ('{"text": "x", "label": "' + "y" * 10_000 + '"}', "'label' is 'yyyy"),
        ("{" + ", ".join(f'"{i}": 1' for i in range(999)) + "}", "no 'text', only 0, 1, 2"),
        ('{"\\ud800": 1}', "no 'text', only \ufffd;"),
        ("\ufeff{}", "not JSON: Unexpected UTF-8 BOM"),
        ('{"text": "a\0b", "label": 1}', "not JSON: Invalid control character"),
        ("null", "NoneType instead of a row"),
        ('{"text": "' + "x" * 200_000 + '", "label": 1}', "longer than 150,000 bytes"),
    ],
)
def test_a_wrong_row_is_named_with_its_file_and_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(rows_of, "LONGEST", 150_000)
    file = put(tmp_path, lines(ROWS[:3]) + "\n" + line + "\n")
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert (
        str(error.value).startswith(f"{file}, line 5: {message}") and len(str(error.value)) < 1_000
    )
    str(error.value).encode()


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    put(tmp_path, lines(ROWS[:2]).encode() + b'{"text": "\xff", "label": 0}\n')
    with pytest.raises(InputError, match=r"task.jsonl, line 3: not UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize("cut", [-12, 30, 5])
def test_a_truncated_gzip_is_noticed(tmp_path, cut):
    put(tmp_path, gzip.compress(lines(ROWS).encode())[:cut], "task.jsonl.gz")
    with pytest.raises(
        InputError, match=r"task.jsonl.gz cannot be read after line \d+: .*truncated"
    ):
        read(tmp_path)


def test_a_file_that_is_no_gzip_is_noticed(tmp_path):
    put(tmp_path, lines(ROWS), "task.jsonl.gz")
    with pytest.raises(InputError, match="truncated or not what its name says"):
        read(tmp_path)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], f"is empty; expected at least {LEAST} rows of each label"),
        ([{"text": "x", "label": 1}] * 50, "all 50 rows have the label 1; expected at least"),
        ([{"text": "x", "label": 0}] * 50, "all 50 rows have the label 0; expected at least"),
        (
            ROWS[:-1],
            f"only {LEAST - 1} of {2 * LEAST - 1} rows have the label 1; expected at least {LEAST} rows of each label",
        ),
    ],
)
def test_too_few_rows_of_a_label_are_refused(tmp_path, rows, message):
    put(tmp_path, lines(rows))
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_the_same_task_twice_is_refused(tmp_path):
    write(tmp_path, "task", ROWS)
    put(tmp_path, lines(ROWS))
    with pytest.raises(
        InputError, match="the task 'task' is in .* twice: task.jsonl and task.jsonl.gz"
    ):
        read(tmp_path)


def test_a_folder_without_tasks_or_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no task; expected files TASK.jsonl"):
        read(tmp_path)
    with pytest.raises(InputError, match="does not exist; give a folder"):
        read(tmp_path / "none")
    put(tmp_path, "x", "file")
    with pytest.raises(InputError, match="is not a folder"):
        read(tmp_path / "file")


def test_a_suite_that_was_made_elsewhere_is_read(shared_data):
    tasks = read(shared_data / "probes")
    assert len(tasks) > 40
    assert all(len(task.texts) == len(task.labels) and set(task.labels) == {0, 1} for task in tasks)
