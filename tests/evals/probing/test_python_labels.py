"""The built-in probe suite: what each task says of a token, and that the standard library's own tools agree."""

import ast
import dis
import io
import itertools
import re
import time
import tokenize
import types
import warnings

import numpy as np
import pytest

from ksparse import pylm
from ksparse.evals.probing.python_labels import TASKS, PythonTask, labels
from ksparse.evals.probing.python_labels.source import MarkedSource

COLUMN = {task.name: number for number, task in enumerate(TASKS)}

# For each task: the token between « and » has label 1 in the first sources, 0 in the second, -1 in the third.
CASES = {
    "in_comment": (["x = 1  «# a»", "x  # a «b»\n"], ["«x» = 1  # a", "x = '«#»'"], []),
    "in_string": (["x = '«a»'", "f'«{x}»'"], ["«x» = 'a'", "x # '«a»'"], []),
    "in_docstring": (
        ["'«a»'", "def f():\n    r'''«a»'''", "class C:\n    ('a' '«b»')"],
        ["x = '«a»'", "def f():\n    x\n    '«a»'", "f'«a»'", "def f():\n    b'«a»'"],
        ["«x»"],
    ),
    "in_replacement_field": (
        [
            "f'a«{»b}'",
            "f'{a:>«{»w}}'",
            "f'{a!r:«>»9}'",
            "rf'\\N{«b»}'",
            "f'{d[\"}\"]}{«x»}'",
            "f'''\n{\n «a»}'''",
            "f'\\\\N{«x»}'",
        ],
        [
            "f'«a»{b}'",
            "f'{{«a»}}'",
            "f'{a}«b»'",
            "f'\\N{EM «DASH»}'",
            "f'{a:{w}}«b»'",
            "f'{x:\"^9}«b»\"'",
        ],
        ["'«a»'"],
    ),
    "double_quoted": (['x = "«a»"', 'x = r"""«a»"""'], ["x = '«a»'", "x = '\"«a»\"'"], ["«x»"]),
    "bytes_string": (["b'«a»'", "Rb'«a»'"], ["'«a»'", "u'«a»'"], []),
    "keyword": (
        ["«if» x: y", "x = «None»", "«match» x:\n    case 1: y", "match x:\n    «case» 1: y"],
        ["if «x»: y", "«match» = 1", "«case» = 1"],
        ["x «=» 1", "'«if»'"],
    ),
    "definition_keyword": (
        ["«def» f(): x", "«class» C: x", "«lambda»: 1"],
        ["«async» def f(): x", "«if» x: y"],
        ["def «f»(): x"],
    ),
    "control_keyword": (
        ["«if» x: y", "«try»: x\nfinally: y", "«match» x:\n    case 1: y"],
        ["x = «not» y", "«pass»"],
        ["«match» = 1"],
    ),
    "operator_keyword": (
        ["x «in» y", "x = a «and» b", "a is «not» b", "for x in (a «in» b): y"],
        ["for x «in» y: z", "[x for x «in» y]", "for x[a in b] «in» c: y", "«if» x: y"],
        ["«x»"],
    ),
    "constant_keyword": (["x = «None»", "«True»"], ["«not» x"], ["x = «Ellipsis»"]),
    "exit_keyword": (["def f(): «return»", "while x: «break»"], ["«pass»", "«del» x"], []),
    "attribute": (
        ["x.«y»", "(x\n . «y»).z", "x.«y»()", "x.«y» = 1"],
        ["«x».y", "import a.«b»"],
        ["x«.»y", "'x.«y»'"],
    ),
    "called_name": (
        ["«f»(x)", "a.«f»(x)", "@«f»(x)\ndef g(): y"],
        ["f(«x»)", "«a».f(x)", "def «f»(x): y", "«f»[0](x)"],
        ["f«(»x)"],
    ),
    "keyword_argument": (
        ["f(«x»=1)", "class C(«x»=1): y", "f(**a, «x»=1)"],
        ["def f(«x»=1): y", "«x» = 1", "f(x=«x»)"],
        ["f(x«=»1)"],
    ),
    "module_name": (
        ["import «a»", "import a.«b» as c", "from .«a» import b", "from a.«b» import c"],
        ["import a as «b»", "from a import «b»", "from a import (b as «c»)"],
        ["«a»", "from «.» import a"],
    ),
    "snake_case": (["«a_b»", "«_a_b1»"], ["«_a»", "«A_B»", "«ab»"], ["«if» x: a_b"]),
    "camel_case": (["«CamelCase»", "«_Ab»"], ["«camelCase»", "«AB»", "«A_b»"], ["«None»"]),
    "constant_case": (["«A_B»", "«AB1»"], ["«A»", "«Ab»"], []),
    "dunder": (["«__a__»"], ["«__a»", "«____»", "«a»"], []),
    "private": (["«_a»", "x.«__a»"], ["«_»", "«__a__»", "«a_»"], []),
    "self_or_cls": (["«self».x"], ["self.«x»"], []),
    "bound_name": (
        [
            "«x» = 1",
            "def «f»(): x",
            "class «C»: x",
            "import «a».b",
            "import a as «b»",
            "from a import «b»",
            "del «x»",
            "try: x\nexcept (A) as «e»: y",
            "def f(*«a»): x",
            "match x:\n    case {**«y»}: z",
            "match x:\n    case [*«y»]: z",
            "match x:\n    case A() as «y»: z",
            "async def «f»(): x",
            "(«x» := 1)",
        ],
        ["x = «y»", "def f(a=«x»): y", "«x»[0] = 1", "def f():\n    global a, «x»\n    x = 1"],
        ["x.«y» = 1", "f(«x»=1)", "import a.«b»", "import «a» as b", "from a import «b» as c"],
    ),
    "parameter": (
        ["def f(«a»): x", "def f(*, a: int = 1, **«b»): x", "lambda «a»: x"],
        ["«a» = 1", "def f(a):\n    «b» = 1"],
        ["def f(a=«b»): x"],
    ),
    "parameter_use": (
        [
            "def f(a): «a»",
            "lambda a: «a»",
            "def f(a): return lambda: «a»",
            "class C:\n    def f(s, __a): «__a»",
        ],
        ["def f(a): «b»", "def f(a): x\n«a»"],
        ["def f(«a»): a"],
    ),
    "local_variable": (
        [
            "def f():\n    «x» = 1",
            "def f(x): «x»",
            "[«x» for x in y]",
            "lambda x: «x»",
            "def f(x): [y for y in z if «x»]",
            "def f(x): ((«x» for y in z) for y in z)",
            "class C:\n    x = [«y» for y in z]",
        ],
        [
            "«x» = 1",
            "def f(): «x»",
            "class C:\n    «x» = 1",
            "def f(x):\n    def g(): «x»",
            "[x for x in «y»]",
            "lambda x=«x»: 1",
        ],
        ["x.«y»"],
    ),
    "global_variable": (
        [
            "«x» = 1",
            "def f(): «x»",
            "def f():\n    global «x»\n    x = 1",
            "class C:\n    def f(): «__x»",
            "[«x» for y in z]",
            "def f(): {y: «x» for y in z}",
            "class C:\n    a = [«a» for y in z]",
        ],
        ["def f(x): «x»", "«len»"],
        [],
    ),
    "free_variable": (
        [
            "def f(x):\n    def g(): «x»",
            "def f(x):\n    class C:\n        y = [x for z in «x»]",
            "def f(x):\n    def g(): [y for y in z if «x»]",
            "def f(x):\n    class C:\n        y = «x»",
            "lambda x: lambda: «x»",
            "lambda x=lambda: 1: lambda: «x»",
        ],
        ["def f(x): «x»", "def f():\n    def g(): «x»", "lambda x=lambda y: «y»: x"],
        [],
    ),
    "builtin_name": (
        ["«len»(x)", "def f(): «print»", "def f(len): x\n«len»"],
        [
            "«x»",
            "len = 1\n«len»",
            "def f(len): «len»",
            "def f():\n    global len\n    len = 1\n«len»",
            "«__name__»",
        ],
        ["x.«len»", "f(«len»=1)"],
    ),
    "imported_name": (
        [
            "import a\n«a»",
            "from a import b as c\ndef f(): «c»",
            "def f():\n    import a\n    def g(): «a»",
        ],
        ["import a as b\n«a»", "a = 1\n«a»"],
        ["import «a»"],
    ),
    "in_call_arguments": (
        ["f(«x»)", "f(g)(«x»)", "f((«x»))", "f(*«x»)", "f(a, [«x»])"],
        ["«f»(x)", "f«(»x)", "f(x«)»", "(«x»)", "def f(«x»): y"],
        [],
    ),
    "in_decorator": (
        ["@«a».b(c)\ndef f(): x", "«@»a\n@b\nclass C: x", "@a\n@(«b»)\nclass C: x"],
        ["@a\n«def» f(): x", "x «@» y", "class C(«a»): x"],
        [],
    ),
    "in_class_body": (
        [
            "class C:\n    «x» = 1",
            "class C:\n    @«a»\n    def f(): x",
            "def f():\n    class C: «x»",
            "class C:\n    def «f»(): x",
        ],
        ["class «C»: x", "class C:\n    def f(): «x»", "«x»"],
        [],
    ),
    "in_method": (
        ["class C:\n    def f(): «x»", "class C:\n    if a:\n        async def f(): «x»"],
        ["def f(): «x»", "class C:\n    def f():\n        def g(): «x»"],
        ["class C:\n    «x»"],
    ),
    "in_async_function": (
        ["async def f(): «x»"],
        ["def f(): «x»", "async def f():\n    def g(): «x»"],
        ["«x»", "async def f(«x»): y"],
    ),
    "in_import": (["import «a»", "from a «import» (b, c)"], ["«x»"], []),
    "in_raise": (["raise «a»", "raise A(b) from «c»"], ["«x»"], []),
    "in_return": (["def f(): return «x»"], ["def f(): «x»"], []),
    "in_if_branch": (
        ["if a: «x»", "if a: b\nelif c: «x»", "if a:\n    @«b»\n    def f(): x"],
        ["if «a»: x", "if a: b\nelse: «x»", "a if «b» else c"],
        [],
    ),
    "in_else_branch": (
        ["if a: b\nelse: «x»", "if a: b\nelif c: d\nelse: «x»", "if a: b\nelse:\n    if «c»: d"],
        ["if a: b\nelif c: «x»", "for a in b: c\nelse: «x»", "if a: b\n«else»: x"],
        [],
    ),
    "in_loop_body": (
        ["for a in b: «x»", "while a: «x»"],
        ["for «a» in b: x", "while a: b\nelse: «x»"],
        [],
    ),
    "in_with_body": (["with a: «x»", "async def f():\n    async with a: «x»"], ["with «a»: x"], []),
    "in_try_body": (
        ["try: «x»\nfinally: y"],
        ["try: x\nfinally: «y»", "try: x\nexcept A: y\nelse: «z»"],
        [],
    ),
    "in_handler": (
        ["try: x\nfinally: «y»", "try: x\nexcept «A»: y", "try: x\nexcept* A: «y»"],
        ["try: «x»\nfinally: y", "try: x\nexcept A: y\nelse: «z»"],
        [],
    ),
    "in_comprehension": (
        ["[«x» for x in y]", "f(«x» for x in y)", "{a: b for a in «b»}"],
        ["[«x»]", "for x in «y»: z"],
        [],
    ),
    "in_subscript": (["a[«x»]", "a[b][«x»]", "a[1:«x»]"], ["«a»[x]", "[«x»]", "a[x«]»"], []),
    "arithmetic_operator": (
        ["a «*» b", "«-»a", "f(a)«**»b", "None «@» b", "'%' «%» x", "a «/» b"],
        [
            "f(«*»a)",
            "def f(a, «/», b): x",
            "a «*=» b",
            "a «|» b",
            "f(«**»a)",
            "lambda «*»a: x",
            "x\n«*»a, b = c",
            "match = 1\n«*»a, b = c",
        ],
        ["«@»a\ndef f(): x", "from a import «*»", "try: x\nexcept «*»A: y", "a«.»b"],
    ),
    "comparison_operator": (["a «==» b", "a «<» b"], ["a «=» b", "a «<<» b"], ["a «is» b"]),
    "assignment_operator": (
        ["a «=» b", "a «+=» b", "(a «:=» b)", "f = lambda a: (b «:=» a)"],
        ["f(a«=»b)", "def f(a«=»1): b", "lambda a«=»1: a", "a «==» b"],
        [],
    ),
    "float_number": (["«1.5»", "«1e5»", "«2j»"], ["«15»", "«0x1e»"], ["«x1»"]),
    "based_number": (["«0x1F»", "«0b1»"], ["«0»", "«0.5»"], []),
    "zero_or_one": (["«0»", "x[«1»]"], ["«10»", "«1.0»"], []),
    "in_braces": (["{«a»: b}", "[{«a»}]", "«{»}"], ["{f(«a»)}", "(«a»)"], ["«a»", "{'«a»'}"]),
    "in_nested_brackets": (["f((«a»))", "{a: «[»]}"], ["f(«a»)", "f()[«a»]"], ["«f»()"]),
    "closing_bracket": (["(a«)»", "{«}»"], ["«(»a)"], ["(«a»)"]),
    "indented_thrice": (
        ["if a:\n if b:\n  if c:\n   «x»", "if a:\n if b:\n  if c:\n   f(x,\n«y»)"],
        ["if a:\n if b:\n  if «c»:\n   x"],
        [],
    ),
    "begins_line": (
        ["«x» = 1", "a\n«b»", "if a:\n    «b»"],
        ["x «=» 1", "f(a,\n«b»)", "a«bc»", "if a: «b»"],
        ["'«a»'"],
    ),
    "ends_line": (
        ["x = «y»  # c", "if (x«)»:\n    b", "if a«:»\n    b", "f(g(x«)»)"],
        ["«x» = y", "f(«x»)"],
        [],
    ),
    "blank_line": (
        ["a\n«\n»b", "a\n«  \n»b", "a«\n\n»b"],
        ["a«\n»b", "a\n\nif b:\n«    »c", "a« »= b"],
        ["'''\n«\n»'''"],
    ),
    "indent_increase": (
        ["if a:«\n   » b", "if a:\n\n«    »b", "if a:\n# c\n«    »b"],
        ["a«\n»b", "if a:\n    b«\n»c"],
        ["a« »= b", "f(a,«\n»b)"],
    ),
    "indent_decrease": (
        ["if a:\n    b«\n»c"],
        ["if a:«\n    »b", "if a:\n    b\n«    »c"],
        ["«a»"],
    ),
}


