"""Arrays of `n2g` and `ablation`, tasks of `probes` -> what they found of single latents.

Explanations   patterns of tokens that predict a latent, and how well
Effects        what a latent does to the LM's predictions where it is strongest
tasks          losses of each probe task, and the latent that is best at it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ksparse.report.source import Arrays, Number, RunSource, is_number, number
from ksparse.report.tokens import token_of

PATTERNS = 4
"""Patterns of a latent that are shown, those with the most examples."""
PARTS = 24
"""Parts of a pattern that are shown, the last ones."""
_ANY = -1


@dataclass(frozen=True)
class PatternPart:
    """A piece of a pattern: a token in quotes, or a sign that stands for something."""

    text: str
    sign: bool = False


@dataclass(frozen=True)
class PatternView:
    """Tokens in reading order, the value they predict at the last of them, and the number of
    examples that it was built from."""

    parts: list[PatternPart]
    value: float
    support: int


@dataclass(frozen=True)
class Explanation:
    """A latent's patterns, as many as are shown, and its scores if it was among the scored."""

    patterns: list[PatternView]
    count: int
    scores: dict[str, float]


class Explanations:
    """Reads the patterns of one latent at a time: there may be millions."""

    def __init__(self, source: RunSource, arrays: Arrays):
        self.arrays, self.vocabulary = arrays, source.vocabulary
        self.latents = arrays.whole("pattern_latent")  # sorted
        self.scored = arrays.whole("scored")
        self.scores = {
            name: arrays.rows(name, 0, len(self.scored)) for name in ("precision", "recall", "f1")
        }

    def of(self, latent: int, most: int = PATTERNS) -> Explanation | None:
        """Return what is known of a latent, with so many patterns, or None if it was neither
        explained nor scored."""
        first, last = (
            int(np.searchsorted(self.latents, latent, side)) for side in ("left", "right")
        )
        at = np.flatnonzero(self.scored == latent)
        if first == last and not len(at):
            return None
        scores = {
            name: float(values[at[0]])
            for name, values in self.scores.items()
            if len(at) and math.isfinite(values[at[0]])
        }
        return Explanation(self._patterns(first, last, most), last - first, scores)

    def best_first(self) -> np.ndarray:
        """Return the scored latents that have an F1, by F1."""
        known = np.isfinite(self.scores["f1"])
        return self.scored[known][np.argsort(-self.scores["f1"][known], kind="stable")]

    def _patterns(self, first: int, last: int, most: int) -> list[PatternView]:
        if first == last:
            return []
        values, support, anchored = (
            np.nan_to_num(self.arrays.rows(f"pattern_{name}", first, last))
            for name in ("value", "support", "anchored")
        )
        starts = self.arrays.rows("pattern_start", first, last + 1)
        shown = np.lexsort((-values, -support))[:most]
        return [
            PatternView(
                self._parts(
                    self.arrays.rows("pattern_tokens", int(starts[i]), int(starts[i + 1])).tolist(),
                    bool(anchored[i]),
                ),
                float(values[i]),
                int(support[i]),
            )
            for i in shown
        ]

    def _parts(self, tokens: list[int], anchored: bool) -> list[PatternPart]:
        parts = [PatternPart("^", sign=True)] if anchored else []
        for token, run in groupby(tokens):
            count = len(list(run))
            if token == _ANY:
                parts.append(PatternPart("*" if count == 1 else f"*×{count}", sign=True))
            else:
                parts += [PatternPart(f'"{token_of(self.vocabulary, token)}"')] * count
        return parts if len(parts) <= PARTS else [PatternPart("…", sign=True), *parts[-PARTS:]]


def explanations(source: RunSource) -> Explanations | None:
    """Return the reader of explanations, or None without them."""
    arrays = source.arrays("n2g")
    return (
        Explanations(source, arrays)
        if arrays is not None and source.result("n2g") is not None
        else None
    )


@dataclass(frozen=True)
class Effect:
    """What a latent adds to the logits of tokens at the position where it is strongest, and the
    share of logits that it matters to."""

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]
    sparsity: float | None


class EffectsReader:
    """Reads the table of one latent at a time."""

    def __init__(self, source: RunSource, arrays: Arrays):
        self.arrays, self.vocabulary = arrays, source.vocabulary
        self.latents = arrays.whole("latent")

    def of(self, latent: int) -> Effect | None:
        """Return a latent's effect, or None if it was not ablated."""
        at = np.flatnonzero(self.latents == latent)
        if not len(at):
            return None
        sparsity = float(self.arrays.row("sparsity", int(at[0])))
        return Effect(
            self._tokens("up", int(at[0]), 1),
            self._tokens("down", int(at[0]), -1),
            sparsity if math.isfinite(sparsity) else None,
        )

    def _tokens(self, kind: str, row: int, sign: int) -> list[tuple[str, float]]:
        """Return the tokens of the latent's own position, the first of the table, as far as they
        are moved that way."""
        tokens, values = (
            self.arrays.row(f"{kind}_{name}", row)[0].tolist() for name in ("tokens", "values")
        )
        return [
            (token_of(self.vocabulary, token), value)
            for token, value in zip(tokens, values)
            if token >= 0 and is_number(value) and value * sign > 0
        ]


def effects(source: RunSource) -> EffectsReader | None:
    """Return the reader of effects, or None without them."""
    arrays = source.arrays("ablation")
    return (
        EffectsReader(source, arrays)
        if arrays is not None and source.result("ablation") is not None
        else None
    )


@dataclass(frozen=True)
class ProbeTask:
    """A probe task: the latent that was best on its training half, and losses on its test half by
    the names of the result."""

    name: str
    latent: int | None
    losses: dict[str, Number | None]
    rows: tuple[int | None, int | None]
    """Of the training and of the test half."""
    positive: float | None

    @property
    def gain(self) -> float | None:
        """How far the best latent is below the best of its rivals: a channel, a random latent, and
        the label's share alone."""
        ours, *rivals = (
            self.losses[name] for name in ("loss", "channel_loss", "random_sae_loss", "prior_loss")
        )
        known = [rival.value for rival in rivals if rival is not None]
        return min(known) - ours.value if ours is not None and known else None


LOSSES = (
    "loss",
    "channel_loss",
    "random_sae_loss",
    "dense_probe_loss",
    "prior_loss",
    "loss_in_sample",
)


def tasks(source: RunSource) -> list[ProbeTask]:
    """Return the probe tasks, those with the largest gain first and those without one last."""
    found = (source.result("probes") or {}).get("tasks")
    made = (
        [_task(str(name), each) for name, each in found.items() if isinstance(each, dict)]
        if isinstance(found, dict)
        else []
    )
    return sorted(made, key=lambda task: (task.gain is None, -(task.gain or 0), task.name))


def _task(name: str, found: dict[str, Any]) -> ProbeTask:
    def whole(key: str) -> int | None:
        return int(found[key]) if is_number(found.get(key)) else None

    return ProbeTask(
        name,
        whole("latent"),
        {key: number(found.get(key)) for key in LOSSES},
        (whole("n_train"), whole("n_test")),
        float(found["positive"]) if is_number(found.get("positive")) else None,
    )
