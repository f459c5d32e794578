"""What the server is asked, and how its answers are read.

Texts are JSON strings, so that a line break inside one does not look like its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

OPEN, CLOSE = "<<", ">>"
"""What marks tokens in a text."""
LONGEST = 300
"""Characters of an explanation at most."""
EXPLANATION_TOKENS = 60
"""Tokens of an answer that explains, at most."""

_EXPLAIN = (
    "A unit of a neural network is active on some tokens of a text. You get texts in which these "
    f"tokens stand between {OPEN} and {CLOSE}. Say in one short phrase what the marked tokens, or "
    "the words before them, have in common. Answer with the phrase alone, of at most 15 words."
)
_DETECT = (
    "You get the description of a feature of text, and {count} numbered texts. Decide for each "
    "whether the feature occurs in it. Answer with a JSON list of {count} numbers alone, in the "
    "order of the texts: 1 if the feature occurs, 0 if it does not. For 3 texts: [1, 0, 1]"
)
_FUZZ = (
    "You get the description of a feature of text, and {count} numbered texts in which some tokens "
    f"stand between {OPEN} and {CLOSE}. Decide for each whether the marked tokens are those that "
    "the description is about. Answer with a JSON list of {count} numbers alone, in the order of "
    "the texts: 1 if they are marked correctly, 0 if not. For 3 texts: [1, 0, 1]"
)
Messages = list[dict[str, str]]


def mark(strings: Sequence[str], marked: Sequence[bool]) -> str:
    """Return tokens as one text, with each run of marked ones between << and >>.

    Example:
        >>> mark(["a", " b", " c", "."], [False, True, True, False])
        'a<< b c>>.'
    """
    text, inside = "", False
    for string, is_marked in zip(strings, marked, strict=True):
        if bool(is_marked) != inside:
            text += CLOSE if inside else OPEN
            inside = not inside
        text += string
    return text + CLOSE * inside


def ask_explanation(texts: Sequence[str]) -> Messages:
    """Return the request for an explanation of marked texts."""
    return _messages(_EXPLAIN, f"{_number(texts)}\n\nPhrase:")


def ask_labels(explanation: str, texts: Sequence[str], *, fuzzing: bool) -> Messages:
    """Return the request for a label, 0 or 1, of each text.

    Args:
        explanation: the description of the feature.
        texts: the texts; with marked tokens for fuzzing.
        fuzzing: ask whether the marks are right, not whether the feature occurs.
    """
    system = (_FUZZ if fuzzing else _DETECT).format(count=len(texts))
    return _messages(
        system,
        f"Description: {json.dumps(explanation, ensure_ascii=False)}\n\n{_number(texts)}\n\nList:",
    )


def label_schema(count: int) -> dict[str, Any]:
    """Return the `response_format` that only an answer with so many labels has.

    An object around the list, since some servers take nothing else.
    """
    labels = {
        "type": "array",
        "items": {"type": "integer", "enum": [0, 1]},
        "minItems": count,
        "maxItems": count,
    }
    table = {
        "type": "object",
        "properties": {"labels": labels},
        "required": ["labels"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "labels", "schema": table}}


def label_tokens(count: int) -> int:
    """Return the tokens of an answer with so many labels, at most."""
    return 16 + 4 * count


def read_explanation(answer: str) -> str:
    """Return the first line with words of an answer, without quotes around it, cut to `LONGEST`
    characters.

    Example:
        >>> read_explanation('\\n"names of cities."\\nThese are …')
        'names of cities.'
    """
    lines = (line.strip() for line in _spoken(answer).splitlines())
    line = next((line for line in lines if re.search(r"\w", line)), "")
    line = re.sub("[\ud800-\udfff]", "\ufffd", line)
    return line.strip("\"'`*“” ")[:LONGEST]


def read_labels(answer: str, count: int) -> list[bool] | None:
    """Return the labels in an answer; None if it has no list of just so many.

    Example:
        >>> read_labels("Here it is: [1, 0, true]", 3)
        [True, False, True]
    """
    for found in re.findall(r"\[[^\[\]]*\]", _spoken(answer[:10_000])):
        try:
            labels = json.loads(found.lower())
        except ValueError:
            continue
        if len(labels) == count and all(
            isinstance(label, (bool, int)) and label in (0, 1) for label in labels
        ):
            return [bool(label) for label in labels]
    return None


def _spoken(answer: str) -> str:
    """Return an answer without what a model thought before it."""
    return re.sub(r"<think>.*", "", answer.rpartition("</think>")[2], flags=re.DOTALL)


def _number(texts: Sequence[str]) -> str:
    return "\n".join(
        f"Text {number}: {json.dumps(text, ensure_ascii=False)}"
        for number, text in enumerate(texts, 1)
    )


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
