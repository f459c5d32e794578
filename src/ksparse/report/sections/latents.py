"""Example latents: cards with the text that each fires on, and what evaluations found of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksparse.report import findings
from ksparse.report.figures import (
    Picture,
    add_column_tooltips,
    canvas,
    draw_histogram,
    filled_range,
    format_one_in,
    read_histogram,
    reference_line,
    render,
)
from ksparse.report.findings import Effect, Explanation
from ksparse.report.sections.base import Section
from ksparse.report.source import Arrays, RunSource
from ksparse.report.tables import decimal_places, format_percent
from ksparse.report.tokens import is_right_to_left, token_of

BEST, AT_TASKS = 6, 4
"""Latents with the best explanations; those best at a probe task."""
DENSEST, RANDOM, RAREST, WORST = 4, 12, 4, 3
"""Latents that fire most and least often, some at random, and those with the worst explanations."""
UNFOLDED = 3
"""Cards that are shown in full; the others open on a click."""
EXAMPLES = 6
"""Examples of each kind on a card."""
TEMPLATE = """\
{% from "card.html.jinja" import latent %}
{% from "parts.html.jinja" import figures %}
{% if not facts.samples %}
{{ figures(facts.pictures) }}
<p class="missing">The text that latents fire on is not in this run. This command adds it:
<code>{{ facts.command }}</code></p>
{% else %}
<p class="note">{{ facts.shown }} of {{ "{:,}".format(facts.count) }} latents, with examples from
{{ facts.text }}. The viewer shows all of them: <code>{{ facts.view }}</code></p>
<details class="how">
<summary>How to read a card</summary>
<p class="note">The colour behind a token is the latent’s value there, relative to its maximum
<span class="scale" aria-hidden="true"></span>. The token that an example was chosen for is
<mark>marked</mark>, and the number before the example is its value. Top examples show what
activates a latent most. Random ones are drawn from all tokens on which it fires, and show what it
mostly does. Its decoder row raises and lowers tokens through the final norm and the
unembedding.</p>
{% if facts.has_patterns %}
<p class="note">A pattern predicts the latent at the last of its tokens, with the value after the
arrow. <b class="sign">*</b> is any token, <b class="sign">*×3</b> any three tokens, and
<b class="sign">^</b> the beginning of a document. The patterns with the most examples are
shown.</p>
{% endif %}
{% if facts.has_effects %}
<p class="note">Sparsity is the share of the logits that change when the latent is ablated where it
is strongest. Without the latent, the logits that it raises would be lower.</p>
{% endif %}
</details>
{% if not facts.has_vocabulary %}
<p class="missing">Tokens are shown as their ids, since evals/vocabulary.json is missing. This
command adds it: <code>{{ facts.command }}</code></p>
{% endif %}
{% for sample in facts.samples %}
<h3>{{ sample.title }} <span class="aside">{{ sample.reason }}</span></h3>
{% for card in sample.cards %}
{{ latent(card, facts.view, card.number in facts.unfolded) }}
{% endfor %}
{% endfor %}
{{ figures(facts.pictures) }}
{% endif %}
"""


@dataclass(frozen=True)
class TextRun:
    """Tokens shown alike: one on which the latent fires, or a stretch of text where it does not."""

    text: str
    value: float = 0.0
    heat: float = 0.0
    """Value over the latent's maximum, from 0 to 1."""
    peak: bool = False
    """Whether the example was chosen for this token."""
    isolate: bool = False
    """Whether the text is written right to left and must not reorder its neighbours."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing sets the text apart from its neighbours."""
        return not (self.value or self.peak or self.isolate)


@dataclass(frozen=True)
class ExampleView:
    """A stretch of text around one token on which the latent fires."""

    value: float
    runs: list[TextRun]


@dataclass(frozen=True)
class LatentCard:
    """One latent as the page shows it."""

    number: int
    density: float
    mean: float
    largest: float
    cosine: float
    top: list[ExampleView]
    random: list[ExampleView]
    explanation: Explanation | None = None
    effect: Effect | None = None
    tasks: tuple[str, ...] = ()
    """Probe tasks of which it is the best latent."""
    raises: tuple[str, ...] = ()
    lowers: tuple[str, ...] = ()

    def format_value(self, value: float) -> str:
        """Return one of its values; all on the card have the same number of decimal places."""
        return f"{value:,.{decimal_places(self.largest, 3)}f}"


