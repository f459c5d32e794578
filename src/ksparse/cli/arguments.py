"""What the verbs share: the table of verbs, and how their arguments are parsed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import logging
import sys
import typing
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from ksparse import config as recipes
from ksparse.cli.examples import EXAMPLES
from ksparse.config import Recipe
from ksparse.config.options import RENAMED_KEYS, classes, field_types
from ksparse.errors import InputError
from ksparse.trust import FLAG

_log = logging.getLogger("ksparse")
VERBS: dict[str, Callable[[list[str]], None]] = {}
"""Every verb by its name, the first word of its function's docstring."""
LOAD_LM = (
    "train",
    "finetune",
    "resume",
    "eval",
    "compare",
    "explain",
    "study",
    "sanity",
    "steer",
    "attribute",
    "convert",
    "shard",
    "plan",
    "bench",
    "sweep",
    "view",
)
"""Verbs that take --trust-remote-code, which lets code that comes with a language model run in
this call only."""


def verb(function: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Add a function to the table of verbs.

    Args:
        function: takes the command line's words after the verb. The first line of its docstring is
            the usage, starting with the verb's name; the rest says what the verb does.
    """
    VERBS[(function.__doc__ or "").split()[0]] = function
    return function


def describe_verb(name: str) -> tuple[str, str]:
    """Return the usage line of a verb, and what it does in a sentence or two."""
    usage, *description = (VERBS[name].__doc__ or "").strip().splitlines()
    return usage, " ".join(line.strip() for line in description if line.strip())


def parse_recipe(
    options: type, verb: str, arguments: list[str]
) -> tuple[Recipe, dict[str, Any], str]:
    """Parse a recipe: a TOML file, if one is named first, with flags over it.

    Args:
        options: a dataclass with the fields of `Recipe` and more of the verb's own.
        verb: name of the verb, for its help.
        arguments: words of the command line after the verb.

    Returns:
        The recipe, the values of the verb's own options, and the name of the file without its
        ending ("default" without a file).
    """
    base, name = Recipe(), "default"
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        base, name = recipes.load_recipe(file), Path(file).stem
    return *parse_changes(options, f"{verb} [RECIPE.toml]", arguments, base), name


def parse_changes(
    options: type, usage: str, arguments: list[str], base: Recipe
) -> tuple[Recipe, dict[str, Any]]:
    """Parse flags over a recipe.

    Args:
        options: as in `parse_recipe`.
        usage: usage of the verb without its flags.
        arguments: the flags.
        base: the recipe with the values of flags that are not given.

    Returns:
        The recipe, and the values of the verb's own options.
    """
    arguments = _join_sites([_current_flag(argument) for argument in arguments])
    activation = _choose_activation(base.sae.activation, arguments)
    base = dataclasses.replace(base, sae=dataclasses.replace(base.sae, activation=activation))
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(Recipe)}
    parsed = parse(options, usage, arguments, default=options(**fields))
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(options)}
    return Recipe(**{key: values.pop(key) for key in fields}), values


def _current_flag(argument: str) -> str:
    """Return an argument with the current name of a renamed flag; warn if it has the old one."""
    flag, equals, value = argument.partition("=")
    key = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--") or key not in RENAMED_KEYS:
        return argument
    current = f"--{RENAMED_KEYS[key]}".replace("_", "-")
    _log.warning("%s is now called %s", flag, current)
    return f"{current}{equals}{value}"


def _join_sites(arguments: list[str]) -> list[str]:
    """Return arguments with several words after --acts.site as one, with commas between."""
    if "--acts.site" not in arguments:
        return arguments
    first = arguments.index("--acts.site") + 1
    rest = arguments[first:]
    sites = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    return [*arguments[:first], *filter(None, [", ".join(sites)]), *rest[len(sites) :]]


def _choose_activation(
    activation: recipes.ActivationConfig, arguments: list[str]
) -> recipes.ActivationConfig:
    """Return the activation that the flags --sae.activation.… change: the recipe's, or the default
    of the kind that they name."""
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
    options = recipes.activation_kind({"kind": activation.kind} | flags, "--sae.activation.")
    return activation if isinstance(activation, options) else options()


def parse(options: type, verb: str, arguments: list[str], default: Any = None) -> Any:
    """Parse flags into an instance of a dataclass; show help and exit where it is wanted.

    Args:
        options: a dataclass whose fields are the flags.
        verb: usage of the verb without its flags, such as "eval RUN".
        arguments: words of the command line.
        default: an instance with the values of flags that are not given; by default that of the
            fields.

    Raises:
        InputError: for a value out of range. An unknown flag exits with code 2.
    """
    if (collect := _collected.get()) is not None:
        collect.append(options)
        raise _FlagsCollected
    import tyro

    if {"-h", "--help"} & set(arguments):
        _reflow_help(options)
    boxed = options if default is not None else _boxed(options)
    parsed = tyro.cli(
        boxed,
        prog=f"ksparse {verb}",
        args=_without_boolean_values(options, arguments),
        description=_help_text(verb.split()[0]),
        config=(tyro.conf.AvoidSubcommands,),
        **({} if default is None else {"default": default}),
    )
    if boxed is not options:
        parsed = options(**_unboxed(parsed))
    recipes.check_fields(parsed)
    return parsed


def _help_text(name: str) -> str:
    """Return what a verb's help says before its options."""
    parts = [describe_verb(name)[1]]
    if name in LOAD_LM:
        parts.append(
            f"Give {FLAG} to let code that comes with the language model run, in this call only. "
            "No file can allow it."
        )
    return "\n\n".join([*parts, _example_text(name)])


def _example_text(name: str) -> str:
    return "\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES[name])])


# ---- flags of a verb


class Flag(NamedTuple):
    """A flag of a verb."""

    name: str
    hint: Any

    @property
    def words(self) -> list[str]:
        """How it is written; a boolean one also with "no-"."""
        prefix, dot, last = self.name.rpartition(".")
        names = [self.name] + ([f"{prefix}{dot}no-{last}"] if self.hint is bool else [])
        return [f"--{name}" for name in names]

    @property
    def choices(self) -> list[str]:
        """The values that it may have, if these are few."""
        literal = typing.get_origin(self.hint) is typing.Literal
        return [str(value) for value in typing.get_args(self.hint) if value] if literal else []


_collected: ContextVar[list[type] | None] = ContextVar("collected", default=None)


class _FlagsCollected(Exception):
    """The options of a verb are known, and nothing more is wanted of it."""


def flags_of(options: type, prefix: str = "") -> list[Flag]:
    """Return the flags that an options class has, those of its sections included."""
    flags: list[Flag] = []
    for name, hint in field_types(options).items():
        key = f"{prefix}{name}".replace("_", "-")
        if sections := classes(hint):
            flags += (flag for section in sections for flag in flags_of(section, f"{key}."))
        else:
            flags.append(Flag(key, hint))
    return list({flag.name: flag for flag in flags}.values())


def options_of_verb(name: str, words: Sequence[str] = ()) -> list[type]:
    """Return the options classes that a verb would parse, after some words that choose among them,
    such as `--lm NAME` for bench."""
    options: list[type] = []
    token = _collected.set(options)
    try:
        VERBS[name]([*words, "--help"])
    except _FlagsCollected:
        pass
    finally:
        _collected.reset(token)
    return options


def flags_of_verb(name: str) -> list[Flag]:
    """Return the flags of a verb, from the options that it would parse."""
    options = options_of_verb(name)
    trust = [Flag(FLAG.removeprefix("--"), str)] if name in LOAD_LM else []
    return [flag for each in options for flag in flags_of(each)] + trust


def _without_boolean_values(options: type, arguments: list[str]) -> list[str]:
    """Return arguments with `--flag True` and `--flag=True` as `--flag`, and with False as
    `--no-flag`: the spelling of earlier versions."""
    words = {flag.words[0]: flag.words for flag in flags_of(options) if flag.hint is bool}
    current, rest = [], iter(enumerate(arguments, 1))
    for at, argument in rest:
        name, equals, given = argument.partition("=")
        value = given if equals else next(iter(arguments[at:]), "")
        spellings = words.get(name.replace("_", "-"))
        if spellings is None or value not in ("True", "False"):
            current.append(argument)
            continue
        current.append(spellings[value == "False"])
        if not equals:
            next(rest)
    return current


def _boxed(options: type) -> type:
    """Return a class with the same flags, those of one evaluation together in a section, which
    help shows in a box; the class itself where no flag is for one evaluation."""
    import tyro

    hints, boxes = field_types(options), dict[str, list[Any]]({"": []})
    for field in dataclasses.fields(options):
        boxes.setdefault(box_of(field), []).append(field)
    if len(boxes) == 1:
        return options
    outer = [_copy(field, hints[field.name]) for field in boxes.pop("")]
    for name, fields in boxes.items():
        inner = dataclasses.make_dataclass(
            name, [_copy(field, hints[field.name]) for field in fields], frozen=True
        )
        inner.__doc__ = f"Only for the evaluation {name}, unless an option names more."
        section = Annotated[inner, tyro.conf.OmitArgPrefixes]  # type: ignore[valid-type]
        outer.append((name, section, dataclasses.field(default_factory=inner)))
    return dataclasses.make_dataclass(options.__name__, outer, frozen=True)


def box_of(field: dataclasses.Field[Any]) -> str:
    """Return the evaluation that an option is for, the first of several; '' for every one."""
    return next((n for n in field.metadata.get("evaluations", ()) if " " not in n), "")


def _copy(field: dataclasses.Field[Any], hint: Any) -> tuple[str, Any, Any]:
    """Return a field for `make_dataclass`, with a help text that leaves out the box's name."""
    metadata = dict(field.metadata)
    if "help" in metadata:
        metadata["help"] = metadata["help"].removeprefix(f"{box_of(field)}: ")
    default = {
        key: getattr(field, key)
        for key in ("default", "default_factory")
        if getattr(field, key) is not dataclasses.MISSING
    }
    return field.name, hint, dataclasses.field(**default, metadata=metadata)


def _unboxed(boxed: Any) -> dict[str, Any]:
    """Return the values of an instance of `_boxed` as those of the original class."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(boxed):
        value = getattr(boxed, field.name)
        is_box = dataclasses.is_dataclass(value) and type(value).__name__ == field.name
        values |= _unboxed(value) if is_box else {field.name: value}
    return values


def _reflow_help(options: type) -> None:
    """Make the docstring of each field its help text, as one paragraph.

    tyro would keep the line breaks of the source.
    """
    for owner in options.__mro__:
        if not dataclasses.is_dataclass(owner):
            continue
        fields = {field.name: field for field in dataclasses.fields(owner)}
        for name, text in field_docstrings(owner).items():
            fields[name].metadata = MappingProxyType(
                {**fields[name].metadata, "help": " ".join(text.split())}
            )
    for hint in field_types(options).values():
        for section in classes(hint):
            _reflow_help(section)


def field_docstrings(owner: type) -> dict[str, str]:
    """Return the strings that follow a class's annotated fields in its source."""
    statements = _class_bodies(owner.__module__)[owner.__name__]
    return {
        statement.target.id: str(following.value.value)
        for statement, following in itertools.pairwise(statements)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def split_folder(
    verb: str, arguments: list[str], what: str = "the folder of a run, such as runs/demo"
) -> tuple[str, list[str]]:
    """Split the first argument, a folder, off the others.

    Args:
        verb: name of the verb, for the message.
        arguments: words of the command line.
        what: what the first argument is, for the message.

    Returns:
        The folder and the other arguments. The folder is '' where only help is wanted.

    Raises:
        InputError: if the first argument is a flag, or missing.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        return "", arguments
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"`ksparse {verb}` needs {what}, before anything else")
    return arguments[0], list(arguments[1:])


def refuse_arguments(verb: str, arguments: list[str]) -> None:
    """Show help and exit, or refuse arguments, for a verb that takes none."""
    if _collected.get() is not None:
        raise _FlagsCollected
    if arguments and arguments[0] in ("-h", "--help"):
        usage, description = describe_verb(verb)
        print(f"usage: ksparse {usage}\n\n{description}\n\n{_example_text(verb)}")
        sys.exit(0)
    if arguments:
        raise InputError(f"`ksparse {verb}` has no such argument: {' '.join(arguments)}")
