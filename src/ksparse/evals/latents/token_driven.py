"""Which latents follow single tokens, whatever the context? arXiv 2601.05679.

The three tokens on which a latent is strongest are put, one at a time, into random held-out
contexts at a random position. A latent that then fires in half of the cases or more is driven by
tokens. For comparison other tokens of the text are put into the same places.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import SAEBatch
from ksparse.evals.latents.properties import Firing
from ksparse.evals.statistics import Result, Value, no_value, share
from ksparse.sae.model import Code

FAVOURITES = 3
"""Tokens of each latent: those with the largest sums of its squared values."""
CONTEXTS = 4
"""Contexts into which each of them is put."""
CONTROLS = 256
"""Places into which other tokens are put."""
DRIVEN = 0.5
"""Share of the cases in which a latent that is driven by tokens fires."""
_POOL = 1_024  # contexts that are kept to draw from


class TokenDriven(Metric):
    """The share of latents that fire when their favourite tokens are put into random contexts."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.firing = context.part(Firing)
        self.pool: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, batch: SAEBatch) -> None:
        contexts = batch.held_out.contexts
        if sum(len(tokens) for tokens, *_ in self.pool) < _POOL:
            self.pool.append(tuple(part.cpu() for part in contexts[:3]))  # type: ignore[arg-type]

    def compute(self, progress: Progress) -> None:
        options = self.context.options
        generator = np.random.default_rng(options.seed)
        live = np.flatnonzero(self.firing.fires_enough)
        size = min(options.latents, len(live))
        self.latents = np.sort(generator.choice(live, size, replace=False)) if size else live
        tokens, attention, keep = (torch.cat(column) for column in zip(*self.pool))
        places = keep.nonzero().numpy()
        favourite = self.firing.favourite_tokens(FAVOURITES)
        cases = [
            (place, int(token), number)
            for number, latent in enumerate(self.latents.tolist())
            for token in favourite[latent][favourite[latent] >= 0]
            for place in generator.integers(len(places), size=CONTEXTS).tolist()
        ]
        text = tokens[keep].numpy()
        controls = [
            (place, int(token), -1)
            for place, token in zip(
                generator.integers(len(places), size=CONTROLS).tolist(),
                generator.choice(text, CONTROLS),
            )
        ]
        fired, tried = np.zeros(size), np.zeros(size)
        self.control = np.zeros(size)
        done, step = 0, self.context.data.acts.lm_batch
        every = cases + controls
        for first in range(0, len(every), step):
            part = every[first : first + step]
            rows = places[[place for place, _, _ in part]]
            code = self._codes(tokens, attention, rows, [token for _, token, _ in part])
            for slot, (_, _, number) in enumerate(part):
                on = code.indices[slot][code.values[slot] > 0].numpy()
                if number < 0:
                    self.control += np.isin(self.latents, on)
                else:
                    fired[number] += self.latents[number] in on
                    tried[number] += 1
            progress("putting tokens into contexts", done := done + len(part), len(every))
        self.rate = fired / np.maximum(1, tried)
        self.control /= CONTROLS

    def _codes(self, tokens: Tensor, attention: Tensor, rows: np.ndarray, put: list[int]) -> Code:
        """Return the codes at some places after tokens were put there."""
        lm, (context, position) = self.context.lm, torch.from_numpy(rows.T.copy())
        changed, each = tokens[context].clone(), torch.arange(len(rows))
        changed[each, position] = torch.tensor(put)
        x = lm.acts(changed.to(lm.device), attention[context].to(lm.device))
        code = self.context.sae.encode(x[each.to(x.device), position.to(x.device)])
        return Code(code.values.cpu(), code.indices.cpu())

    def finalize(self) -> Result:
        driven, count = self.rate >= DRIVEN, len(self.latents)
        values: dict[str, Any] = {
            "token_driven": share(int(driven.sum()), count) if count else no_value(),
            "rate": _mean(self.rate),
            "control_rate": _mean(self.control),
            "difference": _mean(self.rate - self.control),
            "n_latents": count,
            "favourites": FAVOURITES,
            "contexts_per_token": CONTEXTS,
        }
        arrays = {"latent": self.latents, "rate": self.rate, "control_rate": self.control}
        return Result(
            values,
            {
                key: torch.from_numpy(array.astype(np.int32 if key == "latent" else np.float32))
                for key, array in arrays.items()
            },
        )


def _mean(values: np.ndarray) -> Value:
    """Return the mean over latents, with its standard error."""
    if not len(values):
        return no_value()
    se = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": float(values.mean()), "se": se}
