"""The built-in probe suite: 61 questions about a token of Python source whose answers the standard
library knows.

    source ─▶ tokenize, ast, symtable ─▶ marks: {name: bool[characters]} ─▶ labels[tokens, 61]

A mark is a set of characters. Each task has one under its own name, and each population of tokens
one under its phrase: the label is 1 where both hold, 0 where only the population does, -1
elsewhere. Names inside f-strings are text, not identifiers, because Python 3.11 cannot say where
they are.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import re
import symtable
import tokenize
import warnings
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class PythonTask:
    """A binary question: label 1 is `positive`, and tokens not `among` those named have no
    label."""

    name: str
    family: str
    positive: str
    among: str


_TABLE = {
    "region": """
        in_comment               | in a comment                                              | all tokens
        in_string                | in a string literal                                       | all tokens
        in_docstring             | in a docstring                                            | strings
        in_replacement_field     | in a replacement field, from brace to brace               | f-strings
    """,
    "string": """
        double_quoted            | in a string with double quotes                            | strings
        bytes_string             | in a string with the prefix b                             | strings
    """,
    "keyword": """
        keyword                  | a keyword                                                 | words
        definition_keyword       | def, class or lambda                                      | keywords
        control_keyword          | a keyword of branches, loops, try or with                 | keywords
        operator_keyword         | and, or, not, is, or the in that tests membership         | keywords
        constant_keyword         | None, True or False                                       | keywords
        exit_keyword             | return, yield, raise, break or continue                   | keywords
    """,
    "name": """
        attribute                | the name after a dot in an expression                     | identifiers
        called_name              | the name that a call calls                                | identifiers
        keyword_argument         | the name of a keyword argument                            | identifiers
        module_name              | part of the name of the module                            | identifiers in import statements
        snake_case               | in lower case with an underscore inside                   | identifiers
        camel_case               | like CamelCase: an upper-case letter first, then lower    | identifiers
        constant_case            | two characters or more, and letters all in upper case     | identifiers
        dunder                   | with two underscores at both ends                         | identifiers
        private                  | with a leading underscore, and no dunder                  | identifiers
        self_or_cls              | self or cls                                               | identifiers
    """,
    "scope": """
        bound_name               | bound or deleted here rather than read                    | variables
        parameter                | a parameter in its signature                              | bound names
        parameter_use            | the value of a parameter                                  | names read
        local_variable           | local to its function or comprehension                    | variables
        global_variable          | global, and no builtin                                    | variables
        free_variable            | of a function around its own                              | variables
        builtin_name             | a builtin that the module does not rebind                 | variables
        imported_name            | what an import statement has bound                        | names read
    """,
    "function": """
        in_call_arguments        | between the parentheses of a call                         | code
        in_decorator             | in a decorator                                            | code
        in_class_body            | in a class body and in no function of it                  | code
        in_method                | in the body of a method rather than of another function   | code in functions
        in_async_function        | in the body of an async function                          | code in functions
    """,
    "statement": """
        in_import                | in an import statement                                    | code
        in_raise                 | in a raise statement                                      | code
        in_return                | in a return statement                                     | code
        in_if_branch             | in the body of an if or an elif                           | code
        in_else_branch           | in the body of the else of an if                          | code
        in_loop_body             | in the body of a loop                                     | code
        in_with_body             | in the body of a with statement                           | code
        in_try_body              | in the body of a try statement                            | code
        in_handler               | in an except clause or the body of a finally              | code
    """,
    "expression": """
        in_comprehension         | in a comprehension or a generator expression              | code
        in_subscript             | between the brackets of a subscript                       | code
    """,
    "operator": """
        arithmetic_operator      | an arithmetic operator                                    | operators
        comparison_operator      | a comparison                                              | operators
        assignment_operator      | an assignment, augmented or not                           | operators
    """,
    "number": """
        float_number             | a float or an imaginary number                            | numbers
        based_number             | hexadecimal, octal or binary                              | numbers
        zero_or_one              | 0 or 1                                                    | numbers
    """,
    "bracket": """
        in_braces                | in braces, as the innermost brackets                      | code in brackets
        in_nested_brackets       | in two pairs of brackets or more                          | code in brackets
        closing_bracket          | a closing bracket                                         | brackets
    """,
    "layout": """
        indented_thrice          | on a logical line indented three times or more            | code
        begins_line              | the first character of a logical line                     | code
        ends_line                | in the punctuation that ends a logical line, or last word | code
        blank_line               | in a blank line                                           | white space
        indent_increase          | before a line that is indented more                       | white space between logical lines
        indent_decrease          | before a line that is indented less                       | white space between logical lines
    """,
}

TASKS = tuple(
    PythonTask(name, family, positive, among)
    for family, rows in _TABLE.items()
    for row in rows.strip().splitlines()
    for name, positive, among in [map(str.strip, row.split("|"))]
)

# Tasks that the spelling of a Python token decides, by the population that it belongs to.
_SPELLED: dict[str, dict[str, Callable[[str], object]]] = {
    "keywords": {
        "definition_keyword": {"def", "class", "lambda"}.__contains__,
        "control_keyword": {
            "if",
            "elif",
            "else",
            "for",
            "while",
            "try",
            "except",
            "finally",
            "with",
            "match",
            "case",
        }.__contains__,
        "operator_keyword": {
            "and",
            "or",
            "not",
            "is",
            "in",
        }.__contains__,  # less the "in" of each for
        "constant_keyword": {"None", "True", "False"}.__contains__,
        "exit_keyword": {"return", "yield", "raise", "break", "continue"}.__contains__,
    },
    "identifiers": {
        "snake_case": lambda name: "_" in name.strip("_") and name.islower(),
        "camel_case": lambda name: (
            name.lstrip("_")[:1].isupper() and "_" not in name.strip("_") and not name.isupper()
        ),
        "constant_case": lambda name: len(name) > 1 and name.isupper(),
        "dunder": lambda name: _is_dunder(name),
        "private": lambda name: name[0] == "_" and name.strip("_") and not _is_dunder(name),
        "self_or_cls": {"self", "cls"}.__contains__,
    },
    "numbers": {
        "float_number": re.compile(r"(?!0[xX]).*[.eEjJ].*").fullmatch,
        "based_number": re.compile(r"0[xXoObB].*").fullmatch,
        "zero_or_one": {"0", "1"}.__contains__,
    },
    "operators": {
        "arithmetic_operator": {
            "+",
            "-",
            "*",
            "/",
            "//",
            "%",
            "**",
            "@",
        }.__contains__,  # less stars and slashes that are no operators
        "comparison_operator": {"<", ">", "<=", ">=", "==", "!="}.__contains__,
        "assignment_operator": set(
            [
                "=",
                ":=",
                "+=",
                "-=",
                "*=",
                "/=",
                "//=",
                "%=",
                "**=",
                "@=",
                "&=",
                "|=",
                "^=",
                "<<=",
                ">>=",
            ]
        ).__contains__,  # less "=" of an argument or a default
    },
    "brackets": {"closing_bracket": {")", "]", "}"}.__contains__},
}

# Tasks that are the extent of a part of a statement or an expression; "" is all of it.
_EXTENTS: dict[type[ast.AST], tuple[tuple[str, str], ...]] = {
    ast.Import: (("in_import", ""),),
    ast.ImportFrom: (("in_import", ""),),
    ast.Raise: (("in_raise", ""),),
    ast.Return: (("in_return", ""),),
    ast.If: (("in_if_branch", "body"),),
    ast.While: (("in_loop_body", "body"),),
    ast.For: (("in_loop_body", "body"),),
    ast.AsyncFor: (("in_loop_body", "body"),),
    ast.With: (("in_with_body", "body"),),
    ast.AsyncWith: (("in_with_body", "body"),),
    ast.Try: (("in_try_body", "body"), ("in_handler", "handlers"), ("in_handler", "finalbody")),
    ast.TryStar: (("in_try_body", "body"), ("in_handler", "handlers"), ("in_handler", "finalbody")),
    ast.ListComp: (("in_comprehension", ""),),
    ast.SetComp: (("in_comprehension", ""),),
    ast.DictComp: (("in_comprehension", ""),),
    ast.GeneratorExp: (("in_comprehension", ""),),
}

_Placed = ast.stmt | ast.expr | ast.arg | ast.alias | ast.keyword | ast.ExceptHandler | ast.pattern
"""Nodes that have a place in the text."""
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_Block = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef | _Comprehension
"""Nodes whose names are their own."""
_COMPREHENSIONS: dict[type[ast.AST], str] = {
    ast.ListComp: "listcomp",
    ast.SetComp: "setcomp",
    ast.DictComp: "dictcomp",
    ast.GeneratorExp: "genexpr",
}
_BUILTINS = frozenset(
    name for name in dir(builtins) if name[0] != "_"
)  # without "_", which gettext and prompts put there
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_PUNCTUATION = frozenset(",:;.") | {"->", "...", "!"}
_LAYOUT = {tokenize.INDENT: 1, tokenize.DEDENT: -1}
_IGNORED = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER, *_LAYOUT}
_QUOTE = re.compile(r"([a-zA-Z]*)('''|\"\"\"|'|\")")
_QUOTED = re.compile(r"('''|\"\"\"|'|\")(?:\\.|(?!\1).)*\1", re.DOTALL)


def labels(source: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return int8 [len(offsets), 61] in the order of TASKS: 1, 0, or -1 where a token is outside
    the task's population.

    offsets are the tokens' character spans [start, end) in source. A token has the label of its
    first character that is not white space, or of its last character if it is nothing but white
    space; an empty span, or a byte order mark, has -1 everywhere. Raise ValueError if Python cannot
    parse the source.
    """
    text, place = _normalise(source)
    marks = _mark(text)
    characters = (
        place[[_character(source, start, end) for start, end in offsets]]
        if len(offsets)
        else place[:0]
    )
    columns = [
        np.where(marks[task.among][characters], marks[task.name][characters], np.int8(-1))
        for task in TASKS
    ]
    return np.stack(columns, 1).astype(np.int8)


