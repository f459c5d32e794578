"""From a source text and token offsets to labels."""

from __future__ import annotations

import ast
import re
import symtable
import tokenize
import warnings
from collections.abc import Sequence

import numpy as np

from ksparse.evals.probing.python_labels.scopes import NameMarker, walk
from ksparse.evals.probing.python_labels.source import MarkedSource
from ksparse.evals.probing.python_labels.syntax import mark_extents, mark_words
from ksparse.evals.probing.python_labels.tasks import TASKS
from ksparse.evals.probing.python_labels.tokens import mark_brackets, mark_layout, mark_tokens


def labels(source: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Label tokens of Python source with the answers to all 61 tasks.

    A token takes the label of its first character that is not white space, or of its last character
    if it is all white space. An empty span or a byte order mark gets -1 everywhere.

    Args:
        source: The source text.
        offsets: The tokens' character spans [start, end) in `source`.

    Returns:
        int8 [len(offsets), 61], columns in the order of `TASKS`: 1, 0, or -1 where a token is
        outside the task's population.

    Raises:
        ValueError: Python cannot parse the source.

    Example:
        >>> from ksparse.evals.probing.python_labels import TASKS, labels
        >>> column = [task.name for task in TASKS].index("keyword")
        >>> labels("if x: y", [(0, 2), (3, 4), (4, 5)])[:, column].tolist()
        [1, 0, -1]
    """
    text, position = _normalise(source)
    marks = _mark_source(text)
    characters = (
        position[[_deciding_character(source, start, end) for start, end in offsets]]
        if len(offsets)
        else position[:0]
    )
    columns = [
        np.where(marks[task.among][characters], marks[task.name][characters], np.int8(-1))
        for task in TASKS
    ]
    return np.stack(columns, 1).astype(np.int8)


def _deciding_character(source: str, start: int, end: int) -> int:
    """Return the character that decides a token's labels; len(source), outside all marks, if
    none."""
    token = source[start:end]
    stripped = token.lstrip()
    if not token:
        return len(source)
    return end - len(stripped) if stripped else end - 1


def _normalise(source: str) -> tuple[str, np.ndarray]:
    """Return the text as the parser reads it, and each source character's position in it.

    Characters that the parser drops are placed at the end of the text.
    """
    bom = source.startswith("\ufeff")
    text = re.sub("\r\n?", "\n", source[bom:])
    codes = np.frombuffer(source.encode("utf-32-le", "surrogatepass"), np.uint32)
    dropped = np.zeros(len(codes) + 1, np.int64)
    dropped[1:-1] = (codes[:-1] == ord("\r")) & (codes[1:] == ord("\n"))
    position = np.arange(len(codes) + 1) - dropped.cumsum() - bom
    position[:bom] = len(text)
    return text, position


def _mark_source(text: str) -> dict[str, np.ndarray]:
    """Return all marks of a text, bool[characters + 1] each; the last entry is never set."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes and comparisons with literals concern the source's author, not us.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree, top = ast.parse(text), symtable.symtable(text, "<source>", "exec")
            code = MarkedSource(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(
            f"Python cannot parse this source: {str(error) or type(error).__name__}"
        ) from error
    mark_layout(code)
    mark_brackets(code)
    mark_tokens(code)
    nodes = list(walk(tree, top))
    declared = {name for node, _ in nodes if isinstance(node, ast.Global) for name in node.names}
    names = NameMarker(code, top, declared)
    for node, scope in nodes:
        mark_extents(code, node, scope)
        mark_words(code, node)
        names.mark(node, scope)
    _combine_marks(code.marks)
    return code.marks


def _combine_marks(marks: dict[str, np.ndarray]) -> None:
    """Set the marks that combine others."""
    marks["all tokens"][:-1] = True
    marks["strings"] = marks["in_string"]
    marks["keyword"] = marks["keywords"]
    marks["begins_line"] &= marks["code"]
    marks["code in functions"] &= marks["code"]
    marks["identifiers in import statements"] = marks["identifiers"] & marks["in_import"]
    marks["assignment_operator"] &= ~(
        marks["equals signs"] & (marks["code in brackets"] | marks["parameter lists"])
    )
    marks["code in brackets"] &= marks["code"]
    marks["white space"] &= ~(marks["strings"] | marks["in_comment"])
    marks["white space between logical lines"] &= marks["white space"]
