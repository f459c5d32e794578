"""TODO ksparse.storage.jsonio."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.storage.atomic import read_errors, write_text

log = logging.getLogger("ksparse")
SEAL = "checksum"
Types = type | tuple[type, ...]


def digest(facts: Any) -> str:
    """Return a short name for JSON-able facts: the first 16 hex digits of the SHA-256 of their
    canonical form."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write JSON (never NaN) to a temporary name, sync, rename. sealed: a table gets the sum of all
    else in it, which `read_json` checks and takes off."""
    text = _dumps(value)
    write_text(path, (_dumps({**value, SEAL: _seal(json.loads(text))}) if sealed else text) + "\n")


def _dumps(value: Any) -> str:
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which no UTF-8 can hold and an escape can
        return json.dumps(value, indent=1, allow_nan=False)
    return text


def _seal(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read one JSON file; say which one is missing, damaged, or not what its seal says."""
    path = Path(path)
    with read_errors(path):
        found = parse(path.read_text(encoding="utf-8"), path)
    if isinstance(found, dict) and SEAL in found and found.pop(SEAL) != _seal(found):
        raise CorruptError(
            f"{path} was altered: it does not have the sum that it was written with; use an older "
            "copy, or have it written again"
        )
    return found


def read_table(path: Path, **keys: Types) -> dict[str, Any]:
    """Read a JSON table; raise CorruptError, naming the key, unless it has these keys with values
    of these types."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CorruptError(
            f"{path} is not a table but {type(found).__name__}; it was not written by ksparse or "
            "is damaged"
        )
    check_keys(path, found, keys)
    return found


def read_numbered(
    path: Path,
    newest: int,
    keys: Mapping[str, Types],
    optional: Mapping[str, Types] | None = None,
    *,
    unnumbered: int | None = None,
) -> dict[str, Any]:
    """Read a JSON table whose `format` is a number of 1 to `newest`, and return all else in it:
    `keys`, perhaps `optional` ones, and nothing that a newer ksparse may mean something by.

    unnumbered: the format of a table without a number; None: there is none.
    """
    found, optional = read_table(path), optional or {}
    number = found.pop("format", unnumbered)
    check_format(path, number, newest)
    unknown = sorted(set(found) - set(keys) - set(optional))
    if unknown:
        raise CorruptError(
            f"{path} has the key {unknown[0][:80]!r}, which this ksparse does not know in format "
            f"{number}; "
            "it was written by another version or is damaged"
        )
    check_keys(
        path, found, {**keys, **{key: kind for key, kind in optional.items() if key in found}}
    )
    return found


def check_format(path: Path, number: Any, newest: int) -> None:
    """Raise InputError unless the format number of a file is one of 1 to `newest`."""
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
    """Raise CorruptError, naming the key, unless a table of a file has these keys with values of
    these types.

    A boolean is no number, and no whole number has more than 63 bits. under: where in the file the
    table is.
    """
    for key, kind in keys.items():
        name = f"{under}{key}"
        if key not in table:
            raise CorruptError(
                f"{path} has no {'table' if kind is dict else 'key'} {name!r}; it was not "
                f"written by ksparse or is damaged"
            )
        kinds, value = kind if isinstance(kind, tuple) else (kind,), table[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(
                "null" if each is type(None) else each.__name__ for each in kinds
            )
            raise CorruptError(f"{path}: {name!r} is {str(value)[:80]!r}, expected {expected}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CorruptError(f"{path}: {name!r} is too large a number; it must be below 2^63")


def read_strings(path: Path) -> list[str]:
    """Read a JSON list of strings."""
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CorruptError(
            f"{path} is not a list of strings; it was not written by ksparse or is damaged"
        )
    return found


def read_lines(path: Path, **keys: Types) -> list[dict[str, Any]]:
    """Return the tables of a file of JSON lines that have these keys; leave out others with a
    warning, the last without: a killed process was writing it."""
    with read_errors(path):
        lines = path.read_bytes().splitlines()
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line.decode("utf-8"), path)
        except (CorruptError, UnicodeDecodeError):
            row = None
        if isinstance(row, dict) and all(
            isinstance(row.get(key), kind) and not isinstance(row[key], bool)
            for key, kind in keys.items()
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


def parse(text: str, path: Path) -> Any:
    """Return what JSON says, where it is JSON without NaN and infinity; else raise CorruptError."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}; it is truncated or was altered") from None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)
