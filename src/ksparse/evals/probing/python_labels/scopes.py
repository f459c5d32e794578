"""Marks that scopes decide: which names are variables, and where their values live."""

from __future__ import annotations

import ast
import builtins
import symtable
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ksparse.evals.probing.python_labels.source import MarkedSource

_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
ScopeNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef | _Comprehension
"""Nodes that open a scope."""
_COMPREHENSIONS: dict[type[ast.AST], str] = {
    ast.ListComp: "listcomp",
    ast.SetComp: "setcomp",
    ast.DictComp: "dictcomp",
    ast.GeneratorExp: "genexpr",
}
# Without "_", which gettext and interactive prompts add.
_BUILTINS = frozenset(name for name in dir(builtins) if name[0] != "_")


@dataclass(frozen=True)
class Scope:
    """A scope of the syntax tree with its symbol table.

    A comprehension belongs to the function around it except for its own variables: since Python
    3.12 most comprehensions have no table.

    Attributes:
        kind: "module", "class", "function" or "comprehension".
        table: The scope's symbol table, if it has one.
        outer: The enclosing scope.
        owner: The class whose private names are mangled here; "" outside classes.
        targets: The mangled variables that a comprehension binds.
    """

    kind: str
    table: symtable.SymbolTable | None
    outer: Scope | None = None
    owner: str = ""
    targets: frozenset[str] = frozenset()

    def mangle(self, name: str) -> str:
        """Return a name as the symbol tables spell it in this scope."""
        private = name.startswith("__") and not name.endswith("__") and self.owner.strip("_")
        return f"_{self.owner.lstrip('_')}{name}" if private else name

    def symbol(self, name: str) -> symtable.Symbol | None:
        """Look up a mangled name in the scope's table."""
        try:
            return self.table.lookup(name) if self.table else None
        except KeyError:
            return None

    def locate(self, name: str) -> str:
        """Return where a mangled name's value lives.

        Returns:
            "local", "free", "global" or "class"; "" if the tables do not have the name.
        """
        symbol = self.symbol(name)
        if self.kind == "comprehension" and self.outer:
            if name in self.targets:
                return "local"
            if symbol is None or (symbol.is_free() and self.outer.kind != "class"):
                location = self.outer.locate(name)
                # A scope inside a class does not see the names of the class body.
                return "global" if location == "class" else location
        if symbol is None:
            return ""
        if symbol.is_free():
            return "free"
        if symbol.is_global():
            return "global"
        return "class" if self.kind == "class" else "local"

    def binding(self, name: str) -> symtable.Symbol | None:
        """Return a mangled name's symbol in the scope that binds it; None for a comprehension."""
        scope, symbol = self, self.symbol(name)
        while name not in scope.targets and scope.outer and (symbol is None or symbol.is_free()):
            scope = scope.outer
            symbol = None if scope.kind == "class" else scope.symbol(name)
        return None if name in scope.targets else symbol


class ScopeBody(NamedTuple):
    """The children of a node that lie in the scope it opens."""

    node: ScopeNode
    children: list[ast.AST]


def walk(tree: ast.Module, top: symtable.SymbolTable) -> Iterator[tuple[ast.AST, Scope]]:
    """Yield each node outside f-strings with its scope: parents first, scopes in table order.

    A symbol table does not name its node. It is matched as the next table of the node's kind, name
    and line.
    """
    tables = _index_tables(top)
    stack: list[tuple[ast.AST | ScopeBody, Scope, bool]] = [(tree, Scope("module", top), False)]
    while stack:
        node, scope, in_fstring = stack.pop()
        children: Sequence[ast.AST | ScopeBody]
        if isinstance(node, ScopeBody):
            children, scope = node.children, _enter_scope(node.node, scope, tables)
        else:
            if not in_fstring:
                yield node, scope
            in_fstring = (
                in_fstring
                or isinstance(node, ast.JoinedStr)
                or type(node).__name__ == "TemplateStr"
            )
            children = _compiler_order(node)
        stack.extend((child, scope, in_fstring) for child in reversed(children))


def _index_tables(
    top: symtable.SymbolTable,
) -> dict[tuple[str, str, int], deque[symtable.SymbolTable]]:
    """Return the tables of each kind, name and line, in order."""
    tables: dict[tuple[str, str, int], deque[symtable.SymbolTable]] = defaultdict(deque)
    stack = [top]
    while stack:
        table = stack.pop()
        tables[str(table.get_type()), table.get_name().strip("<>"), table.get_lineno()].append(
            table
        )
        stack.extend(reversed(table.get_children()))
    return tables


