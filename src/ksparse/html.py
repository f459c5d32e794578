"""Small pieces of HTML that objects show in a notebook. Every text in them is escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_CELL = "text-align:left;padding:1px 12px 1px 0;white-space:pre-wrap"
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def table(title: str, values: Mapping[str, Any]) -> str:
    """Return a heading and a table of names and values.

    Example:
        >>> "&lt;b&gt;" in table("SAE", {"trained on": "<b>"})
        True
    """
    rows = [f"<tr>{_cell('th', key)}{_cell('td', value)}</tr>" for key, value in values.items()]
    return f"<div><strong>{escape(title)}</strong><table>{''.join(rows)}</table></div>"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of rows under a header.

    Example:
        >>> "&lt;b&gt;" in grid(["number"], [["<b>"]])
        True
    """
    lines = [("th", header), *(("td", row) for row in rows)]
    cells = ("".join(_cell(tag, text) for text in line) for tag, line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _cell(tag: str, value: Any) -> str:
    return f'<{tag} style="{_CELL}">{escape(_text(value))}</{tag}>'


def _text(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def visible(token: str) -> str:
    """Return a token's text with line ends and unseen characters spelled out.

    Example:
        >>> visible("a\\n")
        'a↵'
    """
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(
        signs.get(char)
        or (f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in _UNSEEN else char)
        for char in token
    )


def tokens(texts: Sequence[str], marks: Iterable[tuple[int, float, str]]) -> str:
    """Return tokens in a row, each on the colour of a latent.

    Args:
        texts: the tokens.
        marks: for each token, the latent that gives the hue (-1: none), the strength from 0 to 1,
            and what is shown when the pointer rests on it.
    """
    spans = []
    for text, (latent, strength, note) in zip(texts, marks, strict=True):
        hue = latent * 137 % 360  # neighbours in number are far apart in hue
        colour = (
            f"background:hsl({hue} 70% 55% / {0.08 + 0.52 * strength:.2f});" if strength else ""
        )
        lines = "↵\n".join(escape(visible(line)) for line in text.split("\n"))
        spans.append(
            f'<span style="{colour}border-radius:2px" title="{escape(note)}">{lines}</span>'
        )
    return (
        f'<div style="white-space:pre-wrap;line-height:1.7;margin:0 0 6px">{"".join(spans)}</div>'
    )
