"""The page: its sections in their order, and the templates that show them.

A Section is a title, a template and the function that makes what the template shows; a new one is a
line in SECTIONS.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import jinja2

from ksparse import config as recipes
from ksparse.config import WITH_AUXK, Recipe
from ksparse.errors import KsparseError
from ksparse.report import claims, codes, figures, findings, latents, probes, tables
from ksparse.report.figures import Picture
from ksparse.report.source import DamagedResult, RunSource, is_number
from ksparse.report.tokens import safe_text
from ksparse.storage.run_folder import RunFolder

_ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What values of odd types raise."""
AGAIN = "runs/again"
"""Where the commands of the last section put the run's twin."""
LOSSES = {
    "clean": "the LM as it is",
    "spliced": "reconstruction",
    "n2g": "explanations",
    "bigram": "bigrams",
    "unigram": "unigrams",
    "bias": "b_pre alone",
    "zero": "zeros",
}
"""What `explained_loss` puts in place of the activation, in words."""


@dataclass(frozen=True)
class Section:
    """One question that the page answers."""

    anchor: str
    title: str
    facts: Callable[[RunSource], dict[str, Any]]

    @property
    def template(self) -> str:
        return f"{self.anchor}.html.jinja"


def render(run: RunFolder) -> tuple[str, list[Picture]]:
    """Return the page and the pictures on it."""
    source = RunSource(run)
    while True:
        try:
            return _page(source)
        except DamagedResult as error:
            source.leave_out(error.evaluation, str(error))
        except _ODD as error:
            if isinstance(error, KsparseError):
                raise
            name = _culprit(source)
            if name is None:
                raise
            why = f"it holds what no page can show ({type(error).__name__}: {str(error)[:80]})"
            source.leave_out(name, f"{run.eval_file(name)}: {why}")


def _page(source: RunSource) -> tuple[str, list[Picture]]:
    shown = [(section, section.facts(source)) for section in SECTIONS]
    html = (
        environment()
        .get_template("report.html.jinja")
        .render(
            name=source.run.name,
            summary=summary(source),
            sections=shown,
            left_out=source.left_out,
        )
    )
    return html, [picture for _, facts in shown for picture in facts.get("pictures", [])]


def _culprit(source: RunSource) -> str | None:
    """Return the result without which there would be a page: its sum is right, what it holds is
    not."""
    for name in source.read():
        rest = RunSource(source.run)
        rest.do_without([name, *source.left_out])
        with suppress(*_ODD, DamagedResult):
            _page(rest)
            return name
    return None


