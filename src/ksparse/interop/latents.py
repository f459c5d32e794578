"""One latent for Python and notebooks: how often it fires, how strongly, and on what."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ksparse import html
from ksparse.errors import InputError
from ksparse.interop.latent_examples import LatentExamples
from ksparse.lm.direct_logits import latent_logits
from ksparse.lm.model import LM
from ksparse.sae import ranges
from ksparse.sae.code import TextCode
from ksparse.sae.model import SAE
from ksparse.steering import check_latents

_SHOWN = 6  # direct logits in a notebook
BEFORE, AFTER = 24, 8
"""Tokens of a text shown before and after an example's own token, as those that `stats` keeps."""


class LatentExample(NamedTuple):
    """A window of text around a token on which a latent fires."""

    tokens: list[str]
    values: list[float]
    """The latent's value on each token."""
    at: int
    """The place of the token in the window."""

    @property
    def value(self) -> float:
        """The latent's value on the token."""
        return self.values[self.at]

    def __str__(self) -> str:
        before, after = "".join(self.tokens[: self.at]), "".join(self.tokens[self.at + 1 :])
        return f"{self.value:.3g}  {html.visible(f'{before}«{self.tokens[self.at]}»{after}')}"


def describe_latent(sae: SAE, number: int, *, text: Any = None, lm: LM | None = None) -> Latent:
    """Return a latent as `sae.latent` does."""
    check_latents(sae, [number])
    return Latent(sae, number, None if text is None else (lm or sae.lm()).encode(text, sae))