def of(source, *spans):
    return labels(source, spans)


def marked(text):
    source = text.replace("«", "").replace("»", "")
    return source, (text.index("«"), text.index("»") - 1)


@pytest.mark.parametrize("task", COLUMN)
def test_a_task_says_what_it_should(task):
    for sources, expected in zip(CASES[task], (1, 0, -1)):
        for text in sources:
            source, span = marked(text)
            assert of(source, span)[0, COLUMN[task]] == expected, text


@pytest.mark.parametrize("task", COLUMN)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "é = '日本😀'; ñ = 'ü'\n" + text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "x = '''é\n😀'''\n\x0c\n" + text + "\n# é",
    ],
    ids=["not ASCII", "BOM", "CRLF", "form feed"],
)
def test_labels_do_not_depend_on_how_a_text_is_encoded(task, change):
    for sources, expected in zip(CASES[task], (1, 0, -1)):
        for text in sources:
            if task != "in_docstring":
                source, span = marked(change(text))
                assert of(source, span)[0, COLUMN[task]] == expected, source


def test_columns_are_counted_in_characters_where_the_parser_counts_bytes():
    source, span = marked("日 = ñ.é; x = ü['😀'].«attr»(ö)")
    row = of(source, span)[0]
    assert row[COLUMN["attribute"]] == row[COLUMN["called_name"]] == 1
    assert (
        of(source, (0, 1))[0, COLUMN["bound_name"]] == 1
        and of(source, (0, 1))[0, COLUMN["attribute"]] == 0
    )


