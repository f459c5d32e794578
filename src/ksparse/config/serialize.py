"""Read, write and compare recipes as TOML and as nested dictionaries."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from ksparse.config.activations import ACTIVATION_CONFIGS
from ksparse.config.options import RENAMED_KEYS, build, flat, plain
from ksparse.config.schema import Recipe, suggesting_keys
from ksparse.errors import InputError

LARGEST_TOML = 2**23
"""Bytes that a TOML file may have."""
MOST_DOTS = 3_000
"""Dots that a line of TOML may have. The parser's memory grows with the square of the parts of a
key, so a small file could take all of it."""


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        InputError: for a file that does not exist or is not TOML, and for keys and values that no
            recipe has.
    """
    return from_dict(read_toml(path, "recipe"), where=f" in {path}")


def load_recipe_of_run(path: Path | str) -> Recipe:
    """Read the recipe that a run was begun with, which has every key: one that it lacks came
    later, and stands at what it was before it was an option.

    Raises:
        InputError: as `load_recipe`.
    """
    table = read_toml(path, "recipe")
    sae = table.get("sae")
    activation = sae.get("activation") if isinstance(sae, dict) else None
    if isinstance(sae, dict) and isinstance(activation, dict):
        options = ACTIVATION_CONFIGS.get(str(activation.get("kind")))
        sae["activation"] = {**(options.BEFORE if options else {}), **activation}
    return from_dict(table, where=f" in {path}")


def read_toml(path: Path | str, what: str, advice: str = "") -> dict[str, Any]:
    """Read a TOML file as nested dictionaries.

    Args:
        path: the file.
        what: what the file should be, for messages, such as "recipe".
        advice: added to the message where the file does not exist.

    Raises:
        InputError: for a file that does not exist, cannot be read, is not TOML, or is far larger
            than a recipe.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(LARGEST_TOML + 1)
        dots = sum(line.count(b".") ** 2 for line in content.split(b"\n"))
        if len(content) > LARGEST_TOML or dots > MOST_DOTS**2:
            raise InputError(
                f"{what} {path} was not written for ksparse: it has more than "
                f"{LARGEST_TOML:,} bytes, or {MOST_DOTS:,} dots in a line"
            )
        return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist{advice}") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        # not UTF-8, not TOML, a number of thousands of digits, or lists nested without end
        raise InputError(f"{what} {path} is not TOML: {error}") from None


def from_dict(table: dict[str, Any], where: str = "") -> Recipe:
    """Return the recipe of nested dictionaries; keys that are missing have their defaults.

    Args:
        table: sections and keys, as in TOML.
        where: where the table comes from, for messages, such as " in recipe.toml".

    Raises:
        InputError: for an unknown key, or a value of the wrong type or out of range.

    Example:
        >>> from ksparse.config import from_dict
        >>> from_dict({"sae": {"k": 64}, "tokens": 1e6}).tokens
        1000000
    """
    with suggesting_keys():
        recipe: Recipe = build(Recipe, table, "", where)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as nested dictionaries of plain values, with lists for tuples."""
    table: dict[str, Any] = plain(dataclasses.asdict(recipe))
    return table


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML, with every key, so that a later change of a default does not change
    an old run.

    Example:
        >>> from ksparse.config import Recipe, to_toml
        >>> print(to_toml(Recipe(tokens=1_000)).splitlines()[0])
        tokens = 1000
    """
    return "\n".join(_toml_lines(to_dict(recipe))).lstrip() + "\n"


def _toml_lines(table: dict[str, Any], name: str = "") -> list[str]:
    """Return the keys of a table, then its sections, each under its full name."""
    lines = [
        *(["", f"[{name}]"] if name else []),
        *(
            f"{key} = {to_toml_value(value)}"
            for key, value in table.items()
            if not isinstance(value, dict)
        ),
    ]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml_lines(value, f"{name}.{key}" if name else key)
    return lines


def to_toml_value(value: Any) -> str:
    """Return a value of a recipe as TOML.

    Example:
        >>> to_toml_value([True, "a"])
        '[true, "a"]'
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # TOML has the escapes of JSON, and escapes DEL too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml_value, value))}]"
    return repr(value)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what differs between two recipes, as 'sae.k: 32 -> 64'.

    Args:
        old: nested dictionaries, from `to_dict` or `Recipe.fingerprint`.
        new: the same of another recipe. A missing key counts as None.
    """
    old, new = flat(old), flat(new)
    return [
        f"{RENAMED_KEYS.get(key, key)}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
