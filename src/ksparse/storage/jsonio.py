"""JSON files that are checked when they are read.

    write_json       replace a JSON file atomically, on request with a checksum inside it
    read_json        any JSON
    read_table       a table (object) with keys of known types
    read_numbered    a table with a format number and a closed list of keys
    read_strings     a list of strings
    read_lines       JSON lines; damaged ones are left out with a warning
    read_last_line   the last of them, from the file's end alone

NaN and infinity are refused, in writing and in reading.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.storage.atomic import read_errors, write_text

log = logging.getLogger("ksparse")
SEAL = "checksum"
"""Key that holds the checksum of a sealed table."""
_TAIL = 1 << 16  # bytes from the end that are read for the last line
Types = type | tuple[type, ...]


def digest(facts: Any) -> str:
    """Return a short hash of JSON-able facts: 16 hex digits of the SHA-256 of their canonical form.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write a JSON file: under a temporary name, synced to disk, then renamed.

    Args:
        path: the file.
        value: what to write; NaN and infinity are refused.
        sealed: add to a table the checksum of everything else in it. `read_json` checks and
            removes it.
    """
    text = _dumps(value)
    write_text(path, (_dumps({**value, SEAL: _seal(json.loads(text))}) if sealed else text) + "\n")


def _dumps(value: Any) -> str:
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: JSON can escape it, UTF-8 cannot encode it
        return json.dumps(value, indent=1, allow_nan=False)
    return text


def _seal(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CorruptError: if it is missing, is not JSON, or is not what its checksum says.
    """
    path = Path(path)
    with read_errors(path):
        value = parse(path.read_text(encoding="utf-8"), path)
    if isinstance(value, dict) and SEAL in value and value.pop(SEAL) != _seal(value):
        raise CorruptError(
            f"{path} was altered: its checksum does not match; use an older copy, or have it "
            "written again"
        )
    return value


def read_table(path: Path, **keys: Types) -> dict[str, Any]:
    """Read a JSON table.

    Args:
        path: the file.
        keys: keys that it must have, with their types.

    Raises:
        CorruptError: if it cannot be read, is not a table, or lacks a key of the right type.
    """
    table = read_json(path)
    if not isinstance(table, dict):
        raise CorruptError(
            f"{path} is not a table but {type(table).__name__}; it was not written by ksparse or "
            "is damaged"
        )
    check_keys(path, table, keys)
    return table


def read_numbered(
    path: Path,
    newest: int,
    keys: Mapping[str, Types],
    optional: Mapping[str, Types] | None = None,
    *,
    unnumbered: int | None = None,
) -> dict[str, Any]:
    """Read a JSON table that has a format number, and return the rest of it.

    Args:
        path: the file.
        newest: largest format number that this version of ksparse reads.
        keys: keys that it must have, with their types.
        optional: keys that it may have, with their types. Any other key is refused, because a
            newer ksparse may mean something by it.
        unnumbered: format of a table without a number; None: the number is required.

    Raises:
        InputError: for a newer format.
        CorruptError: for a file that cannot be read, and for keys other than these.
    """
    table, optional = read_table(path), optional or {}
    number = table.pop("format", unnumbered)
    check_format(path, number, newest)
    unknown = sorted(set(table) - set(keys) - set(optional))
    if unknown:
        raise CorruptError(
            f"{path} has the key {unknown[0][:80]!r}, which this ksparse does not know in format "
            f"{number}; "
            "it was written by another version or is damaged"
        )
    present = {key: types for key, types in optional.items() if key in table}
    check_keys(path, table, {**keys, **present})
    return table


def check_format(path: Path, number: Any, newest: int) -> None:
    """Raise InputError unless the format number of a file is from 1 to `newest`."""
    if type(number) is int and number > newest:
        raise InputError(
            f"{path} was written by a newer ksparse (format {number}); this one reads up to "
            f"{newest}. "
            "Install a newer ksparse to read it"
        )
    if type(number) is not int or number < 1:
        raise CorruptError(
            f"{path} has format {str(number)[:80]!r}, expected a number of 1 to {newest}; "
            "it was not written by ksparse or is damaged"
        )


def check_keys(
    path: Path, table: Mapping[str, Any], keys: Mapping[str, Types], under: str = ""
) -> None:
    """Raise CorruptError unless a table has certain keys with values of certain types.

    A boolean does not count as a number, and a whole number may have 63 bits.

    Args:
        path: the file, for messages.
        table: the table to check.
        keys: the keys, with the type or types of each.
        under: prefix of the keys in messages, for a table inside the file.
    """
    for key, expected in keys.items():
        name = f"{under}{key}"
        if key not in table:
            raise CorruptError(
                f"{path} has no {'table' if expected is dict else 'key'} {name!r}; it was not "
                f"written by ksparse or is damaged"
            )
        types, value = expected if isinstance(expected, tuple) else (expected,), table[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise CorruptError(f"{path}: {name!r} is {str(value)[:80]!r}, expected {names}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CorruptError(f"{path}: {name!r} is too large a number; it must be below 2^63")


def read_strings(path: Path) -> list[str]:
    """Read a JSON list of strings; raise CorruptError if it is not one."""
    strings = read_json(path)
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise CorruptError(
            f"{path} is not a list of strings; it was not written by ksparse or is damaged"
        )
    return strings


def read_lines(path: Path, **keys: Types) -> list[dict[str, Any]]:
    """Read the tables of a file of JSON lines.

    Lines that are not JSON, or lack a key, are left out with a warning. If only the last line is
    damaged there is no warning: a process was killed while it wrote it.

    Args:
        path: the file.
        keys: keys that each line must have, with their types.
    """
    with read_errors(path):
        lines = path.read_bytes().splitlines()
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line.decode("utf-8"), path)
        except (CorruptError, UnicodeDecodeError):
            row = None
        if isinstance(row, dict) and all(
            isinstance(row.get(key), types) and not isinstance(row[key], bool)
            for key, types in keys.items()
        ):
            rows.append(row)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        log.warning(
            "%s: %s damaged and left out, the first of them line %s",
            path,
            "1 line is" if len(damaged) == 1 else f"{len(damaged):,} lines are",
            damaged[0],
        )
    return rows


def read_last_line(path: Path) -> dict[str, Any]:
    """Read the last whole table of a file of JSON lines, from the file's end alone; {} if there is
    none within its last 64 KiB.

    Example:
        >>> from pathlib import Path
        >>> read_last_line(Path("runs/demo/metrics.jsonl"))["step"]
        8
    """
    with read_errors(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = parse(line.decode("utf-8"), path)
        except (CorruptError, UnicodeDecodeError):  # cut by a kill, or by where the tail begins
            continue
        if isinstance(row, dict):
            return row
    return {}


def parse(text: str, path: Path) -> Any:
    """Return the value of a JSON text; raise CorruptError, naming the file, if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}; it is truncated or was altered") from None


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _parse_float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse_constant(digits)