def test_names_that_old_tokenizers_stumble_over_are_one_name():
    source = "℘x = 1\nx·y = ℘x"
    assert (of(source, (0, 1), (1, 2), (7, 8), (8, 9), (9, 10))[:, COLUMN["bound_name"]] == 1).all()


def test_private_names_of_a_class_are_found_under_their_real_name():
    source, span = marked("class _C:\n    def f(self, __x):\n        return lambda: «__x»")
    row = of(source, span)[0]
    assert row[COLUMN["free_variable"]] == 1 and row[COLUMN["parameter_use"]] == 1


def test_a_token_has_the_label_of_its_first_character_that_is_not_white_space():
    source = "if a:\n    return_ = b"
    number = COLUMN["begins_line"]
    assert of(source, (9, 12), (9, 13), (10, 12), (11, 12))[:, number].tolist() == [1, 1, 1, 0]
    assert of(source, (5, 9))[0, COLUMN["indent_increase"]] == 1
    source = "a\n\n  # b\nc"
    assert of(source, (1, 3), (1, 5), (1, 2))[:, COLUMN["blank_line"]].tolist() == [1, 0, 0]
    assert of(source, (1, 3), (1, 6))[:, COLUMN["in_comment"]].tolist() == [0, 1]


def test_every_piece_of_a_name_has_the_labels_of_the_name():
    pieces = of("CamelCase()", (0, 5), (5, 7), (7, 9))
    assert (pieces[:, COLUMN["called_name"]] == 1).all() and (
        pieces[:, COLUMN["camel_case"]] == 1
    ).all()


