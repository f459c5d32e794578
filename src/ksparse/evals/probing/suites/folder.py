"""Read and write a suite: a folder of tasks, one file TASK.jsonl or TASK.jsonl.gz each.

Rows are {"text": str, "label": 0 | 1}. They may have more keys, and labels may be true and false.
Other files in the folder, such as index.json, are ignored. Every row is checked on reading, because
a wrong label in row 900 would otherwise only show as a slightly worse probe.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse.errors import InputError
from ksparse.storage.atomic import write_bytes
from ksparse.storage.rows import columns, has_lone_surrogate, jsonl, shown

LEAST = 20
"""Rows of each label that a task needs: with fewer, the best of many latents fits it by chance."""
SUFFIXES = (".jsonl.gz", ".jsonl")
ROW = '{"text": "…", "label": 0 or 1}'
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class TextTask:
    """A binary task: texts[i] has labels[i], 0 or 1."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]


def read(folder: Path | str) -> list[TextTask]:
    """Read every task of a folder, sorted by name.

    Raises:
        InputError: The folder holds no task, or a row is not as expected; with its file and line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"suite {folder} {'is not a folder' if folder.exists() else 'does not exist'}; give a "
            "folder of TASK.jsonl or "
            f"TASK.jsonl.gz with rows {ROW}, or make one: ksparse probes build {folder}"
        )
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"suite {folder} cannot be read: {error.strerror or error}") from None
    tasks: dict[str, Path] = {}
    for file in files:
        name = _task_name(file)
        if name in tasks:
            raise InputError(
                f"the task {name!r} is in {folder} twice: {tasks[name].name} and {file.name}; "
                "remove one of them"
            )
        if name is not None:
            tasks[name] = file
    if not tasks:
        raise InputError(
            f"suite {folder} holds no task; expected files TASK.jsonl or TASK.jsonl.gz with rows "
            f"{ROW}"
        )
    return [_read_task(tasks[name], name) for name in sorted(tasks)]


def write(folder: Path | str, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a task atomically as FOLDER/NAME.jsonl.gz; the same rows give the same bytes.

    Args:
        folder: The suite's folder.
        name: The task's name.
        rows: Mappings with "text" and "label", and any other keys.

    Returns:
        The file.

    Raises:
        InputError: The name or a row is not usable, or the task exists as .jsonl.
    """
    folder = Path(folder)
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a task; expected letters, digits, '_', '-' and '.'"
        )
    if (folder / f"{name}.jsonl").exists():
        raise InputError(
            f"the task {name!r} is in {folder} already, as {name}.jsonl; remove it first"
        )
    lines = []
    for number, row in enumerate(rows, 1):
        text, label = _check_row(row, f"task {name!r}, row {number}")
        try:
            line = json.dumps(
                {**row, "text": text, "label": label}, ensure_ascii=False, allow_nan=False
            )
            lines.append(line.encode() + b"\n")
        except (ValueError, TypeError, RecursionError) as error:  # NaN, a lone surrogate, an object
            raise InputError(
                f"task {name!r}, row {number}: cannot be written as JSON: {error}"
            ) from None
    path = folder / f"{name}.jsonl.gz"
    # Without mtime gzip would write the current time into the file.
    write_bytes(path, gzip.compress(b"".join(lines), mtime=0))
    return path


def _task_name(file: Path) -> str | None:
    """Return the task that a file holds, None if it holds none."""
    suffix = next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), None)
    return (
        None
        if suffix is None or file.name.startswith(".") or not file.is_file()
        else file.name.removesuffix(suffix)
    )


def _read_task(file: Path, name: str) -> TextTask:
    texts, labels = [], []
    for number, row in jsonl(file):
        text, label = _check_row(row, f"{file}, line {number}")
        texts.append(text)
        labels.append(label)
    _check_counts(file, labels)
    return TextTask(name, tuple(texts), tuple(labels))


def _check_row(row: Any, where: str) -> tuple[str, int]:
    """Return a row's text and label; raise InputError if either is not usable."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: {columns(row)} instead of a row; expected {ROW}")
    text, label = row.get("text"), row.get("label")
    if not isinstance(text, str):
        what = (
            f"'text' is {columns(text)}, not a string"
            if "text" in row
            else f"no 'text', only {columns(row)}"
        )
        raise InputError(f"{where}: {what}; expected {ROW}")
    if not text.strip():
        raise InputError(f"{where}: 'text' is empty; a probe needs a token")
    if has_lone_surrogate(text):
        raise InputError(
            f"{where}: 'text' holds half of a surrogate pair, which is not a character; repair "
            "the file"
        )
    if "label" not in row:
        raise InputError(f"{where}: no 'label', only {columns(row)}; expected {ROW}")
    if not isinstance(label, int) or label not in (0, 1):
        raise InputError(
            f"{where}: 'label' is {shown(repr(label))}; expected 0 or 1 (or false, true)"
        )
    return text, int(label)


def _check_counts(file: Path, labels: list[int]) -> None:
    counts = {label: labels.count(label) for label in (0, 1)}
    if not labels:
        raise InputError(f"{file} is empty; expected at least {LEAST} rows of each label")
    if 0 in counts.values():
        only = 0 if counts[0] else 1
        raise InputError(
            f"{file}: all {len(labels)} rows have the label {only}; expected at least {LEAST} "
            "rows of each label"
        )
    if min(counts.values()) < LEAST:
        rarer = min(counts, key=lambda label: counts[label])
        raise InputError(
            f"{file}: only {counts[rarer]} of {len(labels)} rows have the label {rarer}; expected "
            f"at least {LEAST} rows of each label"
        )
