"""Marks that the tokens decide: layout, brackets, operators, words, numbers and strings."""

from __future__ import annotations

import keyword
import re
import tokenize

from ksparse.evals.probing.python_labels.source import (
    IGNORED,
    INDENTATION,
    MarkedSource,
    SourceToken,
    is_formatted,
    split_opening,
)
from ksparse.evals.probing.python_labels.tasks import SPELLING_RULES

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_PUNCTUATION = frozenset(",:;.") | {"->", "...", "!"}


def mark_layout(code: MarkedSource) -> None:
    """Mark logical lines, their indentation, and the white space between them."""
    depth = previous_depth = gap = 0
    line: list[SourceToken] = []
    for token in code.all_tokens:
        depth += INDENTATION.get(token.type, 0)
        if token.type == tokenize.NEWLINE and line:
            _mark_line(code, line, depth)
            line, previous_depth, gap = [], depth, token.start
        elif token.type not in IGNORED:
            if not line:
                code.line_starts.append(token.start)
                code.paint("begins_line", token.start, token.start + 1)
                code.paint("white space between logical lines", gap, token.start)
                code.paint("indent_increase", gap, token.start, depth > previous_depth)
                code.paint("indent_decrease", gap, token.start, depth < previous_depth)
            line.append(token)
        elif token.type == tokenize.COMMENT:
            code.paint("in_comment", token.start, token.end)
    for blank in re.finditer(r"(?m)^[^\S\n]*\n", code.text):
        code.paint("blank_line", *blank.span())


def _mark_line(code: MarkedSource, line: list[SourceToken], depth: int) -> None:
    """Mark one logical line.

    Its end is the punctuation after its last word, number or string, or that token itself where no
    punctuation follows.
    """
    start, end = line[0].start, line[-1].end
    code.paint("indented_thrice", start, end, depth >= 3)
    n_closing = (
        next((i for i, token in enumerate(reversed(line)) if token.type != tokenize.OP), len(line))
        or 1
    )
    code.paint("ends_line", line[-n_closing].start, end)


def mark_brackets(code: MarkedSource) -> None:
    """Mark code in brackets; a bracket counts as inside itself."""
    stack: list[int] = []
    for index, token in enumerate(code.tokens):
        if token.type == tokenize.OP and token.text in _OPENING:
            stack.append(index)
        if stack:
            code.paint_token("code in brackets", index)
            code.paint_token("in_braces", index, code.tokens[stack[-1]].text == "{")
            code.paint_token("in_nested_brackets", index, len(stack) > 1)
        if token.type == tokenize.OP and token.text in _CLOSING:
            code.opening_of[index] = stack.pop()


def mark_tokens(code: MarkedSource) -> None:
    """Mark each token by its type and spelling."""
    for index, token in enumerate(code.tokens):
        if token.type == tokenize.STRING:
            _mark_string(code, token)
            continue
        code.paint("code", token.start, token.end)
        if token.type == tokenize.OP:
            _mark_operator(code, index)
        elif token.type == tokenize.NUMBER:
            mark_spelling(code, "numbers", token)
        else:
            code.paint("words", token.start, token.end)
            mark_spelling(
                code, "keywords" if keyword.iskeyword(token.text) else "identifiers", token
            )
    for space in re.finditer(r"\s+", code.text):
        code.paint("white space", *space.span())


def mark_spelling(code: MarkedSource, among: str, token: SourceToken) -> None:
    """Mark a token as a member of a population, and the tasks that its spelling decides."""
    code.paint(among, token.start, token.end)
    for task, rule in SPELLING_RULES[among].items():
        code.paint(task, token.start, token.end, bool(rule(token.text)))


def _mark_operator(code: MarkedSource, index: int) -> None:
    """Mark a bracket or an operator; stars and slashes are arithmetic only after an operand."""
    token = code.tokens[index]
    if token.text in _OPENING or token.text in _CLOSING:
        mark_spelling(code, "brackets", token)
    if token.text in _OPENING | _CLOSING | _PUNCTUATION:
        return
    previous = code.tokens[index - 1]
    binary = not code.marks["begins_line"][token.start] and _ends_operand(previous)
    if (token.text == "@" and not binary) or (
        token.text == "*" and previous.text in {"import", "except"}
    ):
        return
    mark_spelling(code, "operators", token)
    code.paint_token("equals signs", index, token.text == "=")
    if token.text in {"*", "**", "/"} and not binary:
        code.paint_token("arithmetic_operator", index, False)


def _ends_operand(token: SourceToken) -> bool:
    """Return whether a token can end the left operand of an operator."""
    if token.type == tokenize.OP:
        return token.text in _CLOSING or token.text == "..."
    return not keyword.iskeyword(token.text) or token.text in {"None", "True", "False"}


def _mark_string(code: MarkedSource, token: SourceToken) -> None:
    """Mark a string literal by its prefix and quotes, and the replacement fields of an f-string."""
    prefix, quote = split_opening(token.text)
    formatted = is_formatted(prefix)
    marks = {
        "in_string": True,
        "double_quoted": quote[0] == '"',
        "bytes_string": "b" in prefix.lower(),
        "f-strings": formatted,
    }
    for mark, value in marks.items():
        code.paint(mark, token.start, token.end, value)
    if formatted:
        for start, end in code.replacement_fields[token.start]:
            code.paint("in_replacement_field", start, end)
