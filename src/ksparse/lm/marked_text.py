"""A text that carries a mark for each character through string operations.

A chat template takes the texts of a conversation apart and puts them together: it strips, splits,
slices, replaces and adds. `MarkedText` does the same to the marks, so that in what comes out each
character still says where it is from. An operation that this cannot follow marks its result
UNCLEAR, so that no mark is ever wrong in silence.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

UNCLEAR = 128
"""Mark of characters of which it is not known where they are from."""


class MarkedText(str):
    """A str with a mark for each character; 0 is none.

    Args:
        text: The characters.
        marks: A byte for each of them; all UNCLEAR if not given.

    Example:
        >>> text = "<user> " + MarkedText("  hi there ", bytes([1]) * 11).strip()
        >>> text, list(marks_of(text))
        ('<user> hi there', [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
        >>> list(marks_of(MarkedText("ab", bytes([1, 2])).replace("b", "cd")))
        [1, 0, 0]
    """

    _marks: bytes

    def __new__(cls, text: str = "", marks: bytes | None = None) -> MarkedText:
        self = super().__new__(cls, text)
        self._marks = bytes([UNCLEAR]) * len(self) if marks is None else marks
        return self

    @property
    def _plain(self) -> str:
        return str.__str__(self)

    def _part(self, start: int, end: int) -> MarkedText:
        return MarkedText(self._plain[start:end], self._marks[start:end])

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> MarkedText:
        marks = self._marks[key] if isinstance(key, slice) else bytes([self._marks[key]])
        return MarkedText(self._plain[key], marks)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return (self._part(at, at + 1) for at in range(len(self)))

    def __add__(self, other: str) -> str:
        return joined([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined([other, self]) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> MarkedText:
        return MarkedText(self._plain * times, self._marks * times)

    __rmul__ = __mul__

    def __rmod__(self, template: str) -> MarkedText:
        return MarkedText(str(template) % self._plain)

    def join(self, parts: Iterable[str]) -> str:
        """Return texts with this one between them, with their marks."""
        return join(self, parts)


def _part_at_end(text: MarkedText, result: str, *args: Any) -> MarkedText:
    return text._part(len(text) - len(result), len(text))


def _part_at_start(text: MarkedText, result: str, *args: Any) -> MarkedText:
    return text._part(0, len(result))


def _part_inside(text: MarkedText, result: str, *args: Any) -> MarkedText:
    start = len(text) - len(text._plain.lstrip(*args))
    return text._part(start, start + len(result))


def _parts(
    text: MarkedText, result: list[str], sep: str | None = None, *args: Any, **options: Any
) -> list[str]:
    """Return what lies between separators, or between white space."""
    found: list[str] = []
    at = 0
    for part in result:
        at = text._plain.index(part, at) if sep is None else at
        found.append(text._part(at, at + len(part)))
        at += len(part) + len(sep or "")
    return found


def _lines(text: MarkedText, result: list[str], *args: Any, **options: Any) -> list[str]:
    whole = _parts(text, text._plain.splitlines(True), "")
    return [line[: len(kept)] for line, kept in zip(whole, result)]


def _three_parts(text: MarkedText, result: tuple[str, str, str], *args: Any) -> tuple[str, ...]:
    return tuple(_parts(text, list(result), ""))


def _replaced(text: MarkedText, result: str, old: str, new: str, count: int = -1) -> str:
    return join(new, text.split(old, count)) if old else MarkedText(result)


def _recased(text: MarkedText, result: str) -> MarkedText:
    return MarkedText(result, text._marks if len(result) == len(text) else None)


def _unclear(text: MarkedText, result: str, *args: Any, **options: Any) -> MarkedText:
    return MarkedText(result)


_METHODS: dict[Callable[..., Any], tuple[str, ...]] = {
    _part_at_end: ("lstrip", "removeprefix"),
    _part_at_start: ("rstrip", "removesuffix"),
    _part_inside: ("strip",),
    _parts: ("split", "rsplit"),
    _lines: ("splitlines",),
    _three_parts: ("partition", "rpartition"),
    _replaced: ("replace",),
    _recased: ("lower", "upper", "casefold", "capitalize", "title", "swapcase"),
    _unclear: (
        *("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map"),
        "__mod__",
    ),
}
"""How marks follow the methods of str that return texts."""


def _method(name: str, follow: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of str that carries marks to its result."""
    plain = getattr(str, name)

    @functools.wraps(plain)
    def method(self: MarkedText, *args: Any, **options: Any) -> Any:
        return follow(self, plain(self._plain, *args, **options), *args, **options)

    return method


for _follow, _names in _METHODS.items():
    for _name in _names:
        setattr(MarkedText, _name, _method(_name, _follow))


def marks_of(text: str) -> bytes:
    """Return the mark of each character; zeros for a plain str."""
    return text._marks if isinstance(text, MarkedText) else bytes(len(text))


def joined(parts: Iterable[str]) -> str:
    """Return texts one after another, with their marks."""
    parts = list(parts)
    text = "".join(parts)
    if not any(isinstance(part, MarkedText) for part in parts):
        return text
    return MarkedText(text, b"".join(map(marks_of, parts)))


def join(separator: str, parts: Iterable[str]) -> str:
    """Return texts with a separator between them, with their marks."""
    return joined(piece for part in parts for piece in (separator, part))[len(separator) :]


def mark(value: Any, bits: int) -> Any:
    """Return a value with every text in it marked, keys of dictionaries included.

    Example:
        >>> marked = mark({"text": ["a", 1]}, 3)
        >>> marked, marks_of(marked["text"][0])
        ({'text': ['a', 1]}, b'\\x03')
    """
    if isinstance(value, str):
        return MarkedText(value, bytes([bits]) * len(value))
    if isinstance(value, Mapping):
        return {mark(key, bits): mark(item, bits) for key, item in value.items()}
    return [mark(item, bits) for item in value] if isinstance(value, (list, tuple)) else value


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a value of dictionaries and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from texts_in(list(pair))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)


def is_marked(value: Any) -> bool:
    """Return whether any character of any text in a value has a mark."""
    return any(any(marks_of(text)) for text in texts_in(value))


def followed(result: Any, *sources: Any) -> Any:
    """Return the result of an operation that may lose marks: all UNCLEAR if it is a text and any
    source had some."""
    if isinstance(result, str) and is_marked(sources):
        return MarkedText(str.__str__(result))
    return result


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as `json.dumps` writes it, with the marks of its texts.

    Quotes and escapes belong to their text. Brackets, numbers and commas belong to it where all
    texts of their dictionary or list have one mark.

    Example:
        >>> text = to_json({"name": mark("f", 1), "arguments": mark({"x": 2}, 1)})
        >>> text, "".join(map(str, marks_of(text)))
        ('{"name": "f", "arguments": {"x": 2}}', '000000000111000000000000000111111110')
    """
    space = " " * indent if isinstance(indent, int) else indent
    between, colon = separators or (", " if space is None else ",", ": ")

    def scalar(item: Any) -> str:
        text = json.dumps(item, ensure_ascii=ensure_ascii)
        marks = set(marks_of(item)) if isinstance(item, str) else {0}
        if marks <= {0}:
            return text
        return MarkedText(text, bytes(marks) * len(text) if len(marks) == 1 else None)

    def write(item: Any, level: int) -> str:
        if not isinstance(item, (Mapping, list, tuple)) or not item:
            return scalar(item)
        if isinstance(item, Mapping):
            pairs = sorted(item.items()) if sort_keys else item.items()
            ends = "{}"
            parts = [
                joined([_key(key, scalar), colon, write(below, level + 1)]) for key, below in pairs
            ]
        else:
            ends, parts = "[]", [write(below, level + 1) for below in item]
        if space is None:
            text = joined([ends[0], join(between, parts), ends[1]])
        else:
            line, last = "\n" + space * (level + 1), "\n" + space * level
            text = joined([ends[0], line, join(between + line, parts), last, ends[1]])
        marks = {bits for inner in texts_in(item) for bits in marks_of(inner)}
        return (
            MarkedText(text, bytes(marks) * len(text)) if len(marks) == 1 and any(marks) else text
        )

    return write(value, 0)


def _key(key: Any, write: Any) -> str:
    """Return a key as JSON: `json.dumps` writes numbers and constants as texts."""
    text: str = write(key)
    return text if isinstance(key, str) else f'"{text}"'
