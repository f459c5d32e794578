"""The latents of a run as viewers show them: evaluation arrays as plain numbers and strings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ksparse.errors import InputError
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Example:
    """A window of text around a position where a latent fires."""

    context: int
    """Row of the context in the arrays of `stats`."""
    tokens: list[int]
    """Token ids of the window."""
    acts: list[float]
    """The latent's value on each token."""
    at: int
    """Index, in the window, of the position that was sampled."""


class LatentExamples:
    """The latents of a run that has results of `stats`, and optionally of `ablation`.

    Args:
        run: the run's folder.

    Raises:
        InputError: the run has no results of `stats`, or those of an older version.
    """

    def __init__(self, run: RunFolder):
        self.run, self.acts = run, run.subject().acts
        self.stats, self.arrays = self.read("stats")
        if "power_means" not in self.arrays or "top_acts" not in self.arrays:
            raise InputError(
                f"{run.eval_file('stats')} is from an older version; run `ksparse eval {run.path} "
                "stats` again"
            )
        self.ablation = self.read("ablation")[1] if run.eval("ablation") else {}
        self.vocabulary = jsonio.read_strings(run.eval_file("vocabulary"))
        self.n_latents = len(self.arrays["density"])

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return an evaluation's JSON and its arrays."""
        result = self.run.eval(name)
        arrays = self.run.arrays_file(name, result)
        if result is None or arrays is None:
            raise InputError(
                f"{self.run.path} has no result of `{name}`; run `ksparse eval {self.run.path} "
                f"{name}`"
            )
        return result, load_file(arrays)

    def live_latents(self) -> list[int]:
        """Return the latents that fired at least once."""
        return np.flatnonzero(self.arrays["density"] > 0).tolist()

    def token_strings(self, tokens: list[int]) -> list[str]:
        """Return the strings of token ids; `<id N>` for ids beyond the vocabulary."""
        return [
            self.vocabulary[token] if token < len(self.vocabulary) else f"<id {token}>"
            for token in tokens
        ]

    def has_examples(self, latent: int, sampling: str) -> bool:
        """Return whether `examples` yields any."""
        contexts = self.arrays.get(f"{sampling}_context")
        return contexts is not None and bool((contexts[latent] >= 0).any())

    def examples(self, latent: int, sampling: str) -> Iterator[Example]:
        """Yield the examples of a latent, each with the window of text that `stats` kept.

        Args:
            latent: the latent.
            sampling: "top", the strongest; "random"; or "band", random ones of each band of sizes.
        """
        before = self.stats["window"]["before"]
        for index, context in enumerate(self.arrays[f"{sampling}_context"][latent].tolist()):
            if context < 0:
                continue
            text = self.arrays["contexts"][context]
            length = int((text >= 0).sum())
            position = int(self.arrays[f"{sampling}_position"][latent, index])
            values = self.arrays[f"{sampling}_acts"][latent, index].astype(np.float32)
            first, last = max(0, position - before), min(length, position - before + len(values))
            acts = values[first - position + before : last - position + before]
            yield Example(context, text[first:last].tolist(), acts.tolist(), position - first)

    def histogram(self, latent: int) -> dict[int, int]:
        """Return {bar: tokens} of a latent's positive values; bar i ends at i x act_bin."""
        bars = slice(*self.arrays["bar_start"][latent : latent + 2].tolist())
        return dict(zip(self.arrays["bar"][bars].tolist(), self.arrays["bar_count"][bars].tolist()))

    def moments(self, latent: int) -> list[float]:
        """Return the means of a, a^2, a^3 and a^4 over all tokens."""
        return self.arrays["power_means"][:, latent].astype(float).tolist()