class Latent:
    """One latent: from the results of the run that its SAE was loaded from, or on a text.

    Args:
        sae: the SAE.
        number: the latent.
        code: the code of a text to measure it on; None for what `stats` found in the run.

    Raises:
        InputError: without a code, if there is no result of `stats`, when it is needed.
    """

    def __init__(self, sae: SAE, number: int, code: TextCode | None = None):
        self.sae, self.number, self.code = sae, number, code

    @cached_property
    def _results(self) -> LatentExamples:
        run = ranges.results_of(self.sae)
        if run is None:
            where = self.sae.source if self.sae.source is not None else "SAE --out DIR"
            raise InputError(
                f"there is no result of `stats` to read latent {self.number} from: run "
                f"`ksparse eval {where} stats` and load what it writes to, or give a text: "
                f"sae.latent({self.number}, text=…)"
            )
        results = LatentExamples(run)
        if results.n_latents != self.sae.n_latents:
            raise InputError(
                f"the result of `stats` in {run.path} is of an SAE of {results.n_latents:,} "
                f"latents, this one has {self.sae.n_latents:,}; run the evaluation again"
            )
        return results

    @cached_property
    def _acts(self) -> np.ndarray:
        assert self.code is not None
        acts: np.ndarray = self.code.of_latent(self.number).float().cpu().numpy()
        return acts

    @property
    def density(self) -> float:
        """The share of tokens on which the latent fires."""
        if self.code is not None:
            return float((self._acts > 0).mean())
        return float(self._results.arrays["density"][self.number])

    @property
    def max(self) -> float:
        """The latent's largest value."""
        if self.code is not None:
            return float(self._acts.max())
        return float(self._results.arrays["max_act"][self.number])

    def examples(
        self, n: int = 5, *, text: str | list[str] | None = None, lm: LM | None = None
    ) -> list[LatentExample]:
        """Return the windows of text in which the latent is largest, the largest first.

        Args:
            n: how many at most.
            text: a text, or several, to look in; by default what the latent was measured on.
            lm: the LM for `text`; by default the one that the SAE was trained on.
        """
        if text is not None:
            return describe_latent(self.sae, self.number, text=text, lm=lm).examples(n)
        if self.code is not None:
            return self._examples_in_text(self.code, n)
        results = self._results
        if "top_context" not in results.arrays:
            raise InputError(
                f"the result of `stats` in {results.run.path} has no examples; run `ksparse eval "
                f"{results.run.path} stats --examples 8`, or give a text: examples(text=…)"
            )
        return [
            LatentExample(results.token_strings(example.tokens), example.acts, example.at)
            for example in list(results.examples(self.number, "top"))[:n]
        ]

    def _examples_in_text(self, code: TextCode, n: int) -> list[LatentExample]:
        """Return windows around the largest values, none within the window of a larger one."""
        documents, shown = code.documents.tolist(), np.zeros(len(self._acts), bool)
        found: list[LatentExample] = []
        for row in np.argsort(-self._acts, kind="stable").tolist():
            if len(found) >= n or self._acts[row] <= 0:
                break
            if shown[row]:
                continue
            window = range(max(0, row - BEFORE), min(len(documents), row + AFTER + 1))
            places = [place for place in window if documents[place] == documents[row]]
            shown[places] = True
            values = [float(self._acts[place]) for place in places]
            tokens = [code.tokens[place] for place in places]
            found.append(LatentExample(tokens, values, places.index(row)))
        return found

    def tokens(self, n: int = 8) -> list[tuple[str, float]]:
        """Return the tokens on which the latent is active most, each with its share of the sum of
        the latent's activations (in results of older versions, of their number)."""
        if self.code is not None:
            mass: dict[str, float] = defaultdict(float)
            for row in np.flatnonzero(self._acts > 0).tolist():
                mass[self.code.tokens[row]] += float(self._acts[row])
            total = sum(mass.values())
            strongest = sorted(mass, key=lambda token: -mass[token])[:n]
            return [(token, mass[token] / total) for token in strongest]
        arrays = self._results.arrays
        if "on_token" not in arrays:
            return []
        ids, shares = arrays["on_token"][self.number], arrays["on_share"][self.number]
        strings = self._results.token_strings([token for token in ids.tolist() if token >= 0])
        return list(zip(strings, shares.tolist()))[:n]

    def logits(self, n: int = 10, *, lm: LM | None = None) -> dict[str, list[tuple[str, float]]]:
        """Return the tokens that the latent's decoder row raises and lowers most.

        The direct path through the final norm and the unembedding (`ksparse.lm.direct_logits`).

        Args:
            n: tokens of each list.
            lm: the LM; by default what `stats` found in the run, or else the LM that the SAE was
                trained on.

        Returns:
            "raises" and "lowers": (token, logit centred over the vocabulary), the strongest first.

        Raises:
            InputError: the site or the LM has no direct logits.
        """
        kept = None if lm is not None or self.code is not None else self._kept_logits(n)
        return kept or latent_logits(lm or self.sae.lm(), self.sae.W_dec[self.number], n)

    def _kept_logits(self, n: int) -> dict[str, list[tuple[str, float]]] | None:
        """Return what `stats` found of the direct logits; None if it did not, or not as many."""
        arrays = {} if ranges.results_of(self.sae) is None else self._results.arrays
        if "logits_up_token" not in arrays or n > arrays["logits_up_token"].shape[1]:
            return None
        return {
            name: list(
                zip(
                    self._results.token_strings(
                        arrays[f"logits_{end}_token"][self.number, :n].tolist()
                    ),
                    arrays[f"logits_{end}_value"][self.number, :n].tolist(),
                )
            )
            for name, end in (("raises", "up"), ("lowers", "down"))
        }

    def __repr__(self) -> str:
        try:
            fires = f", density={self.density:.3g}, max={self.max:.3g}"
        except InputError:
            fires = ""
        return f"Latent({self.number}{fires})"

    def _repr_html_(self) -> str:
        words = {
            "density": f"{self.density:.3%}",
            "largest": f"{self.max:.3g}",
            "fires on": ", ".join(f"{html.visible(t)} {share:.0%}" for t, share in self.tokens()),
        }
        for name, rows in ((self.code is None and self._kept_logits(_SHOWN)) or {}).items():
            words[name] = ", ".join(f"{html.visible(t)} {value:+.2f}" for t, value in rows)
        most = self.max or 1.0
        parts = [
            html.tokens(
                [token.replace("\n", "↵") for token in example.tokens],
                [
                    (self.number, min(1.0, v / most), f"{v:.3g}" if v else "")
                    for v in example.values
                ],
            )
            for example in self.examples()
        ]
        return html.table(f"Latent {self.number}", words) + "".join(parts)
