"""Arrays of `stats` -> cards of some latents, with the text that each fires on, and what other
evaluations found of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ksparse.report import figures, findings
from ksparse.report.figures import Picture
from ksparse.report.findings import Effect, Explanation
from ksparse.report.source import Arrays, RunSource
from ksparse.report.tables import decimals
from ksparse.report.tokens import is_right_to_left, token_of

DENSEST, RANDOM, RAREST = 4, 12, 4
EXPLAINED, KNOWING = 3, 4
"""Latents with the best explanations, as many with the worst, and those that are best at a probe
task."""
EXAMPLES = 6
"""Examples of each kind on a card."""


@dataclass(frozen=True)
class TextRun:
    """Some tokens that look alike: one that the latent fires on, or a stretch of text where it does
    not."""

    text: str
    value: float = 0.0
    heat: float = 0.0
    """Value over the latent's largest, from 0 to 1."""
    peak: bool = False
    apart: bool = False
    """Written right to left, so it must be kept from reordering its neighbours."""


@dataclass(frozen=True)
class ExampleView:
    """A stretch of text around one token on which the latent fires."""

    value: float
    pieces: list[TextRun]


@dataclass(frozen=True)
class LatentCard:
    """One latent."""

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

    def written(self, value: float) -> str:
        """Return one of its values with as many digits after the point as all on the card."""
        return f"{value:,.{decimals(self.largest, 3)}f}"


@dataclass(frozen=True)
class LatentSample:
    """Some latents that were chosen alike."""

    title: str
    why: str
    cards: list[LatentCard]


def pictures(source: RunSource) -> list[Picture]:
    """Return the figures over all latents."""
    stats, arrays = source.result("stats") or {}, source.arrays("stats")
    recipe, histogram = source.recipe, stats.get("density_histogram") or {}
    drawn = [
        figures.density(
            histogram.get("edges", []),
            histogram.get("counts", []),
            recipe.sae.k / recipe.sae.n_latents,
        )
    ]
    if arrays is not None:
        drawn.append(figures.cosines(arrays.whole("cosine")[arrays.whole("density") > 0]))
    return [picture for picture in drawn if picture is not None]


def samples(source: RunSource) -> list[LatentSample]:
    """Return the cards of each sample; nothing without the arrays of `stats`."""
    groups, arrays = chosen(source), source.arrays("stats")
    if not groups or arrays is None:
        return []
    reader = _Reader(source, arrays)
    return [
        LatentSample(title, why, [reader.card(latent) for latent in latents])
        for title, why, latents in groups
    ]


def chosen(source: RunSource) -> list[tuple[str, str, list[int]]]:
    """Return (title, why, latents) of each sample, each latent in one: the densest, some at random,
    the rarest, and what evaluations single out."""
    arrays = source.arrays("stats")
    if arrays is None or source.result("stats") is None:
        return []
    density = arrays.whole("density")
    densest, random, rarest = (latents.tolist() for latents in choose(density))
    taken = {*densest, *random, *rarest}

    def others(latents: Any, most: int) -> list[int]:
        """Take the first live ones that are in no sample yet."""
        free = [
            i
            for i in dict.fromkeys(map(int, latents))
            if 0 <= i < len(density) and density[i] > 0 and i not in taken
        ][:most]
        taken.update(free)
        return free

    explained = findings.explanations(source)
    scored = explained.best_first() if explained is not None else np.array([], int)
    knowing = [
        task.latent
        for task in findings.tasks(source)
        if task.latent is not None and (task.gain or 0) > 0
    ]
    groups = (
        (
            "The densest",
            "They fire on the most tokens; often they stand for something general.",
            densest,
        ),
        (
            "At random",
            "Drawn from all other live latents, with a fixed seed and no regard to how they look.",
            random,
        ),
        ("The rarest", "They fire on the fewest tokens, but on some.", rarest),
        (
            "Best explained",
            "The highest F1 among the scored; often they stand for a single token.",
            others(scored, EXPLAINED),
        ),
        (
            "Worst explained",
            "The lowest F1 among the scored: the patterns found do not tell when they fire.",
            others(scored[::-1], EXPLAINED),
        ),
        (
            "Best at a task",
            "At the probe tasks on which a latent is furthest below channels and random latents.",
            others(knowing, KNOWING),
        ),
    )
    return [group for group in groups if group[2]]


def shown(source: RunSource) -> set[int]:
    """Return the latents that have a card on the page."""
    return {latent for _, _, latents in chosen(source) for latent in latents}


