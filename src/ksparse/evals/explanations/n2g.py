"""Can latents be explained by short patterns of tokens? Precision and recall of N2G: Gao et al.
2024, section 4.3.

recall      share of random activations of a latent at which its explanation predicts one
precision   share of random tokens with a prediction on which the latent is active
Both on documents that the explanation was not built from, and both for explanations dealt to the
wrong latents beside it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import SAEBatch
from ksparse.evals.explanations.builder import (
    LEAST,
    SCALE,
    SCORE,
    Activations,
    N2GBuilder,
    Reservoir,
    activations,
    key,
    of_parts,
)
from ksparse.evals.explanations.patterns import Matches, Predictor, TokenPattern
from ksparse.evals.statistics import Result, Value

_TRIED = 8  # times as many latents as are scored are watched, since many may be dead
_TOKENS = 1 << 17  # precision is taken on so many tokens at most


class N2G(Metric):
    """Precision, recall and F1 of explanations, over a random sample of live latents."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        options, n = context.options, context.sae.shape.n_latents
        self.explainer = context.part(N2GBuilder)
        self.order = np.random.default_rng(options.seed).permutation(n)[: _TRIED * options.latents]
        self.explainer.want(self.order)
        self.watched = np.zeros(n, bool)
        self.watched[self.order] = True
        self.positives = Reservoir(options.n2g_examples, options.seed + 1)
        self.active: list[np.ndarray] = []
        self.judged: list[np.ndarray] = []
        self.tokens, self.contexts = 0, 0

    def update(self, batch: SAEBatch) -> None:
        found = activations(batch, self.watched, self.contexts)
        found = found.among(of_parts(found.document, SCALE + SCORE))
        self.positives.add(found)
        keep = (
            (batch.held_out.keep & of_parts(batch.held_out.contexts.documents, SCALE + SCORE))
            .cpu()
            .numpy()
        )
        if self.tokens < _TOKENS:
            self.judged.append(keep)
            self.tokens += int(keep.sum())
            self.active.append(
                self._key(found.context, found.position, found.latent, keep.shape[1])
            )
        self.contexts += len(keep)

    def _key(
        self, context: np.ndarray, position: np.ndarray, latent: np.ndarray, length: int
    ) -> np.ndarray:
        return key(context, position, latent, length, len(self.watched))

    def compute(self, observe: Progress) -> None:
        explainer, positives = self.explainer, self.positives.drawn()
        counts = np.bincount(positives.latent, minlength=len(self.watched))
        fired = self.order[(counts + explainer.counts)[self.order] > 0]
        enough = np.minimum(counts, explainer.counts)[fired] >= LEAST
        self.scored = fired[enough][: self.context.options.latents]
        full = len(self.scored) == self.context.options.latents
        last = (
            np.flatnonzero(enough)[len(self.scored) - 1] if full else len(fired)
        )  # those behind were not asked
        self.too_few = sorted(fired[:last][~enough[:last]].tolist())
        if not len(self.scored):
            self.rates = {
                name: np.zeros(0)
                for name in (
                    "recall",
                    "precision",
                    "f1",
                    "shuffled_recall",
                    "shuffled_precision",
                    "shuffled_f1",
                )
            }
            self.hits = self.right = np.zeros(0, int)
            return
        explainer.explain(self.scored, observe)
        self._score(positives, counts)

    def _score(self, positives: Activations, counts: np.ndarray) -> None:
        scored, predictor = self.scored, self.explainer.predictor(self.scored)
        slot = np.full(len(self.watched), -1)
        slot[scored] = np.arange(len(scored))
        other = scored[
            np.roll(np.arange(len(scored)), 1)
        ]  # whose explanation stands for each latent's when they are shuffled
        mine = positives.among(slot[positives.latent] >= 0)
        hit, wrong = self._recalled(mine, predictor, other, slot)
        recall, shuffled_recall = (
            np.bincount(slot[mine.latent], each, len(scored)) / counts[scored]
            for each in (hit, wrong)
        )
        keep = np.concatenate(self.judged)
        tokens, begins = self.explainer.text(self.explainer.tokens[: len(keep)])
        found = predictor.match(tokens, begins, keep[:, self.explainer.first :])
        precision, self.hits, self.right = self._precise(found, scored, slot, keep.shape[1])
        standing = np.full(len(self.watched), -1)
        standing[other] = scored
        shuffled_precision, _, _ = self._precise(
            found._replace(latent=standing[found.latent]), scored, slot, keep.shape[1]
        )
        if len(scored) < 2:
            shuffled_recall = shuffled_precision = np.full(
                len(scored), np.nan
            )  # there is no other explanation
        self.rates = {
            "recall": recall,
            "precision": precision,
            "f1": f1(precision, recall),
            "shuffled_recall": shuffled_recall,
            "shuffled_precision": shuffled_precision,
            "shuffled_f1": f1(shuffled_precision, shuffled_recall),
        }

    def _recalled(
        self, mine: Activations, predictor: Predictor, other: np.ndarray, slot: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return for each activation whether its latent's explanation predicts one, and whether
        another's does."""
        rows, context = np.unique(mine.context, return_inverse=True)
        tokens, begins = self.explainer.text(self.explainer.tokens[rows])
        position = mine.position - self.explainer.first
        wanted = np.zeros(tokens.shape, bool)
        wanted[context, position] = True
        found = predictor.match(tokens, begins, wanted)
        keys = self._key(found.context, found.position, found.latent, tokens.shape[1])
        own, others = (
            np.isin(self._key(context, position, latent, tokens.shape[1]), keys)
            for latent in (mine.latent, other[slot[mine.latent]])
        )
        return own, others

    def _precise(
        self, found: Matches, scored: np.ndarray, slot: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return precision, predictions and right predictions of each scored latent; NaN where
        nothing was predicted."""
        right = np.isin(
            self._key(found.context, found.position + self.explainer.first, found.latent, length),
            np.concatenate(self.active),
        )
        hits = np.bincount(slot[found.latent], minlength=len(scored))
        true = np.bincount(slot[found.latent], right, len(scored))
        return np.where(hits > 0, true / np.maximum(hits, 1), np.nan), hits, true

    def finalize(self) -> Result:
        rates, explainer = self.rates, self.explainer
        values = {name: over_latents(rates[name]) for name in rates}
        values["precision_pooled"] = {
            "value": float(self.right.sum() / self.hits.sum()) if self.hits.sum() else None,
            "se": None,
        }
        notes = [f"a removed token is replaced by {explainer.pad_text!r} (id {explainer.pad})"]
        if self.too_few:
            notes.append(
                f"{len(self.too_few)} latents fired, but less than {LEAST} times on one side of "
                "the text, and are left out"
            )
        if silent := int(np.isnan(rates["precision"]).sum()):
            notes.append(
                f"{silent} explanations predicted nothing on {self.tokens:,} tokens: they have no "
                "precision and no F1"
            )
        if len(self.scored) < self.context.options.latents:
            notes.append(f"only {len(self.scored)} latents could be scored")
        arrays = {
            "scored": torch.from_numpy(self.scored),
            **{
                name: torch.from_numpy(rates[name]).float()
                for name in ("precision", "recall", "f1")
            },
            **pattern_arrays(explainer.explanations),
        }
        return Result(
            {
                **values,
                "n_latents": len(self.scored),
                "n_tokens_scored": self.tokens,
                "too_few": self.too_few,
                "pad": {"id": explainer.pad, "text": explainer.pad_text},
                "patterns_per_latent": _patterns(explainer, self.scored),
                "notes": notes,
            },
            arrays,
        )


def _patterns(explainer: N2GBuilder, scored: np.ndarray) -> float | None:
    return (
        float(np.mean([len(explainer.explanations[i]) for i in scored.tolist()]))
        if len(scored)
        else None
    )


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Return the harmonic mean; 0 where both are, NaN without precision."""
    total = precision + recall
    return np.where(
        total > 0,
        2 * precision * recall / np.where(total > 0, total, 1),
        np.where(np.isnan(total), np.nan, 0.0),
    )


def over_latents(values: np.ndarray) -> Value:
    """Return the mean over latents that have a value, with its standard error."""
    values = values[~np.isnan(values)]
    m = len(values)
    return {
        "value": float(values.mean()) if m else None,
        "se": float(values.std(ddof=1) / math.sqrt(m)) if m > 1 else None,
    }


def pattern_arrays(explanations: dict[int, list[TokenPattern]]) -> dict[str, torch.Tensor]:
    """Return all patterns as flat arrays: of pattern p the tokens pattern_tokens[pattern_start[p] :
    pattern_start[p + 1]]; -1 is ANY."""
    every = [
        (latent, pattern)
        for latent, patterns in sorted(explanations.items())
        for pattern in patterns
    ]
    lengths = [len(pattern.tokens) for _, pattern in every]
    return {
        "pattern_latent": torch.tensor([latent for latent, _ in every], dtype=torch.int32),
        "pattern_start": torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32),
        "pattern_tokens": torch.tensor(
            [token for _, pattern in every for token in pattern.tokens], dtype=torch.int32
        ),
        "pattern_anchored": torch.tensor(
            [pattern.anchored for _, pattern in every], dtype=torch.bool
        ),
        "pattern_value": torch.tensor([pattern.value for _, pattern in every], dtype=torch.float32),
        "pattern_support": torch.tensor(
            [pattern.support for _, pattern in every], dtype=torch.int32
        ),
    }