@dataclass(frozen=True)
class LatentSample:
    """The cards of latents that were chosen for the same reason."""

    title: str
    reason: str
    cards: list[LatentCard]


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the figures over all latents, and the cards of some."""
    arrays, samples = source.arrays("stats"), read_samples(source)
    cards = [card for sample in samples for card in sample.cards]
    return {
        "pictures": draw_pictures(source),
        "samples": samples,
        "shown": len(cards),
        "unfolded": {card.number for card in cards[:UNFOLDED]},
        "count": len(arrays.tensor("density")) if arrays is not None else None,
        "text": source.describe_text("stats"),
        "command": source.command("eval", "stats"),
        "view": source.command("view"),
        "has_patterns": any(card.explanation and card.explanation.patterns for card in cards),
        "has_effects": any(card.effect for card in cards),
        "has_vocabulary": bool(source.vocabulary),
    }


# ---- figures


def draw_pictures(source: RunSource) -> list[Picture]:
    """Return the figures over all latents that the run has data for."""
    stats, arrays = source.result("stats") or {}, source.arrays("stats")
    pictures = [draw_densities(stats.get("density_histogram"), source.uniform_density)]
    if arrays is not None:
        live = arrays.tensor("density") > 0
        pictures.append(draw_cosines(arrays.tensor("cosine")[live]))
    return [picture for picture in pictures if picture is not None]


def draw_densities(histogram: Any, uniform: float) -> Picture | None:
    """Draw how many latents fire how often.

    Args:
        histogram: edges (powers of ten) and counts, as the result has them.
        uniform: the density of each latent if all fired equally often, k / n.
    """
    edges_and_counts = read_histogram(histogram)
    if edges_and_counts is None:
        return None
    edges, counts = edges_and_counts
    first, last = filled_range(counts)
    low = math.floor(edges[first])
    high = max(math.ceil(edges[last + 1]), low + 1)
    with canvas() as (figure, axes):
        draw_histogram(axes, edges, counts)
        shares = [format_percent(10**edge) for edge in edges]
        texts = [
            f"density {shares[i]} to {shares[i + 1]}: {count:,.0f} latents" if count else ""
            for i, count in enumerate(counts)
        ]
        add_column_tooltips(axes, edges, texts)
        axes.set_xlim(low, high)
        axes.set_xticks(range(low, high + 1))
        axes.xaxis.set_major_formatter(lambda power, _: format_one_in(power))
        axes.set_xlabel("share of tokens on which it fires")
        axes.set_ylabel("latents")
        axes.grid(axis="x", visible=False)
        if low <= math.log10(uniform) <= high:
            reference_line(axes, math.log10(uniform), "all alike", vertical=True)
        drawing = render(figure)
    return Picture(
        "latents-density",
        drawing,
        "How often latents fire",
        "Live latents by density, on a logarithmic axis. The line is k / n, where all would be if "
        "they fired equally often. A hump at the far left is latents that are almost dead; one "
        "near 1 is latents that carry little information.",
        f"{counts.sum():,.0f} live latents; the commonest density is about "
        f"{shares[int(np.argmax(counts))]} of tokens.",
    )


def draw_cosines(values: np.ndarray) -> Picture | None:
    """Draw the cosine between what latents read and what they write, [latents]."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low = min(0.0, float(values.min()))
    counts, edges = np.histogram(values, bins=40, range=(low, 1))
    with canvas() as (figure, axes):
        draw_histogram(axes, edges, counts)
        texts = [
            f"cosine {edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,.0f} latents" if count else ""
            for i, count in enumerate(counts)
        ]
        add_column_tooltips(axes, edges, texts)
        axes.set_xlim(low, 1)
        axes.set_xlabel("cosine of encoder and decoder direction")
        axes.set_ylabel("latents")
        axes.grid(axis="x", visible=False)
        drawing = render(figure)
    return Picture(
        "latents-cosine",
        drawing,
        "What they read and what they write",
        "Cosine between each live latent’s encoder and decoder direction. They start equal; "
        "those of correlated latents diverge, so that each reads what the others do not.",
        f"Median {np.median(values):.2f}, from {values.min():.2f} to {values.max():.2f}.",
    )


# ---- which latents have a card


def choose_latents(source: RunSource) -> list[tuple[str, str, list[int]]]:
    """Return (title, reason, latents) of each sample; no latent is in two."""
    arrays = source.arrays("stats")
    if arrays is None or source.result("stats") is None:
        return []
    density = arrays.tensor("density")
    taken: set[int] = set()

    def take(latents: Any, count: int) -> list[int]:
        """Take the first live latents that are in no sample yet."""
        free = [
            i
            for i in dict.fromkeys(map(int, latents))
            if 0 <= i < len(density) and density[i] > 0 and i not in taken
        ][:count]
        taken.update(free)
        return free

    explained = findings.explanations(source)
    scored = explained.best_first() if explained is not None else np.array([], int)
    at_tasks = [
        task.latent for task in findings.tasks(source) if task.latent is not None and task.is_clear
    ]
    best, best_at_tasks = take(scored, BEST), take(at_tasks, AT_TASKS)
    others = density.copy()
    others[list(taken)] = 0
    densest, random, rarest = (take(latents, len(latents)) for latents in sample_by_density(others))
    samples = (
        (
            "Best explained",
            "Patterns of tokens predict them best (the highest F1); many respond to a single "
            "token.",
            best,
        ),
        (
            "Best at a task",
            "At a probe task they clearly beat channels and random latents.",
            best_at_tasks,
        ),
        (
            "The densest",
            "Of the others, those that fire on the most tokens; many respond to something general.",
            densest,
        ),
        ("At random", "Drawn with a fixed seed from all that are left.", random),
        ("The rarest", "They fire on the fewest tokens, but on some.", rarest),
        (
            "Worst explained",
            "The lowest F1: their patterns do not predict when they fire.",
            take(scored[::-1], WORST),
        ),
    )
    return [sample for sample in samples if sample[2]]


