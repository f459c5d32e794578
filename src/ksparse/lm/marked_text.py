"""A text that carries a mark for each character through string operations.

A chat template takes the texts of a conversation apart and puts them together: it strips, splits,
slices, replaces and adds. `MarkedText` does the same to the marks, so that in what comes out each
character still says where it is from. An operation that this cannot follow marks its result
UNCLEAR, so that no mark is ever wrong in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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

    def __mod__(self, values: Any) -> MarkedText:
        return MarkedText(self._plain % values)

    def __rmod__(self, template: str) -> MarkedText:
        return MarkedText(str(template) % self._plain)

    # ---- parts

    def lstrip(self, chars: str | None = None) -> MarkedText:
        return self._part(len(self) - len(self._plain.lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> MarkedText:
        return self._part(0, len(self._plain.rstrip(chars)))

    def strip(self, chars: str | None = None) -> MarkedText:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> MarkedText:
        return self._part(len(self) - len(self._plain.removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str) -> MarkedText:
        return self._part(0, len(self._plain.removesuffix(suffix)))

    def _find(self, parts: Iterable[str], gap: int | None) -> list[str]:
        """Return parts, given in their order, with their marks; `gap` characters lie between two of
        them, or white space if None."""
        found: list[str] = []
        at = 0
        for part in parts:
            if gap is None:
                at = self._plain.index(part, at)
            found.append(self._part(at, at + len(part)))
            at += len(part) + (gap or 0)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._find(self._plain.split(sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._find(self._plain.rsplit(sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._find(self._plain.splitlines(True), 0)
        if keepends:
            return whole
        return [line[: len(text)] for line, text in zip(whole, self._plain.splitlines())]

    def partition(self, sep: str) -> tuple[str, str, str]:
        first, middle, last = self._find(self._plain.partition(sep), 0)
        return first, middle, last

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        first, middle, last = self._find(self._plain.rpartition(sep), 0)
        return first, middle, last

    # ---- changes

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:  # type: ignore[override]
        if not old:
            return MarkedText(self._plain.replace(old, new, count))
        return join(new, self.split(old, count))

    def join(self, parts: Iterable[str]) -> str:
        return join(self, parts)

    def _recased(self, text: str) -> MarkedText:
        return MarkedText(text, self._marks if len(text) == len(self) else None)

    def lower(self) -> MarkedText:
        return self._recased(self._plain.lower())

    def upper(self) -> MarkedText:
        return self._recased(self._plain.upper())

    def casefold(self) -> MarkedText:
        return self._recased(self._plain.casefold())

    def capitalize(self) -> MarkedText:
        return self._recased(self._plain.capitalize())

    def title(self) -> MarkedText:
        return self._recased(self._plain.title())

    def swapcase(self) -> MarkedText:
        return self._recased(self._plain.swapcase())

    def center(self, *args: Any) -> MarkedText:
        return MarkedText(self._plain.center(*args))

    def ljust(self, *args: Any) -> MarkedText:
        return MarkedText(self._plain.ljust(*args))

    def rjust(self, *args: Any) -> MarkedText:
        return MarkedText(self._plain.rjust(*args))

    def zfill(self, *args: Any) -> MarkedText:
        return MarkedText(self._plain.zfill(*args))

    def expandtabs(self, *args: Any, **options: Any) -> MarkedText:
        return MarkedText(self._plain.expandtabs(*args, **options))

    def translate(self, table: Any) -> MarkedText:
        return MarkedText(self._plain.translate(table))

    def format(self, *args: Any, **values: Any) -> MarkedText:
        return MarkedText(self._plain.format(*args, **values))

    def format_map(self, values: Any) -> MarkedText:
        return MarkedText(self._plain.format_map(values))


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
