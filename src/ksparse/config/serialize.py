"""Recipes as TOML and as nested dictionaries, read, written and compared."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from ksparse.config.options import RENAMED_KEYS, build, flat, plain
from ksparse.config.schema import Recipe, suggesting_keys
from ksparse.errors import InputError

# ---- TOML and dictionaries -----------------------------------------------------------------------


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe from a TOML file."""
    return from_dict(read_toml(path, "recipe"), where=f" in {path}")


LARGEST_TOML = 2**23
MOST_DOTS = 3_000  # in a line, or fewer in many: a key's parts take the parser memory by the square


def read_toml(path: Path | str, what: str, advice: str = "") -> dict[str, Any]:
    """Read a TOML file; raise InputError, saying what it should have been, where it is not there or
    none."""
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(LARGEST_TOML + 1)
        dots = sum(line.count(b".") ** 2 for line in data.split(b"\n"))
        if len(data) > LARGEST_TOML or dots > MOST_DOTS**2:
            raise InputError(
                f"{what} {path} is no file of ours: it has more than "
                f"{LARGEST_TOML:,} bytes, or {MOST_DOTS:,} dots in a line"
            )
        return tomllib.loads(data.decode("utf-8").replace("\r\n", "\n"))
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist{advice}") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not TOML, a number of thousands of digits, lists in lists without end
        raise InputError(f"{what} {path} is not TOML: {error}") from None


def from_dict(table: dict[str, Any], where: str = "") -> Recipe:
    """Make a recipe of nested dictionaries; name every key that is unknown or has the wrong
    type."""
    with suggesting_keys():
        return build(Recipe, table, "", where)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return nested dictionaries of plain values, tuples as lists."""
    return plain(dataclasses.asdict(recipe))


def to_toml(recipe: Recipe) -> str:
    """Write every key of the recipe as TOML, so that a later change of a default does not change an
    old run."""
    table = to_dict(recipe)
    return "\n".join(_toml_lines(table)).lstrip() + "\n"


def _toml_lines(table: dict[str, Any], name: str = "") -> list[str]:
    """Return a table's own keys, then those of the tables in it, each under its whole name."""
    lines = [
        *(["", f"[{name}]"] if name else []),
        *(f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict)),
    ]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml_lines(value, f"{name}.{key}" if name else key)
    return lines


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what differs between two recipes' dictionaries, as 'sae.k: 32 -> 64'."""
    old, new = flat(old), flat(new)
    return [
        f"{RENAMED_KEYS.get(key, key)}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # JSON's escapes are TOML's
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