def sample_by_density(density: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the densest, random and rarest live latents, each latent once; never a dead one."""
    live = np.flatnonzero(density > 0)
    order = live[np.argsort(-density[live], kind="stable")]
    densest, others = order[:DENSEST], order[DENSEST:]
    if len(others) > RAREST:
        rarest, others = others[-RAREST:], others[:-RAREST]
    else:
        rarest, others = others, others[:0]
    drawn = np.random.default_rng(0).permutation(len(others))[:RANDOM]
    return densest, np.sort(others[drawn]), rarest


def latents_with_cards(source: RunSource) -> set[int]:
    """Return the latents that have a card on the page."""
    return {latent for _, _, latents in choose_latents(source) for latent in latents}


# ---- cards


def read_samples(source: RunSource) -> list[LatentSample]:
    """Return the cards of each sample; none without the arrays of `stats`."""
    samples, arrays = choose_latents(source), source.arrays("stats")
    if not samples or arrays is None:
        return []
    reader = _CardReader(source, arrays)
    return [
        LatentSample(title, reason, [reader.read(latent) for latent in latents])
        for title, reason, latents in samples
    ]


class _CardReader:
    """Reads the rows of one latent at a time and makes its card."""

    def __init__(self, source: RunSource, arrays: Arrays):
        stats = source.result("stats") or {}
        window = stats.get("window") or {}
        self.has_examples = stats.get("options", {}).get("examples") != 0
        self.arrays, self.vocabulary = arrays, source.vocabulary
        self.explanations = findings.explanations(source)
        self.effects = findings.effects(source)
        self.tasks = findings.tasks(source)
        self.after, self.before = int(window.get("after", 0)), int(window.get("before", 0))

    def read(self, latent: int) -> LatentCard:
        density, mean, largest, cosine = (
            float(np.nan_to_num(self.arrays.row(name, latent)))
            for name in ("density", "mean_act", "max_act", "cosine")
        )
        return LatentCard(
            latent,
            density,
            mean,
            largest,
            cosine,
            self._read_examples("top", latent, largest),
            self._read_examples("random", latent, largest),
            self.explanations.find(latent) if self.explanations else None,
            self.effects.find(latent) if self.effects else None,
            tuple(task.name for task in self.tasks if task.latent == latent),
            self._read_ends("up", latent),
            self._read_ends("down", latent),
        )

    def _read_ends(self, end: str, latent: int) -> tuple[str, ...]:
        """Return the tokens at an end of the direct logits, which old results lack."""
        name = f"logits_{end}_token"
        if name not in self.arrays.names:
            return ()
        tokens = self.arrays.row(name, latent).tolist()
        return tuple(token_of(self.vocabulary, token) for token in tokens if token >= 0)

    def _read_examples(self, prefix: str, latent: int, largest: float) -> list[ExampleView]:
        if not self.has_examples:
            return []
        context, position, value, acts = (
            self.arrays.row(f"{prefix}_{name}", latent)[:EXAMPLES]
            for name in ("context", "position", "value", "acts")
        )
        width = self.before + 1 + self.after
        if acts.ndim != 2 or acts.shape[1] != width:
            raise self.arrays.damaged(
                f": '{prefix}_acts' has windows of {acts.shape[-1]} tokens, the result says {width}"
            )
        return [
            self._make_example(int(c), int(p), float(v), a, largest)
            for c, p, v, a in zip(context, position, value, acts)
            if c >= 0
        ]

    def _make_example(
        self, context: int, position: int, value: float, acts: np.ndarray, largest: float
    ) -> ExampleView:
        tokens = self.arrays.row("contexts", context)
        window = range(position - self.before, position + self.after + 1)
        runs = [
            self._make_run(int(tokens[offset]), act, largest, offset == position)
            for offset, act in zip(window, np.nan_to_num(acts.astype(float)))
            if 0 <= offset < len(tokens) and tokens[offset] >= 0
        ]
        # Examples are float16, so their value may be rounded above the maximum.
        return ExampleView(min(value, largest), join_quiet_runs(runs))

    def _make_run(self, token: int, act: float, largest: float, peak: bool) -> TextRun:
        heat = min(1.0, act / largest) if act > 0 and largest > 0 else 0.0
        text = token_of(self.vocabulary, token)
        return TextRun(text, act if heat else 0.0, round(heat, 2), peak, is_right_to_left(text))


def join_quiet_runs(runs: list[TextRun]) -> list[TextRun]:
    """Join neighbours on which the latent does not fire, so that a page has few elements."""
    joined: list[TextRun] = []
    for run in runs:
        if joined and run.is_quiet and joined[-1].is_quiet:
            joined[-1] = TextRun(joined[-1].text + run.text)
        else:
            joined.append(run)
    return joined


SECTION = Section("latents", "Latents", read_facts, TEMPLATE, needs="stats")