def _character(source: str, start: int, end: int) -> int:
    """Return the character that decides a token's labels; len(source), which is outside everything,
    if it has none."""
    token = source[start:end]
    bare = token.lstrip()
    if not token:
        return len(source)
    return end - len(bare) if bare else end - 1


def _normalise(source: str) -> tuple[str, np.ndarray]:
    """Return the text as the parser reads it, and the place in it of each character of source; what
    has none is at its end."""
    mark = source.startswith("\ufeff")
    text = re.sub("\r\n?", "\n", source[mark:])
    codes = np.frombuffer(source.encode("utf-32-le", "surrogatepass"), np.uint32)
    dropped = np.zeros(len(codes) + 1, np.int64)
    dropped[1:-1] = (codes[:-1] == ord("\r")) & (codes[1:] == ord("\n"))
    place = np.arange(len(codes) + 1) - dropped.cumsum() - mark
    place[:mark] = len(text)
    return text, place


def _mark(text: str) -> dict[str, np.ndarray]:
    """Return the marks of a text, bool[characters + 1] each; the last is never set."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes and comparisons with literals are the business of who wrote the
            # source.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree, top = ast.parse(text), symtable.symtable(text, "<source>", "exec")
            code = _Code(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(
            f"Python cannot parse this source: {str(error) or type(error).__name__}"
        ) from error
    _mark_layout(code)
    _mark_brackets(code)
    _mark_tokens(code)
    nodes = list(_walk(tree, top))
    names = _Names(
        code,
        top,
        {name for node, _ in nodes if isinstance(node, ast.Global) for name in node.names},
    )
    for node, scope in nodes:
        _mark_extents(code, node, scope)
        _mark_words(code, node)
        names.mark(node, scope)
    _combine(code.marks)
    return code.marks


# ---- the text, its tokens, and places in it ------------------------------------------------------


class _Token(NamedTuple):
    """A token at characters [start, end); an f-string is one token, of type STRING."""

    type: int
    text: str
    start: int
    end: int


class _Code:
    """A text with its Python tokens, where parts of its tree are, and its marks; tokens are those
    that one sees, raw are all."""

    def __init__(self, text: str):
        self.text = text
        data = np.frombuffer(text.encode(), np.uint8)
        lines = np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1])
        characters = np.concatenate(
            [((data & 0xC0) != 0x80).cumsum() - 1, [len(text)]]
        )  # the character of each byte
        self._bytes, self._characters = lines.tolist(), characters.tolist()
        self._lines = [*characters[lines].tolist(), len(text)]
        self.fields: defaultdict[int, list[tuple[int, int]]] = defaultdict(
            list
        )  # the replacement fields of the f-string that begins there
        self.raw = _joined(self._tokens())
        self.tokens = [token for token in self.raw if token.type not in _IGNORED]
        if not hasattr(tokenize, "FSTRING_START"):
            self.fields |= {
                token.start: list(_fields(token))
                for token in self.tokens
                if token.type == tokenize.STRING
            }
        self.starts = [token.start for token in self.tokens]
        self.partner: dict[
            int, int
        ] = {}  # the number of a closing bracket's token: that of the opening one
        self.first: list[int] = []  # the first character of each logical line
        self.marks: defaultdict[str, np.ndarray] = defaultdict(
            lambda: np.zeros(len(text) + 1, bool)
        )

    def _tokens(self) -> Iterator[_Token]:
        """Yield the tokens, with f-strings in one piece; since Python 3.12 they come in several."""
        depth = begin = level = opening = 0
        for kind, text, *places, _ in tokenize.generate_tokens(io.StringIO(self.text).readline):
            start, end = (
                min(self._lines[line - 1] + column, len(self.text)) for line, column in places
            )
            name = tokenize.tok_name[kind]
            if name.endswith("STRING_START"):
                begin = begin if depth else start
                depth += 1
            elif name.endswith("STRING_END"):
                depth -= 1
                if not depth:
                    yield _Token(tokenize.STRING, self.text[begin:end], begin, end)
            elif not depth and (kind != tokenize.ERRORTOKEN or text.strip()):
                yield _Token(kind, text, start, end)
            elif kind == tokenize.OP and text in "{}":
                opening = opening if level else start
                level += 1 if text == "{" else -1
                if not level:
                    self.fields[begin].append((opening, end))

    def start(self, node: _Placed) -> int:
        """Return the first character of a node, whose columns are in bytes."""
        return self._characters[self._bytes[node.lineno - 1] + node.col_offset]

    def end(self, node: _Placed) -> int:
        """Return the character behind a node."""
        line, column = node.end_lineno, node.end_col_offset
        assert line is not None and column is not None  # as in all that ast.parse returns
        return self._characters[self._bytes[line - 1] + column]

    def at(self, character: int) -> int:
        """Return the number of the first token that begins there or later."""
        return bisect_left(self.starts, character)

    def last(self, node: _Placed) -> int:
        """Return the number of a node's last token."""
        return self.at(self.end(node)) - 1

    def find(self, text: str, start: int) -> int:
        """Return the number of the first token of that spelling from a character on."""
        number = self.at(start)
        while self.tokens[number].text != text:
            number += 1
        return number

    def paint(self, mark: str, start: int, end: int, value: bool = True) -> None:
        """Set a mark on characters [start, end)."""
        self.marks[mark][start:end] = value

    def paint_token(self, mark: str, number: int, value: bool = True) -> None:
        """Set a mark on a token."""
        self.paint(mark, self.tokens[number].start, self.tokens[number].end, value)

    def paint_nodes(self, mark: str, nodes: Sequence[_Placed], value: bool = True) -> None:
        """Set a mark from the first of some nodes to the last; a decorated definition begins with
        its decorators."""
        if nodes:
            decorators = getattr(nodes[0], "decorator_list", [])
            start = self.start(decorators[0] if decorators else nodes[0])
            self.paint(mark, self.line(start) if decorators else start, self.end(nodes[-1]), value)

    def line(self, character: int) -> int:
        """Return where the logical line of a character begins."""
        return self.first[bisect_left(self.first, character + 1) - 1]


