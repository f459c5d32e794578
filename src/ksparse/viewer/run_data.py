"""What all resources need of a run: its results, its tokens as text, a gloss of each latent."""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.report.source import Arrays, RunSource
from ksparse.report.tokens import is_right_to_left, safe_text, token_of
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder

GLOSS_TOKENS = 3
"""Tokens in a gloss at most."""
GLOSS_SHARE = 0.02
"""Smallest share of a latent's activation mass at which a token is in its gloss."""
EXAMPLE_TOKENS, EXAMPLE_WORDS, EXAMPLE_CONTEXTS = 20, 4, 500
"""Tokens of an example text at most, its words at least, and the contexts it is looked for in."""


class RunData:
    """A run's files, each read when it is first needed.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder):
        # No file of the results may be a link that leads out of the run.
        for path in sorted(atomic.inside(run.path, "evals").glob("*")):
            atomic.inside(run.path, "evals", path.name)
        self.source = RunSource(run)
        self.n = self.source.subject.n_latents
        self._tokens: dict[int, str] = {}

    def has(self, name: str) -> bool:
        """Return whether an evaluation has a result and arrays; "" stands for no evaluation."""
        return not name or (
            self.source.result(name) is not None and self.source.arrays(name) is not None
        )

    def arrays(self, name: str) -> Arrays:
        """Return the arrays of an evaluation; raise CorruptError if there are none."""
        arrays = self.source.arrays(name)
        if arrays is None:
            raise CorruptError(
                f"{self.source.run.path} has no arrays of '{name}'; run the evaluation again"
            )
        return arrays

    @cached_property
    def stats(self) -> Arrays | None:
        """The arrays of `stats`."""
        return self.source.arrays("stats") if self.has("stats") else None

    @cached_property
    def text(self) -> str | None:
        """The text that `stats` is of, in a few words: "held-out text"; None without `stats`."""
        return self.source.describe_text_briefly("stats") if self.has("stats") else None

    @cached_property
    def fires_on(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens that each latent fires on most, and the share of its mass on each, [n, tokens].

        In older results the share is that of its activations.

        None in results that were written before they were recorded.
        """
        if self.stats is None or "on_token" not in self.stats.names:
            return None
        return self.stats.tensor("on_token"), self.stats.tensor("on_share")

    @cached_property
    def raises(self) -> np.ndarray | None:
        """Tokens that each latent's decoder row raises most, [n, tokens]; None in old results."""
        if self.stats is None or "logits_up_token" not in self.stats.names:
            return None
        return self.stats.tensor("logits_up_token")

    def raised(self, latent: int) -> list[str]:
        """Return the tokens that a latent's decoder row raises most, as many as a gloss has."""
        if self.raises is None:
            return []
        return [self.token(token) for token in self.raises[latent, :GLOSS_TOKENS].tolist()]

    @cached_property
    def explained(self) -> dict[str, dict[str, Any]]:
        """Explanations in words by latent, each with its scores; made safe to look at.

        A score by which the judge cannot tell latents apart is left out.
        """
        rows = (self.source.result("explain") or {}).get("latents")
        scores = [score for score in ("detection", "fuzzing") if self.judged(score)]
        return {
            str(row["latent"]): {
                "text": safe_text(row["explanation"]),
                **{score: number(_score(row, score)) for score in scores},
            }
            for row in (rows if isinstance(rows, list) else ())
            if isinstance(row, dict)
            and type(row.get("latent")) is int
            and 0 <= row["latent"] < self.n
            and isinstance(row.get("explanation"), str)
            and row["explanation"].strip()
        }

    @cached_property
    def example(self) -> str:
        """A text to try: the beginning of a document that `stats` read, or else one for the LM."""
        if self.source.subject.acts.lm.startswith("pylm"):
            return "def area(self, width):\n    return"
        vocabulary, result = self.source.vocabulary, self.source.result("stats") or {}
        found = ""
        if vocabulary and self.stats is not None and "contexts" in self.stats.names:
            policy = result.get("policy") or {}
            ends = {policy.get("bos_token"), policy.get("separator_token")}
            contexts = self.stats.tensor("contexts")[:EXAMPLE_CONTEXTS]
            found = find_beginning(contexts, ends, vocabulary)
        return found or "Once upon a time, there was a"

    def judged(self, score: str) -> bool:
        """Return whether a score of explanations may rank latents: "detection" or "fuzzing"."""
        judged = (self.source.result("explain") or {}).get("tells_apart")
        return not isinstance(judged, dict) or judged.get(score) is not False

    def gloss(self, latent: int) -> list[list[Any]]:
        """Return [token, share] of the tokens that a latent fires on most."""
        if self.fires_on is None:
            return []
        pairs = zip(*(column[latent].tolist() for column in self.fires_on))
        return [
            [self.token(token), number(share, 3)]
            for token, share in pairs
            if token >= 0 and share >= GLOSS_SHARE
        ][:GLOSS_TOKENS]

    def token(self, token_id: int) -> str:
        """Return a token by its id, made safe to look at."""
        if token_id not in self._tokens:
            self._tokens[token_id] = token_of(self.source.vocabulary, token_id)
        return self._tokens[token_id]


def find_beginning(contexts: np.ndarray, ends: set[Any], vocabulary: list[str]) -> str:
    """Return the first words of a document in contexts [c, t]; "" if none is plain text.

    Args:
        contexts: ids; below 0 is padding.
        ends: the ids that stand between documents.
        vocabulary: the string of each id.
    """
    for tokens in contexts.tolist():
        begins = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        words = tokens[begins : begins + EXAMPLE_TOKENS]
        if len(words) < EXAMPLE_TOKENS or any(
            token in ends or not 0 <= token < len(vocabulary) for token in words
        ):
            continue
        text = "".join(vocabulary[token] for token in words).strip()
        text = text[: max(text.rfind(" "), text.rfind("\n"))].rstrip()
        printable = re.sub("[\n\t]", "", text).isprintable() and "\ufffd" not in text
        if printable and len(text.split()) >= EXAMPLE_WORDS and not is_right_to_left(text):
            return text
    return ""


def _score(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, (int, float)) else None


def number(value: Any, digits: int = 5) -> float | None:
    """Return a number for JSON with so many significant digits; None if missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def quote_value(value: Any) -> str:
    """Return a value of a request for an error message; lists and tables only by their type."""
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)