def test_empty_spans_and_byte_order_marks_have_no_label():
    assert (of("\ufeffx = 1", (0, 1), (2, 2), (0, 0), (6, 6)) == -1).all()
    assert (of("", (0, 0)) == -1).all()


def test_empty_text_has_labels_of_the_right_shape():
    for source in ("", "\n", "x"):
        assert of(source).shape == (0, 61) and of(source).dtype == np.int8


@pytest.mark.parametrize(
    "source",
    [
        "def",
        "x = (",
        " x",
        "'''",
        "\x00",
        "\ud800",
        "def f(a):\n    global a",
        "x = " + "-" * 100_000 + "1",
    ],
)
def test_source_that_python_cannot_parse_is_refused(source):
    with pytest.raises(ValueError, match="^Python cannot parse this source: ."):
        of(source, (0, 1))


def test_source_that_python_warns_of_is_labelled_without_a_warning():
    assert of("x = '\\d'\nif x is 1: y = 1if x else 2", (0, 1))[0, COLUMN["bound_name"]] == 1


def test_there_are_61_tasks_each_with_its_own_name():
    assert (
        len(TASKS)
        == len({task.name for task in TASKS})
        == len({(task.positive, task.among) for task in TASKS})
        == 61
    )
    assert all(
        re.fullmatch("[a-z_]+", task.name) and task.family and task.positive and task.among
        for task in TASKS
    )
    assert set(CASES) == set(COLUMN) and isinstance(TASKS[0], PythonTask)