def _joined(tokens: Iterable[_Token]) -> list[_Token]:
    """Return the tokens with names in one piece: before Python 3.12 tokenize stumbles over some
    letters, as in "℘" or "x·y"."""
    found: list[_Token] = []
    for token in tokens:
        if token.type in (tokenize.NAME, tokenize.ERRORTOKEN):
            token = token._replace(type=tokenize.NAME)
            if found and found[-1].type == tokenize.NAME and found[-1].end == token.start:
                token = token._replace(text=found[-1].text + token.text, start=found.pop().start)
        found.append(token)
    return found


# ---- marks that tokens decide --------------------------------------------------------------------


def _mark_layout(code: _Code) -> None:
    """Mark logical lines, their indentation, and what is between them."""
    depth = before = gap = 0
    line: list[_Token] = []
    for token in code.raw:
        depth += _LAYOUT.get(token.type, 0)
        if token.type == tokenize.NEWLINE and line:
            _mark_line(code, line, depth)
            line, before, gap = [], depth, token.start
        elif token.type not in _IGNORED:
            if not line:
                code.first.append(token.start)
                code.paint("begins_line", token.start, token.start + 1)
                code.paint("white space between logical lines", gap, token.start)
                code.paint("indent_increase", gap, token.start, depth > before)
                code.paint("indent_decrease", gap, token.start, depth < before)
            line.append(token)
        elif token.type == tokenize.COMMENT:
            code.paint("in_comment", token.start, token.end)
    for blank in re.finditer(r"(?m)^[^\S\n]*\n", code.text):
        code.paint("blank_line", *blank.span())


