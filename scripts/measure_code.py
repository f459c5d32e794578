"""Measure the code: lines, functions, docstrings, annotations, complexity, names, type errors.

    python scripts/measure_code.py [FOLDER] [--json FILE]      FOLDER: src if not given

Every figure is counted from the syntax tree, so that two commits can be compared by the same rules. Type errors need mypy.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.With,
    ast.AsyncWith,
    ast.Assert,
    ast.comprehension,
    ast.match_case,
)
LONG_LINE = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("src"))
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    figures = measure(arguments.folder)
    for name, value in figures.items():
        print(f"{name:<44}{value:>12,}" if isinstance(value, int) else f"{name:<44}{value:>12}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path) -> dict[str, Any]:
    """Return every figure by its name."""
    files = sorted(folder.rglob("*.py"))
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    lengths = sorted(len(line) for line in lines if line.strip())
    functions = [
        node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    sizes = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    complexities = sorted(complexity(node) for node in functions)
    classes = collections.Counter(
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    public = [node for tree in trees.values() for node in public_definitions(tree)]
    parameters = [parameter for node in functions for parameter in parameters_of(node)]
    return {
        "files": len(files),
        "lines": len(lines),
        "line length, mean": round(statistics.mean(lengths), 1),
        "line length, 95th percentile": lengths[int(0.95 * len(lengths))],
        "line length, longest": lengths[-1],
        f"lines over {LONG_LINE}": sum(length > LONG_LINE for length in lengths),
        "functions": len(functions),
        "function length, median": int(statistics.median(sizes)),
        "function length, longest": sizes[-1],
        "functions over 50 lines": sum(size > 50 for size in sizes),
        "longest file": max(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        "complexity, mean": round(statistics.mean(complexities), 2),
        "complexity, largest": complexities[-1],
        "complexity over 15": sum(value > 15 for value in complexities),
        "public definitions with a docstring, %": share(
            sum(ast.get_docstring(node) is not None for node in public), len(public)
        ),
        "public docstrings with sections": sum(
            bool(
                re.search(
                    r"^\s*(Args|Returns|Raises|Example):", ast.get_docstring(node) or "", re.M
                )
            )
            for node in public
        ),
        "parameters with a type, %": share(
            sum(parameter.annotation is not None for parameter in parameters), len(parameters)
        ),
        "functions with a return type, %": share(
            sum(node.returns is not None for node in functions), len(functions)
        ),
        "class names used more than once": sum(count > 1 for count in classes.values()),
        "type errors (mypy)": type_errors(folder),
    }


def complexity(function: Function) -> int:
    """Return McCabe's number: one, and one for each branch and each `and` or `or`; nested functions count for themselves."""
    total, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*Function.__args__, ast.ClassDef)):
            continue
        total += isinstance(node, BRANCHES) - isinstance(node, (ast.With, ast.AsyncWith))
        total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        total += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        waiting += ast.iter_child_nodes(node)
    return total


def public_definitions(tree: ast.Module) -> Iterator[Any]:
    """Yield public classes and functions of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, (*Function.__args__, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    inner
                    for inner in node.body
                    if isinstance(inner, Function) and not inner.name.startswith("_")
                )


def parameters_of(function: Function) -> list[ast.arg]:
    arguments = function.args
    named = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        *filter(None, (arguments.vararg, arguments.kwarg)),
    ]
    return [parameter for parameter in named if parameter.arg not in ("self", "cls")]


def share(part: int, whole: int) -> float:
    return round(100 * part / max(1, whole), 1)


def type_errors(folder: Path) -> int | str:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mypy", str(folder)], capture_output=True, text=True
        )
    except OSError:
        return "not run"
    if "No module named mypy" in done.stderr:
        return "no mypy"
    return sum(": error:" in line for line in done.stdout.splitlines())


if __name__ == "__main__":
    main()
