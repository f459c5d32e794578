"""Token patterns that predict a latent's activation: the explanations of N2G.

Gao et al. 2024, section 4.3. A *pattern* is a run of tokens, some of them `ANY`, whose last token
is at the position it predicts; an anchored pattern must begin where a document begins. An
*explanation* of a latent is a list of patterns: at each position, the most specific pattern that
matches gives the prediction.

    predict          the definition, one position at a time
    Matcher          the same for all positions and all latents at once
    GreedyMatcher    the published trie with its faults: it stops at the first value it reaches, and
                     prefers a token to ANY without ever backtracking
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

ANY = -1
"""Stands for any token in a pattern."""
_NONE = -2  # fills the rows of the table of patterns
_PAIRS = 4_000_000  # pairs of a position and a pattern that are compared at a time


class TokenPattern(NamedTuple):
    """A pattern: its tokens in reading order, the last at the position it predicts.

    anchored: whether a document must begin at its first token. value: the activation it predicts.
    support: the number of examples it comes from.
    """

    tokens: tuple[int, ...]
    anchored: bool
    value: float
    support: int = 1

    @property
    def specificity(self) -> tuple[int, int, float]:
        """Sort key: the length (an anchor counts as one), the tokens that are not ANY, the
        value."""
        return (
            len(self.tokens) + self.anchored,
            sum(token != ANY for token in self.tokens),
            self.value,
        )


def merge_patterns(patterns: Iterable[TokenPattern]) -> list[TokenPattern]:
    """Merge equal patterns into one, whose value is the mean over all their examples.

    Returns:
        The patterns, sorted by support and value, the largest first.

    Example:
        >>> merge_patterns([TokenPattern((5,), False, 1.0), TokenPattern((5,), False, 3.0)])
        [TokenPattern(tokens=(5,), anchored=False, value=2.0, support=2)]
    """
    groups: dict[tuple[tuple[int, ...], bool], list[TokenPattern]] = {}
    for pattern in patterns:
        groups.setdefault(pattern[:2], []).append(pattern)
    merged = []
    for (tokens, anchored), group in groups.items():
        support = sum(pattern.support for pattern in group)
        value = sum(pattern.value * pattern.support for pattern in group) / support
        merged.append(TokenPattern(tokens, anchored, value, support))
    return sorted(merged, key=lambda pattern: (-pattern.support, -pattern.value, pattern.tokens))


def predict(
    patterns: Iterable[TokenPattern], tokens: Sequence[int], begins: Sequence[bool]
) -> list[float]:
    """Return an explanation's prediction at each token: the definition.

    Args:
        patterns: the explanation.
        tokens: token ids.
        begins: whether a document begins with the token.

    Returns:
        Predicted activations; 0 where no pattern matches.

    Example:
        >>> predict([TokenPattern((7, ANY), False, 2.0)], [7, 1, 1], [True, False, False])
        [0.0, 2.0, 0.0]
    """
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
        and all(
            expected in (ANY, token)
            for expected, token in zip(pattern.tokens, tokens[start : at + 1])
        )
    )


class Matches(NamedTuple):
    """Predictions above 0, one entry for each position and latent; each field is [m]."""

    context: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    value: np.ndarray


class Predictor(Protocol):
    """The explanations of many latents."""

    def match(self, tokens: np.ndarray, begins: np.ndarray, mask: np.ndarray) -> Matches:
        """Return the predictions above 0.

        Args:
            tokens: contexts, [c, t].
            begins: where documents begin, [c, t].
            mask: the positions to predict at, [c, t].
        """


class Matcher:
    """All patterns of all latents in one table, so that each distinct pattern is matched once.

    Args:
        explanations: {latent: patterns}.
    """

    def __init__(self, explanations: dict[int, list[TokenPattern]]):
        runs: dict[tuple[tuple[int, ...], bool], list[tuple[int, float]]] = {}
        for latent, patterns in explanations.items():
            for pattern in patterns:
                runs.setdefault(pattern[:2], []).append((latent, pattern.value))
        # one row for each distinct run of tokens, reversed, sorted by the run's last token
        ordered = sorted(runs, key=lambda run: run[0][-1])
        self.length = np.array([len(tokens) for tokens, _ in ordered], int)
        self.anchored = np.array([anchored for _, anchored in ordered], bool)
        self.table = np.full((len(ordered), self.length.max(initial=1)), _NONE)
        for row, (tokens, _) in zip(self.table, ordered):
            row[: len(tokens)] = tokens[::-1]
        literals = ((self.table != ANY) & (self.table != _NONE)).sum(1)
        self.rank = (self.length + self.anchored) * (self.table.shape[1] + 2) + literals
        # the latents of each run, and what it predicts for them, as slices of two flat arrays
        predictions = [runs[run] for run in ordered]
        self.count = np.array([len(pairs) for pairs in predictions], int)
        self.first = np.cumsum(self.count) - self.count
        self.latent = np.array([latent for pairs in predictions for latent, _ in pairs], int)
        self.value = np.array([value for pairs in predictions for _, value in pairs], np.float32)
        self.any_last = int(np.searchsorted(self.table[:, 0], ANY, "right"))

    def match(self, tokens: np.ndarray, begins: np.ndarray, mask: np.ndarray) -> Matches:
        """Return the predictions above 0, as `Predictor.match` does, in parts of bounded memory."""
        context, position = np.nonzero(mask)
        last = tokens[context, position]
        low, high = (np.searchsorted(self.table[:, 0], last, side) for side in ("left", "right"))
        counts = high - low + self.any_last
        ends = np.cumsum(counts)
        parts, start = [_no_matches()], 0
        while start < len(counts):
            limit = (ends[start - 1] if start else 0) + _PAIRS
            end = max(start + 1, int(np.searchsorted(ends, limit, "right")))
            part = slice(start, end)
            parts.append(
                self._match_part(
                    tokens, begins, context[part], position[part], low[part], counts[part]
                )
            )
            start = end
        return Matches(*(np.concatenate(columns) for columns in zip(*parts)))

    def _match_part(
        self,
        tokens: np.ndarray,
        begins: np.ndarray,
        context: np.ndarray,
        position: np.ndarray,
        low: np.ndarray,
        counts: np.ndarray,
    ) -> Matches:
        """Compare positions with runs, one token further back in each round.

        A position is compared with all runs that end in ANY, and with those from `low` on that end
        in its own token: `counts` in all.
        """
        pair = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
        run = np.where(number < self.any_last, number, low[pair] + number - self.any_last)
        pairs, runs = [], []
        for depth in range(1, self.table.shape[1] + 1):
            complete = self.length[run] == depth
            starts = position[pair] - depth + 1
            fits = complete & (~self.anchored[run] | begins[context[pair], starts])
            pairs.append(pair[fits])
            runs.append(run[fits])
            longer = ~complete & (starts > 0)
            pair, run, before = pair[longer], run[longer], starts[longer] - 1
            if not len(pair):
                break
            expected = self.table[run, depth]
            same = (expected == ANY) | (expected == tokens[context[pair], before])
            pair, run = pair[same], run[same]
        return self._most_specific(context, position, np.concatenate(pairs), np.concatenate(runs))

    def _most_specific(
        self, context: np.ndarray, position: np.ndarray, pair: np.ndarray, run: np.ndarray
    ) -> Matches:
        """Keep the most specific run for each position and latent."""
        counts = self.count[run]
        offsets = np.repeat(self.first[run] - np.cumsum(counts) + counts, counts)
        entry = offsets + np.arange(counts.sum())
        pair, rank = np.repeat(pair, counts), np.repeat(self.rank[run], counts)
        latent, value = self.latent[entry], self.value[entry]
        order = np.lexsort((value, rank, latent, pair))
        pair, latent, value = pair[order], latent[order], value[order]
        last = np.ones(len(pair), bool)
        last[:-1] = (pair[1:] != pair[:-1]) | (latent[1:] != latent[:-1])
        pair = pair[last]
        return Matches(context[pair], position[pair], latent[last], value[last])


def _no_matches() -> Matches:
    return Matches(*(np.zeros(0, dtype) for dtype in (int, int, int, np.float32)))


# ---- as published --------------------------------------------------------------------------------

_START, _VALUE = "start", "value"


class GreedyMatcher:
    """Tries that are walked backwards from a position, as in the published code.

    Args:
        explanations: {latent: patterns}, the patterns in the order of their examples.
    """

    def __init__(self, explanations: dict[int, list[TokenPattern]]):
        self.tries = {latent: build_trie(patterns) for latent, patterns in explanations.items()}
        self.by_last: dict[int, list[int]] = {}
        for latent, root in self.tries.items():
            for token in root:
                self.by_last.setdefault(token, []).append(latent)

    def match(self, tokens: np.ndarray, begins: np.ndarray, mask: np.ndarray) -> Matches:
        """Return the predictions above 0, as `Predictor.match` does."""
        entries = []
        rows = tokens.tolist()
        for context, position in zip(*(axis.tolist() for axis in np.nonzero(mask))):
            row = rows[context][: position + 1]
            for latent in {*self.by_last.get(row[-1], ()), *self.by_last.get(ANY, ())}:
                value = walk_trie(self.tries[latent], row)
                if value > 0:
                    entries.append((context, position, latent, value))
        if not entries:
            return _no_matches()
        context, position, latent, values = zip(*entries)
        return Matches(
            np.array(context, int),
            np.array(position, int),
            np.array(latent, int),
            np.array(values, np.float32),
        )


def build_trie(patterns: Iterable[TokenPattern]) -> dict[Any, Any]:
    """Return patterns as nested dicts over their reversed tokens.

    The last of equal patterns gives the value.
    """
    root: dict[Any, Any] = {}
    for pattern in patterns:
        node = root
        for token in reversed(pattern.tokens):
            node = node.setdefault(token, {})
        if pattern.anchored:
            node = node.setdefault(_START, {})
        node[_VALUE] = pattern.value
    return root


def walk_trie(node: dict[Any, Any], tokens: Sequence[int]) -> float:
    """Return the first value reached from the last token backwards, taking a token before ANY.

    Returns:
        The value; 0 if there is none.
    """
    for token in reversed(tokens):
        node = node.get(token) or node.get(ANY) or {}
        if _VALUE in node:
            return node[_VALUE]
    return node.get(_START, {}).get(_VALUE, 0.0)