def choose(density: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the densest, random and rarest live latents, each latent once; never a dead one."""
    live = np.flatnonzero(density > 0)
    order = live[np.argsort(-density[live], kind="stable")]
    densest, rest = order[:DENSEST], order[DENSEST:]
    rarest, rest = (rest[-RAREST:], rest[:-RAREST]) if len(rest) > RAREST else (rest, rest[:0])
    drawn = np.random.default_rng(0).permutation(len(rest))[:RANDOM]
    return densest, np.sort(rest[drawn]), rarest


class _Reader:
    """Reads the rows of one latent and makes its card."""

    def __init__(self, source: RunSource, arrays: Arrays):
        stats = source.result("stats") or {}
        window, self.none = stats.get("window") or {}, stats.get("options", {}).get("examples") == 0
        self.arrays, self.vocabulary = arrays, source.vocabulary
        self.explanations, self.effects, self.tasks = (
            findings.explanations(source),
            findings.effects(source),
            findings.tasks(source),
        )
        self.after, self.before = int(window.get("after", 0)), int(window.get("before", 0))

    def card(self, latent: int) -> LatentCard:
        density, mean, largest, cosine = (
            self._one(name, latent) for name in ("density", "mean_act", "max_act", "cosine")
        )
        return LatentCard(
            latent,
            density,
            mean,
            largest,
            cosine,
            self._examples("top", latent, largest),
            self._examples("random", latent, largest),
            self.explanations.of(latent) if self.explanations else None,
            self.effects.of(latent) if self.effects else None,
            tuple(task.name for task in self.tasks if task.latent == latent),
        )

    def _one(self, name: str, latent: int) -> float:
        return float(np.nan_to_num(self.arrays.row(name, latent)))

    def _examples(self, kind: str, latent: int, largest: float) -> list[ExampleView]:
        if self.none:
            return []
        context, position, value, acts = (
            self.arrays.row(f"{kind}_{name}", latent)[:EXAMPLES]
            for name in ("context", "position", "value", "acts")
        )
        if acts.ndim != 2 or acts.shape[1] != self.before + 1 + self.after:
            raise self.arrays.damaged(
                f": '{kind}_acts' has windows of {acts.shape[-1]} tokens, "
                f"the result says {self.before + 1 + self.after}"
            )
        return [
            self._example(int(c), int(p), float(v), a, largest)
            for c, p, v, a in zip(context, position, value, acts)
            if c >= 0
        ]

    def _example(
        self, context: int, position: int, value: float, acts: np.ndarray, largest: float
    ) -> ExampleView:
        tokens = self.arrays.row("contexts", context)
        shown = []
        for offset, act in zip(
            range(position - self.before, position + self.after + 1),
            np.nan_to_num(acts.astype(float)),
        ):
            if 0 <= offset < len(tokens) and tokens[offset] >= 0:
                shown.append(self._piece(int(tokens[offset]), act, largest, offset == position))
        return ExampleView(
            min(value, largest), join(shown)
        )  # examples are float16 and may round up

    def _piece(self, token: int, act: float, largest: float, peak: bool) -> TextRun:
        heat = min(1.0, act / largest) if act > 0 and largest > 0 else 0.0
        text = token_of(self.vocabulary, token)
        return TextRun(text, act if heat else 0.0, round(heat, 2), peak, is_right_to_left(text))


def join(pieces: list[TextRun]) -> list[TextRun]:
    """Join neighbours on which the latent does not fire, so that a page has an element only where
    there is something to say."""
    joined: list[TextRun] = []
    for piece in pieces:
        if joined and _quiet(piece) and _quiet(joined[-1]):
            joined[-1] = TextRun(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def _quiet(piece: TextRun) -> bool:
    return not (piece.value or piece.peak or piece.apart)


def facts(source: RunSource) -> dict[str, Any]:
    """Return what the section on latents shows."""
    arrays = source.arrays("stats")
    count = len(arrays.whole("density")) if arrays is not None else None
    found = samples(source)
    cards = [card for sample in found for card in sample.cards]
    return {
        "pictures": pictures(source),
        "samples": found,
        "count": count,
        "text": source.text_of("stats"),
        "command": source.command("eval", "stats"),
        "view": source.command("view"),
        "has_patterns": any(card.explanation and card.explanation.patterns for card in cards),
        "has_effects": any(card.effect for card in cards),
        "has_stats": source.result("stats") is not None,
        "has_vocabulary": bool(source.vocabulary),
    }