# ---- real files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files():
    """Held-out files of a moderate size, each with the labels of all its characters."""
    texts = (text for _, text in pylm.documents("held-out") if 2_000 < len(text) < 25_000)
    return [
        (text, labels(text, [(i, i + 1) for i in range(len(text))]))
        for text in itertools.islice(texts, 25)
    ]


def test_every_task_has_tokens_of_both_labels(files):
    rows = np.concatenate([rows[::2] for _, rows in files])
    assert set(np.unique(rows)) == {-1, 0, 1}
    rare = [
        task.name
        for number, task in enumerate(TASKS)
        if min((rows[:, number] == 1).sum(), (rows[:, number] == 0).sum()) < 10
    ]
    assert rare == []


def characters(text, wanted):
    """Return which characters are in tokens that are wanted, by tokenize, but for those in f-strings, which Python 3.11 does not have."""
    inside = np.zeros(len(text) + 1, bool)
    starts = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
        if not depth and wanted(token):
            start = starts[token.start[0] - 1] + token.start[1]
            inside[start : start + len(token.string)] = True
    return inside


@pytest.mark.parametrize(
    "task, wanted",
    [
        ("in_comment", lambda token: token.type == tokenize.COMMENT),
        (
            "exit_keyword",
            lambda token: (
                token.type == tokenize.NAME
                and token.string in "return yield raise break continue".split()
            ),
        ),
        (
            "float_number",
            lambda token: (
                token.type == tokenize.NUMBER
                and not isinstance(ast.literal_eval(token.string), int)
            ),
        ),
        ("closing_bracket", lambda token: token.type == tokenize.OP and token.string in ")]}"),
    ],
)
def test_tokenize_agrees(files, task, wanted):
    for text, rows in files[:6]:
        assert np.array_equal(rows[:, COLUMN[task]] == 1, characters(text, wanted)[:-1])


