"""Unigram and bigram predictions of the next token, counted on training text: what a loss is held
against."""

from __future__ import annotations

import numpy as np

from ksparse.data.contexts import Corpus
from ksparse.evals.base import Progress

DISCOUNT = 0.75


class Ngrams:
    """Counts of tokens and of pairs; loss in nats.

    unigram     (count + 1) / (all + vocabulary)
    bigram      absolute discounting: (count(v, w) - 0.75) / count(v), what is taken off going to
                the unigram
    """

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: int,
        tokens: int,
        observe: Progress = lambda what, done, total: None,
    ):
        """Count so many kept tokens of a corpus, or one pass over it if it has fewer."""
        self.vocabulary, self.tokens = vocabulary, 0
        pairs: list[np.ndarray] = []
        group: list = []
        for context in corpus.contexts():
            if context.start.epoch or self.tokens >= tokens:
                break
            group.append(context)
            if len(group) == 256:
                pairs.append(self._pairs(corpus, group))
                group = []
                observe("counting n-grams", min(self.tokens, tokens), tokens)
        if group:
            pairs.append(self._pairs(corpus, group))
        found = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
        self.keys, self.counts = np.unique(found, return_counts=True)
        self.after = np.bincount(
            self.keys // vocabulary, self.counts, vocabulary
        )  # tokens seen after each token
        self.kinds = np.bincount(self.keys // vocabulary, minlength=vocabulary)  # distinct ones
        self.single = np.bincount(found % vocabulary, minlength=vocabulary) + 1.0

    def _pairs(self, corpus: Corpus, group: list) -> np.ndarray:
        """Return token * vocabulary + next token wherever a loss would be measured."""
        batch = corpus.batch(group)
        at = (batch.keep[:, :-1] & batch.keep[:, 1:]).numpy()
        tokens = batch.tokens.numpy()
        self.tokens += int(batch.keep.sum())
        return tokens[:, :-1][at] * self.vocabulary + tokens[:, 1:][at]

    def unigram(self, token: np.ndarray) -> np.ndarray:
        """Return the loss of each token."""
        return -np.log(self._single(token))

    def bigram(self, before: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Return the loss of each token after the one before it."""
        key = before.astype(np.int64) * self.vocabulary + token
        at = np.minimum(np.searchsorted(self.keys, key), max(0, len(self.keys) - 1))
        count = (
            np.where(self.keys[at] == key, self.counts[at], 0)
            if len(self.keys)
            else np.zeros(len(key))
        )
        seen = np.maximum(self.after[before], 1)
        rest = np.where(self.after[before] > 0, DISCOUNT * self.kinds[before] / seen, 1.0)
        return -np.log(np.maximum(count - DISCOUNT, 0) / seen + rest * self._single(token))

    def _single(self, token: np.ndarray) -> np.ndarray:
        return self.single[token] / self.single.sum()
