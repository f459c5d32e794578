"""Several texts as one, by weight: `acts.text = "0.7 * web.jsonl, 0.3 * code/"`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ksparse.errors import InputError

_PART = re.compile(r"(?:^|,)\s*([-+]?[\d.][\d.eE+-]*)\s*\*\s*")
_Item = TypeVar("_Item")


class Part(NamedTuple):
    """One text of a mixture."""

    weight: float
    """Its share of the whole, on the scale of the other weights."""
    text: str
    """A file, a folder, or a data set on the Hub."""


def parts_of(text: str) -> list[Part]:
    """Return the texts of a mixture; a text without weights is one part.

    Args:
        text: as `acts.text`: a text, or "WEIGHT * TEXT, WEIGHT * TEXT, …".

    Raises:
        InputError: a weight is no positive number, a text is missing, given twice, or the built-in
            one.

    Example:
        >>> parts_of("3 * web.jsonl, 1 * code/")
        [Part(weight=3.0, text='web.jsonl'), Part(weight=1.0, text='code/')]
        >>> parts_of("web.jsonl")
        [Part(weight=1.0, text='web.jsonl')]
    """
    if not _PART.match(text) or _exists(text):
        return [Part(1.0, text)]
    pieces = _PART.split(text)[1:]
    parts = [
        Part(_weight(number, text), name.strip())
        for number, name in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    names = [part.text for part in parts]
    for name in names:
        if not name or name == "pylm" or names.count(name) > 1:
            what = "is missing" if not name else "is the built-in one"
            raise InputError(
                f"acts.text is {text!r}: the text {name!r} "
                f"{'is given twice' if names.count(name) > 1 else what}; a mixture is "
                "'WEIGHT * TEXT, WEIGHT * TEXT', of different files, folders or data sets"
            )
    return parts


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:
        return False


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not (weight > 0 and math.isfinite(weight)):
        raise InputError(
            f"acts.text is {text!r}: the weight {number!r} is not a positive number; a mixture is "
            "'WEIGHT * TEXT, WEIGHT * TEXT'"
        )
    return weight


def interleave(
    parts: Sequence[tuple[float, Iterator[_Item]]],
    size: Callable[[_Item], int],
    ended: Callable[[int, list[int]], None] = lambda part, counts: None,
) -> Iterator[_Item]:
    """Yield the items of several iterators, so that their sizes are in the ratio of the weights.

    The next item is taken from the part that is furthest behind, the earlier one of two, so the
    order is always the same. It ends with the first part that ends: the ratio holds to the end.

    Args:
        parts: a weight and the items of each part.
        size: the size of an item, such as its characters.
        ended: called at the end, with the number of the part that ended and how many items were
            taken from each.

    Example:
        >>> "".join(interleave([(2, iter("aaaa")), (1, iter("bbbb"))], len))
        'abaaba'
    """
    taken, counts = [0.0] * len(parts), [0] * len(parts)
    while True:
        part = min(range(len(parts)), key=lambda number: taken[number] / parts[number][0])
        item = next(parts[part][1], None)
        if item is None:
            ended(part, counts)
            return
        taken[part] += max(1, size(item))
        counts[part] += 1
        yield item
