"""Text from data, made safe to look at: unseen characters are spelled out, endless text is cut.

safe_token(text)                 one token of an example
token_of(vocabulary, token_id)   the same, by its id
safe_text(text)                  any other string: a name, a path, a value of the recipe

HTML is not escaped here; the templates escape every string, these included.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

TOKEN_LIMIT = 80
"""Characters of a token that are shown at most."""
TEXT_LIMIT = 2000
"""Characters of another string that are shown at most."""
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
# Control, format (bidi, zero width), surrogates (which UTF-8 cannot hold), private, unassigned,
# line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def safe_token(text: str) -> str:
    """Return a token with white space and unseen characters visible, cut after TOKEN_LIMIT.

    Example:
        >>> safe_token("\\n    ")
        '↵····'
    """
    if text == "":
        return "⟨empty⟩"
    safe = safe_text(text, TOKEN_LIMIT)
    if safe.strip(" ↵⇥␍") == "":
        return safe.replace(" ", "·")
    return re.sub(" {2,}", lambda spaces: "·" * len(spaces.group()), safe)


def token_of(vocabulary: Sequence[str], token_id: int) -> str:
    """Return a token by its id, made safe; the id itself where the vocabulary lacks it."""
    if 0 <= token_id < len(vocabulary):
        return safe_token(vocabulary[token_id])
    return f"⟨{token_id}⟩"


def safe_text(text: str, limit: int = TEXT_LIMIT) -> str:
    """Return a string on one line, with unseen characters as their codes, cut after `limit`.

    Example:
        >>> safe_text("a\\x00b")
        'a⟨U+0000⟩b'
    """
    cut = text[:limit]
    safe = "".join(map(_make_visible, cut))
    if unicodedata.category(safe[:1] or " ").startswith("M"):
        safe = "◌" + safe  # a combining mark would sit on the letter of the token before
    return safe if len(cut) == len(text) else f"{safe}… ({len(text):,} characters)"


def is_right_to_left(text: str) -> bool:
    """Return whether a text would change the order of its neighbours on the line."""
    return any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in text)


def _make_visible(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    category = unicodedata.category(char)
    if category in _UNSEEN or (category == "Zs" and char != " "):
        return f"⟨U+{ord(char):04X}⟩"
    return char
