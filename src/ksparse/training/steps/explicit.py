"""The same training step as `optim.Optimizer` with its gradient written out: only the encoder
product is dense.

    product x W_enc^T, in pieces ─▶ the k largest ─▶ error, loss, slopes ─▶ (AuxK on the dead rows)
    ─▶ latents' tokens ─▶ one pass over the rows

`ExplicitOptimizer` does it in plain torch, `FusedOptimizer` by the compiled kernels, where no
gradient of n x d is ever stored: each latent's two gradient rows are built where they are used.
Adam's state is torch's own, so checkpoints are the same files. With a screen, the product is
computed in low precision and only chooses candidates; their values are exact, and a token whose
k-th value is not clear of what was dropped is computed again in full.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ksparse.config import Recipe, auxk_tokens
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.kernels import torch_ops
from ksparse.planning import flops
from ksparse.sae.losses import Losses
from ksparse.sae.model import SAE, Code
from ksparse.sae.sharded import ShardedSAE, compact
from ksparse.sae.terms import LossTerm, total_loss
from ksparse.training.steps.autograd import PRE_ACTS, AutogradStep, clip_

PIECE = PRE_ACTS


class SparseGrads(NamedTuple):
    """A batch's gradient as lists: what each latent got from which token."""

    x: Tensor
    centred: Tensor
    """x - b_pre."""
    error: Tensor
    values: Tensor
    indices: Tensor
    slopes: Tensor
    scale: float
    finite: bool | Tensor
    """A tensor where the device has not been waited for."""
    extra: AuxGrads | None


class AuxGrads(NamedTuple):
    """AuxK's gradient, dense over the dead latents: their numbers, and rows [m, d], [m, d], [m]."""

    latents: Tensor
    dec: Tensor
    enc: Tensor
    bias: Tensor