def _mark_line(code: _Code, line: list[_Token], depth: int) -> None:
    """Mark one logical line; it ends with all the punctuation behind its last word, number or
    string, or with that if there is none."""
    start, end = line[0].start, line[-1].end
    code.paint("indented_thrice", start, end, depth >= 3)
    closing = (
        next((i for i, token in enumerate(reversed(line)) if token.type != tokenize.OP), len(line))
        or 1
    )
    code.paint("ends_line", line[-closing].start, end)


def _mark_brackets(code: _Code) -> None:
    """Mark what is in brackets; a bracket is in its own."""
    stack: list[int] = []
    for number, token in enumerate(code.tokens):
        if token.type == tokenize.OP and token.text in _OPENING:
            stack.append(number)
        if stack:
            code.paint_token("code in brackets", number)
            code.paint_token("in_braces", number, code.tokens[stack[-1]].text == "{")
            code.paint_token("in_nested_brackets", number, len(stack) > 1)
        if token.type == tokenize.OP and token.text in _CLOSING:
            code.partner[number] = stack.pop()


def _mark_tokens(code: _Code) -> None:
    """Mark what the spelling of a token decides."""
    for number, token in enumerate(code.tokens):
        if token.type == tokenize.STRING:
            _mark_string(code, token)
            continue
        code.paint("code", token.start, token.end)
        if token.type == tokenize.OP:
            _mark_operator(code, number)
        elif token.type == tokenize.NUMBER:
            _mark_spelling(code, "numbers", token)
        else:
            code.paint("words", token.start, token.end)
            _mark_spelling(
                code, "keywords" if keyword.iskeyword(token.text) else "identifiers", token
            )
    for space in re.finditer(r"\s+", code.text):
        code.paint("white space", *space.span())