def environment() -> jinja2.Environment:
    """Return the templates' environment: every string is made safe to look at, then escaped."""
    made = jinja2.Environment(
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
    made.filters |= {"percent": tables.percent}
    return made


# ---- the top -------------------------------------------------------------------------------------


def summary(source: RunSource) -> str:
    """Return what there is to say of a run in one sentence; what was not measured is left out."""
    recipe = source.recipe
    seen = tokens_seen(source)
    trained = (
        f"trained on {tables.amount(seen)}"
        if seen
        else f"to be trained on {tables.amount(recipe.tokens)}"
    )
    what = (
        f"A {type(recipe.sae.activation).__name__} autoencoder of {recipe.sae.n_latents:,} "
        f"latents, {recipe.sae.bound}, "
        f"{trained} activations of {called(recipe.acts.lm)} at {recipe.acts.site}"
    )
    explained, added, clean, spliced = (
        source.number(*which)
        for which in (
            ("stats", "explained_variance"),
            ("downstream", "ce_delta"),
            ("downstream", "ce_clean"),
            ("downstream", "ce_spliced"),
        )
    )
    said = []
    if explained:
        said.append(f"it explains {tables.percent(explained.value)} of their variance")
    if added and clean and spliced:
        said.append(
            "with its reconstructions in their place the LM's loss rises by "
            f"{tables.significant(added.value, 2)} nats per "
            f"token, from {clean.value:.2f} to {spliced.value:.2f}"
        )
    return what + (": " if said else "") + ", and ".join(said) + "."


def called(lm: str) -> str:
    """Return a short name of an LM: the last part of a path, the whole name on the Hub."""
    return (
        lm.rstrip("/").rpartition("/")[2]
        if lm.startswith((".", "/", "~")) or lm.count("/") > 1
        else lm
    )


def tokens_seen(source: RunSource) -> int:
    """Return the tokens that the metrics say were trained on."""
    last = source.metrics[-1].get("tokens") if source.metrics else None
    return int(last) if is_number(last) else 0


# ---- the sections --------------------------------------------------------------------------------


def subject(source: RunSource) -> dict[str, Any]:
    """Return what was trained on what, and on which machine."""
    recipe = source.recipe
    text = source.run.recipe_file.read_text(encoding="utf-8")
    return {
        "what": what(recipe, source),
        "machine": machine(source),
        "recipe": text.splitlines(),
        "changed": recipes.differences(recipes.to_dict(Recipe()), recipes.to_dict(recipe)),
    }


def what(recipe: Recipe, source: RunSource) -> dict[str, str]:
    acts, sae, seen = recipe.acts, recipe.sae, tokens_seen(source)
    text = " · ".join(
        part for part in (acts.text, acts.text_config, acts.text_split) if part and part != "train"
    )
    asked = recipe.steps * recipe.batch
    return {
        "Subject LM": acts.lm + ("" if acts.revision == "main" else f" at {acts.revision}"),
        "Site": acts.site,
        "Text": text,
        "Contexts": f"{acts.context} tokens, borders {acts.borders}, BOS {acts.bos}, kept "
        f"positions: {acts.keep}",
        "Latents": f"{sae.n_latents:,}",
        "Activation": ", ".join(
            [
                type(sae.activation).__name__,
                *(
                    f"{key} {value}"
                    for key, value in asdict(sae.activation).items()
                    if key != "kind"
                ),
            ]
        ),
        "Active at a time": f"k = {sae.k}" if sae.activation.kind == "topk" else sae.bound,
        "Training": f"{seen:,} tokens in batches of {recipe.batch:,}"
        + (f"; {asked:,} were asked for" if seen < asked else ""),
        "Normalisation": acts.normalize,
        "Learning rate": f"{recipe.lr:.3g}" + ("" if recipe.optim.lr else ", from the 1/√n law"),
        "AuxK": f"weight {sae.auxk_coef:.3g}, dead after {recipe.dead_after:,} tokens"
        if sae.auxk_coef and sae.activation.kind in WITH_AUXK
        else "off",
        "Weights": f"average with decay {recipe.ema:.4g}" if recipe.ema else "the last step's",
        "Seed": str(recipe.seed),
    }


def machine(source: RunSource) -> dict[str, str]:
    """Return the hardware, the versions and the time, as far as the run recorded them."""
    found, last = source.environment, source.metrics[-1] if source.metrics else {}
    facts = {
        "Hardware": hardware(found),
        "System": found.get("platform"),
        "Versions": tables.plain(found.get("versions") or {}),
    }
    if is_number(last.get("seconds")):
        facts["Time"] = tables.duration(last["seconds"])
    if is_number(last.get("tokens_per_s")):
        facts["Speed"] = f"{last['tokens_per_s']:,.0f} tokens per second"
    return {key: str(value) for key, value in facts.items() if value}


def hardware(found: dict[str, Any]) -> str:
    threads = f"{found['threads']} CPU threads" if found.get("threads") else ""
    parts = [
        tables.plain(found.get("gpus") or ""),
        tables.plain(found.get("processor") or ""),
        threads,
    ]
    return ", ".join(part for part in parts if part)


def quality(source: RunSource) -> dict[str, Any]:
    """Return the claims, the numbers behind them, and the figures that show more than a mean
    does."""
    judged = claims.judged(source)
    return {
        "claims": judged,
        "tally": claims.tally(judged),
        "groups": tables.table(source),
        "pictures": evaluated(source),
        "settings": tables.settings(source),
    }


def evaluated(source: RunSource) -> list[Picture]:
    """Return the figures of explanations and ablations."""
    drawn = [
        figures.explained(
            {name: source.number("explained_loss", f"ce_{key}") for key, name in LOSSES.items()},
            LOSSES["n2g"],
        )
    ]
    if (explained := findings.explanations(source)) is not None:
        means = {
            name: (source.number("n2g", f"{kind}recall"), source.number("n2g", f"{kind}precision"))
            for name, kind in (("mean", ""), ("mean of wrong latents’ patterns", "shuffled_"))
        }
        drawn.append(
            figures.patterns(
                explained.scores["recall"], explained.scores["precision"], means, explained.scored
            )
        )
    ablation = source.result("ablation") or {}
    drawn.append(
        figures.effects(ablation.get("histogram") or {}, ablation.get("channel_histogram") or {})
    )
    return [picture for picture in drawn if picture is not None]


def training(source: RunSource) -> dict[str, Any]:
    held_out = source.number("stats", "nmse")
    skipped = source.metrics[-1].get("skipped") if source.metrics else 0
    return {
        "pictures": figures.training(
            source.metrics,
            source.recipe.sae.k,
            held_out.value if held_out else None,
            source.brief_text_of("stats"),
        ),
        "skipped": skipped or 0,
        "command": source.command("resume"),
    }


def again(source: RunSource) -> dict[str, Any]:
    """Return the commands that make this run and this page again."""
    train = ["ksparse", "train", f"{source.place}/recipe.toml", "--out", AGAIN]
    if not source.recipe.threads and is_number(source.environment.get("threads")):
        train += [
            "--threads",
            str(source.environment["threads"]),
        ]  # the recipe left it to the machine
    return {
        "train": shlex.join(train),
        "evaluate": evaluations(source),
        "report": source.command("report"),
        "version": versions.get("ksparse")
        if isinstance(versions := source.environment.get("versions"), dict)
        else None,
    }


def evaluations(source: RunSource) -> list[str]:
    """Return the commands of the results that there are, one for all whose options agree."""
    calls: list[tuple[list[str], dict[str, Any]]] = []
    for group in (*tables.GROUPS, *codes.GROUPS):
        result = source.result(group.eval)
        if result is None:
            continue
        options = result.get("options") or {}
        names, own = next(
            (
                call
                for call in calls
                if all(call[1].get(key, value) == value for key, value in options.items())
            ),
            ([], {}),
        )
        if not names:
            calls.append((names, own))
        names.append(group.eval)
        own.update(options)
    return [
        shlex.join(["ksparse", "eval", AGAIN, *names, *_flags(options)]) for names, options in calls
    ] or [f"ksparse eval {AGAIN}"]


def _flags(options: dict[str, Any]) -> list[str]:
    return [
        word
        for key, value in options.items()
        if value not in (None, "")
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]


SECTIONS = (
    Section("subject", "What was run", subject),
    Section("quality", "Is it good?", quality),
    Section("probes", "What its latents know", probes.facts),
    Section("training", "How it trained", training),
    Section("codes", "How its codes and latents are", codes.facts),
    Section("latents", "Its latents", latents.facts),
    Section("again", "How to reproduce it", again),
)
