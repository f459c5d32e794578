"""The training step by the Triton kernels: candidates by a product in low precision that never
reaches memory, rows updated in one pass.

    quantize -> candidates -> gather_dot, topk -> gather_sum, gather_dot -> transposed,
    scatter_transposed -> row_squares -> adam_rows_

Weights, moments, gradients and sums are float32, and so are the values of the candidates and the
selection among them: the result is that of the other steps up to rounding, and checkpoints are the
same files. With `optim.precision = "bfloat16"` the sparse parts read bfloat16 copies of the weights
(made in the pass over the rows) and of the activations and errors that gradients sum; results then
differ by that rounding, 2^-9. Without a prefilter, and for uncertain tokens, the product is torch's
in float32, which uses no tensor cores and takes several times as long as everything else.

The device is never idle: the host waits once per step, for the norm, while the rows are still being
updated. It therefore learns too late which tokens are uncertain. As many as can be expected are
recomputed unconditionally; if there were more, nothing is updated and `step` returns None, so that
the batch is processed again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from ksparse.config import Recipe
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.kernels import triton_candidates, triton_ops
from ksparse.sae.model import SAE
from ksparse.training.steps.async_copy import copy_async, true_positions
from ksparse.training.steps.explicit import AuxGrads
from ksparse.training.steps.prefilter import MARGIN, PrefilteredStep


class TritonStep(PrefilteredStep):
    """`PrefilteredStep` by Triton's kernels: on a CUDA GPU, or in Triton's interpreter."""

    sparse: ClassVar[ModuleType] = triton_ops
    # a product in float32 without tensor cores costs more than a few candidates of each token
    patience = 5000

    def __init__(self, sae: SAE, recipe: Recipe, kind: str = "off", mesh: Mesh = SINGLE_PROCESS):
        super().__init__(sae, recipe, kind, mesh)
        self.again = 0
        """Tokens of the batch that are recomputed unconditionally: at least one in `patience`, and
        twice as many as were uncertain the last time."""
        self.uncertain: Tensor | None = None
        """How many tokens of the pending batch are uncertain, as a tensor."""
        self.candidates = sae.shape.k + max(16, sae.shape.k // 2)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | ({"screen.again": torch.tensor(self.again)} if self.kind else {})

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        super().restore(tensors, updates)
        self.again = int(tensors.get("screen.again", 0))

    @torch.no_grad()
    def _quantize(self) -> None:
        kept = ["W_enc", "W_dec"] if self.recipe.optim.precision == "bfloat16" else []
        self.copies = {key: getattr(self.sae, key).detach().bfloat16() for key in kept}
        if self.kind:
            weight = self.copies.get("W_enc", self.sae.W_enc.detach())
            self.low = triton_candidates.quantize(
                weight if self.screen == "bfloat16" else self.sae.W_enc.detach(), self.screen
            )

    def _read(self, key: str) -> Tensor:
        """Return a weight as the sparse parts read it: its bfloat16 copy where there is one."""
        return self.copies.get(key, getattr(self.sae, key).detach())

    def _max_product(self) -> int:
        # with a prefilter the full product is never materialised
        return 2**62 if self.kind else super()._max_product()

    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae, k = self.sae, self.sae.shape.k
        candidates = triton_candidates.candidates(
            centred, self.low, sae.b_enc.detach(), c, k=k + k // 8
        )
        if candidates is None:  # with so few latents buckets save nothing
            values, latents = self._choose_exact(centred)
            return (
                values,
                latents,
                values.new_full((len(values),), -torch.inf),
                values.new_zeros(len(values)),
            )
        values, indices, spread = triton_ops.choose(
            centred,
            candidates.latents,
            candidates.scores,
            self._read("W_enc"),
            sae.b_enc.detach(),
            k,
            margin=MARGIN,
        )
        return values, indices, candidates.dropped, spread

    def _code(
        self, x: Tensor, centred: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.kind:
            return super()._code(x, centred, error)
        values, indices, uncertain = self._preselect(centred)
        self.again, self.uncertain = (
            min(len(x), max(self.again, -(-len(x) // self.patience))),
            uncertain.sum(),
        )
        self._recompute_(centred, values, indices, true_positions(uncertain, self.again))
        return values, indices, *self._decode(x, values, indices, error)

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        sae = self.sae
        return triton_ops.decode(
            values.relu_(), indices, self._read("W_dec"), sae.b_pre.detach(), x, error
        )

    def _is_finite(self, nmse: Tensor, grad_values: Tensor) -> Tensor:
        return torch.isfinite(nmse + grad_values.sum())  # `step` reads it with the norm

    @torch.no_grad()
    def step(self, step: int) -> float | None:
        """Apply the pending gradient of step number `step` (from 1).

        Returns:
            Its norm before clipping; NaN, with nothing changed, if it is not finite; None, with
            nothing changed, if more tokens were uncertain than were recomputed: call `backward`
            with the same batch again.
        """
        sae, recipe, pending = self.sae, self.recipe, self._take_pending()
        csc, aux = triton_ops.sort_by_latent(pending.indices, sae.shape.n_latents), pending.aux
        values, grad_values = pending.values * pending.scale, pending.grad_values * pending.scale
        error, centred = (
            rows.bfloat16() if self.copies else rows for rows in (pending.error, pending.centred)
        )
        dec, dec_squares, radial_grad = triton_ops.scatter_measured(
            csc, values, error, values * pending.grad_values
        )  # radial_grad: <gradient, decoder row>
        enc, enc_squares, bias = triton_ops.scatter_measured(csc, grad_values, centred, grad_values)
        if recipe.sae.unit_norm:
            dec_squares -= radial_grad.square()
        if aux is not None:
            dec_squares, enc_squares = self._add_aux_(dec, enc, bias, aux)
        pre = pending.scale * pending.error.sum(0) - bias @ sae.W_enc
        squared_norms = [
            dec_squares,
            enc_squares,
            pre.square(),
            *([bias.square()] if recipe.sae.b_enc else []),
        ]
        norm = functools.reduce(torch.add, (part.double().sum() for part in squared_norms)).sqrt()
        uncertain = norm.new_zeros(()) if self.uncertain is None else self.uncertain.double()
        norm = torch.where(
            pending.finite & torch.isfinite(norm) & (uncertain <= self.again), norm, math.nan
        )
        clip = (
            ((recipe.optim.clip or math.inf) / (norm + 1e-6)).clamp(max=1.0).float()
        )  # NaN where the norm is: then no row changes
        read_numbers = copy_async(torch.stack((norm, uncertain)))
        self._adam_rows("W_dec", dec, step, clip, unit=recipe.sae.unit_norm)
        self._adam_rows("W_enc", enc, step, clip, unit=False)
        norm, uncertain = read_numbers()
        enough, self.again = uncertain <= self.again, 2 * int(uncertain)
        if not enough:
            return None
        if math.isnan(norm):
            self.again = 0  # such a batch predicts nothing about the next
            return math.nan
        if self.kind:
            self._count_recomputed(len(pending.x), int(uncertain))
        if recipe.sae.b_enc:
            self._adam_bias("b_enc", bias * clip, step)
        elif self.average:
            self.average["b_enc"].lerp_(sae.b_enc.detach(), 1 - recipe.ema)
        self._finish_step(pre * clip, step)
        return norm

    def _add_aux_(
        self, dec: Tensor, enc: Tensor, bias: Tensor, aux: AuxGrads
    ) -> tuple[Tensor, Tensor]:
        """Add AuxK's gradients to the rows of its latents; return the squared norms [n] of all
        decoder and encoder rows."""
        for rows, part in ((dec, aux.dec), (enc, aux.enc), (bias, aux.bias)):
            rows.index_add_(0, aux.latents, part)
        return (
            triton_ops.row_squares(dec, self.sae.W_dec.detach(), project=self.recipe.sae.unit_norm),
            triton_ops.row_squares(enc, self.sae.W_enc.detach()),
        )

    def _adam_rows(
        self, key: str, gradient: Tensor, step: int, clip: Tensor, *, unit: bool
    ) -> None:
        weight, options, rule = (
            getattr(self.sae, key),
            self.recipe.optim,
            self._adam_rule(step, self._rates(step)[0], 1.0),
        )
        state = self.adam.state[weight]
        low = self.low if key == "W_enc" and self.kind else None
        rows, scale = low or (None, None)
        bf16_copy, int8_copy = (
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
            copies=triton_ops.RowCopies(
                self.average.get(key), self.recipe.ema, bf16_copy, int8_copy, scale
            ),
        )
