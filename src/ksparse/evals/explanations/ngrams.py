"""Unigram and bigram predictions of the next token, counted on training text: baselines of a
loss."""

from __future__ import annotations

import numpy as np

from ksparse.data.contexts import Context, Corpus
from ksparse.progress import Progress, no_progress

DISCOUNT = 0.75
_BATCH = 256  # contexts


class Ngrams:
    """Losses of the next token from counts of tokens and of pairs of tokens.

    unigram: p(w) = (count(w) + 1) / (all + vocabulary). bigram, by absolute discounting:
    p(w | v) = (count(v, w) - 0.75) / count(v), and the discounted share times the unigram.

    Args:
        pairs: each pair of a token and the next one, as token * vocabulary + next, [m].
        vocabulary: the number of token ids.
        tokens: the kept tokens that the pairs come from.
    """

    def __init__(self, pairs: np.ndarray, vocabulary: int, tokens: int):
        self.vocabulary, self.tokens = vocabulary, tokens
        self.keys, self.counts = np.unique(pairs, return_counts=True)
        before = self.keys // vocabulary
        self.after = np.bincount(before, self.counts, vocabulary)  # tokens that follow each token
        self.distinct_after = np.bincount(before, minlength=vocabulary)
        self.unigram_counts = np.bincount(pairs % vocabulary, minlength=vocabulary) + 1.0

    @classmethod
    def count(
        cls, corpus: Corpus, vocabulary: int, tokens: int, progress: Progress = no_progress
    ) -> Ngrams:
        """Count the pairs of a corpus.

        Args:
            corpus: the text.
            vocabulary: the number of token ids.
            tokens: kept tokens to count; one pass over the corpus if it has fewer.
            progress: called after each batch.
        """
        pairs: list[np.ndarray] = [np.zeros(0, np.int64)]
        group: list[Context] = []
        counted = 0
        progress("counting n-grams", 0, tokens)
        for context in corpus.contexts():
            if context.start.epoch or counted >= tokens:
                break
            group.append(context)
            if len(group) == _BATCH:
                new, kept = _pairs(corpus, group, vocabulary)
                pairs.append(new)
                counted += kept
                group = []
                progress("counting n-grams", min(counted, tokens), tokens)
        if group:
            new, kept = _pairs(corpus, group, vocabulary)
            pairs.append(new)
            counted += kept
        return cls(np.concatenate(pairs), vocabulary, counted)

    def unigram(self, token: np.ndarray) -> np.ndarray:
        """Return the loss of each token, in nats."""
        return -np.log(self._unigram(token))

    def bigram(self, before: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Return the loss of each token after the one before it, in nats."""
        key = before.astype(np.int64) * self.vocabulary + token
        count = np.zeros(len(key))
        if len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
            count = np.where(self.keys[at] == key, self.counts[at], 0)
        after = np.maximum(self.after[before], 1)
        discounted = np.where(
            self.after[before] > 0, DISCOUNT * self.distinct_after[before] / after, 1.0
        )
        return -np.log(np.maximum(count - DISCOUNT, 0) / after + discounted * self._unigram(token))

    def _unigram(self, token: np.ndarray) -> np.ndarray:
        return self.unigram_counts[token] / self.unigram_counts.sum()


def _pairs(corpus: Corpus, group: list[Context], vocabulary: int) -> tuple[np.ndarray, int]:
    """Return the pairs wherever a loss would be measured, and the number of kept tokens."""
    batch = corpus.batch(group)
    at = (batch.keep[:, :-1] & batch.keep[:, 1:]).numpy()
    tokens = batch.tokens.numpy()
    return tokens[:, :-1][at] * vocabulary + tokens[:, 1:][at], int(batch.keep.sum())