def _enter_scope(
    node: ScopeNode, scope: Scope, tables: dict[tuple[str, str, int], deque[symtable.SymbolTable]]
) -> Scope:
    """Return the scope that a node opens."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    name: str = _COMPREHENSIONS.get(type(node), "") or getattr(node, "name", "lambda")
    queue = tables.get((kind, name, node.lineno))
    table = queue.popleft() if queue else None
    if not isinstance(node, _Comprehension):
        return Scope(kind, table, scope, name if kind == "class" else scope.owner)
    nodes = (part for generator in node.generators for part in ast.walk(generator.target))
    targets = {
        scope.mangle(part.id)
        for part in nodes
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    return Scope("comprehension", table, scope, scope.owner, frozenset(targets))


def _compiler_order(node: ast.AST) -> list[ast.AST | ScopeBody]:
    """Return a node's children in the order in which the compiler visits them."""
    outside: list[ast.AST | None]
    inside: list[ast.AST]
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            args = node.args
            slots = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
            parameters = [arg for arg in slots if arg]
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
            return []  # its annotation belongs to the outer scope
        case _:
            return list(ast.iter_child_nodes(node))
    return [*filter(None, outside), ScopeBody(node, inside)]


class NameMarker:
    """Marks names that stand for values by their use and by where the value lives."""

    def __init__(self, code: MarkedSource, top: symtable.SymbolTable, declared: set[str]):
        self._code = code
        self._global = {symbol.get_name(): symbol for symbol in top.get_symbols()}
        self._rebound = declared | {
            name for name, symbol in self._global.items() if symbol.is_local()
        }

    def mark(self, node: ast.AST, scope: Scope) -> None:
        """Mark the names that a node reads, binds or declares.

        Where the tree gives a name without its position, the tokens locate it.
        """
        code = self._code
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                self._mark_name(code.token_at(code.start_of(node)), name, scope, "names read")
            case ast.Name(id=name):
                self._mark_name(code.token_at(code.start_of(node)), name, scope, "bound names")
            case ast.arg(arg=name):
                index = code.token_at(code.start_of(node))
                code.paint_token("parameter", index)
                self._mark_name(index, name, scope, "bound names")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                self._mark_name(
                    code.find("def", code.start_of(node)) + 1, name, scope, "bound names"
                )
            case ast.ClassDef(name=name):
                self._mark_name(code.token_at(code.start_of(node)) + 1, name, scope, "bound names")
            case ast.alias(name=name, asname=None) if name != "*":
                self._mark_name(
                    code.token_at(code.start_of(node)), name.partition(".")[0], scope, "bound names"
                )
            case (
                ast.alias(asname=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                self._mark_name(code.last_token(node), name, scope, "bound names")
            case ast.MatchMapping(rest=str(name)):
                last = next(
                    i for i in range(code.last_token(node), 0, -1) if code.tokens[i].text == "**"
                )
                self._mark_name(last + 1, name, scope, "bound names")
            case ast.ExceptHandler(name=str(name), type=ast.expr() as caught):
                self._mark_name(
                    code.find("as", code.end_of(caught)) + 1, name, scope, "bound names"
                )
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                for i, name in enumerate(names):
                    self._mark_name(
                        code.token_at(code.start_of(node)) + 1 + 2 * i,
                        name,
                        scope,
                        "declared names",
                    )

    def _mark_name(self, index: int, name: str, scope: Scope, use: str) -> None:
        """Mark one name with its use and with where its value lives."""
        code, name = self._code, scope.mangle(name)
        location = scope.locate(name)
        if not location:
            return  # as in an annotation that is never evaluated
        binding = self._global.get(name) if location == "global" else scope.binding(name)
        builtin = name in _BUILTINS and name not in self._rebound
        marks = {
            "variables": True,
            use: True,
            "bound_name": use == "bound names",
            "local_variable": location == "local",
            "free_variable": location == "free",
            "global_variable": location == "global" and not builtin,
            "builtin_name": location == "global" and builtin,
            "parameter_use": binding is not None and binding.is_parameter(),
            "imported_name": binding is not None and binding.is_imported(),
        }
        for mark, value in marks.items():
            code.paint_token(mark, index, value)