def _mark_spelling(code: _Code, among: str, token: _Token) -> None:
    """Mark a token as one of a population, and the tasks on it that its spelling decides."""
    code.paint(among, token.start, token.end)
    for task, rule in _SPELLED[among].items():
        code.paint(task, token.start, token.end, bool(rule(token.text)))


def _mark_operator(code: _Code, number: int) -> None:
    """Mark a bracket or an operator; a star or a slash is arithmetic only behind an operand."""
    token = code.tokens[number]
    if token.text in _OPENING or token.text in _CLOSING:
        _mark_spelling(code, "brackets", token)
    if token.text in _OPENING | _CLOSING | _PUNCTUATION:
        return
    behind = code.tokens[number - 1]
    binary = not code.marks["begins_line"][token.start] and _ends_operand(behind)
    if (token.text == "@" and not binary) or (
        token.text == "*" and behind.text in {"import", "except"}
    ):
        return
    _mark_spelling(code, "operators", token)
    code.paint_token("equals signs", number, token.text == "=")
    if token.text in {"*", "**", "/"} and not binary:
        code.paint_token("arithmetic_operator", number, False)


def _ends_operand(token: _Token) -> bool:
    """Say whether a token can be the last of what an operator has on its left."""
    if token.type == tokenize.OP:
        return token.text in _CLOSING or token.text == "..."
    return not keyword.iskeyword(token.text) or token.text in {"None", "True", "False"}


def _mark_string(code: _Code, token: _Token) -> None:
    """Mark a string literal by its prefix and its quotes, and the replacement fields of an
    f-string."""
    prefix, quote = _opening(token.text)
    formatted = _is_formatted(prefix)
    kinds = {
        "in_string": True,
        "double_quoted": quote[0] == '"',
        "bytes_string": "b" in prefix.lower(),
        "f-strings": formatted,
    }
    for mark, value in kinds.items():
        code.paint(mark, token.start, token.end, value)
    if formatted:
        for start, end in code.fields[token.start]:
            code.paint("in_replacement_field", start, end)


def _is_dunder(name: str) -> bool:
    return len(name) > 4 and name[:2] == name[-2:] == "__"


def _is_formatted(prefix: str) -> bool:
    return bool(set(prefix.lower()) & {"f", "t"})


def _opening(literal: str) -> tuple[str, str]:
    """Return the prefix of a string literal and its quotes."""
    match = _QUOTE.match(literal)
    assert match  # what the tokenizer calls a string begins so
    return match[1], match[2]