class ExplicitStep(AutogradStep):
    """`Optimizer` with the gradient written out, in plain torch: no graph, no matrix of n latents
    twice. Without Multi-TopK."""

    sparse: ClassVar[ModuleType] = torch_ops
    """Where its operations on lists come from."""

    def __init__(self, sae: SAE, recipe: Recipe, mesh: Mesh = SINGLE_PROCESS):
        super().__init__(sae, recipe, mesh)
        self.pending: SparseGrads | None = None
        self.buffers: dict[str, Tensor] = {}

    # ---- forward

    @torch.no_grad()
    def backward(self, x: Tensor, *, baseline: float, dead: Tensor, k_aux: int) -> Losses:
        sae, options = self.sae, self.recipe.sae
        x = x.contiguous()
        centred = x - sae.b_pre
        error = self._buffer("error", x.shape)
        values, indices, square, slopes = self._code(x, centred, error)
        whole = len(x) * self.mesh.data
        nmse = self.mesh.all_reduce_sum(
            "loss", square.double().mean() / x.shape[1] / baseline / self.mesh.data, "data"
        )
        finite = self._finite(nmse, slopes)
        aux, extra = nmse.new_zeros(()), None
        if options.uses_auxk and sae.count(dead) and finite is not False:
            tokens = auxk_tokens(options, whole)
            counted = slice(max(0, tokens - self.mesh.batch_range(whole).start))
            aux, extra = self._auxk(centred[counted], error[counted], dead, k_aux, tokens)
        terms = {"nmse": LossTerm(nmse)}
        if options.uses_auxk:
            terms["auxk"] = LossTerm(aux, options.auxk_coef)
        scale = 2 / (whole * x.shape[1] * baseline)
        self.pending = SparseGrads(x, centred, error, values, indices, slopes, scale, finite, extra)
        return Losses(
            total_loss(terms).float(),
            {name: term.logged.float() for name, term in terms.items()},
            Code(values, indices.long()),
        )

    def _finite(self, nmse: Tensor, slopes: Tensor) -> bool | Tensor:
        """Return whether loss and slopes are finite, on all processes."""
        finite = bool(torch.isfinite(nmse)) and bool(torch.isfinite(slopes.sum()))
        return not self.mesh.all_reduce_max_ints("finite", [int(not finite)])[0]

    def _code(
        self, x: Tensor, centred: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose and decode, writing the error [b, d]; return (values[b, k], indices[b, k], and
        what `_decode` does)."""
        values, indices = self.choose(centred)
        return values, indices, *self._decode(x, values, indices, error)

    def choose(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Return (values[b, k], indices[b, k]) of the k largest pre-activations of centred[b, d] =
        x - b_pre."""
        count = math.ceil(len(centred) * self.sae.shape.n_latents / self._piece())
        pieces = centred.split(math.ceil(len(centred) / max(1, count)) or 1)
        chosen = [self._choose(piece) for piece in pieces]
        values, indices = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*chosen)
        )
        return self._surviving(values, indices, self.sae.shape.k)

    def _surviving(
        self, values: Tensor, indices: Tensor, k: int, among: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a code [b, <= k] of a slice, those that are not among the k largest of all slices
        as 0, as narrow as the others are."""
        if not isinstance(self.sae, ShardedSAE):
            return values, indices
        kept, values, indices = compact(
            self.sae.survivors(values, k, self.sae.offer(k, among)), values, indices
        )
        return torch.where(kept, values, 0.0), indices

    def _piece(self) -> int:
        """Return how many numbers of the product may be in memory at once."""
        return PIECE

    def _choose(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        return self._exact(centred)

    def _exact(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Choose by the whole product in float32."""
        sae = self.sae
        product = self._buffer("product", (len(centred), sae.shape.n_latents))
        torch.mm(centred, sae.W_enc.detach().t(), out=product)
        return self._select(
            product,
            sae.b_enc.detach(),
            sae.offer(sae.shape.k) if isinstance(sae, ShardedSAE) else sae.shape.k,
        )

    def _select(self, product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of product + bias; the product may be overwritten."""
        indices = torch_ops.topk(product.add_(bias), k)
        return product.gather(1, indices), indices

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Make the values >= 0 and write the error [b, d]; return (its squared norm [b], its
        product with each chosen decoder row [b, k])."""
        sae = self.sae
        recon = self.mesh.all_reduce_sum(
            "recon", torch_ops.gather_sum(values.relu_(), indices, sae.W_dec.detach()), "latent"
        )
        torch.add(recon, sae.b_pre.detach(), out=error).sub_(x)
        return error.square().sum(1), torch_ops.gather_dot(error, indices, sae.W_dec.detach()).mul_(
            values > 0
        )

    # ---- AuxK on the dead rows alone

    def _auxk(
        self, centred: Tensor, error: Tensor, dead: Tensor, k_aux: int, tokens: int
    ) -> tuple[Tensor, AuxGrads]:
        """Return the loss over `tokens` of the batch, of which these are this process's, and its
        gradient.

        The product that chooses is dense over the dead latents; the rest where the code is not
        sparse among them.
        """
        sae = self.sae
        W_enc, W_dec, b_enc = (
            weight.detach()[dead] for weight in (sae.W_enc, sae.W_dec, sae.b_enc)
        )
        z = torch.addmm(b_enc, centred, W_enc.t()).relu_()
        if k_aux < sae.count(dead):
            values, indices = self._select(z, z.new_zeros(len(dead)), min(k_aux, len(dead)))
            values, indices = self._surviving(values, indices, k_aux, dead)
            if flops.SPARSER * k_aux < len(dead):
                return self._auxk_listed(
                    centred, error, dead, W_dec, values, indices.long(), tokens
                )
            z.zero_().scatter_(1, indices.long(), values)
        loss, slope = self._auxk_loss(torch.mm(z, W_dec), error, tokens)
        inner = torch.mm(slope, W_dec.t()).mul_(z > 0)
        return loss, AuxGrads(
            dead, torch.mm(z.t(), slope), torch.mm(inner.t(), centred), inner.sum(0)
        )

    def _auxk_listed(
        self,
        centred: Tensor,
        error: Tensor,
        dead: Tensor,
        W_dec: Tensor,
        values: Tensor,
        indices: Tensor,
        tokens: int,
    ) -> tuple[Tensor, AuxGrads]:
        """The same from a code values, indices[s, k_aux] among the dead latents."""
        loss, slope = self._auxk_loss(self.sparse.gather_sum(values, indices, W_dec), error, tokens)
        inner = self.sparse.gather_dot(slope, indices, W_dec).mul_(values > 0)
        lists = self.sparse.transposed(indices, len(dead))
        bias = self.sparse.scatter_transposed(lists, inner, inner.new_ones(len(inner), 1)).squeeze(
            1
        )
        return loss, AuxGrads(
            dead,
            self.sparse.scatter_transposed(lists, values, slope),
            self.sparse.scatter_transposed(lists, inner, centred),
            bias,
        )

    def _auxk_loss(self, predicted: Tensor, error: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient by the prediction [s, d], which takes the place of this
        slice's share; both are 0 where the loss is not finite."""
        options, tiny = self.recipe.sae, torch.finfo(error.dtype).tiny
        difference = self.mesh.all_reduce_sum("recon", predicted, "latent").add_(
            error
        )  # the prediction less x - recon
        if options.auxk_norm == "token":
            weights = 1 / error.square().sum(1).clamp_min(tiny) / tokens
        else:
            weights = (
                1 / (self._spread(error, tokens).clamp_min(tiny) * tokens * error.shape[1])
            ).expand(len(error))
        loss = self.mesh.all_reduce_sum(
            "loss", (difference.square().sum(1) * weights).double().sum(), "data"
        )
        finite = torch.isfinite(loss)  # nobody waits for a device to tell
        return torch.where(finite, loss, 0.0), torch.where(
            finite, difference.mul_((2 * options.auxk_coef * weights)[:, None]), 0.0
        )

    def _spread(self, error: Tensor, tokens: int) -> Tensor:
        """Return the variance over `tokens` of the batch, averaged over components, from this
        process's error[<= tokens, d]."""
        if self.mesh.data == 1:
            return (error - error.mean(0)).square().mean()
        mean = self.mesh.all_reduce_sum("spread", error.sum(0), "data") / tokens
        return self.mesh.all_reduce_sum("spread", (error - mean).square().sum(), "data") / (
            tokens * error.shape[1]
        )

    def _buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return memory that is used again: fresh pages cost as much as a fifth of the product."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.sae.W_enc.device)
        return self.buffers[name][:size].view(shape)

    # ---- the gradient

    def _gradient(self, name: str) -> Tensor | None:
        """Return memory for a weight's gradient; None on a GPU, where torch keeps what is freed."""
        weight = getattr(self.sae, name)
        return self._buffer(name, weight.shape) if weight.device.type == "cpu" else None

    def averaged(self) -> SAE:
        for name in ("W_enc", "W_dec"):
            self.buffers.pop(name, None)  # the copy is as large
        return super().averaged()

    def forget(self) -> None:
        super().forget()
        self.pending = None

    def _taken(self) -> SparseGrads:
        """Return the gradient that is pending, which it no longer is."""
        pending, self.pending = self.pending, None
        if pending is None:
            raise RuntimeError("no gradient is pending: `backward` comes before each `step`")
        return pending

    @torch.no_grad()
    def constrain_gradient(self) -> float:
        """Build the gradients, without the part along decoder rows, and clip them; return their
        norm before clipping."""
        sae, pending, mesh = self.sae, self._taken(), self.mesh
        extra = pending.extra
        if not pending.finite:
            return math.nan
        n = sae.shape.n_latents
        slopes, values = pending.slopes * pending.scale, pending.values * pending.scale
        lists = torch_ops.transposed(pending.indices, n)
        sae.W_enc.grad = torch_ops.scatter_transposed(
            lists, slopes, pending.centred, out=self._gradient("W_enc")
        )
        if extra is not None:
            sae.W_enc.grad.index_add_(0, extra.latents, extra.enc)
        sums = [
            mesh.start_all_reduce_sum("W_enc", sae.W_enc.grad, "data")
        ]  # on its way while the decoder's is computed
        sae.W_dec.grad = torch_ops.scatter_transposed(
            lists, values, pending.error, out=self._gradient("W_dec")
        )
        g_bias = torch_ops.scatter_sum(lists, slopes)
        along = torch_ops.scatter_sum(
            lists, values * pending.slopes
        )  # <gradient, row>, for nothing
        if extra is not None:
            sae.W_dec.grad.index_add_(0, extra.latents, extra.dec)
            g_bias.index_add_(0, extra.latents, extra.bias)
            along.index_add_(0, extra.latents, (extra.dec * sae.W_dec[extra.latents]).sum(1))
        if self.recipe.sae.unit_norm:
            sae.W_dec.grad.addcmul_(sae.W_dec, along[:, None], value=-1)
        sums.append(mesh.start_all_reduce_sum("W_dec", sae.W_dec.grad, "data"))
        mesh.all_reduce_sum("b_enc", g_bias, "data")
        sae.b_pre.grad = mesh.all_reduce_sum(
            "b_pre", pending.scale * pending.error.sum(0), "data"
        ) - mesh.all_reduce_sum("b_pre_encoder", g_bias @ sae.W_enc, "latent")
        sae.b_enc.grad = g_bias if self.recipe.sae.b_enc else None
        for wait in sums:
            wait()
        return clip_(sae, self.recipe.optim.clip, mesh)
