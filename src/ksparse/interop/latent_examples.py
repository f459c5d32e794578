"""What viewers show of a run's latents: the arrays of its evaluations, as plain numbers and
strings."""

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
    """A stretch of text in which a latent fires: its tokens, the latent's value on each, and at
    which of them it was chosen."""

    context: int
    tokens: list[int]
    acts: list[float]
    at: int

    @property
    def act(self) -> float:
        return self.acts[self.at]


class LatentExamples:
    """The latents of a run that has been evaluated with `stats`; `ablation` is there if it has been
    run."""

    def __init__(self, run: RunFolder):
        self.run, self.acts = run, run.recipe().acts
        self.stats, self.arrays = self.read("stats")
        if "power_means" not in self.arrays or "top_acts" not in self.arrays:
            raise InputError(
                f"{run.eval_file('stats')} is of an older version; run `ksparse eval {run.path} "
                "stats` again"
            )
        self.ablation = self.read("ablation")[1] if run.eval("ablation") else {}
        self.vocabulary = jsonio.read_strings(run.eval_file("vocabulary"))
        self.n = len(self.arrays["density"])

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return an evaluation's JSON and arrays."""
        result = self.run.eval(name)
        arrays = self.run.arrays_file(name, result)
        if result is None or arrays is None:
            raise InputError(
                f"{self.run.path} has no result of `{name}`; `ksparse eval {self.run.path} {name}` "
                "makes it"
            )
        return result, load_file(arrays)

    def live(self) -> list[int]:
        """Return the latents that fired."""
        return np.flatnonzero(self.arrays["density"] > 0).tolist()

    def strings(self, tokens: list[int]) -> list[str]:
        return [
            self.vocabulary[token] if token < len(self.vocabulary) else f"<id {token}>"
            for token in tokens
        ]

    def examples(self, latent: int, kind: str) -> Iterator[Example]:
        """Yield the 'top' or 'random' examples of a latent, with the text around them that was
        kept."""
        before = self.stats["window"]["before"]
        for place, context in enumerate(self.arrays[f"{kind}_context"][latent].tolist()):
            if context < 0:
                return
            text = self.arrays["contexts"][context]
            length, position = (
                int((text >= 0).sum()),
                int(self.arrays[f"{kind}_position"][latent, place]),
            )
            values = self.arrays[f"{kind}_acts"][latent, place].astype(np.float32)
            first, last = max(0, position - before), min(length, position - before + len(values))
            acts = values[first - position + before : last - position + before]
            yield Example(context, text[first:last].tolist(), acts.tolist(), position - first)

    def bars(self, latent: int) -> dict[int, int]:
        """Return {bar: tokens} of a latent's values above 0; bar i is of values up to i x
        act_bin."""
        part = slice(*self.arrays["bar_start"][latent : latent + 2].tolist())
        return dict(zip(self.arrays["bar"][part].tolist(), self.arrays["bar_count"][part].tolist()))

    def moments(self, latent: int) -> list[float]:
        """Return the means of a, a^2, a^3, a^4 over all tokens."""
        return self.arrays["power_means"][:, latent].astype(float).tolist()