def _fields(token: _Token) -> Iterator[tuple[int, int]]:
    """Yield the extents of a string's replacement fields, braces included, by the grammar before
    Python 3.12; a field in a format is part of it."""
    literal = token.text
    prefix, quote = _opening(literal)
    if not _is_formatted(prefix):
        return
    skipped = r"\{\{|[^{]" if "r" in prefix.lower() else r"\\N\{[^}]*\}|\\[^{]|\{\{|[^{]"
    text = re.compile(f"(?:{skipped})*", re.DOTALL)
    at = len(prefix) + len(quote)
    while (match := text.match(literal, at)) and (at := match.end()) < len(literal):
        end = _field_end(literal, at + 1)
        yield token.start + at, token.start + end
        at = end


def _field_end(literal: str, at: int) -> int:
    """Return where a replacement field ends whose expression begins at a character: behind its
    brace."""
    depth = 0
    while depth or literal[at] not in ":}":
        depth += (literal[at] in "([{") - (literal[at] in ")]}")
        quoted = _QUOTED.match(literal, at)
        at = quoted.end() if quoted else at + 1
    while literal[at] != "}":  # the format, where quotes are text
        at = _field_end(literal, at + 1) if literal[at] == "{" else at + 1
    return at + 1


# ---- marks that the tree decides -----------------------------------------------------------------


def _mark_extents(code: _Code, node: ast.AST, scope: _Scope) -> None:
    """Mark the parts of a node that are tasks as they are, and those that go by brackets or
    lines."""
    for mark, field in _EXTENTS.get(type(node), ()):
        part: Any = getattr(node, field) if field else node
        code.paint_nodes(mark, part if isinstance(part, list) else [part] if part else [])
    if decorators := getattr(node, "decorator_list", None):
        code.paint("in_decorator", code.line(code.start(decorators[0])), code.end(decorators[-1]))
    match node:
        case ast.Call() | ast.Subscript():
            closing = code.last(node)
            opening = code.tokens[code.partner[closing]]
            code.paint(
                "in_call_arguments" if isinstance(node, ast.Call) else "in_subscript",
                opening.end,
                code.tokens[closing].start,
            )
        case ast.If(orelse=[first, *_]) if not (
            isinstance(first, ast.If) and code.text.startswith("elif", code.start(first))
        ):
            code.paint_nodes("in_else_branch", node.orelse)
        case ast.Module() | ast.ClassDef():
            _mark_docstring(code, node)
            if isinstance(node, ast.ClassDef):
                code.paint_nodes("in_class_body", node.body)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            _mark_docstring(code, node)
            _mark_function(code, node, scope)
        case ast.Lambda():
            code.paint("parameter lists", code.start(node), code.start(node.body))