def test_the_parser_counts_as_many_docstrings(files):
    for text, rows in files:
        owners = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        found = rows[:, COLUMN["in_docstring"]] == 1
        assert (np.diff(found.astype(int), prepend=0) == 1).sum() == sum(
            ast.get_docstring(node) is not None for node in owners
        )


def test_the_parser_counts_as_many_replacement_fields(files):
    seen = 0
    for text, _ in files:
        count = sum(map(len, MarkedSource(text).replacement_fields.values()))
        assert count == fields_of(ast.parse(text))
        seen += count
    assert seen > 5


def fields_of(node):
    """Return how many replacement fields there are, without those in the format of another."""
    if isinstance(node, ast.JoinedStr):
        return sum(isinstance(part, ast.FormattedValue) for part in node.values)
    return sum(map(fields_of, ast.iter_child_nodes(node)))


def loads(code, around=frozenset()):
    """Yield (line, column, end, name, kind) of the names that bytecode loads; a comprehension is part of the function it is in."""
    free = (
        around & set(code.co_freevars)
        if code.co_name in {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
        else set(code.co_freevars)
    )
    for step in dis.get_instructions(code):
        kind = {
            "LOAD_GLOBAL": "global",
            "LOAD_FAST": "local",
            "LOAD_DEREF": "free" if step.argval in free else "local",
        }.get(step.opname)
        if kind and step.positions and step.positions.lineno == step.positions.end_lineno:
            yield (
                step.positions.lineno,
                step.positions.col_offset,
                step.positions.end_col_offset,
                step.argval,
                kind,
            )
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from loads(inner, free)


def test_the_compiler_loads_names_from_where_the_scope_tasks_say(files):
    seen = {"global": 0, "local": 0, "free": 0}
    for text, rows in files:
        lines = text.split("\n")
        starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
        with warnings.catch_warnings(action="ignore"):
            code = compile(text, "<held-out>", "exec")
        for line, column, end, name, kind in loads(code):
            if lines[line - 1].isascii() and lines[line - 1][column:end] == name:
                row = rows[starts[line - 1] + column]
                where = {
                    "global": row[COLUMN["global_variable"]] == 1
                    or row[COLUMN["builtin_name"]] == 1,
                    "local": row[COLUMN["local_variable"]] == 1,
                    "free": row[COLUMN["free_variable"]] == 1,
                }
                if row[COLUMN["bound_name"]] == 0:  # not in an f-string
                    assert where == {other: other == kind for other in where}, (line, name)
                    seen[kind] += 1
    assert min(seen.values()) > 20


def test_time_is_about_linear_in_the_length(files):
    text = next(text for text, _ in files if 5_000 < len(text) < 8_000 and "__future__" not in text)

    def seconds(source):
        begin = time.perf_counter()
        labels(source, [(0, 1)])
        return time.perf_counter() - begin

    once, eight = (min(seconds(source) for _ in range(3)) for source in (text, 8 * (text + "\n")))
    assert eight < 24 * once
