"""The page of a run: the sections in their order, and the templates that show them."""

from __future__ import annotations

from contextlib import suppress

import jinja2

from ksparse.errors import KsparseError
from ksparse.report.figures import Picture
from ksparse.report.sections import SECTIONS, headline
from ksparse.report.source import DamagedResult, RunSource
from ksparse.report.tables import format_amount, format_percent, format_significant
from ksparse.report.tokens import safe_text
from ksparse.storage.run_folder import RunFolder

_WRONG_TYPES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""The errors that values of an unexpected type cause."""


def render(run: RunFolder) -> tuple[str, list[Picture]]:
    """Return the page as HTML, and the pictures on it.

    A result that is damaged, or that no section can show, is left out, and the page says so.
    """
    source = RunSource(run)
    while True:
        try:
            return _render(source)
        except DamagedResult as error:
            source.leave_out(error.evaluation, str(error))
        except _WRONG_TYPES as error:
            if isinstance(error, KsparseError):
                raise
            name = _find_culprit(source)
            if name is None:
                raise
            problem = f"{type(error).__name__}: {str(error)[:80]}"
            source.leave_out(
                name, f"{run.eval_file(name)}: it holds values that no page can show ({problem})"
            )


def _render(source: RunSource) -> tuple[str, list[Picture]]:
    sections = [
        (section, section.facts(source))
        for section in SECTIONS
        if not section.needs or source.result(section.needs) is not None
    ]
    html = (
        environment()
        .get_template("report.html.jinja")
        .render(
            name=source.run.name,
            summary=describe(source) + ".",
            headline=headline.read_numbers(source),
            sections=sections,
            left_out=source.left_out,
        )
    )
    return html, [picture for _, facts in sections for picture in facts.get("pictures", [])]


def _find_culprit(source: RunSource) -> str | None:
    """Return the result without which the page renders: its checksum is right, its content not."""
    for name in source.names_read():
        others = RunSource(source.run)
        others.do_without([name, *source.left_out])
        with suppress(*_WRONG_TYPES, DamagedResult):
            _render(others)
            return name
    return None


def environment() -> jinja2.Environment:
    """Return the templates' environment, which makes every string safe to look at, then escapes it.

    It has the filters `percent`, and `template`, which compiles a section's source for `include`.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("ksparse.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: (
            safe_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
        ),
    )
    templates.filters |= {"percent": format_percent, "template": templates.from_string}
    return templates


def describe(source: RunSource) -> str:
    """Return what a run is, in one sentence without its full stop."""
    recipe, subject, tokens = source.recipe, source.subject, source.tokens_trained
    if tokens:
        trained = f"trained on {format_amount(tokens)} activations"
    elif recipe:
        trained = f"to be trained on {format_amount(recipe.tokens)} activations"
    else:
        trained = "judged on activations"
    return (
        f"A {source.activation} autoencoder of {subject.n_latents:,} latents, {subject.bound}, "
        f"{trained} of {short_name(subject.acts.lm)} at {subject.acts.site}"
    )


def summarize(source: RunSource) -> str:
    """Return a run in one sentence; what was not measured is left out."""
    text = describe(source)
    explained = source.number("stats", "explained_variance")
    added, clean, spliced = (
        source.number("downstream", f"ce_{name}") for name in ("delta", "clean", "spliced")
    )
    results = []
    if explained:
        results.append(f"it explains {format_percent(explained.value)} of their variance")
    if added and clean and spliced:
        results.append(
            "with its reconstructions in their place the LM’s loss rises by "
            f"{format_significant(added.value, 2)} nats per token, from {clean.value:.2f} to "
            f"{spliced.value:.2f}"
        )
    return f"{text}: {', and '.join(results)}." if results else f"{text}."


def short_name(lm: str) -> str:
    """Return a short name of an LM: the last part of a path, or the whole name on the Hub."""
    is_path = lm.startswith((".", "/", "~")) or lm.count("/") > 1
    return lm.rstrip("/").rpartition("/")[2] if is_path else lm
