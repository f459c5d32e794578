"""Base of the option classes: frozen dataclasses whose fields hold what they declare.

    Config             converts and checks every field when an instance is made
    build(Class, d)    an instance from nested dictionaries, as TOML gives them
    flat(d)            {"sae.k": 32, …} of nested dictionaries
    plain(d)           the same dictionaries with lists in place of tuples

Recipes, evaluations, studies and the options of commands follow this one rule.
"""

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
"""Old names of recipe keys, which are still read, with their current names."""


class Config:
    """Base of frozen dataclasses that hold options.

    When an instance is made, each field is converted to its declared type where that loses nothing,
    as in TOML: 1e6 to a whole number, 1 to a float, a list to a tuple, a dictionary to the option
    class of a section. Subclasses check ranges in `__post_init__`, after calling this one's.

    Raises:
        InputError: for a value of another type, one that is not among the choices of its field,
            and a number that is not finite.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import Literal
        >>> @dataclass(frozen=True)
        ... class Job(Config):
        ...     OWNER = "a job"
        ...     steps: int = 100
        ...     mode: Literal["fast", "exact"] = "fast"
        ...
        ...     def __post_init__(self):
        ...         super().__post_init__()
        ...         self.check_range("steps", at_least=1)
        >>> Job(steps=1e3).steps
        1000
        >>> Job(steps=0)
        Traceback (most recent call last):
        ksparse.errors.InputError: steps of a job is 0; it must be at least 1
    """

    SECTION: ClassVar[str] = ""
    """Prefix of its keys in a recipe, such as "sae."."""
    OWNER: ClassVar[str] = ""
    """What the options belong to, in messages, where they are not keys of a recipe."""
    JOINED: ClassVar[tuple[str, ...]] = ()
    """Fields of text that may also be given as a list, which is joined with commas."""

    def __post_init__(self) -> None:
        check_fields(self, self.SECTION)

    def check_range(
        self,
        *names: str,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
        note: str = "",
    ) -> None:
        """Raise InputError, naming the key, for a field outside a range.

        Args:
            names: the fields to check.
            at_least: lowest value allowed.
            above: the value must be greater than this.
            at_most: largest value allowed.
            below: the value must be less than this.
            note: added to the message, such as a unit or a reason.
        """
        for name in names:
            value = getattr(self, name)
            if not (
                (at_least is None or value >= at_least)
                and (above is None or value > above)
                and (at_most is None or value <= at_most)
                and (below is None or value < below)
            ):
                key = f"{name} of {self.OWNER}" if self.OWNER else f"{self.SECTION}{name}"
                bounds = _describe_range(at_least, above, at_most, below)
                raise InputError(f"{key} is {value}; it must {bounds}{note}")


def _describe_range(
    at_least: float | None, above: float | None, at_most: float | None, below: float | None
) -> str:
    if at_least is not None:
        if below is not None:
            return f"be from {at_least} up to, but not including, {below}"
        if at_most is not None:
            return f"be from {at_least} to {at_most}"
        return "not be negative" if at_least == 0 else f"be at least {at_least}"
    lower = "" if above is None else f"above {above}"
    upper = "" if at_most is None else f"at most {at_most}"
    upper = upper if below is None else f"below {below}"
    return f"be {' and '.join(filter(None, (lower, upper)))}"


def check_fields(options: object, prefix: str = "") -> None:
    """Convert each field of a dataclass to its declared type, in place.

    Args:
        options: an instance of a dataclass; it may be frozen.
        prefix: prefix of the field names in messages, such as "sae.".

    Raises:
        InputError: for a value that cannot be converted; it names the field.
    """
    options_class: type = type(options)
    for name, hint in field_types(options_class).items():
        value = getattr(options, name)
        converted = _convert(_joined(value, options_class, name), hint, f"'{prefix}{name}'")
        if converted is not value:
            object.__setattr__(options, name, converted)


@functools.cache
def field_types(config: type) -> dict[str, Any]:
    """Return the declared types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted keys.

    Example:
        >>> from ksparse.config import flat
        >>> flat({"sae": {"k": 32}, "seed": 0})
        {'sae.k': 32, 'seed': 0}
    """
    flattened: dict[str, Any] = {}
    for key, value in table.items():
        flattened |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flattened


class UnknownKeyError(InputError):
    """A key that no option has. `suggesting_keys` of the schema adds a suggestion."""

    def __init__(self, key: str, where: str):
        super().__init__(f"unknown key '{key}'{where}")
        self.key = key


