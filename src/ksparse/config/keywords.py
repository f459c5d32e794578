"""Recipes from what users have at hand: a Recipe, a TOML file, a dictionary, flat keywords."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ksparse.config.options import flat, plain
from ksparse.config.schema import Recipe
from ksparse.config.serialize import from_dict, load_recipe, to_dict
from ksparse.errors import InputError, unknown


def recipe_of(
    source: Recipe | Path | str | dict[str, Any] | None = None, /, **keywords: Any
) -> Recipe:
    """Return the recipe that a source and keywords describe.

    Args:
        source: a recipe, a TOML file, nested dictionaries, or None for the defaults.
        keywords: keys that replace those of the source: the last part of a recipe's key
            (`n_latents`, `lm`, `lr`), a whole section as a dictionary (`sae={"k": 64}`), or
            `activation`, a kind or a dictionary.

    Raises:
        InputError: for a source of another type, a keyword that is no key of a recipe or that two
            sections have, and for whatever a recipe refuses.

    Example:
        >>> from ksparse.config import recipe_of
        >>> recipe_of(n_latents=8192, site="resid_post.2", tokens=1e6)
        Recipe(acts={'site': 'resid_post.2'}, sae={'n_latents': 8192}, tokens=1000000)
        >>> recipe_of(n_latent=8192)
        Traceback (most recent call last):
        ksparse.errors.InputError: a recipe has no key 'n_latent'; did you mean 'n_latents'?
    """
    recipe = _read(source)
    if not keywords:
        return recipe
    table = to_dict(recipe)
    for name, value in keywords.items():
        _set(table, name, _plain(value))
    return from_dict(table)


def _read(source: Any) -> Recipe:
    if source is None:
        return Recipe()
    if isinstance(source, Recipe):
        return source
    if isinstance(source, (str, Path)):
        return load_recipe(source)
    if isinstance(source, dict):
        return from_dict(source)
    raise InputError(
        f"a recipe is a Recipe, a TOML file, a dictionary or keywords such as n_latents=8192, got "
        f"{type(source).__name__}"
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else plain(value)


@functools.cache
def _places() -> dict[str, list[str]]:
    """Return the dotted keys that each keyword may stand for."""
    places: dict[str, list[str]] = {}
    for key in flat(to_dict(Recipe())):
        if not key.startswith("sae.activation."):
            places.setdefault(key.rpartition(".")[2], []).append(key)
    return places | {"activation": ["sae.activation"]}


def _set(table: dict[str, Any], name: str, value: Any) -> None:
    """Set the key that a keyword names in a recipe's table, in place."""
    if isinstance(table.get(name), dict):
        if not isinstance(value, dict):
            raise InputError(
                f"{name} is a section of a recipe; give a dictionary of its keys, got {value!r:.80}"
            )
        for key, item in value.items():
            if isinstance(item, dict):
                item = {**item}
            table[name][key] = item
        return
    section, _, last = key_of(name, value, flat(table)).rpartition(".")
    if name == "activation" and isinstance(value, str):
        value = {"kind": value}
    (table[section] if section else table)[last] = value


def key_of(name: str, value: Any = "…", others: Collection[str] = ()) -> str:
    """Return the key of a recipe, with its section, that a keyword stands for.

    Args:
        name: the last part of a key, or a whole key.
        value: the keyword's value, for messages.
        others: keys that there are beside those of the default recipe.

    Raises:
        InputError: no key of a recipe is called so, or keys of two sections are.

    Example:
        >>> from ksparse.config.keywords import key_of
        >>> key_of("n_latents"), key_of("sae.k")
        ('sae.n_latents', 'sae.k')
    """
    places = _places()
    whole = {key for keys in places.values() for key in keys}.union(others)
    keys = places.get(name) or ([name] if name in whole else [])
    if not keys:
        raise unknown("a recipe has no key", name, [*places, *others])
    if len(keys) > 1:
        sections = [key.partition(".")[0] for key in keys]
        raise InputError(
            f"{name!r} is a key of {' and '.join(sections)}; say which: "
            f"{sections[0]}={{{name!r}: {value!r:.80}}}"
        )
    return keys[0]
