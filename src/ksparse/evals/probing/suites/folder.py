"""A suite is a folder of tasks, one file each: TASK.jsonl or TASK.jsonl.gz, rows {"text": str,
"label": 0 | 1}.

Rows may have more keys, labels may be true and false; other files in the folder (index.json) are no
tasks. A file is checked whole when it is read, because a wrong label in row 900 would otherwise
only show as a slightly worse probe.
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
from ksparse.storage.rows import columns, has_half, jsonl, shown

LEAST = (
    20  # rows of each label: with fewer, the best of many thousand latents fits a task by chance
)
SUFFIXES = (".jsonl.gz", ".jsonl")
ROW = '{"text": "…", "label": 0 or 1}'
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class TextTask:
    """One binary task: texts[i] has labels[i], 0 or 1."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]


def read(folder: Path | str) -> list[TextTask]:
    """Read every task of a folder, sorted by name; raise InputError with file and line where one
    does not fit."""
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
    found: dict[str, Path] = {}
    for file in files:
        name = _task_of(file)
        if name in found:
            raise InputError(
                f"the task {name!r} is in {folder} twice: {found[name].name} and {file.name}; "
                "remove one of them"
            )
        if name is not None:
            found[name] = file
    if not found:
        raise InputError(
            f"suite {folder} holds no task; expected files TASK.jsonl or TASK.jsonl.gz with rows "
            f"{ROW}"
        )
    return [_read_task(found[name], name) for name in sorted(found)]


def write(folder: Path | str, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows {"text", "label"} as FOLDER/NAME.jsonl.gz, whole or not at all; the same rows give
    the same bytes."""
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
        text, label = _checked(row, f"task {name!r}, row {number}")
        try:
            line = json.dumps(
                {**row, "text": text, "label": label}, ensure_ascii=False, allow_nan=False
            )
            lines.append(line.encode() + b"\n")
        except (ValueError, TypeError, RecursionError) as error:  # NaN, half a character, an object
            raise InputError(
                f"task {name!r}, row {number}: cannot be written as JSON: {error}"
            ) from None
    path = folder / f"{name}.jsonl.gz"
    # mtime: gzip would put the time of writing into the file
    write_bytes(path, gzip.compress(b"".join(lines), mtime=0))
    return path


def _task_of(file: Path) -> str | None:
    suffix = next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), None)
    return (
        None
        if suffix is None or file.name.startswith(".") or not file.is_file()
        else file.name.removesuffix(suffix)
    )


def _read_task(file: Path, name: str) -> TextTask:
    texts, labels = [], []
    for number, row in jsonl(file):
        text, label = _checked(row, f"{file}, line {number}")
        texts.append(text)
        labels.append(label)
    _check_counts(file, labels)
    return TextTask(name, tuple(texts), tuple(labels))


def _checked(row: Any, where: str) -> tuple[str, int]:
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
        raise InputError(f"{where}: 'text' is empty; a probe needs a token to look at")
    if has_half(text):
        raise InputError(
            f"{where}: 'text' holds half of a surrogate pair, which is no character; repair the "
            "file"
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
        there = 0 if counts[0] else 1
        raise InputError(
            f"{file}: all {len(labels)} rows have the label {there}; expected at least {LEAST} "
            "rows of each label"
        )
    if min(counts.values()) < LEAST:
        few = min(counts, key=lambda label: counts[label])
        raise InputError(
            f"{file}: only {counts[few]} of {len(labels)} rows have the label {few}; expected at "
            f"least {LEAST} rows of each label"
        )