def build(config: Any, table: dict[str, Any], prefix: str = "", where: str = "") -> Any:
    """Return an instance of an option class with the values of a table.

    Args:
        config: an option class, or a union of them with the field `kind`, of which the table
            chooses one.
        table: nested dictionaries, as TOML gives them.
        prefix: prefix of the keys in messages, such as "sae.".
        where: where the table comes from, for messages, such as " in recipe.toml".

    Raises:
        InputError: for a table, a key or a value that the class does not have.
    """
    if not isinstance(table, dict):
        raise InputError(f"a recipe{where} is a table of keys, not {type(table).__name__}")
    if len(classes(config)) > 1:
        config = choose_class(config, table, prefix, where)
    hints = field_types(config)
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
            else _convert(_joined(value, config, key), hints[key], f"'{name}'{where}")
        )
    return config(**values)


def _joined(value: Any, config: type, name: str) -> Any:
    """Return a list as one text where a field takes both; other values as they are."""
    if name not in getattr(config, "JOINED", ()) or not isinstance(value, (list, tuple)):
        return value
    return ", ".join(value) if value and all(type(item) is str for item in value) else value


def _refuse_trust(value: Any, where: str) -> None:
    """Warn about a key of older recipes, which allowed a model's own code to run."""
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
    """Return the member of a union that a table's key `kind` names; the first one by default.

    Args:
        union: a union of option classes, each with a field `kind`.
        table: the keys and values given.
        prefix: prefix of the keys in messages.
        where: where the table comes from, for messages.

    Raises:
        InputError: for an unknown `kind`, and for keys that this member does not have.
    """
    by_kind: dict[str, type] = {member.kind: member for member in typing.get_args(union)}
    kind = _convert(
        table.get("kind", next(iter(by_kind))), Literal[tuple(by_kind)], f"'{prefix}kind'{where}"
    )
    keys = {name: list(field_types(member)) for name, member in by_kind.items()}
    for key in table:
        if key not in keys[kind]:
            others = [name for name in by_kind if key in keys[name]]
            nearest = nearest_name(key, keys[kind])
            raise InputError(
                f"unknown key '{prefix}{key:.80}' of kind {kind!r}{where}; "
                + (
                    f"did you mean '{prefix}{nearest}'?"
                    if nearest
                    else f"it is a key of kind {', '.join(others)}"
                    if others
                    else f"its keys are {', '.join(keys[kind])}"
                )
            )
    return by_kind[kind]


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return a value converted to a declared type.

    Args:
        value: what was given.
        hint: the declared type: an option class or a union of them, Literal, an optional type, a
            tuple, int, float, bool or str.
        name: how messages name the option.

    Raises:
        InputError: for a value that is not of the type.
    """
    if classes(hint):
        return _convert_section(value, hint, name)
    if type(None) in typing.get_args(hint):
        return None if value is None else _convert(value, typing.get_args(hint)[0], name)
    if typing.get_origin(hint) is Literal:
        _check_choice(value, typing.get_args(hint), name)
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} is {preview(value)}; it must be a list")
        return tuple(_convert(item, typing.get_args(hint)[0], name) for item in value)
    if hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = _convert_number(value, hint, name)
    if type(value) is not hint:
        raise InputError(
            f"{name} is {preview(value)}, of type {type(value).__name__}; it must be of type "
            f"{hint.__name__}"
        )
    return value


def _convert_section(value: Any, hint: Any, name: str) -> Any:
    members = classes(hint)
    if isinstance(value, dict):
        return build(hint, value, f"{name.strip(chr(39))}.")
    if not isinstance(value, members):
        raise InputError(
            f"{name} is {value!r}; it must be "
            f"{' or '.join(f'{member.__name__}(…)' for member in members)}, or a dictionary of "
            "its keys"
        )
    return value


def _check_choice(value: Any, choices: tuple[Any, ...], name: str) -> None:
    if value not in choices:
        nearest = nearest_name(preview(value).strip("'"), map(str, choices))
        raise InputError(
            f"{name} is {preview(value)}; it must be one of {', '.join(map(repr, choices))}"
            + (f". Did you mean {nearest!r}?" if nearest else "")
        )


def _convert_number(value: int | float, hint: type, name: str) -> int | float:
    """Return 1 as a float and 1e9 as an int where these are declared, other numbers as they are."""
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise InputError(f"{name} is too large a number; it must be below 2^63")
        return float(value) if hint is float else value
    if hint is float and not abs(value) <= LARGEST:
        raise InputError(
            f"{name} is {value}; it must be a finite number"
            + (f", at most {LARGEST:g}" if math.isfinite(value) else "")
        )
    return int(value) if hint is int and value.is_integer() and abs(value) < 2**63 else value


def preview(value: Any) -> str:
    """Return a value as text for a message: at most 80 characters, for any value from a file."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deeply nested lists
        return (
            "a number of thousands of digits"
            if isinstance(value, int)
            else f"a {type(value).__name__} that cannot be shown"
        )
    return text if len(text) <= 80 else text[:80] + "…"


def plain(value: Any) -> Any:
    """Return nested dictionaries and sequences with every tuple as a list, as TOML and JSON have
    them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
