"""What evaluations found of single latents: arrays of `n2g` and `ablation`, tasks of `probes`.

explanations   patterns of tokens that predict a latent, and how well they do
effects        how a latent changes the LM's predictions where it is strongest
tasks          the losses of each probe task, and the latent that is best at it

Both the report's cards and the viewer's pages show them.
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
"""Patterns of a latent that are shown: those with the most examples."""
PARTS = 24
"""Parts of a pattern that are shown: the last ones."""
_ANY_TOKEN = -1


@dataclass(frozen=True)
class PatternPart:
    """A part of a pattern: a token in quotes, or a sign such as * for any token."""

    text: str
    sign: bool = False


@dataclass(frozen=True)
class PatternView:
    """A pattern: tokens in reading order, the value that they predict at the last of them, and the
    number of examples that it was built from."""

    parts: list[PatternPart]
    value: float
    support: int


@dataclass(frozen=True)
class Explanation:
    """A latent's first patterns, the number of all, and its scores if it was scored."""

    patterns: list[PatternView]
    count: int
    scores: dict[str, float]


class Explanations:
    """Reads the patterns of one latent at a time, since all together may be millions.

    Args:
        source: the run, for the vocabulary.
        arrays: the arrays of `n2g`.
    """

    def __init__(self, source: RunSource, arrays: Arrays):
        self.arrays, self.vocabulary = arrays, source.vocabulary
        self.latents = arrays.tensor("pattern_latent")  # sorted
        self.scored = arrays.tensor("scored")
        self.scores = {
            name: arrays.rows(name, 0, len(self.scored)) for name in ("precision", "recall", "f1")
        }

    def find(self, latent: int, most: int = PATTERNS) -> Explanation | None:
        """Return a latent's explanation; None if it was neither explained nor scored.

        Args:
            latent: the latent's number.
            most: patterns to return at most.
        """
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
        return Explanation(self._read_patterns(first, last, most), last - first, scores)

    def best_first(self) -> np.ndarray:
        """Return the scored latents that have an F1, the highest first."""
        known = np.isfinite(self.scores["f1"])
        return self.scored[known][np.argsort(-self.scores["f1"][known], kind="stable")]

    def _read_patterns(self, first: int, last: int, most: int) -> list[PatternView]:
        if first == last:
            return []
        values, support, anchored = (
            np.nan_to_num(self.arrays.rows(f"pattern_{name}", first, last))
            for name in ("value", "support", "anchored")
        )
        starts = self.arrays.rows("pattern_start", first, last + 1)
        order = np.lexsort((-values, -support))[:most]
        return [
            PatternView(
                self._split_pattern(
                    self.arrays.rows("pattern_tokens", int(starts[i]), int(starts[i + 1])).tolist(),
                    bool(anchored[i]),
                ),
                float(values[i]),
                int(support[i]),
            )
            for i in order
        ]

    def _split_pattern(self, tokens: list[int], anchored: bool) -> list[PatternPart]:
        parts = [PatternPart("^", sign=True)] if anchored else []
        for token, run in groupby(tokens):
            count = len(list(run))
            if token == _ANY_TOKEN:
                parts.append(PatternPart("*" if count == 1 else f"*×{count}", sign=True))
            else:
                parts += [PatternPart(f'"{token_of(self.vocabulary, token)}"')] * count
        return parts if len(parts) <= PARTS else [PatternPart("…", sign=True), *parts[-PARTS:]]


def explanations(source: RunSource) -> Explanations | None:
    """Return the reader of explanations; None if `n2g` was not run."""
    arrays = source.arrays("n2g")
    return (
        Explanations(source, arrays)
        if arrays is not None and source.result("n2g") is not None
        else None
    )


@dataclass(frozen=True)
class Effect:
    """A latent's effect at the position where it is strongest.

    Attributes:
        up: tokens whose logits it raises, and by how much.
        down: tokens whose logits it lowers, and by how much.
        sparsity: the share of logits that change without it.
    """

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]
    sparsity: float | None


class EffectsReader:
    """Reads the effect of one latent at a time.

    Args:
        source: the run, for the vocabulary.
        arrays: the arrays of `ablation`.
    """

    def __init__(self, source: RunSource, arrays: Arrays):
        self.arrays, self.vocabulary = arrays, source.vocabulary
        self.latents = arrays.tensor("latent")

    def find(self, latent: int) -> Effect | None:
        """Return a latent's effect; None if it was not ablated."""
        rows = np.flatnonzero(self.latents == latent)
        if not len(rows):
            return None
        sparsity = float(self.arrays.row("sparsity", int(rows[0])))
        return Effect(
            self._read_tokens("up", int(rows[0]), 1),
            self._read_tokens("down", int(rows[0]), -1),
            sparsity if math.isfinite(sparsity) else None,
        )

    def _read_tokens(self, direction: str, row: int, sign: int) -> list[tuple[str, float]]:
        """Return the tokens moved in a direction at the latent's own position, its first one."""
        tokens, values = (
            self.arrays.row(f"{direction}_{name}", row)[0].tolist() for name in ("tokens", "values")
        )
        return [
            (token_of(self.vocabulary, token), value)
            for token, value in zip(tokens, values)
            if token >= 0 and is_number(value) and value * sign > 0
        ]


def effects(source: RunSource) -> EffectsReader | None:
    """Return the reader of effects; None if `ablation` was not run."""
    arrays = source.arrays("ablation")
    return (
        EffectsReader(source, arrays)
        if arrays is not None and source.result("ablation") is not None
        else None
    )


@dataclass(frozen=True)
class ProbeTask:
    """A probe task.

    Attributes:
        name: the task's name.
        latent: the latent that was best on the training half.
        losses: losses on the test half, by their names in the result.
        rows: rows of the training half and of the test half.
        positive: share of rows with the label "yes".
    """

    name: str
    latent: int | None
    losses: dict[str, Number | None]
    rows: tuple[int | None, int | None]
    positive: float | None

    @property
    def gain(self) -> float | None:
        """How far the best latent is below the best baseline: channel, random latent, base rate."""
        loss, *baselines = (
            self.losses[name] for name in ("loss", "channel_loss", "random_sae_loss", "prior_loss")
        )
        known = [baseline.value for baseline in baselines if baseline is not None]
        return min(known) - loss.value if loss is not None and known else None

    @property
    def is_clear(self) -> bool:
        """Whether the gain is more than two standard errors of the latent's loss."""
        loss = self.losses["loss"]
        return self.gain is not None and loss is not None and self.gain > 2 * (loss.se or 0)


LOSSES = (
    "loss",
    "channel_loss",
    "random_sae_loss",
    "dense_probe_loss",
    "prior_loss",
    "loss_in_sample",
)
"""Losses of a task, by their keys in the result."""


def tasks(source: RunSource) -> list[ProbeTask]:
    """Return the probe tasks, the largest gain first; those without one come last."""
    entries = (source.result("probes") or {}).get("tasks")
    if not isinstance(entries, dict):
        return []
    tasks = [
        _read_task(str(name), entry) for name, entry in entries.items() if isinstance(entry, dict)
    ]
    return sorted(tasks, key=lambda task: (task.gain is None, -(task.gain or 0), task.name))


def _read_task(name: str, entry: dict[str, Any]) -> ProbeTask:
    def read_int(key: str) -> int | None:
        return int(entry[key]) if is_number(entry.get(key)) else None

    return ProbeTask(
        name,
        read_int("latent"),
        {key: number(entry.get(key)) for key in LOSSES},
        (read_int("n_train"), read_int("n_test")),
        float(entry["positive"]) if is_number(entry.get("positive")) else None,
    )
