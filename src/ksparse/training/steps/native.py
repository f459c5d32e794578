"""The prefiltered step by the compiled kernels, on a CPU (`ksparse.kernels.native`)."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ksparse.kernels import native
from ksparse.training.steps.explicit import PIECE, AuxGrads, SparseGrads
from ksparse.training.steps.prefilter import PrefilteredStep, int8_kind


class NativeStep(PrefilteredStep):
    """`PrefilteredStep` by the compiled kernels, on a CPU: each latent's gradient rows are built,
    applied and dropped in one pass.

    Where the batch is split over processes the rows are built by torch and summed first; the pass
    then applies them as it does AuxK's.
    """

    def _product_kind(self, screen: str) -> int:
        return int8_kind() if screen == "int8" else super()._product_kind(screen)

    @torch.no_grad()
    def _quantize(self) -> None:
        if self.kind:
            self.low, self.low_scale = native.quantize(self.sae.W_enc.detach(), self.kind)

    def _max_product(self) -> int:
        # in panels the full product is never materialised
        return 2**62 if self.kind == native.PANELS else PIECE

    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae, bias, weight = self.sae, self.sae.b_enc.detach(), self.sae.W_enc.detach()
        k = self._offered()
        if self.kind == native.PANELS and self.low_scale is not None:
            return native.candidates(self.low, self.low_scale, bias, centred, weight, k, c)
        low, scale = native.quantize(centred, self.kind)
        product = self._buffer(
            "low",
            (len(centred), sae.shape.n_latents),
            torch.int32 if self.kind == 1 else torch.bfloat16,
        )
        torch._int_mm(low, self.low.t(), out=product) if self.kind == 1 else torch.mm(
            low, self.low.t(), out=product
        )
        return native.rerank(product, scale, self.low_scale, bias, centred, weight, k, c)

    def _select_topk(self, product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not k:  # a shard without dead latents
            return super()._select_topk(product, bias, k)
        return native.select(product, bias, k)

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        b_pre, rows = self.sae.b_pre.detach(), self.sae.W_dec.detach()
        if self.mesh.latent == 1:
            return native.decode(x, b_pre, rows, values, indices, error)
        native.reconstruct(rows, values, indices, error)
        self.mesh.all_reduce_sum("recon", error, "latent").add_(b_pre).sub_(x)
        return native.slopes(rows, values, indices, error)

    # ---- the pass over the rows

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Apply the pending gradient of step number `step` (from 1).

        Returns:
            Its norm before clipping; NaN, with nothing changed, if it is not finite.
        """
        pending, options = self._take_pending(), self.recipe.optim
        if not pending.finite:
            return math.nan
        if self.mesh.data > 1:
            pending = self._summed(pending)
        csc = native.transpose(pending.values, pending.indices, self.sae.shape.n_latents)
        errors = pending.scale * pending.error.sum(0)
        self.mesh.all_reduce_sum("b_pre", errors, "data")
        if not options.clip:
            norm, gradient = self._joint(errors, *self._pass(pending, csc, step, apply=True))
            self._finish_step(gradient, step)
            return norm
        norm, gradient = self._joint(errors, *self._pass(pending, csc, step, apply=False))
        clip = min(1.0, options.clip / (norm + 1e-6))
        self._pass(pending, csc, step, apply=True, clip=clip)
        self._finish_step(gradient * clip, step)
        return norm

    def _joint(self, errors: Tensor, square: Tensor, pull: Tensor) -> tuple[float, Tensor]:
        """Return the gradient's norm over all shards, and b_pre's gradient [d], from what `_pass`
        found on this one and the scaled sum of the errors [d]."""
        self.mesh.all_reduce_sum("norm", square, "latent")
        gradient = errors - self.mesh.all_reduce_sum("b_pre_encoder", pull, "latent")
        return math.sqrt(square.item() + gradient.double().square().sum().item()), gradient

    def _summed(self, pending: SparseGrads) -> SparseGrads:
        """Return the gradient summed over the parts of the batch, as rows of all latents."""
        enc, dec, bias = self._summed_gradients(pending)
        latents = torch.arange(self.sae.shape.n_latents)
        return pending._replace(
            values=pending.values[:0],
            indices=pending.indices[:0],
            aux=AuxGrads(latents, dec, enc, bias),
        )

    def _pass(
        self,
        pending: SparseGrads,
        csc: tuple[Tensor, Tensor],
        step: int,
        *,
        apply: bool,
        clip: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Make one pass over the latents, which updates their rows if `apply`.

        Returns:
            The squared norm of the gradients of W_enc, W_dec and b_enc, in float64; and the sum [d]
            of encoder rows, each times the gradient of its bias.
        """
        sae, recipe, threads = self.sae, self.recipe, torch.get_num_threads()
        n, d = sae.shape.n_latents, sae.shape.d_model
        norms, pull = torch.zeros(threads, dtype=torch.float64), torch.zeros(threads, d)
        rates, state = self._rates(step), self.adam.state[sae.b_enc]
        rule = self._adam_rule(step, rates[0], clip)
        aux = _aux_tensors(pending.aux, n)  # alive until the call returns
        sparse = (*csc, pending.values, pending.grad_values, pending.error, pending.x)
        b_enc = (sae.b_enc.detach(), state["exp_avg"], state["exp_avg_sq"])
        native.library().ks_update(
            ctypes.c_int64(n),
            ctypes.c_int64(d),
            pending.values.shape[1],
            *map(native.pointer, (*sparse, sae.b_pre.detach())),
            ctypes.c_float(pending.scale),
            *map(native.pointer, aux),
            self._matrix("W_enc"),
            self._matrix("W_dec"),
            *map(native.pointer, (*b_enc, self.average.get("b_enc"))),
            ctypes.byref(rule),
            ctypes.c_float(rates[1]),
            int(recipe.sae.unit_norm),
            int(recipe.sae.b_enc),
            int(apply),
            self.kind,
            *map(native.pointer, (self.low, self.low_scale) if self.kind else (None, None)),
            native.pointer(norms),
            native.pointer(pull),
            threads,
        )
        return norms.sum(), pull.sum(0)

    def _matrix(self, key: str) -> native.Matrix:
        weight = getattr(self.sae, key)
        state = self.adam.state[weight]
        return native.Matrix(
            *(
                native.pointer(part).value
                for part in (
                    weight.detach(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    self.average.get(key),
                )
            )
        )


def _aux_tensors(aux: AuxGrads | None, n: int) -> tuple[Tensor | None, ...]:
    """Return the row in AuxK's gradient of each latent, int32[n] with -1 for none, and the gradient
    of W_dec, W_enc and b_enc; None each where there is none."""
    if aux is None:
        return None, None, None, None
    rows = torch.full((n,), -1, dtype=torch.int32)
    rows[aux.latents] = torch.arange(len(aux.latents), dtype=torch.int32)
    return rows, aux.dec, aux.enc, aux.bias
