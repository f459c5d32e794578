"""Patterns of tokens that predict a latent's activation: the explanations of N2G (Gao et al. 2024,
section 4.3).

A *pattern* is a run of tokens, some of them `ANY`, that ends at the position it speaks of; an
anchored one must begin where a document does. An *explanation* is what patterns say of one latent:
at each position the most specific of those that match counts.

    predict          the definition, one position at a time
    Matcher          the same for all positions and all latents at once
    Greedy           the published trie with its faults: it stops at the first value it meets and
                     prefers a token to ANY
                     without ever going back
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

ANY = -1
_NONE = -2  # fills rows of the table of patterns
_PAIRS = 4_000_000  # of a position and a pattern, looked at together


class TokenPattern(NamedTuple):
    """Tokens in reading order, the last being that of the position; value: the activation it
    predicts; support: its examples."""

    tokens: tuple[int, ...]
    anchored: bool
    value: float
    support: int = 1

    @property
    def specificity(self) -> tuple[int, int, float]:
        """Length (an anchor counts as one), then tokens that are not ANY; of equals the larger
        value."""
        return (
            len(self.tokens) + self.anchored,
            sum(token != ANY for token in self.tokens),
            self.value,
        )


def merged(patterns: Iterable[TokenPattern]) -> list[TokenPattern]:
    """Join equal patterns: their value is the mean over all examples, whichever came last."""
    found: dict[tuple[tuple[int, ...], bool], list[TokenPattern]] = {}
    for pattern in patterns:
        found.setdefault(pattern[:2], []).append(pattern)
    joined = []
    for (tokens, anchored), same in found.items():
        support = sum(each.support for each in same)
        joined.append(
            TokenPattern(
                tokens, anchored, sum(each.value * each.support for each in same) / support, support
            )
        )
    return sorted(joined, key=lambda pattern: (-pattern.support, -pattern.value, pattern.tokens))


def predict(
    patterns: Iterable[TokenPattern], tokens: Sequence[int], begins: Sequence[bool]
) -> list[float]:
    """Return what an explanation predicts at each of the tokens; begins: whether a document begins
    with the token."""
    return [
        max(
            (pattern for pattern in patterns if _matches(pattern, tokens, begins, at)),
            key=lambda pattern: pattern.specificity,
            default=TokenPattern((), False, 0.0),
        ).value
        for at in range(len(tokens))
    ]


def _matches(pattern: TokenPattern, tokens: Sequence[int], begins: Sequence[bool], at: int) -> bool:
    start = at + 1 - len(pattern.tokens)
    return (
        start >= 0
        and (not pattern.anchored or begins[start])
        and all(own in (ANY, token) for own, token in zip(pattern.tokens, tokens[start : at + 1]))
    )


class Matches(NamedTuple):
    """Where which latent is predicted to be active, and how much: each field [m], one entry for
    each position and latent."""

    context: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    value: np.ndarray


class Predictor(Protocol):
    """Explanations of many latents."""

    def match(self, tokens: np.ndarray, begins: np.ndarray, wanted: np.ndarray) -> Matches:
        """Return the predictions above 0 at the positions wanted[c, t] of contexts tokens[c, t]."""


class Matcher:
    """All patterns of all latents in one table: each distinct run of tokens is looked for once."""

    def __init__(self, explanations: dict[int, list[TokenPattern]]):
        runs: dict[tuple[tuple[int, ...], bool], list[tuple[int, float]]] = {}
        for latent, patterns in explanations.items():
            for pattern in patterns:
                runs.setdefault(pattern[:2], []).append((latent, pattern.value))
        ordered = sorted(runs, key=lambda run: run[0][-1])
        self.length = np.array([len(tokens) for tokens, _ in ordered], int)
        self.anchored = np.array([anchored for _, anchored in ordered], bool)
        self.table = np.full((len(ordered), self.length.max(initial=1)), _NONE)  # last token first
        for row, (tokens, _) in zip(self.table, ordered):
            row[: len(tokens)] = tokens[::-1]
        literals = ((self.table != ANY) & (self.table != _NONE)).sum(1)
        self.rank = (self.length + self.anchored) * (self.table.shape[1] + 2) + literals
        spoken = [runs[run] for run in ordered]
        self.count = np.array([len(each) for each in spoken], int)
        self.first = np.cumsum(self.count) - self.count
        self.latent = np.array([latent for each in spoken for latent, _ in each], int)
        self.value = np.array([value for each in spoken for _, value in each], np.float32)
        self.any_last = int(np.searchsorted(self.table[:, 0], ANY, "right"))

    def match(self, tokens: np.ndarray, begins: np.ndarray, wanted: np.ndarray) -> Matches:
        context, position = np.nonzero(wanted)
        last = tokens[context, position]
        low, high = (np.searchsorted(self.table[:, 0], last, side) for side in ("left", "right"))
        counts = high - low + self.any_last
        found, at = [], 0
        ends = np.cumsum(counts)
        while at < len(counts):
            end = max(
                at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + _PAIRS, "right"))
            )
            part = slice(at, end)
            found.append(
                self._part(tokens, begins, context[part], position[part], low[part], counts[part])
            )
            at = end
        empty = Matches(*(np.zeros(0, kind) for kind in (int, int, int, np.float32)))
        return Matches(*(np.concatenate(columns) for columns in zip(empty, *found)))

    def _part(
        self,
        tokens: np.ndarray,
        begins: np.ndarray,
        context: np.ndarray,
        position: np.ndarray,
        low: np.ndarray,
        counts: np.ndarray,
    ) -> Matches:
        pair = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
        run = np.where(number < self.any_last, number, low[pair] + number - self.any_last)
        pairs, runs = [], []
        for depth in range(1, self.table.shape[1] + 1):
            whole = self.length[run] == depth
            starts = position[pair] - depth + 1
            fits = whole & (~self.anchored[run] | begins[context[pair], starts])
            pairs.append(pair[fits])
            runs.append(run[fits])
            on = ~whole & (starts > 0)
            pair, run, before = pair[on], run[on], starts[on] - 1
            if not len(pair):
                break
            token = self.table[run, depth]
            same = (token == ANY) | (token == tokens[context[pair], before])
            pair, run = pair[same], run[same]
        return self._best(context, position, np.concatenate(pairs), np.concatenate(runs))

    def _best(
        self, context: np.ndarray, position: np.ndarray, pair: np.ndarray, run: np.ndarray
    ) -> Matches:
        """Keep for each position and latent the most specific run."""
        counts = self.count[run]
        entry = np.repeat(self.first[run] - np.cumsum(counts) + counts, counts) + np.arange(
            counts.sum()
        )
        pair, rank = np.repeat(pair, counts), np.repeat(self.rank[run], counts)
        latent, value = self.latent[entry], self.value[entry]
        order = np.lexsort((value, rank, latent, pair))
        pair, latent, value = pair[order], latent[order], value[order]
        best = np.ones(len(pair), bool)
        best[:-1] = (pair[1:] != pair[:-1]) | (latent[1:] != latent[:-1])
        pair = pair[best]
        return Matches(context[pair], position[pair], latent[best], value[best])


# ---- as published --------------------------------------------------------------------------------

_START, _VALUE = "start", "value"


class Greedy:
    """Tries that are walked backwards from a position, as in the published code; patterns in the
    order of their examples."""

    def __init__(self, explanations: dict[int, list[TokenPattern]]):
        self.tries = {latent: trie(patterns) for latent, patterns in explanations.items()}
        self.by_last: dict[int, list[int]] = {}
        for latent, root in self.tries.items():
            for token in root:
                self.by_last.setdefault(token, []).append(latent)

    def match(self, tokens: np.ndarray, begins: np.ndarray, wanted: np.ndarray) -> Matches:
        found = []
        rows = tokens.tolist()
        for context, position in zip(*(each.tolist() for each in np.nonzero(wanted))):
            row = rows[context][: position + 1]
            for latent in {*self.by_last.get(row[-1], ()), *self.by_last.get(ANY, ())}:
                value = walk(self.tries[latent], row)
                if value > 0:
                    found.append((context, position, latent, value))
        columns = zip(*found) if found else ((), (), (), ())
        return Matches(
            *(np.array(column, kind) for column, kind in zip(columns, (int, int, int, np.float32)))
        )


def trie(patterns: Iterable[TokenPattern]) -> dict[Any, Any]:
    """Return a nested dict over the reversed tokens; the last of equal patterns gives the value."""
    root: dict[Any, Any] = {}
    for pattern in patterns:
        node = root
        for token in reversed(pattern.tokens):
            node = node.setdefault(token, {})
        if pattern.anchored:
            node = node.setdefault(_START, {})
        node[_VALUE] = pattern.value
    return root


def walk(node: dict[Any, Any], tokens: Sequence[int]) -> float:
    """Return the first value met on the way back from the last token, taking a token before ANY; 0
    if there is none."""
    for token in reversed(tokens):
        node = node.get(token) or node.get(ANY) or {}
        if _VALUE in node:
            return node[_VALUE]
    return node.get(_START, {}).get(_VALUE, 0.0)
