"""Examples in docstrings run as they stand.

Every docstring in src/ksparse that has `>>>` is found and run, one test for each. An example sees
the names of its module, and starts in an empty folder. If it mentions runs/demo, that is a small
trained run there (4,096 latents, k = 32, 8 steps), with the evaluation `stats`.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ksparse
from ksparse import config
from ksparse.config import evaluation

SOURCE = Path(ksparse.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield (module, name in it, docstring) of every module, class, function and method."""
    for file in sorted(SOURCE.rglob("*.py")):
        parts = ["ksparse", *file.relative_to(SOURCE).with_suffix("").parts]
        module = ".".join(parts).removesuffix(".__init__")
        for name, docstring in of_node(ast.parse(file.read_text(encoding="utf-8")), ""):
            yield module, name, docstring


def of_node(node: Any, name: str) -> Iterator[tuple[str, str]]:
    yield name, ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            if not isinstance(node, ast.FunctionDef):
                yield from of_node(child, f"{name}.{child.name}".lstrip("."))


EXAMPLES = {
    f"{module}:{name}".rstrip(":"): (module, docstring)
    for module, name, docstring in docstrings()
    if ">>>" in docstring
}


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    """Return the folder of a small trained and evaluated run."""
    from ksparse.evals import runner

    folder = tmp_path_factory.mktemp("docstrings") / "demo"
    recipe = config.Recipe(
        acts={"lm": "pylm/0.3m", "site": "resid_post.1", "mix": 2048, "lm_batch": 16},
        tokens=4096,
        batch=512,
    )
    run = ksparse.train(recipe, folder)
    options = evaluation.EvalConfig(tokens=500, device="cpu")
    results = ksparse.evaluate(ksparse.load(folder), names=["stats"], options=options)
    runner.write_results(run, results)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, tmp_path, monkeypatch, request):
    module, docstring = EXAMPLES[name]
    if "runs/demo" in docstring:
        shutil.copytree(request.getfixturevalue("demo_run"), tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names = dict(vars(importlib.import_module(module)))
    test = doctest.DocTestParser().get_doctest(docstring, names, name, module, 0)
    assert not any(doctest.SKIP in example.options for example in test.examples), (
        "no example is skipped: build what it needs, or use runs/demo, which is there"
    )
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=report.append)
    assert not result.failed, "\n" + "".join(report)


def option_classes() -> dict[str, type]:
    return {
        name: value
        for module in (config, evaluation)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, config.Config)
    }


@pytest.mark.parametrize("name", sorted({*ksparse.__all__, *option_classes()}))
def test_a_name_that_users_meet_first_has_an_example(name):
    value = option_classes().get(name) or getattr(ksparse, name)
    assert ">>>" in (value.__doc__ or ""), f"the docstring of {name} has no example"


def test_examples_are_found_in_modules_classes_methods_and_decorated_functions():
    source = (
        '"""M >>> 1"""\nclass C:\n    """C >>> 1"""\n    @property\n    def p(self):\n'
        '        """P >>> 1"""\n@wraps\ndef f():\n    """F >>> 1"""\n    def g():\n        """G"""\n'
    )
    assert dict(of_node(ast.parse(source), "")) == {
        "": "M >>> 1",
        "C": "C >>> 1",
        "C.p": "P >>> 1",
        "f": "F >>> 1",
    }
