"""Frozen option classes: what a field declares is what it holds. One rule for every option."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import types
import typing
from typing import Any, ClassVar, Literal

from ksparse.errors import InputError, nearest_name

_log = logging.getLogger("ksparse")
LARGEST = 3e38  # a float of single precision
RENAMED_KEYS = {"optim.screen": "optim.approx_topk"}
"""Old names of recipe keys, which are still read, by the new ones."""


class Config:
    """Frozen data whose fields hold what they are declared to: the type, one of the choices, a
    finite number. One rule for all options.

    What stands for a value becomes it, as in TOML: 1e6 for a whole number, 1 for a float, a list
    for a tuple, a dictionary for a section.
    """

    SECTION: ClassVar[str] = ""
    """What its keys begin with in a recipe."""

    def __post_init__(self) -> None:
        check_fields(self, self.SECTION)

    def at_least(self, what: str, **lowest: float) -> None:
        """Raise InputError, saying of what they are options, for a number below its lowest."""
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise InputError(
                    f"{name} of {what} is {getattr(self, name)}; it must be at least {low}"
                )


def check_fields(options: object, prefix: str = "") -> None:
    """Give each field of a dataclass the type that it declares, in place; raise InputError, naming
    the field, for a value that is none of it."""
    kind: type = type(options)
    for name, hint in _hints(kind).items():
        value = getattr(options, name)
        fitting = _convert(value, hint, f"'{prefix}{name}'")
        if fitting is not value:
            object.__setattr__(options, name, fitting)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types that a dataclass declares."""
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"sae.k": 32, …} of nested dictionaries."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return out


class UnknownKeyError(InputError):
    """A key that no option has. Whoever knows all keys adds a suggestion."""

    def __init__(self, key: str, where: str):
        super().__init__(f"unknown key '{key}'{where}")
        self.key = key


def build(config: Any, table: dict[str, Any], prefix: str = "", where: str = "") -> Any:
    """Return an option class, or the member of a union of them that the table names, with values
    of a table.

    Args:
        config: a dataclass, or a union of dataclasses with the field `kind`.
        table: nested dictionaries, as TOML gives them.
        prefix: what stands before the keys in messages, such as "sae.".
        where: where the table comes from, for messages, such as " in recipe.toml".

    Raises:
        InputError: for a table, a key or a value that the class does not have.
    """
    if not isinstance(table, dict):
        raise InputError(f"a recipe{where} is a table of keys, not {type(table).__name__}")
    if len(classes(config)) > 1:
        config = choose_class(config, table, prefix, where)
    hints = _hints(config)
    values = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if name == "run.trust_remote_code":
            _refuse_trust(value, where)
            continue
        if name in RENAMED_KEYS:
            key = RENAMED_KEYS[name].removeprefix(prefix)
            if key in table:
                raise InputError(
                    f"'{name}'{where} is the old name of '{prefix}{key}', which is there too; "
                    "keep the new one"
                )
        if key not in hints:
            raise UnknownKeyError(f"{prefix}{key!s:.80}", where)
        is_section = bool(classes(hints[key]))
        if is_section and not isinstance(value, dict):
            raise InputError(f"'{name}'{where} is a section; write [{name}] and its keys")
        values[key] = (
            build(hints[key], value, f"{name}.", where)
            if is_section
            else _convert(value, hints[key], f"'{name}'{where}")
        )
    return config(**values)


def _refuse_trust(value: Any, where: str) -> None:
    """Warn about the key of older recipes that allowed a model's code to run."""
    if value:
        _log.warning(
            "run.trust_remote_code%s is ignored: a file cannot allow code to run. If you trust the "
            "code that comes with the model, give --trust-remote-code True with this command",
            where,
        )


def classes(hint: Any) -> tuple[type, ...]:
    """Return the option classes that a field may hold: one, the members of a union, or none."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return members if all(map(dataclasses.is_dataclass, members)) else ()


def choose_class(union: Any, table: dict[str, Any], prefix: str, where: str = "") -> type:
    """Return the member of a union that a table's key `kind` names, the first if it names none.

    Raises:
        InputError: for an unknown `kind`, and for keys that this member does not have.
    """
    by_kind = {member.kind: member for member in typing.get_args(union)}
    kind = _convert(
        table.get("kind", next(iter(by_kind))), Literal[tuple(by_kind)], f"'{prefix}kind'{where}"
    )
    keys = {name: list(_hints(member)) for name, member in by_kind.items()}
    for key in table:
        if key not in keys[kind]:
            others = [name for name in by_kind if key in keys[name]]
            near = nearest_name(key, keys[kind])
            raise InputError(
                f"unknown key '{prefix}{key:.80}' of kind {kind!r}{where}; "
                + (
                    f"did you mean '{prefix}{near}'?"
                    if near
                    else f"it is a key of kind {', '.join(others)}"
                    if others
                    else f"its keys are {', '.join(keys[kind])}"
                )
            )
    return by_kind[kind]


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return a value as its type; raise InputError, naming the option, where it has another."""
    if members := classes(hint):
        if isinstance(value, dict):
            return build(hint, value, f"{name.strip(chr(39))}.")
        if not isinstance(value, members):
            raise InputError(
                f"{name} is {value!r}; it must be "
                f"{' or '.join(f'{member.__name__}(…)' for member in members)}, or a dictionary of "
                "its keys"
            )
        return value
    if type(None) in typing.get_args(hint):
        return None if value is None else _convert(value, typing.get_args(hint)[0], name)
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options:
            near = nearest_name(preview(value).strip("'"), map(str, options))
            raise InputError(
                f"{name} is {preview(value)}; it must be one of {', '.join(map(repr, options))}"
                + (f". Did you mean {near!r}?" if near else "")
            )
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} is {preview(value)}; it must be a list")
        return tuple(_convert(item, typing.get_args(hint)[0], name) for item in value)
    if (
        hint is float
        and isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) < 2**63
    ):
        return float(value)
    if hint is float and type(value) is float and not abs(value) <= LARGEST:
        raise InputError(
            f"{name} is {value}; it must be a finite number"
            + (f", at most {LARGEST:g}" if math.isfinite(value) else "")
        )
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)  # so that tokens = 1e9 may be written
    if hint in (int, float) and type(value) is int and abs(value) >= 2**63:
        raise InputError(f"{name} is too large a number; it must be below 2^63")
    if type(value) is not hint:
        raise InputError(
            f"{name} is {preview(value)}, of type {type(value).__name__}; it must be of type "
            f"{hint.__name__}"
        )
    return value


def preview(value: Any) -> str:
    """Return a value as it can stand in a message, whatever a file has in its place."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists
        return (
            "a number of thousands of digits"
            if isinstance(value, int)
            else f"a {type(value).__name__} that cannot be shown"
        )
    return text if len(text) <= 80 else text[:80] + "…"


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
