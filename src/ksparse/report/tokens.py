"""Text from data, made safe to look at: what cannot be seen is spelled out, what is endless is cut.

    safe_token(text)               one token of an example
    token_of(vocabulary, number)   the same, by its id
    safe_text(text)                any other string: a name, a path, a value of the recipe

HTML is not escaped here; the templates escape every string, these included.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

TOKEN_LIMIT = 80
TEXT_LIMIT = 2000
_SHORT = {"\n": "↵", "\t": "⇥", "\r": "␍"}
# Control, format (bidi, zero width), surrogates (which UTF-8 cannot hold), private, unassigned,
# line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def safe_token(text: str) -> str:
    """Return a token with its white space and unseen characters visible, at most about 80
    characters of it."""
    if text == "":
        return "⟨empty⟩"
    shown = safe_text(text, TOKEN_LIMIT)
    if shown.strip(" ↵⇥␍") == "":
        return shown.replace(" ", "·")
    return re.sub(" {2,}", lambda run: "·" * len(run.group()), shown)


def token_of(vocabulary: Sequence[str], number: int) -> str:
    """Return a token by its id: made safe, or the id itself where the vocabulary does not have
    it."""
    return safe_token(vocabulary[number]) if 0 <= number < len(vocabulary) else f"⟨{number}⟩"


def safe_text(text: str, limit: int = TEXT_LIMIT) -> str:
    """Return a string on one line, with unseen characters as their codes, cut after `limit`
    characters."""
    cut = text[:limit]
    shown = "".join(map(_visible, cut))
    if unicodedata.category(shown[:1] or " ").startswith("M"):
        shown = "◌" + shown  # a combining mark would sit on the letter of the token before
    return shown if len(cut) == len(text) else f"{shown}… ({len(text):,} characters)"


def is_right_to_left(text: str) -> bool:
    """Tell whether a text would change the order of its neighbours on the line."""
    return any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in text)


def _visible(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    category = unicodedata.category(char)
    if category in _UNSEEN or (category == "Zs" and char != " "):
        return f"⟨U+{ord(char):04X}⟩"
    return char
