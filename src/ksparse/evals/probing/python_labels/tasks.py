"""The 61 questions of the built-in probe suite, and the rules for those that a word decides."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PythonTask:
    """A binary question about a token of Python source.

    Attributes:
        name: The task's name, also the name of its mark.
        family: The group that reports show it in.
        positive: What label 1 means.
        among: The population: tokens outside it have no label.
    """

    name: str
    family: str
    positive: str
    among: str


# Rows: name | positive | among.
_TABLE = {
    "region": """
        in_comment | in a comment | all tokens
        in_string | in a string literal | all tokens
        in_docstring | in a docstring | strings
        in_replacement_field | in a replacement field, from brace to brace | f-strings
    """,
    "string": """
        double_quoted | in a string with double quotes | strings
        bytes_string | in a string with the prefix b | strings
    """,
    "keyword": """
        keyword | a keyword | words
        definition_keyword | def, class or lambda | keywords
        control_keyword | a keyword of branches, loops, try or with | keywords
        operator_keyword | and, or, not, is, or the in that tests membership | keywords
        constant_keyword | None, True or False | keywords
        exit_keyword | return, yield, raise, break or continue | keywords
    """,
    "name": """
        attribute | the name after a dot in an expression | identifiers
        called_name | the name that a call calls | identifiers
        keyword_argument | the name of a keyword argument | identifiers
        module_name | part of the name of the module | identifiers in import statements
        snake_case | in lower case with an underscore inside | identifiers
        camel_case | like CamelCase: an upper-case letter first, then lower | identifiers
        constant_case | two characters or more, and letters all in upper case | identifiers
        dunder | with two underscores at both ends | identifiers
        private | with a leading underscore, and no dunder | identifiers
        self_or_cls | self or cls | identifiers
    """,
    "scope": """
        bound_name | bound or deleted here rather than read | variables
        parameter | a parameter in its signature | bound names
        parameter_use | the value of a parameter | names read
        local_variable | local to its function or comprehension | variables
        global_variable | global, and no builtin | variables
        free_variable | of a function around its own | variables
        builtin_name | a builtin that the module does not rebind | variables
        imported_name | what an import statement has bound | names read
    """,
    "function": """
        in_call_arguments | between the parentheses of a call | code
        in_decorator | in a decorator | code
        in_class_body | in a class body and in no function of it | code
        in_method | in the body of a method rather than of another function | code in functions
        in_async_function | in the body of an async function | code in functions
    """,
    "statement": """
        in_import | in an import statement | code
        in_raise | in a raise statement | code
        in_return | in a return statement | code
        in_if_branch | in the body of an if or an elif | code
        in_else_branch | in the body of the else of an if | code
        in_loop_body | in the body of a loop | code
        in_with_body | in the body of a with statement | code
        in_try_body | in the body of a try statement | code
        in_handler | in an except clause or the body of a finally | code
    """,
    "expression": """
        in_comprehension | in a comprehension or a generator expression | code
        in_subscript | between the brackets of a subscript | code
    """,
    "operator": """
        arithmetic_operator | an arithmetic operator | operators
        comparison_operator | a comparison | operators
        assignment_operator | an assignment, augmented or not | operators
    """,
    "number": """
        float_number | a float or an imaginary number | numbers
        based_number | hexadecimal, octal or binary | numbers
        zero_or_one | 0 or 1 | numbers
    """,
    "bracket": """
        in_braces | in braces, as the innermost brackets | code in brackets
        in_nested_brackets | in two pairs of brackets or more | code in brackets
        closing_bracket | a closing bracket | brackets
    """,
    "layout": """
        indented_thrice | on a logical line indented three times or more | code
        begins_line | the first character of a logical line | code
        ends_line | in the punctuation that ends a logical line, or last word | code
        blank_line | in a blank line | white space
        indent_increase | before a line that is indented more | white space between logical lines
        indent_decrease | before a line that is indented less | white space between logical lines
    """,
}

TASKS = tuple(
    PythonTask(name, family, positive, among)
    for family, rows in _TABLE.items()
    for row in rows.strip().splitlines()
    for name, positive, among in [map(str.strip, row.split("|"))]
)


def _is_dunder(name: str) -> bool:
    return len(name) > 4 and name[:2] == name[-2:] == "__"


def _one_of(words: str) -> Callable[[str], bool]:
    return frozenset(words.split()).__contains__


# Tasks decided by the spelling of a Python token, by the population the token belongs to.
SPELLING_RULES: dict[str, dict[str, Callable[[str], object]]] = {
    "keywords": {
        "definition_keyword": _one_of("def class lambda"),
        "control_keyword": _one_of("if elif else for while try except finally with match case"),
        # The "in" of a `for` is unmarked later, from the syntax tree.
        "operator_keyword": _one_of("and or not is in"),
        "constant_keyword": _one_of("None True False"),
        "exit_keyword": _one_of("return yield raise break continue"),
    },
    "identifiers": {
        "snake_case": lambda name: "_" in name.strip("_") and name.islower(),
        "camel_case": lambda name: (
            name.lstrip("_")[:1].isupper() and "_" not in name.strip("_") and not name.isupper()
        ),
        "constant_case": lambda name: len(name) > 1 and name.isupper(),
        "dunder": _is_dunder,
        "private": lambda name: name[0] == "_" and name.strip("_") and not _is_dunder(name),
        "self_or_cls": _one_of("self cls"),
    },
    "numbers": {
        "float_number": re.compile(r"(?!0[xX]).*[.eEjJ].*").fullmatch,
        "based_number": re.compile(r"0[xXoObB].*").fullmatch,
        "zero_or_one": _one_of("0 1"),
    },
    "operators": {
        # Stars and slashes that are not operators are unmarked later.
        "arithmetic_operator": _one_of("+ - * / // % ** @"),
        "comparison_operator": _one_of("< > <= >= == !="),
        # The "=" of an argument or a default is unmarked later.
        "assignment_operator": _one_of("= := += -= *= /= //= %= **= @= &= |= ^= <<= >>="),
    },
    "brackets": {"closing_bracket": _one_of(") ] }")},
}

# Tasks that cover a field of a statement or an expression; "" is the whole node.
EXTENTS: dict[type[ast.AST], tuple[tuple[str, str], ...]] = {
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
