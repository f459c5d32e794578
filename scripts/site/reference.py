"""The pages of the reference, written from the code: API, command line, recipe, evaluations, exit codes.

`pages()` returns them as Markdown. Nothing here is kept in the repository: `build.py` writes the pages
into the site each time it is built, so they cannot be out of date.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import ksparse
from ksparse import cli, config, errors
from ksparse.cli.arguments import (
    LOAD_LM,
    VERBS,
    describe_verb,
    field_docstrings,
    options_of_verb,
)
from ksparse.cli.examples import EXAMPLES
from ksparse.config import options
from ksparse.config.evaluation import DEFAULT_EVALUATIONS, EvalConfig, budget_sizes
from ksparse.evals.registry import EVALS
from ksparse.trust import FLAG

MORE_NAMES = {
    "What calls return": (
        "ksparse.sae.code.TextCode",
        "ksparse.interop.latents.Latent",
        "ksparse.evals.statistics.Results",
        "ksparse.evals.statistics.Result",
        "ksparse.evals.comparison.SAEComparison",
        "ksparse.storage.run_folder.RunFolder",
        "ksparse.scaling.laws.law.Law",
        "ksparse.scaling.laws.law.Prediction",
    ),
    "Steering and attribution": (
        "ksparse.steering.compare",
        "ksparse.steering.attribute",
        "ksparse.steering.attribute_choice",
    ),
    "The built-in language model": ("ksparse.pylm.folder",),
}
"""What a user meets beside the names of `ksparse` itself, by the heading under which it stands."""
OTHER_FORMS = {"bench": ("--lm", "pylm"), "shard": ("--from", "features")}
"""Words after which a verb takes other options."""
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Example", "Examples", "Note")


def pages() -> dict[str, str]:
    """Return every page of the reference by its path in the site."""
    return {
        "reference/api.md": api(),
        "reference/cli.md": command_line(),
        "reference/recipe.md": recipe(),
        "reference/evaluations.md": evaluations(),
        "reference/exit-codes.md": exit_codes(),
    }


# ---- API


def api() -> str:
    """Return the page of every public name."""
    names = [f"ksparse.{name}" for name in ksparse.__all__]
    index = [
        f"| [`{name}`](#{re.sub(r'[^a-z0-9_]', '', name.lower())}) | {first_sentence(name)} |"
        for name in names
    ]
    parts = [
        "# API\n\nWhat `import ksparse` offers. Names are imported when they are first used, so the "
        "import itself takes no time.",
        "\n".join(["| name | |", "|---|---|", *index]),
    ]
    parts += ["## `ksparse`", *map(describe, names)]
    for title, more in MORE_NAMES.items():
        parts += [f"## {title}", *map(describe, more)]
    return "\n\n".join(parts)


def find(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last)


def first_sentence(name: str) -> str:
    paragraph = " ".join((inspect.getdoc(find(name)) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z])", paragraph)[0]


def describe(name: str) -> str:
    """Return heading, signature, docstring and members of a function or class."""
    found, last = find(name), name.rpartition(".")[2]
    parts = [f"### `{name}`"]
    if not (inspect.isclass(found) and issubclass(found, Exception)):
        parts.append(f"```python\n{signature(last, found)}\n```")
    parts.append(docstring(inspect.getdoc(found) or ""))
    if inspect.isclass(found):
        parts += [
            f"#### `{last}.{member}`\n\n"
            + (f"```python\n{signature(member, value)}\n```\n\n" if callable(value) else "")
            + docstring(inspect.getdoc(value) or "")
            for member, value in members(found)
        ]
    return "\n\n".join(parts)


def members(found: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class of ours documents, its bases' included."""
    seen = set()
    for owner in found.__mro__:
        if not owner.__module__.startswith("ksparse"):
            continue
        for name, value in vars(owner).items():
            value = getattr(value, "__func__", value)  # of a static method
            documented = (
                inspect.isfunction(value) or isinstance(value, property)
            ) and value.__doc__
            if documented and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, value


