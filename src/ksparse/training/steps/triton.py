"""The training step by the Triton kernels: candidates by a product in low precision that never
reaches memory, rows moved in one pass.

    lower ─▶ candidates ─▶ gather_dot, topk ─▶ gather_sum, gather_dot ─▶ transposed,
    scatter_transposed ─▶ row_squares ─▶ adam_rows_

Weights, moments, gradients and sums are float32, and so are the values of the candidates and the
choice among them: the result is that of the other steps up to rounding, and checkpoints are the
same files. With `optim.precision = "bfloat16"` the sparse parts read bfloat16 copies, of the
weights (the pass over the rows makes them) and of the activations and errors that gradients add up;
results then differ by the rounding of what is read, 2^-9 of it. Without a screen, and for tokens
whose choice is not certain, the product is torch's in float32, which uses no tensor cores and takes
several times as long as all the rest.

The device never runs dry: the host waits once a step, for the norm, and while it does the rows
still move. So it does not learn in time which tokens are unclear. As many as may be expected are
done again in any case; where there were more nothing moves, and the batch is taken in again.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from ksparse.config import Recipe
from ksparse.kernels import triton_candidates, triton_ops
from ksparse.sae.model import SAE
from ksparse.training.steps.async_copy import copy_async, true_positions
from ksparse.training.steps.prefilter import MARGIN, PrefilteredStep


class TritonStep(PrefilteredStep):
    """The written-out step by Triton's kernels: on a CUDA GPU, or in Triton's interpreter."""

    sparse: ClassVar[ModuleType] = triton_ops
    # a product in float32 without tensor cores costs more than a few candidates of each token
    patience = 5000

    def __init__(self, sae: SAE, recipe: Recipe, kind: str = "off"):
        super().__init__(sae, recipe, kind)
        self.again = 0
        """Tokens of the batch that are done again in any case, at least one in `patience`: twice as
        many as were unclear the last time."""
        self.unclear: Tensor | None = None
        """How many were, of the batch that is pending."""
        self.candidates = sae.shape.k + max(16, sae.shape.k // 2)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | ({"screen.again": torch.tensor(self.again)} if self.kind else {})

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        super().restore(tensors, updates)
        self.again = int(tensors.get("screen.again", 0))

    @torch.no_grad()
    def _lower(self) -> None:
        kept = ["W_enc", "W_dec"] if self.recipe.optim.precision == "bfloat16" else []
        self.copies = {key: getattr(self.sae, key).detach().bfloat16() for key in kept}
        if self.kind:
            weight = self.copies.get("W_enc", self.sae.W_enc.detach())
            self.low = triton_candidates.quantize(
                weight if self.screen == "bfloat16" else self.sae.W_enc.detach(), self.screen
            )

    def _read(self, key: str) -> Tensor:
        """Return a weight as the sparse parts read it."""
        return self.copies.get(key, getattr(self.sae, key).detach())

    def _piece(self) -> int:
        return 2**62 if self.kind else super()._piece()  # no product is in memory

    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae, k = self.sae, self.sae.shape.k
        found = triton_candidates.candidates(centred, self.low, sae.b_enc.detach(), c, k=k + k // 8)
        if found is None:  # so few latents that buckets save nothing
            values, latents = self._exact(centred)
            return (
                values,
                latents,
                values.new_full((len(values),), -torch.inf),
                values.new_zeros(len(values)),
            )
        values, indices, spread = triton_ops.choose(
            centred,
            found.latents,
            found.scores,
            self._read("W_enc"),
            sae.b_enc.detach(),
            k,
            margin=MARGIN,
        )
        return values, indices, found.dropped, spread

    def _code(
        self, x: Tensor, centred: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.kind:
            return super()._code(x, centred, error)
        values, indices, unclear = self._offered(centred)
        self.again, self.unclear = (
            min(len(x), max(self.again, -(-len(x) // self.patience))),
            unclear.sum(),
        )
        self._exactly(centred, values, indices, true_positions(unclear, self.again))
        return values, indices, *self._decode(x, values, indices, error)

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        sae = self.sae
        return triton_ops.decode(
            values.relu_(), indices, self._read("W_dec"), sae.b_pre.detach(), x, error
        )

    def _finite(self, nmse: Tensor, slopes: Tensor) -> Tensor:
        return torch.isfinite(nmse + slopes.sum())  # `step` asks for it with the norm

    @torch.no_grad()
    def step(self, step: int) -> float | None:
        """Apply the pending gradient; return its norm before clipping. NaN, and nothing is changed,
        if it is not finite.

        None, and no weight is changed, where more tokens were unclear than were done again: take
        the batch in again.
        """
        sae, recipe, pending = self.sae, self.recipe, self._taken()
        lists, extra = triton_ops.transposed(pending.indices, sae.shape.n_latents), pending.extra
        values, slopes = pending.values * pending.scale, pending.slopes * pending.scale
        error, centred = (
            rows.bfloat16() if self.copies else rows for rows in (pending.error, pending.centred)
        )
        dec, dec_squares, along = triton_ops.scatter_measured(
            lists, values, error, values * pending.slopes
        )  # along: <gradient, row>
        enc, enc_squares, bias = triton_ops.scatter_measured(lists, slopes, centred, slopes)
        if recipe.sae.unit_norm:
            dec_squares -= along.square()
        if extra is not None:
            for whole, part in ((dec, extra.dec), (enc, extra.enc), (bias, extra.bias)):
                whole.index_add_(0, extra.latents, part)
            dec_squares, enc_squares = (
                triton_ops.row_squares(dec, sae.W_dec.detach(), project=recipe.sae.unit_norm),
                triton_ops.row_squares(enc, sae.W_enc.detach()),
            )
        pre = pending.scale * pending.error.sum(0) - bias @ sae.W_enc
        squares = [
            dec_squares,
            enc_squares,
            pre.square(),
            *([bias.square()] if recipe.sae.b_enc else []),
        ]
        norm = functools.reduce(torch.add, (each.double().sum() for each in squares)).sqrt()
        unclear = norm.new_zeros(()) if self.unclear is None else self.unclear.double()
        norm = torch.where(
            pending.finite & torch.isfinite(norm) & (unclear <= self.again), norm, math.nan
        )
        clip = (
            ((recipe.optim.clip or math.inf) / (norm + 1e-6)).clamp(max=1.0).float()
        )  # NaN as the norm is: then no row moves
        asked = copy_async(torch.stack((norm, unclear)))
        self._rows("W_dec", dec, step, clip, unit=recipe.sae.unit_norm)
        self._rows("W_enc", enc, step, clip, unit=False)
        norm, unclear = asked()
        enough, self.again = unclear <= self.again, 2 * int(unclear)
        if not enough:
            return None
        if math.isnan(norm):
            self.again = 0  # such a batch says nothing of the next
            return math.nan
        if self.kind:
            self._count(len(pending.x), int(unclear))
        if recipe.sae.b_enc:
            self._move("b_enc", bias * clip, step)
        elif self.average:
            self.average["b_enc"].lerp_(sae.b_enc.detach(), 1 - recipe.ema)
        self._bias(pre * clip, step)
        return norm

    def _rows(self, key: str, gradient: Tensor, step: int, clip: Tensor, *, unit: bool) -> None:
        weight, options, rule = (
            getattr(self.sae, key),
            self.recipe.optim,
            self._rule(step, self._rates(step)[0], 1.0),
        )
        state = self.adam.state[weight]
        low = self.low if key == "W_enc" and self.kind else None
        rows, scale = low or (None, None)
        half, whole = (
            self.copies.get(key, rows if scale is None else None),
            rows if scale is not None else None,
        )
        triton_ops.adam_rows_(
            weight.detach(),
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]) + 1,
            rate=rule.rate,
            beta1=options.beta1,
            beta2=options.beta2,
            eps=options.eps,
            clip=clip,
            project=unit,
            unit_norm=unit,
            average=self.average.get(key),
            decay=self.recipe.ema,
            half=half,
            whole=whole,
            scale=scale,
        )
