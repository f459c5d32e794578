"""What all pieces need of a run: its results, its tokens as text, a few words on each latent."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.report.source import Arrays, RunSource
from ksparse.report.tokens import token_of
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder

GLOSS_TOKENS = 3
"""Tokens in a gloss."""
_LEAST_SHARE = 0.02  # of a latent's activations, for a token to be in its gloss


class RunData:
    """A run's files, read when they are first needed."""

    def __init__(self, run: RunFolder):
        for path in sorted(atomic.inside(run.path, "evals").glob("*")):
            atomic.inside(run.path, "evals", path.name)
        self.source = RunSource(run)
        self.n = self.source.recipe.sae.n_latents
        self._tokens: dict[int, str] = {}

    def has(self, name: str) -> bool:
        """Tell whether an evaluation has been run and left its arrays; what needs none always
        is."""
        return not name or (
            self.source.result(name) is not None and self.source.arrays(name) is not None
        )

    def arrays(self, name: str) -> Arrays:
        """Return the arrays of an evaluation that `has` says is there."""
        arrays = self.source.arrays(name)
        if arrays is None:
            raise CorruptError(
                f"{self.source.run.path} has no arrays of '{name}'; run the evaluation again"
            )
        return arrays

    @cached_property
    def stats(self) -> Arrays | None:
        return self.source.arrays("stats") if self.has("stats") else None

    @cached_property
    def fires_on(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The tokens that each latent fires on most, and its share of activations on each; None in
        results of before there were any."""
        if self.stats is None or "on_token" not in self.stats.names:
            return None
        return self.stats.whole("on_token"), self.stats.whole("on_share")

    def gloss(self, latent: int) -> list[list[Any]]:
        """Return [token, share] of the tokens that a latent fires on most."""
        if self.fires_on is None:
            return []
        listed = zip(*(column[latent].tolist() for column in self.fires_on))
        return [
            [self.token(token), number(share, 3)]
            for token, share in listed
            if token >= 0 and share >= _LEAST_SHARE
        ][:GLOSS_TOKENS]

    def token(self, which: int) -> str:
        """Return a token by its id, made safe to look at."""
        if which not in self._tokens:
            self._tokens[which] = token_of(self.source.vocabulary, which)
        return self._tokens[which]


def number(value: Any, digits: int = 5) -> float | None:
    """Return a number for JSON, rounded; None for one that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def written(value: Any) -> str:
    """Return what a request gave in place of a number, for an error; lists and tables by name."""
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)
