"""Marks that the syntax tree decides: parts of statements and expressions, and roles of words."""

from __future__ import annotations

import ast
from typing import Any

from ksparse.evals.probing.python_labels.scopes import Scope
from ksparse.evals.probing.python_labels.source import MarkedSource, SourceToken
from ksparse.evals.probing.python_labels.tasks import EXTENTS, SPELLING_RULES
from ksparse.evals.probing.python_labels.tokens import mark_spelling


def mark_extents(code: MarkedSource, node: ast.AST, scope: Scope) -> None:
    """Mark the spans that a node gives to tasks: its fields, its brackets or its lines."""
    for mark, field in EXTENTS.get(type(node), ()):
        part: Any = getattr(node, field) if field else node
        code.paint_nodes(mark, part if isinstance(part, list) else [part] if part else [])
    if decorators := getattr(node, "decorator_list", None):
        code.paint(
            "in_decorator",
            code.line_start(code.start_of(decorators[0])),
            code.end_of(decorators[-1]),
        )
    match node:
        case ast.Call() | ast.Subscript():
            closing = code.last_token(node)
            opening = code.tokens[code.opening_of[closing]]
            code.paint(
                "in_call_arguments" if isinstance(node, ast.Call) else "in_subscript",
                opening.end,
                code.tokens[closing].start,
            )
        case ast.If(orelse=[first, *_]) if not (
            isinstance(first, ast.If) and code.text.startswith("elif", code.start_of(first))
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
            code.paint("parameter lists", code.start_of(node), code.start_of(node.body))


def _mark_docstring(
    code: MarkedSource, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> None:
    match node.body:
        case [ast.Expr(value=ast.Constant(value=str())) as first, *_]:
            code.paint_nodes("in_docstring", [first])


def _mark_function(
    code: MarkedSource, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope
) -> None:
    """Mark a function's body, overriding the marks of what encloses it."""
    code.paint_nodes("code in functions", node.body)
    code.paint_nodes("in_class_body", node.body, False)
    code.paint_nodes("in_method", node.body, scope.kind == "class")
    code.paint_nodes("in_async_function", node.body, isinstance(node, ast.AsyncFunctionDef))


def mark_words(code: MarkedSource, node: ast.AST) -> None:
    """Mark the words whose role only the syntax tree knows."""
    match node:
        case ast.Attribute():
            code.paint_token("attribute", code.last_token(node))
        case ast.Call(func=ast.Name() | ast.Attribute()):
            code.paint_token("called_name", code.last_token(node.func))
        case ast.keyword(arg=str()):
            code.paint_token("keyword_argument", code.token_at(code.start_of(node)))
        case ast.Import():
            for alias in node.names:
                for dots in range(alias.name.count(".") + 1):
                    code.paint_token("module_name", code.token_at(code.start_of(alias)) + 2 * dots)
        case ast.ImportFrom():
            code.paint(
                "module_name",
                code.start_of(node),
                code.tokens[code.find("import", code.start_of(node))].start,
            )
        case ast.For() | ast.AsyncFor():
            code.paint_token("operator_keyword", code.find("in", code.end_of(node.target)), False)
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            for generator in node.generators:
                code.paint_token(
                    "operator_keyword", code.find("in", code.end_of(generator.target)), False
                )
        case ast.Match():
            for position in (
                code.start_of(node),
                *(code.line_start(code.start_of(case.pattern)) for case in node.cases),
            ):
                _mark_soft_keyword(code, code.tokens[code.token_at(position)])
        case ast.stmt() if type(node).__name__ == "TypeAlias":  # since Python 3.12
            _mark_soft_keyword(code, code.tokens[code.token_at(code.start_of(node))])


def _mark_soft_keyword(code: MarkedSource, token: SourceToken) -> None:
    """Turn a word from an identifier into a keyword."""
    for mark in ("identifiers", *SPELLING_RULES["identifiers"]):
        code.paint(mark, token.start, token.end, False)
    mark_spelling(code, "keywords", token)
