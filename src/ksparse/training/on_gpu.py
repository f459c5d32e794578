"""The training step by the Triton kernels: the product never reaches memory, rows are moved in one pass.

    topk_encode ─▶ gather_sum, gather_dot ─▶ transposed, scatter_transposed ─▶ row_squares ─▶ adam_rows_

Weights, moments and gradients are float32, so the result is that of the other steps up to rounding, and checkpoints are the same files. With
a screen, `topk_encode` reads bfloat16 copies and names candidates; their values and the choice among them are float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ksparse.kernels import gpu
from ksparse.training.fused import ScreenedOptimizer


class TritonOptimizer(ScreenedOptimizer):
    """The written-out step by Triton's kernels: on a CUDA GPU, or in Triton's interpreter."""

    @torch.no_grad()
    def _lower(self) -> None:
        if self.kind:
            self.low = self.sae.W_enc.detach().bfloat16()

    def _piece(self) -> int:
        return 2**62  # no product is in memory

    def _exact(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        return gpu.topk_encode(centred, self.sae.W_enc.detach(), self.sae.b_enc.detach(), self.sae.shape.k)

    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae, n = self.sae, self.sae.shape.n_latents
        scores, latents = gpu.topk_encode(centred, self.low, sae.b_enc.detach(), min(n, c + 1))
        dropped = scores.new_full((len(scores),), -torch.inf)
        if c < n:
            dropped, least = scores.min(1, keepdim=True)
            kept = torch.ones_like(scores, dtype=torch.bool).scatter_(1, least, False)
            scores, latents, dropped = scores[kept].view(-1, c), latents[kept].view(-1, c), dropped.squeeze(1)
        exact = gpu.gather_dot(centred, latents, sae.W_enc.detach()) + sae.b_enc.detach()[latents]
        values, chosen = exact.topk(sae.shape.k, dim=1, sorted=False)
        return values, latents.gather(1, chosen), dropped, (exact - scores).square().mean(1).sqrt()

    def _decode(self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        sae = self.sae
        torch.add(gpu.gather_sum(values.relu_(), indices, sae.W_dec.detach()), sae.b_pre.detach(), out=error).sub_(x)
        return error.square().sum(1), gpu.gather_dot(error, indices, sae.W_dec.detach()).mul_(values > 0)

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Apply the pending gradient; return its norm before clipping. NaN, and nothing is changed, if it is not finite."""
        sae, recipe, pending = self.sae, self.recipe, self.pending
        self.pending = None
        if not pending.finite:
            return math.nan
        lists, scale, extra = gpu.transposed(pending.indices, sae.shape.n_latents), pending.scale, pending.extra
        dec = gpu.scatter_transposed(lists, pending.values * scale, pending.error)
        enc = gpu.scatter_transposed(lists, pending.slopes * scale, pending.x - sae.b_pre)
        bias = gpu.scatter_transposed(lists, pending.slopes * scale, pending.x.new_ones(len(pending.x), 1)).squeeze(1)
        if extra is not None:
            for whole, part in ((dec, extra.dec), (enc, extra.enc), (bias, extra.bias)):
                whole.index_add_(0, extra.latents, part)
        pre = scale * pending.error.sum(0) - bias @ sae.W_enc
        squares = [gpu.row_squares(dec, sae.W_dec.detach(), project=recipe.sae.unit_norm), gpu.row_squares(enc, sae.W_enc.detach()), pre.square(),
                   *([bias.square()] if recipe.sae.b_enc else [])]
        norm = math.sqrt(sum(each.double().sum() for each in squares).item())
        clip = min(1.0, recipe.optim.clip / (norm + 1e-6)) if recipe.optim.clip else 1.0
        self._rows("W_dec", dec, step, clip, unit=recipe.sae.unit_norm)
        self._rows("W_enc", enc, step, clip, unit=False)
        if recipe.sae.b_enc:
            self._move("b_enc", bias * clip, step)
        elif self.average:
            self.average["b_enc"].lerp_(sae.b_enc.detach(), 1 - recipe.ema)
        self._bias(pre * clip, step)
        return norm

    def _rows(self, key: str, gradient: Tensor, step: int, clip: float, *, unit: bool) -> None:
        weight, options, rule = getattr(self.sae, key), self.recipe.optim, self._rule(step, self._rates(step)[0], clip)
        state = self.adam.state[weight]
        gpu.adam_rows_(weight.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]) + 1, rate=rule.rate, beta1=options.beta1,
                       beta2=options.beta2, eps=options.eps, clip=clip, project=unit, unit_norm=unit, average=self.average.get(key), decay=self.recipe.ema,
                       low=self.low if key == "W_enc" and self.kind else None)
