"""A Python text with its tokens, the positions of its syntax nodes, and its marks."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PositionedNode = (
    ast.stmt | ast.expr | ast.arg | ast.alias | ast.keyword | ast.ExceptHandler | ast.pattern
)
"""Syntax nodes that have a position in the text."""
INDENTATION = {tokenize.INDENT: 1, tokenize.DEDENT: -1}
IGNORED = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER, *INDENTATION}
"""Types of tokens that are not visible code."""
_QUOTE = re.compile(r"([a-zA-Z]*)('''|\"\"\"|'|\")")
_QUOTED = re.compile(r"('''|\"\"\"|'|\")(?:\\.|(?!\1).)*\1", re.DOTALL)


class SourceToken(NamedTuple):
    """A token at characters [start, end). An f-string is a single token of type STRING."""

    type: int
    text: str
    start: int
    end: int


class MarkedSource:
    """A text with its Python tokens and its marks, both by character position.

    Attributes:
        text: The text as the parser reads it.
        all_tokens: Every token, including line ends, indentation and comments.
        tokens: The tokens of visible code.
        token_starts: The first character of each of `tokens`.
        replacement_fields: For an f-string, by its first character, the spans of its fields.
        opening_of: For a closing bracket's token index, that of its opening bracket.
        line_starts: The first character of each logical line.
        marks: bool[characters + 1] by name; the last entry is never set.
    """

    def __init__(self, text: str):
        self.text = text
        data = np.frombuffer(text.encode(), np.uint8)
        lines = np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1])
        # In UTF-8 every byte but a continuation byte begins a character.
        char_of_byte = np.concatenate([((data & 0xC0) != 0x80).cumsum() - 1, [len(text)]])
        self._line_bytes, self._char_of_byte = lines.tolist(), char_of_byte.tolist()
        self._line_chars = [*char_of_byte[lines].tolist(), len(text)]
        self.replacement_fields: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self.all_tokens = _merge_name_tokens(self._tokenize())
        self.tokens = [token for token in self.all_tokens if token.type not in IGNORED]
        if not hasattr(tokenize, "FSTRING_START"):
            self.replacement_fields |= {
                token.start: list(_find_replacement_fields(token))
                for token in self.tokens
                if token.type == tokenize.STRING
            }
        self.token_starts = [token.start for token in self.tokens]
        self.opening_of: dict[int, int] = {}
        self.line_starts: list[int] = []
        self.marks: defaultdict[str, np.ndarray] = defaultdict(
            lambda: np.zeros(len(text) + 1, bool)
        )

    def _tokenize(self) -> Iterator[SourceToken]:
        """Yield the tokens, each f-string as one; since Python 3.12 `tokenize` splits them."""
        depth = begin = level = opening = 0
        for token_type, text, *positions, _ in tokenize.generate_tokens(
            io.StringIO(self.text).readline
        ):
            start, end = (
                min(self._line_chars[line - 1] + column, len(self.text))
                for line, column in positions
            )
            name = tokenize.tok_name[token_type]
            if name.endswith("STRING_START"):
                begin = begin if depth else start
                depth += 1
            elif name.endswith("STRING_END"):
                depth -= 1
                if not depth:
                    yield SourceToken(tokenize.STRING, self.text[begin:end], begin, end)
            elif not depth and (token_type != tokenize.ERRORTOKEN or text.strip()):
                yield SourceToken(token_type, text, start, end)
            elif token_type == tokenize.OP and text in "{}":
                opening = opening if level else start
                level += 1 if text == "{" else -1
                if not level:
                    self.replacement_fields[begin].append((opening, end))

    def start_of(self, node: PositionedNode) -> int:
        """Return a node's first character; its own columns count bytes."""
        return self._char_of_byte[self._line_bytes[node.lineno - 1] + node.col_offset]

    def end_of(self, node: PositionedNode) -> int:
        """Return the character after a node."""
        line, column = node.end_lineno, node.end_col_offset
        assert line is not None and column is not None  # always set by ast.parse
        return self._char_of_byte[self._line_bytes[line - 1] + column]

    def token_at(self, character: int) -> int:
        """Return the index of the first token that begins at a character or later."""
        return bisect_left(self.token_starts, character)

    def last_token(self, node: PositionedNode) -> int:
        """Return the index of a node's last token."""
        return self.token_at(self.end_of(node)) - 1

    def find(self, text: str, start: int) -> int:
        """Return the index of the first token spelled `text` at or after a character."""
        index = self.token_at(start)
        while self.tokens[index].text != text:
            index += 1
        return index

    def paint(self, mark: str, start: int, end: int, value: bool = True) -> None:
        """Set a mark on characters [start, end)."""
        self.marks[mark][start:end] = value

    def paint_token(self, mark: str, index: int, value: bool = True) -> None:
        """Set a mark on a token."""
        self.paint(mark, self.tokens[index].start, self.tokens[index].end, value)

    def paint_nodes(self, mark: str, nodes: Sequence[PositionedNode], value: bool = True) -> None:
        """Set a mark from the first of consecutive nodes to the end of the last.

        A decorated definition begins with its decorators.
        """
        if nodes:
            decorators = getattr(nodes[0], "decorator_list", [])
            start = self.start_of(decorators[0] if decorators else nodes[0])
            self.paint(
                mark, self.line_start(start) if decorators else start, self.end_of(nodes[-1]), value
            )

    def line_start(self, character: int) -> int:
        """Return the first character of the logical line that holds a character."""
        return self.line_starts[bisect_left(self.line_starts, character + 1) - 1]


