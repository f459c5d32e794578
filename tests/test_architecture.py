"""Imports point one way, importing is free, only the command line speaks, and nothing is pickled."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ksparse"
LINES = [
    {"errors", "limits", "progress", "html", "lookup"},
    {"storage", "trust", "display"},
    {"config"},
    {"storage.run_folder", "distributed", "device", "kernels", "pylm"},
    {"sae", "lm"},
    {"data", "steering"},
    {"planning"},
    {"evals", "interop"},
    {"training"},
    {"judging", "scaling", "explain"},
    {"studies"},
    {"report", "doctor", "bench"},
    {"viewer"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, line in enumerate(LINES) for room in line}
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(["ksparse", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


MODULES = {name_of(file) for file in FILES}


def room(module: str) -> str | None:
    """Return the longest name in LINES that a module lies under; else the first part of its name."""
    parts = module.split(".")
    if parts[0] != "ksparse" or len(parts) == 1:
        return None
    names = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
    return next((name for name in names if name in LEVEL), parts[1])


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Return the modules that a module imports anywhere in it; `from ksparse import x` as ksparse.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {
                f"{base}.{alias.name}"
                if base == "ksparse" or f"{base}.{alias.name}" in MODULES
                else base
                for alias in node.names
            }
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def upward(module: str, imported: set[str]) -> list[str]:
    """Return the imports that break the order."""
    own = room(module)
    theirs = {
        name: room(name)
        for name in imported
        if name.split(".")[0] == "ksparse" and room(name) != own
    }
    wrong = []
    for name, other in sorted(theirs.items(), key=str):
        allowed = other in LEVEL and LEVEL[other] < LEVEL[own]
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize(
    "file", [file for file in FILES if file != SOURCE / "__init__.py"], ids=name_of
)
def test_imports_point_one_way(file):
    module = name_of(file)
    assert room(module) in LEVEL, f"{module} has no place in the order; give it one here"
    found = imports(ast.parse(file.read_text(encoding="utf-8")), module, file.name == "__init__.py")
    assert upward(module, found) == []


@pytest.mark.parametrize(
    "source, module",
    [
        ("from ksparse.sae.model import SAE", "ksparse.storage.atomic"),
        ("def f():\n    from ksparse import scaling", "ksparse.training.train"),
        ("import ksparse.lm.model", "ksparse.sae.model"),
        ("from ..training import train", "ksparse.lm.model"),
        ("import_module('ksparse.cli')", "ksparse.storage.run_folder"),
    ],
)
def test_the_parser_sees_an_upward_import(source, module):
    assert upward(module, imports(ast.parse(source), module, False))


def test_no_module_is_imported_in_a_circle():
    graph = {
        name_of(file): imports(
            ast.parse(file.read_text(encoding="utf-8")), name_of(file), file.name == "__init__.py"
        )
        for file in FILES
        if file != SOURCE / "__init__.py"
    }
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in graph and name not in done:
            for other in graph[name]:
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in FILES
        if SOURCE / "cli" not in file.parents and file != SOURCE / "display.py"
    ],
    ids=name_of,
)
def test_only_the_command_line_and_the_display_print_or_exit(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not calls(tree) & {
        "print",
        "input",
        "exit",
        "quit",
        "sys.exit",
        "os._exit",
        "sys.stdout.write",
        "sys.stderr.write",
    }
    assert not any(
        isinstance(node, ast.Name) and node.id == "SystemExit" for node in ast.walk(tree)
    )


FOREIGN = SOURCE / "interop" / "foreign.py"
SAFE = {"torch.load": {"weights_only": True}, "np.load": {"allow_pickle": False}}


def unsafe(tree: ast.AST, *, foreign: bool) -> list[str]:
    """Return the calls that run or write a pickle. Other libraries' files are opened in one place, where each call says that no code may be in them."""
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {
            word.arg: word.value.value
            for word in node.keywords
            if isinstance(word.value, ast.Constant)
        }
        allowed = foreign and (
            name == "torch.save" or name in SAFE and SAFE[name].items() <= said.items()
        )
        if (
            name
            in {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec", "__import__"}
            and not allowed
        ):
            wrong.append(ast.unparse(node))
    return wrong


TRUSTING = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True, "shell": True}


def trusting(tree: ast.AST) -> list[str]:
    """Return the calls and defaults that trust what comes from elsewhere."""
    words = [
        (node, node.arg, node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword)
    ]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            named = [
                *zip(node.args.kwonlyargs, node.args.kw_defaults),
                *zip(
                    node.args.args[len(node.args.args) - len(node.args.defaults) :],
                    node.args.defaults,
                ),
            ]
            words += [(argument, argument.arg, default) for argument, default in named]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            words.append((node, node.target.id, node.value))
        elif isinstance(node, ast.Dict):
            words += [
                (node, key.value, value)
                for key, value in zip(node.keys, node.values)
                if isinstance(key, ast.Constant)
            ]
    return [
        f"{name}={value.value}"
        for _, name, value in words
        if name in TRUSTING and isinstance(value, ast.Constant) and value.value is TRUSTING[name]
    ]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_from_elsewhere_is_trusted_unasked(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert trusting(tree) == []
    found = imports(tree, name_of(file), file.name == "__init__.py")
    assert not {name for name in found if name.startswith("torch.distributed.checkpoint")}, (
        "its .metadata is a pickle"
    )
    assert "torch.distributed.checkpoint" not in ast.unparse(tree) and not calls(tree) & {
        "os.system",
        "os.popen",
        "yaml.load",
    }


@pytest.mark.parametrize(
    "source",
    [
        "f(trust_remote_code=True)",
        "def f(a, *, trust_remote_code: bool = True): pass",
        "def f(trust_remote_code=True): pass",
        "f(**{'trust_remote_code': True})",
        "class R:\n    trust_remote_code: bool = True",
        "run('x', shell=True)",
    ],
)
def test_the_parser_sees_trust(source):
    assert len(trusting(ast.parse(source))) == 1


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_is_pickled_or_evaluated(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert unsafe(tree, foreign=file == FOREIGN) == []
    roots = {
        name.split(".")[0] for name in imports(tree, name_of(file), file.name == "__init__.py")
    }
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=trusted)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_parser_sees_a_pickle_that_would_be_run(call):
    assert unsafe(ast.parse(call), foreign=True) == [call]
    assert unsafe(ast.parse("torch.load(f, weights_only=True)"), foreign=True) == []
    assert unsafe(ast.parse("torch.load(f, weights_only=True)"), foreign=False) != []


@pytest.mark.parametrize(
    "module",
    [
        "ksparse",
        "ksparse.errors",
        "ksparse.limits",
        "ksparse.planning.costs",
        "ksparse.planning.sharing",
        "ksparse.planning.steps",
        "ksparse.storage.atomic",
        "ksparse.storage.rows",
        "ksparse.config",
        "ksparse.config.evaluation",
        "ksparse.storage.run_folder",
        "ksparse.pylm",
        "ksparse.cli",
    ],
)
def test_importing_is_free_of(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'numpy', 'tokenizers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_importing_the_package_reads_no_file_of_its_own_stations():
    code = (
        "import sys, ksparse; print(*[name for name in sys.modules if name.startswith('ksparse.')])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        ).stdout.strip()
        == ""
    )


def test_no_source_or_test_is_ignored_by_git():
    """A pattern such as `acts/` would take src/ksparse/acts out of the repository and out of the wheel."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = [
        str(file.relative_to(ROOT))
        for folder in ("src", "tests")
        for file in (ROOT / folder).rglob("*.py")
    ]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(files),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.split() == []