def _mark_docstring(
    code: _Code, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> None:
    match node.body:
        case [ast.Expr(value=ast.Constant(value=str())) as first, *_]:
            code.paint_nodes("in_docstring", [first])


def _mark_function(
    code: _Code, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope
) -> None:
    """Mark a function, over what holds for what it is in."""
    code.paint_nodes("code in functions", node.body)
    code.paint_nodes("in_class_body", node.body, False)
    code.paint_nodes("in_method", node.body, scope.kind == "class")
    code.paint_nodes("in_async_function", node.body, isinstance(node, ast.AsyncFunctionDef))


def _mark_words(code: _Code, node: ast.AST) -> None:
    """Mark the words whose part in a sentence only the tree knows."""
    match node:
        case ast.Attribute():
            code.paint_token("attribute", code.last(node))
        case ast.Call(func=ast.Name() | ast.Attribute()):
            code.paint_token("called_name", code.last(node.func))
        case ast.keyword(arg=str()):
            code.paint_token("keyword_argument", code.at(code.start(node)))
        case ast.Import():
            for alias in node.names:
                for dots in range(alias.name.count(".") + 1):
                    code.paint_token("module_name", code.at(code.start(alias)) + 2 * dots)
        case ast.ImportFrom():
            code.paint(
                "module_name",
                code.start(node),
                code.tokens[code.find("import", code.start(node))].start,
            )
        case ast.For() | ast.AsyncFor():
            code.paint_token("operator_keyword", code.find("in", code.end(node.target)), False)
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            for generator in node.generators:
                code.paint_token(
                    "operator_keyword", code.find("in", code.end(generator.target)), False
                )
        case ast.Match():
            for character in (
                code.start(node),
                *(code.line(code.start(case.pattern)) for case in node.cases),
            ):
                _mark_soft_keyword(code, code.tokens[code.at(character)])
        case ast.stmt() if type(node).__name__ == "TypeAlias":  # since Python 3.12
            _mark_soft_keyword(code, code.tokens[code.at(code.start(node))])


def _mark_soft_keyword(code: _Code, token: _Token) -> None:
    """Mark a name as a keyword after all."""
    for mark in ("identifiers", *_SPELLED["identifiers"]):
        code.paint(mark, token.start, token.end, False)
    _mark_spelling(code, "keywords", token)


def _combine(marks: dict[str, np.ndarray]) -> None:
    """Set the marks that are made of others."""
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


# ---- marks that scopes decide --------------------------------------------------------------------


@dataclass(frozen=True)
class _Scope:
    """A block of the tree with its symbol table, None if it has none; owner is the class whose
    private names are mangled in it.

    A comprehension is part of the function it is in, but for its own variables: since Python 3.12
    most have no table.
    """

    kind: str
    table: symtable.SymbolTable | None
    outer: _Scope | None = None
    owner: str = ""
    own: frozenset[str] = frozenset()

    def mangled(self, name: str) -> str:
        """Return the name that the symbol tables have for a name in this block."""
        private = name.startswith("__") and not name.endswith("__") and self.owner.strip("_")
        return f"_{self.owner.lstrip('_')}{name}" if private else name

    def symbol(self, name: str) -> symtable.Symbol | None:
        """Return what the block's table knows of a mangled name."""
        try:
            return self.table.lookup(name) if self.table else None
        except KeyError:
            return None

    def place(self, name: str) -> str:
        """Say whether the value of a mangled name is local, free, global or in a class; "" if the
        tables do not have the name."""
        symbol = self.symbol(name)
        if self.kind == "comprehension" and self.outer:
            if name in self.own:
                return "local"
            if symbol is None or (symbol.is_free() and self.outer.kind != "class"):
                place = self.outer.place(name)
                return (
                    "global" if place == "class" else place
                )  # what is inside a class does not see the names of its body
        if symbol is None:
            return ""
        return (
            "free"
            if symbol.is_free()
            else "global"
            if symbol.is_global()
            else "class"
            if self.kind == "class"
            else "local"
        )

    def home(self, name: str) -> symtable.Symbol | None:
        """Return a mangled name's symbol in the block that binds it; None if that is a
        comprehension."""
        scope, symbol = self, self.symbol(name)
        while name not in scope.own and scope.outer and (symbol is None or symbol.is_free()):
            scope = scope.outer
            symbol = None if scope.kind == "class" else scope.symbol(name)
        return None if name in scope.own else symbol


class _Inside(NamedTuple):
    """The part of a node that is in the node's own block."""

    node: _Block
    children: list[ast.AST]


def _walk(tree: ast.Module, top: symtable.SymbolTable) -> Iterator[tuple[ast.AST, _Scope]]:
    """Yield each node outside f-strings and the block it is in, parents first, and blocks in the
    order of the symbol tables.

    A table does not say which node it is of: it is the next one of the node's kind, name and line.
    """
    tables = _tables(top)
    stack: list[tuple[ast.AST | _Inside, _Scope, bool]] = [(tree, _Scope("module", top), False)]
    while stack:
        node, scope, quiet = stack.pop()
        children: Sequence[ast.AST | _Inside]
        if isinstance(node, _Inside):
            children, scope = node.children, _enter(node.node, scope, tables)
        else:
            if not quiet:
                yield node, scope
            quiet = quiet or isinstance(node, ast.JoinedStr) or type(node).__name__ == "TemplateStr"
            children = _children(node)
        stack.extend((child, scope, quiet) for child in reversed(children))


def _tables(top: symtable.SymbolTable) -> dict[tuple[str, str, int], deque[symtable.SymbolTable]]:
    """Return the blocks of each kind, name and line in order."""
    found: dict[tuple[str, str, int], deque[symtable.SymbolTable]] = defaultdict(deque)
    stack = [top]
    while stack:
        table = stack.pop()
        found[str(table.get_type()), table.get_name().strip("<>"), table.get_lineno()].append(table)
        stack.extend(reversed(table.get_children()))
    return found


def _enter(
    node: _Block, scope: _Scope, tables: dict[tuple[str, str, int], deque[symtable.SymbolTable]]
) -> _Scope:
    """Return the block of a node."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    name: str = _COMPREHENSIONS.get(type(node), "") or getattr(node, "name", "lambda")
    found = tables.get((kind, name, node.lineno))
    table = found.popleft() if found else None
    if not isinstance(node, _Comprehension):
        return _Scope(kind, table, scope, name if kind == "class" else scope.owner)
    targets = (part for generator in node.generators for part in ast.walk(generator.target))
    own = {
        scope.mangled(part.id)
        for part in targets
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    return _Scope("comprehension", table, scope, scope.owner, frozenset(own))


def _children(node: ast.AST) -> list[ast.AST | _Inside]:
    """Return a node's children in the order in which the compiler's symbol tables visit them."""
    outside: list[ast.AST | None]
    inside: list[ast.AST]
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            args = node.args
            every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
            parameters = [arg for arg in every if arg]
            outside = [
                *args.defaults,
                *args.kw_defaults,
                *(arg.annotation for arg in parameters),
                getattr(node, "returns", None),
                *getattr(node, "decorator_list", []),
            ]
            inside = [*parameters, *(node.body if isinstance(node.body, list) else [node.body])]
        case ast.ClassDef():
            outside, inside = [*node.bases, *node.keywords, *node.decorator_list], [*node.body]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            first, *others = node.generators
            result = [node.value, node.key] if isinstance(node, ast.DictComp) else [node.elt]
            outside, inside = [first.iter], [first.target, *first.ifs, *others, *result]
        case ast.arg():
            return []  # its annotation is outside
        case _:
            return list(ast.iter_child_nodes(node))
    return [*filter(None, outside), _Inside(node, inside)]


class _Names:
    """The names that stand for values, and where those live."""

    def __init__(self, code: _Code, top: symtable.SymbolTable, declared: set[str]):
        self._code = code
        self._global = {symbol.get_name(): symbol for symbol in top.get_symbols()}
        self._rebound = declared | {
            name for name, symbol in self._global.items() if symbol.is_local()
        }

    def mark(self, node: ast.AST, scope: _Scope) -> None:
        """Mark the names that a node reads or binds; the tree says of some only what they are, and
        the tokens where."""
        code = self._code
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                self._place(code.at(code.start(node)), name, scope, "names read")
            case ast.Name(id=name):
                self._place(code.at(code.start(node)), name, scope, "bound names")
            case ast.arg(arg=name):
                number = code.at(code.start(node))
                code.paint_token("parameter", number)
                self._place(number, name, scope, "bound names")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                self._place(code.find("def", code.start(node)) + 1, name, scope, "bound names")
            case ast.ClassDef(name=name):
                self._place(code.at(code.start(node)) + 1, name, scope, "bound names")
            case ast.alias(name=name, asname=None) if name != "*":
                self._place(code.at(code.start(node)), name.partition(".")[0], scope, "bound names")
            case (
                ast.alias(asname=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                self._place(code.last(node), name, scope, "bound names")
            case ast.MatchMapping(rest=str(name)):
                last = next(i for i in range(code.last(node), 0, -1) if code.tokens[i].text == "**")
                self._place(last + 1, name, scope, "bound names")
            case ast.ExceptHandler(name=str(name), type=ast.expr() as caught):
                self._place(code.find("as", code.end(caught)) + 1, name, scope, "bound names")
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                for i, name in enumerate(names):
                    self._place(
                        code.at(code.start(node)) + 1 + 2 * i, name, scope, "declared names"
                    )

    def _place(self, number: int, name: str, scope: _Scope, use: str) -> None:
        """Mark one name with its use and with where its value lives."""
        code, name = self._code, scope.mangled(name)
        place = scope.place(name)
        if not place:
            return  # as in an annotation that is never evaluated
        home = self._global.get(name) if place == "global" else scope.home(name)
        builtin = name in _BUILTINS and name not in self._rebound
        marks = {
            "variables": True,
            use: True,
            "bound_name": use == "bound names",
            "local_variable": place == "local",
            "free_variable": place == "free",
            "global_variable": place == "global" and not builtin,
            "builtin_name": place == "global" and builtin,
            "parameter_use": home is not None and home.is_parameter(),
            "imported_name": home is not None and home.is_imported(),
        }
        for mark, value in marks.items():
            code.paint_token(mark, number, value)