def _merge_name_tokens(tokens: Iterable[SourceToken]) -> list[SourceToken]:
    """Merge adjacent parts of a name.

    Before Python 3.12 `tokenize` splits names at some letters, as in "℘" or "x·y".
    """
    merged: list[SourceToken] = []
    for token in tokens:
        if token.type in (tokenize.NAME, tokenize.ERRORTOKEN):
            token = token._replace(type=tokenize.NAME)
            if merged and merged[-1].type == tokenize.NAME and merged[-1].end == token.start:
                token = token._replace(text=merged[-1].text + token.text, start=merged.pop().start)
        merged.append(token)
    return merged


# ---- string literals -----------------------------------------------------------------------------


def is_formatted(prefix: str) -> bool:
    """Return whether a prefix makes a string an f-string or a t-string."""
    return bool(set(prefix.lower()) & {"f", "t"})


def split_opening(literal: str) -> tuple[str, str]:
    """Split off a string literal's prefix and its opening quotes."""
    match = _QUOTE.match(literal)
    assert match  # every STRING token begins this way
    return match[1], match[2]


def _find_replacement_fields(token: SourceToken) -> Iterator[tuple[int, int]]:
    """Yield the spans of a string's replacement fields, braces included.

    By the grammar before Python 3.12. A field nested in a format is part of the outer field.
    """
    literal = token.text
    prefix, quote = split_opening(literal)
    if not is_formatted(prefix):
        return
    skipped = r"\{\{|[^{]" if "r" in prefix.lower() else r"\\N\{[^}]*\}|\\[^{]|\{\{|[^{]"
    text = re.compile(f"(?:{skipped})*", re.DOTALL)
    at = len(prefix) + len(quote)
    while (match := text.match(literal, at)) and (at := match.end()) < len(literal):
        end = _field_end(literal, at + 1)
        yield token.start + at, token.start + end
        at = end


def _field_end(literal: str, at: int) -> int:
    """Return the character after the closing brace of the field whose expression begins at `at`."""
    depth = 0
    while depth or literal[at] not in ":}":
        depth += (literal[at] in "([{") - (literal[at] in ")]}")
        quoted = _QUOTED.match(literal, at)
        at = quoted.end() if quoted else at + 1
    while literal[at] != "}":  # in the format, quotes are text
        at = _field_end(literal, at + 1) if literal[at] == "{" else at + 1
    return at + 1