def signature(name: str, found: Any) -> str:
    """Return a call with its parameters, on several lines where it is long."""
    try:
        given = inspect.signature(found)
    except ValueError:  # a kind of dict
        return f"{name}(...)"
    parameters, star = [], False
    for each in given.parameters.values():
        if each.name == "self":
            continue
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
        star = star or each.kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
        )
        parameters.append(parameter(each))
    after = given.return_annotation
    ending = (
        "" if after is inspect.Signature.empty or inspect.isclass(found) else f" -> {plain(after)}"
    )
    line = f"{name}({', '.join(parameters)}){ending}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){ending}"


def parameter(given: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = stars.get(given.kind, "") + given.name
    annotated = given.annotation is not inspect.Parameter.empty
    text += f": {plain(given.annotation)}" if annotated else ""
    if given.default is inspect.Parameter.empty:
        return text
    return text + (" = " if annotated else "=") + repr(given.default)


def plain(annotation: Any) -> str:
    """Return a type as it is written in the source."""
    if isinstance(annotation, typing.ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def docstring(text: str) -> str:
    """Return a docstring as Markdown: arguments and errors as lists, examples as code."""
    parts: list[str] = []
    for title, body in sections(text):
        if title in ("Example", "Examples"):
            parts.append(f"```pycon\n{body}\n```")
        elif title in ("Args", "Raises"):
            entries = re.split(r"\n(?=\S)", body)
            words = {"Args": "**Arguments**", "Raises": "**Errors**"}[title]
            parts.append(f"{words}\n\n" + "\n".join(map(entry, entries)))
        elif title:
            parts.append(f"**{title}** {paragraphs(body)}")
        else:
            parts.append(paragraphs(body))
    return "\n\n".join(filter(None, parts))


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the sections of a docstring in Google's style, as (title or '', body)."""
    title, lines = "", list[str]()
    for line in text.splitlines():
        if line.rstrip().removesuffix(":") in SECTIONS and line.rstrip().endswith(":"):
            yield title, textwrap.dedent("\n".join(lines)).strip("\n")
            title, lines = line.rstrip().removesuffix(":"), []
        elif title and line and not line.startswith(" "):
            yield title, textwrap.dedent("\n".join(lines)).strip("\n")
            title, lines = "", [line]
        else:
            lines.append(line)
    yield title, textwrap.dedent("\n".join(lines)).strip("\n")


def entry(text: str) -> str:
    name, colon, meaning = text.partition(":")
    meaning = " ".join(meaning.split())
    return f"* `{name}`: {meaning}" if colon else f"* {' '.join(text.split())}"


def paragraphs(text: str) -> str:
    """Return paragraphs, with indented blocks as code."""
    blocks = [
        f"```\n{textwrap.dedent(block)}\n```"
        if all(line.startswith("    ") for line in block.splitlines())
        else block
        for block in re.split(r"\n\s*\n", text.strip("\n"))
        if block.strip()
    ]
    return "\n\n".join(blocks)


# ---- command line


def command_line() -> str:
    """Return the page of every verb and its options."""
    parts = [
        "# Command line\n\nOne command, `ksparse`, with a verb. `ksparse help VERB` shows the same in a terminal; "
        "`ksparse completion bash` (zsh, fish) prints a script that completes verbs and options. The same by task: "
        "[commands](../commands.md)."
    ]
    for group, modules in cli.GROUPS.items():
        names = {module.__name__ for module in modules}
        parts.append(f"## {group[0].upper()}{group[1:]}")
        parts += [verb(name) for name, function in VERBS.items() if function.__module__ in names]
    return "\n\n".join(parts)


def verb(name: str) -> str:
    """Return the section of a verb: usage, what it does, examples, options."""
    usage, description = describe_verb(name)
    parts = [f"### `{name}`", f"```\nksparse {usage}\n```", description]
    parts.append("```sh\n" + "\n".join(EXAMPLES[name]) + "\n```")
    forms: tuple[tuple[str, ...], ...] = ((), OTHER_FORMS[name]) if name in OTHER_FORMS else ((),)
    for words in forms:
        if words:
            parts.append(f"With `{words[0]}`:")
        for each in options_of_verb(name, words):
            parts += option_tables(each)
    if name in LOAD_LM:
        parts.append(
            f"`{FLAG}` lets code that comes with the language model run, in this call only."
        )
    return "\n\n".join(parts)


def option_tables(owner: type) -> list[str]:
    """Return the table of a verb's own options; the keys of a recipe are named and linked."""
    texts, rows, linked = all_docstrings(owner), [], []
    recipe_keys = options.field_types(config.Recipe)
    recipe_sections = {each for hint in recipe_keys.values() for each in options.classes(hint)}
    defaults = {field.name: default_of(field) for field in dataclasses.fields(owner)}
    for name, hint in options.field_types(owner).items():
        kinds = options.classes(hint)
        of_recipe = bool(kinds) and kinds[0] in recipe_sections
        if of_recipe or (name in recipe_keys and issubclass(owner, config.Recipe)):
            linked.append(f"`--{name}.…`" if kinds else f"`--{name}`")
        elif kinds:
            rows += [
                option_row(f"--{name}.{key}", each, "", all_docstrings(kinds[0]).get(key, ""))
                for key, each in options.field_types(kinds[0]).items()
            ]
        else:
            rows.append(option_row(f"--{name}", hint, defaults[name], texts.get(name, "")))
    found = []
    if linked:
        found.append(
            f"The keys of a recipe are options, too ([what each is](recipe.md)): {', '.join(linked)}."
        )
    if rows:
        found.append("\n".join(["| option | default | |", "|---|---|---|", *rows]))
    return found


def option_row(name: str, hint: Any, default: Any, text: str) -> str:
    flag = name.replace("_", "-")
    if hint is bool:
        flag += f"`, `--no-{flag.removeprefix('--')}"
    return f"| `{flag}` | {cell(default)} | {choices(hint)}{inline(text)} |"


def all_docstrings(owner: type) -> dict[str, str]:
    """Return what each field of an options class says, with those that it inherits."""
    found: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        if dataclasses.is_dataclass(each):
            found |= field_docstrings(each)
    return found


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return "" if field.default_factory is dataclasses.MISSING else field.default_factory()


def cell(value: Any) -> str:
    if value in ("", (), None):
        return ""
    if isinstance(value, tuple):
        return " ".join(f"`{each}`" for each in value)
    return f"`{value:,}`" if type(value) is int and abs(value) >= 10_000 else f"`{value}`"


def choices(hint: Any) -> str:
    """Return the values that an option may have, if they are few, before what it says."""
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return " ".join(f"`{value}`" for value in typing.get_args(hint) if value != "") + ": "


def inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- recipe


def recipe() -> str:
    """Return the page of every key of a recipe."""
    parts = [
        "# The recipe\n\nEverything that defines a run. A recipe is a TOML file with these sections and keys, a "
        "`ksparse.Recipe`, or options of `ksparse train` (`--sae.k 64`). In `ksparse.train`, a key may be given by its "
        "last part (`k=64`). Every key has a default; `ksparse.Recipe()` shows what differs from them. The paper is "
        "Gao et al. 2024 ([arXiv 2406.04093](https://arxiv.org/abs/2406.04093)).",
        '```toml\ntokens = 1_000_000\nbatch = 2048\n\n[acts]\nlm = "gpt2"\nsite = "resid_post.8"\n'
        'text = "my-texts/"\n\n[sae]\nn_latents = 8192\nk = 32\n\n[sae.activation]\nkind = "batch_topk"\n```',
    ]
    plain = [
        (name, hint)
        for name, hint in options.field_types(config.Recipe).items()
        if not options.classes(hint)
    ]
    parts += ["## The run as a whole", key_table(config.Recipe, "", [name for name, _ in plain])]
    for name, hint in options.field_types(config.Recipe).items():
        for section in options.classes(hint):
            parts += [f"## `[{name}]`", summary(section)]
            simple = [
                key
                for key, each in options.field_types(section).items()
                if not options.classes(each)
            ]
            parts.append(key_table(section, f"{name}.", simple))
            if name == "sae":
                parts += activations()
    return "\n\n".join(parts)


def activations() -> list[str]:
    """Return the sections of the kinds of activation."""
    kinds = " ".join(f"`{kind}`" for kind in config.ACTIVATION_CONFIGS)
    parts = [
        "### `[sae.activation]`\n\nThe activation function, by its kind.\n\n| key | default | |\n"
        f"|---|---|---|\n| `sae.activation.kind` | `topk` | {kinds}: what becomes of pre-activations |"
    ]
    for kind, section in config.ACTIVATION_CONFIGS.items():
        keys = [name for name in options.field_types(section) if name != "kind"]
        parts += [f'#### `kind = "{kind}"`', summary(section)]
        parts += [key_table(section, "sae.activation.", keys)] if keys else []
    return parts


def summary(owner: type) -> str:
    """Return what a class's docstring says before its sections."""
    return paragraphs(next(sections(inspect.getdoc(owner) or ""))[1])


def key_table(owner: type, prefix: str, names: list[str]) -> str:
    texts, hints = all_docstrings(owner), options.field_types(owner)
    fields = {field.name: field for field in dataclasses.fields(owner)}
    rows = [
        f"| `{prefix}{name}` | {cell(default_of(fields[name]))} | {choices(hints[name])}{inline(texts[name])} |"
        for name in names
    ]
    return "\n".join(["| key | default | |", "|---|---|---|", *rows])


# ---- evaluations, exit codes


def evaluations() -> str:
    """Return the page of every evaluation: its question, its numbers' place, its options."""
    parts = [
        "# Evaluations and their options\n\n`ksparse eval SAE NAME …` and `ksparse.evaluate(sae, lm, [NAME, …])`. "
        "Which question each answers, and beside which baseline: [evaluations](../evaluations.md). Numbers that go "
        "wrong elsewhere, and how they are defined here: [metrics](../metrics.md)."
    ]
    texts, hints = all_docstrings(EvalConfig), options.field_types(EvalConfig)
    fields = {field.name: field for field in dataclasses.fields(EvalConfig)}
    small, paper = budget_sizes("small"), budget_sizes("paper")

    def table(names: list[str]) -> str:
        rows = []
        for name in names:
            default = cell(fields[name].default)
            if name in small:
                default = f"small {cell(small[name] or 'all')}, paper {cell(paper[name] or 'all')}"
            text = re.sub(r"^[a-z0-9_, ]+: ", "", inline(texts[name]))
            rows.append(f"| `{name}` | {default} | {choices(hints[name])}{text} |")
        return "\n".join(["| option | default | |", "|---|---|---|", *rows])

    every = [
        name
        for name, field in fields.items()
        if not (set(field.metadata.get("evaluations", ())) & set(EVALS))
    ]
    parts += ["## Of every evaluation", table(every)]
    for name, metric in EVALS.items():
        first = ", runs where none is named" if name in DEFAULT_EVALUATIONS else ""
        parts += [f"## `{name}`", docstring(inspect.getdoc(metric) or "")]
        parts.append(f"Numbers, field by field: [`{name}.json`](../formats.md#{name}json){first}.")
        own = [
            key for key, field in fields.items() if name in field.metadata.get("evaluations", ())
        ]
        parts += [table(own)] if own else []
    return "\n\n".join(parts)


def exit_codes() -> str:
    """Return the page of exit codes, with the error of each in Python."""
    rows = ["| 0 | | done |"]
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and kind.__module__ == errors.__name__
        and "exit_code" in vars(kind)
    ]
    for kind in kinds:
        rows.append(f"| {kind.exit_code} | `{kind.__name__}` | {inline(summary(kind))} |")
    rows += [
        "| 129, 130, 143 | `Interrupted` | SIGHUP, Ctrl-C, SIGTERM, after saving |",
        "| 141 | | the reader of the output has left, as `head` does |",
    ]
    return "\n\n".join(
        [
            "# Exit codes and errors",
            "Every error that ksparse raises on purpose is a `KsparseError`. Its message says what is wrong, where, "
            "what was found, what was expected, and what to do. On the command line it is one line on standard error, "
            "and the exit code says which kind it is.",
            "\n".join(["| code | error in Python | |", "|---|---|---|", *rows]),
            f"In one line: {cli.EXIT_CODES}.",
        ]
    )
