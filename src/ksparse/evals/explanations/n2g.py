"""Can latents be explained by short patterns of tokens? Precision and recall of N2G.

Gao et al. 2024, section 4.3.

    recall       the share of random activations of a latent where its explanation predicts one
    precision    the share of the positions where it predicts one at which the latent is active

Both are measured on documents that the explanations were not built on. The baseline, `shuffled_…`,
gives each latent the explanation of another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.explanations.builder import (
    MIN_EXAMPLES,
    SCALE,
    SCORE,
    Activations,
    N2GBuilder,
    Reservoir,
    batch_activations,
    in_parts,
    pair_keys,
)
from ksparse.evals.explanations.patterns import Matches, Predictor, TokenPattern
from ksparse.evals.statistics import Result, Value
from ksparse.progress import Progress

_CANDIDATES = 8  # latents sampled for each one to be scored, since many may be dead
_TOKENS = 1 << 17  # positions that precision is measured on, at most
_RATES = ("recall", "precision", "f1", "shuffled_recall", "shuffled_precision", "shuffled_f1")


class N2G(Metric):
    """Precision, recall and F1 of explanations, over a random sample of live latents."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        options, n = context.options, context.sae.shape.n_latents
        self.builder = context.part(N2GBuilder)
        order = np.random.default_rng(options.seed).permutation(n)
        self.candidates = order[: _CANDIDATES * options.latents]
        self.builder.request(self.candidates)
        self.is_candidate = np.zeros(n, bool)
        self.is_candidate[self.candidates] = True
        self.positives = Reservoir(options.n2g_examples, options.seed + 1)
        self.active_keys: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []  # positions that precision is measured on
        self.n_tokens, self.n_contexts = 0, 0

    def update(self, batch: SAEBatch) -> None:
        held_out, parts = batch.held_out, SCALE + SCORE
        activations = batch_activations(batch, self.is_candidate, self.n_contexts)
        activations = activations.select(in_parts(activations.document, parts))
        self.positives.add(activations)
        mask = (held_out.keep & in_parts(held_out.contexts.documents, parts)).cpu().numpy()
        if self.n_tokens < _TOKENS:
            self.masks.append(mask)
            self.n_tokens += int(mask.sum())
            self.active_keys.append(
                self._keys(
                    activations.context, activations.position, activations.latent, mask.shape[1]
                )
            )
        self.n_contexts += len(mask)

    def _keys(
        self, context: np.ndarray, position: np.ndarray, latent: np.ndarray, length: int
    ) -> np.ndarray:
        return pair_keys(context, position, latent, length, len(self.is_candidate))

    def compute(self, progress: Progress) -> None:
        positives = self.positives.sample()
        counts = np.bincount(positives.latent, minlength=len(self.is_candidate))
        self._choose_latents(counts)
        if not len(self.scored):
            nothing = np.zeros(0)
            self.rates = dict.fromkeys(_RATES, nothing)
            self.precision = _Precision(nothing, np.zeros(0, int), np.zeros(0, int))
            return
        self.builder.explain(self.scored, progress)
        self._score(positives, counts)

    def _choose_latents(self, counts: np.ndarray) -> None:
        """Choose the first candidates that have enough activations for building and for scoring.

        `too_few` are the candidates before the last chosen one that fired, but not often enough.
        """
        size, built = self.context.options.latents, self.builder.counts
        fired = self.candidates[(counts + built)[self.candidates] > 0]
        enough = np.minimum(counts, built)[fired] >= MIN_EXAMPLES
        self.scored = fired[enough][:size]
        tried = len(fired)
        if len(self.scored) == size:
            tried = np.flatnonzero(enough)[size - 1]
        self.too_few = sorted(fired[:tried][~enough[:tried]].tolist())

    def _score(self, positives: Activations, counts: np.ndarray) -> None:
        """Compute the rates of the scored latents, each [scored]."""
        scored, builder = self.scored, self.builder
        predictor = builder.predictor({i: builder.explanations[i] for i in scored.tolist()})
        slot = np.full(len(self.is_candidate), -1)
        slot[scored] = np.arange(len(scored))
        other = np.roll(scored, 1)  # whose explanation each latent gets when they are shuffled
        positives = positives.select(slot[positives.latent] >= 0)
        recall, shuffled_recall = (
            np.bincount(slot[positives.latent], hits, len(scored)) / counts[scored]
            for hits in self._recalled(predictor, positives, other[slot[positives.latent]])
        )
        mask, start = np.concatenate(self.masks), self.builder.text_start
        tokens, begins = self.builder.text(self.builder.tokens[: len(mask)])
        matches = predictor.match(tokens, begins, mask[:, start:])
        self.precision = self._measure_precision(matches, slot, mask.shape[1])
        recipient = np.full(len(self.is_candidate), -1)
        recipient[other] = scored
        shuffled_matches = matches._replace(latent=recipient[matches.latent])
        shuffled = self._measure_precision(shuffled_matches, slot, mask.shape[1])
        shuffled_precision = shuffled.precision
        if len(scored) < 2:  # there is no other explanation
            shuffled_recall = shuffled_precision = np.full(len(scored), np.nan)
        precision = self.precision.precision
        self.rates = {
            "recall": recall,
            "precision": precision,
            "f1": f1(precision, recall),
            "shuffled_recall": shuffled_recall,
            "shuffled_precision": shuffled_precision,
            "shuffled_f1": f1(shuffled_precision, shuffled_recall),
        }

    def _recalled(
        self, predictor: Predictor, positives: Activations, other: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yield two masks of the activations: where their latent's explanation predicts one, and
        where the explanation of `other`[m] does."""
        rows, context = np.unique(positives.context, return_inverse=True)
        tokens, begins = self.builder.text(self.builder.tokens[rows])
        position = positives.position - self.builder.text_start
        mask = np.zeros(tokens.shape, bool)
        mask[context, position] = True
        matches = predictor.match(tokens, begins, mask)
        length = tokens.shape[1]
        keys = self._keys(matches.context, matches.position, matches.latent, length)
        for latent in (positives.latent, other):
            yield np.isin(self._keys(context, position, latent, length), keys)

    def _measure_precision(self, matches: Matches, slot: np.ndarray, length: int) -> _Precision:
        start, n = self.builder.text_start, len(self.scored)
        correct = np.isin(
            self._keys(matches.context, matches.position + start, matches.latent, length),
            np.concatenate(self.active_keys),
        )
        predicted = np.bincount(slot[matches.latent], minlength=n)
        true = np.bincount(slot[matches.latent], correct, n)
        precision = np.where(predicted > 0, true / np.maximum(predicted, 1), np.nan)
        return _Precision(precision, predicted, true)

    def finalize(self) -> Result:
        rates, builder = self.rates, self.builder
        predicted, true = self.precision.predicted.sum(), self.precision.true.sum()
        pooled = float(true / predicted) if predicted else None
        lengths = [len(builder.explanations[i]) for i in self.scored.tolist()]
        return Result(
            {
                **{name: over_latents(rates[name]) for name in rates},
                "precision_pooled": {"value": pooled, "se": None},
                "n_latents": len(self.scored),
                "n_tokens_scored": self.n_tokens,
                "too_few": self.too_few,
                "pad": {"id": builder.pad, "text": builder.pad_text},
                "patterns_per_latent": float(np.mean(lengths)) if lengths else None,
                "notes": self._notes(),
            },
            {
                "scored": torch.from_numpy(self.scored),
                **{
                    name: torch.from_numpy(rates[name]).float()
                    for name in ("precision", "recall", "f1")
                },
                **pattern_arrays(builder.known()),
            },
        )

    def _notes(self) -> list[str]:
        builder = self.builder
        notes = [f"a removed token is replaced by {builder.pad_text!r} (id {builder.pad})"]
        if self.too_few:
            notes.append(
                f"{len(self.too_few)} latents fired, but less than {MIN_EXAMPLES} times on one "
                "side of the text, and are left out"
            )
        if unused := int(np.isnan(self.rates["precision"]).sum()):
            notes.append(
                f"{unused} explanations predicted nothing on {self.n_tokens:,} tokens: they have "
                "no precision and no F1"
            )
        if len(self.scored) < self.context.options.latents:
            notes.append(f"only {len(self.scored)} latents could be scored")
        return notes


class _Precision(NamedTuple):
    """Of each scored latent, [scored]: precision (NaN without a prediction), the number of
    predictions, and of true ones."""

    precision: np.ndarray
    predicted: np.ndarray
    true: np.ndarray


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Return the harmonic mean of precision and recall; 0 where both are 0, NaN without precision.

    Example:
        >>> import numpy as np
        >>> f1(np.array([0.5, np.nan]), np.array([1.0, 1.0])).round(2).tolist()
        [0.67, nan]
    """
    total = precision + recall
    return np.where(
        total > 0,
        2 * precision * recall / np.where(total > 0, total, 1),
        np.where(np.isnan(total), np.nan, 0.0),
    )


def over_latents(values: np.ndarray) -> Value:
    """Return the mean over the latents that have a value, with its standard error.

    Args:
        values: a value of each latent, [n]; NaN for none.
    """
    values = values[~np.isnan(values)]
    m = len(values)
    return {
        "value": float(values.mean()) if m else None,
        "se": float(values.std(ddof=1) / math.sqrt(m)) if m > 1 else None,
    }


def pattern_arrays(explanations: dict[int, list[TokenPattern]]) -> dict[str, torch.Tensor]:
    """Return all patterns as flat arrays, sorted by latent.

    Args:
        explanations: {latent: patterns}.

    Returns:
        pattern_tokens: all tokens, one pattern after another; -1 is ANY. pattern_start: where each
        pattern begins in them, and at last where they end. pattern_latent, pattern_anchored,
        pattern_value, pattern_support: of each pattern.
    """
    latents, patterns = [], []
    for latent, of_latent in sorted(explanations.items()):
        latents += [latent] * len(of_latent)
        patterns += of_latent
    starts = np.cumsum([0, *(len(pattern.tokens) for pattern in patterns)])
    return {
        "pattern_latent": torch.tensor(latents, dtype=torch.int32),
        "pattern_start": torch.tensor(starts, dtype=torch.int32),
        "pattern_tokens": torch.tensor(
            [token for pattern in patterns for token in pattern.tokens], dtype=torch.int32
        ),
        "pattern_anchored": torch.tensor(
            [pattern.anchored for pattern in patterns], dtype=torch.bool
        ),
        "pattern_value": torch.tensor([pattern.value for pattern in patterns], dtype=torch.float32),
        "pattern_support": torch.tensor(
            [pattern.support for pattern in patterns], dtype=torch.int32
        ),
    }
