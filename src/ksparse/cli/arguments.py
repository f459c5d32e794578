"""What verbs have in common: the table of them, and how their arguments are read."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksparse import config as recipes
from ksparse.config import Recipe
from ksparse.config.options import RENAMED_KEYS
from ksparse.errors import InputError
from ksparse.trust import FLAG

_log = logging.getLogger("ksparse")
VERBS: dict[str, Callable[[list[str]], None]] = {}
"""Every verb by its name, the first word of its docstring."""
LOAD_LM = (
    "train",
    "resume",
    "eval",
    "compare",
    "study",
    "steer",
    "attribute",
    "convert",
    "shard",
    "plan",
    "sweep",
    "view",
)
"""Verbs that take --trust-remote-code True: it lets code that comes with a language model run, in
this call alone."""


def verb(function: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Enter a function into the table of verbs."""
    VERBS[(function.__doc__ or "").split()[0]] = function
    return function


def usage_of(name: str) -> tuple[str, str]:
    """Return how a verb is written, the first line of its docstring, and what it does, the rest."""
    usage, *what = (VERBS[name].__doc__ or "").strip().splitlines()
    return usage, " ".join(line.strip() for line in what if line.strip())


def recipe_of(kind: type, verb: str, arguments: list[str]) -> tuple[Recipe, dict[str, Any], str]:
    """Return the recipe of a TOML file, if one is named first, with flags over it; the verb's own
    options; a name for it."""
    given, name = Recipe(), "default"
    arguments = [_current_flag(argument) for argument in arguments]
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        given, name = recipes.load_recipe(file), Path(file).stem
    given = dataclasses.replace(
        given,
        sae=dataclasses.replace(
            given.sae, activation=activation_of(given.sae.activation, arguments)
        ),
    )
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(Recipe)}
    parsed = parse(kind, f"{verb} [RECIPE.toml]", arguments, default=kind(**fields))
    own = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)}
    return Recipe(**{key: own.pop(key) for key in fields}), own, name


def _current_flag(argument: str) -> str:
    """Return an argument with the current name of a renamed flag; warn if it has the old one."""
    flag, equals, value = argument.partition("=")
    key = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--") or key not in RENAMED_KEYS:
        return argument
    current = f"--{RENAMED_KEYS[key]}".replace("_", "-")
    _log.warning("%s is now called %s", flag, current)
    return f"{current}{equals}{value}"


def activation_of(
    given: recipes.ActivationConfig, arguments: list[str]
) -> recipes.ActivationConfig:
    """Return the activation whose keys the flags --sae.activation.… are: the given one, or that of
    another kind where they name one."""
    words = [
        word
        for argument in arguments
        for word in (argument.split("=", 1) if argument.startswith("--") else [argument])
    ]
    flags = {
        word.removeprefix("--sae.activation.").replace("-", "_"): value
        for word, value in zip(words, [*words[1:], ""])
        if word.startswith("--sae.activation.")
    }
    kind = recipes.activation_kind({"kind": given.kind} | flags, "--sae.activation.")
    return given if isinstance(given, kind) else kind()


def parse(
    kind: type, verb: str, arguments: list[str], default: Any = None, prefix: str = ""
) -> Any:
    import tyro

    description = usage_of(verb.split()[0])[1]
    if verb.split()[0] in LOAD_LM:
        description += (
            f"\n\n{FLAG} True lets code that comes with the language model run, in this "
            "call alone; no file can say so."
        )
    if prefix:  # tyro names the flags of a bare dataclass without the section's name
        arguments = [argument.replace(f"--{prefix}.", "--", 1) for argument in arguments]
    made = tyro.cli(
        kind,
        prog=f"ksparse {verb}",
        args=arguments,
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        **({} if default is None else {"default": default}),
    )
    recipes.check_fields(made)
    return made


def take_folder(
    verb: str, arguments: list[str], what: str = "the folder of a run, such as runs/demo"
) -> tuple[str, list[str]]:
    """Take the folder off the arguments; '' where only help is wanted."""
    if arguments and arguments[0] in ("-h", "--help"):
        return "", arguments
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"`ksparse {verb}` needs {what}, before anything else")
    return arguments[0], list(arguments[1:])


def no_options(verb: str, rest: list[str]) -> None:
    """Show help, or refuse arguments, for a verb without options."""
    if rest and rest[0] in ("-h", "--help"):
        usage, what = usage_of(verb)
        print(f"usage: ksparse {usage}\n\n{what}")
        sys.exit(0)
    if rest:
        raise InputError(f"`ksparse {verb}` has no such argument: {' '.join(rest)}")
