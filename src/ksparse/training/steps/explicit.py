"""The step of `AutogradStep` for TopK with AuxK, its gradient written out: only the encoder product
is dense.

    product x W_enc^T, in parts -> the k largest -> error, loss, gradient of the values
      -> (AuxK on the dead rows) -> tokens of each latent -> one pass over the rows

`ExplicitStep` does it in plain torch, `NativeStep` by compiled kernels, where no gradient of n x d
is ever stored: each latent's two gradient rows are built where they are used. Adam's state is
torch's own, so checkpoints are the same files.
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
    """The gradient of a batch in sparse form: what each latent gets from which token.

    x, centred and error are [b, d]; values, indices and grad_values are [b, k]. grad_values is the
    gradient by the values of the code, up to `scale`.
    """

    x: Tensor
    centred: Tensor
    """x - b_pre."""
    error: Tensor
    values: Tensor
    indices: Tensor
    grad_values: Tensor
    scale: float
    finite: bool | Tensor
    """Whether all is finite; a tensor where the host has not waited for the device."""
    aux: AuxGrads | None


class AuxGrads(NamedTuple):
    """AuxK's gradient, dense over the dead latents: their indices [m], and their rows of W_dec
    [m, d], W_enc [m, d] and b_enc [m]."""

    latents: Tensor
    dec: Tensor
    enc: Tensor
    bias: Tensor


class ExplicitStep(AutogradStep):
    """`AutogradStep` with the gradient written out in plain torch: no graph, and no second matrix
    of [b, n]. It is for recipes that do not need autograd."""

    sparse: ClassVar[ModuleType] = torch_ops
    """The module that its sparse operations come from."""

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
        values, indices, square, grad_values = self._code(x, centred, error)
        batch_size = len(x) * self.mesh.data
        nmse = self.mesh.all_reduce_sum(
            "loss", square.double().mean() / x.shape[1] / baseline / self.mesh.data, "data"
        )
        finite = self._is_finite(nmse, grad_values)
        aux_loss, aux = nmse.new_zeros(()), None
        if options.uses_auxk and sae.count(dead) and finite is not False:
            tokens = auxk_tokens(options, batch_size)
            counted = slice(max(0, tokens - self.mesh.batch_range(batch_size).start))
            aux_loss, aux = self._auxk(centred[counted], error[counted], dead, k_aux, tokens)
        terms = {"nmse": LossTerm(nmse)}
        if options.uses_auxk:
            terms["auxk"] = LossTerm(aux_loss, options.auxk_coef)
        scale = 2 / (batch_size * x.shape[1] * baseline)
        self.pending = SparseGrads(
            x, centred, error, values, indices, grad_values, scale, finite, aux
        )
        return Losses(
            total_loss(terms).float(),
            {name: term.logged.float() for name, term in terms.items()},
            Code(values, indices.long()),
        )

    def _is_finite(self, nmse: Tensor, grad_values: Tensor) -> bool | Tensor:
        """Return whether the loss and the gradients are finite, on all processes."""
        finite = bool(torch.isfinite(nmse)) and bool(torch.isfinite(grad_values.sum()))
        return not self.mesh.all_reduce_max_ints("finite", [int(not finite)])[0]

    def _code(
        self, x: Tensor, centred: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Select and decode, writing the error [b, d]; return (values[b, k], indices[b, k], and
        the results of `_decode`)."""
        values, indices = self.choose(centred)
        return values, indices, *self._decode(x, values, indices, error)

    def choose(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Return (values[b, k], indices[b, k]) of the k largest pre-activations of centred[b, d] =
        x - b_pre."""
        count = math.ceil(len(centred) * self.sae.shape.n_latents / self._max_product())
        parts = centred.split(math.ceil(len(centred) / max(1, count)) or 1)
        chosen = [self._choose(part) for part in parts]
        values, indices = (
            tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in zip(*chosen)
        )
        return self._keep_global_topk(values, indices, self.sae.shape.k)

    def _keep_global_topk(
        self, values: Tensor, indices: Tensor, k: int, among: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the part of a shard's code [b, <= k] that is among the k largest of all shards,
        narrowed to the widest token, with 0 elsewhere."""
        if not (isinstance(self.sae, ShardedSAE) and self.mesh.latent > 1):
            return values, indices
        kept, values, indices = compact(
            self.sae.survivors(values, k, self.sae.offer(k, among)), values, indices
        )
        return torch.where(kept, values, 0.0), indices

    def _max_product(self) -> int:
        """Return how many numbers of the dense product may be in memory at once."""
        return PIECE

    def _choose(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        return self._choose_exact(centred)

    def _choose_exact(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Select by the full product in float32."""
        sae = self.sae
        product = self._buffer("product", (len(centred), sae.shape.n_latents))
        torch.mm(centred, sae.W_enc.detach().t(), out=product)
        return self._select_topk(product, sae.b_enc.detach(), self._offered())

    def _offered(self) -> int:
        """Return how many latents are chosen for each token among those of this process."""
        sae = self.sae
        return sae.offer(sae.shape.k) if isinstance(sae, ShardedSAE) else sae.shape.k

    def _select_topk(self, product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return values and indices of the k largest of product + bias; the product may be
        overwritten."""
        indices = torch_ops.topk(product.add_(bias), k)
        return product.gather(1, indices), indices

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply ReLU to the values in place, and write the error recon - x [b, d].

        Returns:
            The error's squared norm [b], and its product with each selected decoder row [b, k].
        """
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
        """Return AuxK's loss over `tokens` of the batch, and its gradient.

        `centred` and `error` are this process's part of those tokens. The product that selects is
        dense over the dead latents; what follows is dense only where the code is not sparse among
        them.
        """
        sae = self.sae
        W_enc, W_dec, b_enc = (
            weight.detach()[dead] for weight in (sae.W_enc, sae.W_dec, sae.b_enc)
        )
        z = torch.addmm(b_enc, centred, W_enc.t()).relu_()
        if k_aux < sae.count(dead):
            values, indices = self._select_topk(z, z.new_zeros(len(dead)), min(k_aux, len(dead)))
            values, indices = self._keep_global_topk(values, indices, k_aux, dead)
            if flops.SPARSER * k_aux < len(dead):
                return self._auxk_sparse(
                    centred, error, dead, W_dec, values, indices.long(), tokens
                )
            z.zero_().scatter_(1, indices.long(), values)
        loss, slope = self._auxk_loss(torch.mm(z, W_dec), error, tokens)
        inner = torch.mm(slope, W_dec.t()).mul_(z > 0)
        return loss, AuxGrads(
            dead, torch.mm(z.t(), slope), torch.mm(inner.t(), centred), inner.sum(0)
        )

    def _auxk_sparse(
        self,
        centred: Tensor,
        error: Tensor,
        dead: Tensor,
        W_dec: Tensor,
        values: Tensor,
        indices: Tensor,
        tokens: int,
    ) -> tuple[Tensor, AuxGrads]:
        """Return the same from a code values, indices[s, k_aux] among the dead latents."""
        loss, slope = self._auxk_loss(self.sparse.gather_sum(values, indices, W_dec), error, tokens)
        inner = self.sparse.gather_dot(slope, indices, W_dec).mul_(values > 0)
        csc = self.sparse.sort_by_latent(indices, len(dead))
        bias = self.sparse.scatter_transposed(csc, inner, inner.new_ones(len(inner), 1)).squeeze(1)
        return loss, AuxGrads(
            dead,
            self.sparse.scatter_transposed(csc, values, slope),
            self.sparse.scatter_transposed(csc, inner, centred),
            bias,
        )

    def _auxk_loss(self, predicted: Tensor, error: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient by the prediction [s, d]; both are 0 where the loss is
        not finite. `predicted` is this shard's share, and is overwritten."""
        options, tiny = self.recipe.sae, torch.finfo(error.dtype).tiny
        difference = self.mesh.all_reduce_sum("recon", predicted, "latent").add_(
            error
        )  # the prediction less x - recon
        if options.auxk_divisor == "token":
            weights = 1 / error.square().sum(1).clamp_min(tiny) / tokens
        else:
            weights = (
                1 / (self.sae.joint.spread(error, tokens).clamp_min(tiny) * tokens * error.shape[1])
            ).expand(len(error))
        loss = self.mesh.all_reduce_sum(
            "loss", (difference.square().sum(1) * weights).double().sum(), "data"
        )
        finite = torch.isfinite(loss)  # a tensor, so that the host need not wait for the device
        return torch.where(finite, loss, 0.0), torch.where(
            finite, difference.mul_((2 * options.auxk_coef * weights)[:, None]), 0.0
        )

    def _buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return a buffer that is reused: fresh pages would cost a fifth of the product's time."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.sae.W_enc.device)
        return self.buffers[name][:size].view(shape)

    # ---- the gradient

    def _gradient(self, name: str) -> Tensor | None:
        """Return a buffer for a weight's gradient; None on a GPU, where torch caches freed
        memory."""
        weight = getattr(self.sae, name)
        return self._buffer(name, weight.shape) if weight.device.type == "cpu" else None

    def averaged(self) -> SAE:
        for name in ("W_enc", "W_dec"):
            self.buffers.pop(name, None)  # makes room for the copy, which is as large
        return super().averaged()

    def forget(self) -> None:
        super().forget()
        self.pending = None

    def _take_pending(self) -> SparseGrads:
        """Return the pending gradient and clear it."""
        pending, self.pending = self.pending, None
        if pending is None:
            raise RuntimeError("no gradient is pending: `backward` comes before each `step`")
        return pending

    @torch.no_grad()
    def constrain_gradient(self) -> float:
        """Build the gradients, without the part along decoder rows, and clip them.

        Returns:
            Their norm before clipping; NaN if they are not finite.
        """
        sae, pending, mesh = self.sae, self._take_pending(), self.mesh
        if not pending.finite:
            return math.nan
        sae.W_enc.grad, sae.W_dec.grad, g_bias = self._summed_gradients(pending)
        sae.b_pre.grad = mesh.all_reduce_sum(
            "b_pre", pending.scale * pending.error.sum(0), "data"
        ) - mesh.all_reduce_sum("b_pre_encoder", g_bias @ sae.W_enc, "latent")
        sae.b_enc.grad = g_bias if self.recipe.sae.b_enc else None
        for key in self.frozen:
            getattr(sae, key).grad = None
        return clip_(sae, self.recipe.optim.clip, mesh)

    def _summed_gradients(self, pending: SparseGrads) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of W_enc [n, d], W_dec [n, d] without the part along its rows, and
        b_enc [n], summed over the parts of the batch."""
        sae, aux, mesh = self.sae, pending.aux, self.mesh
        grad_values, values = pending.grad_values * pending.scale, pending.values * pending.scale
        csc = torch_ops.sort_by_latent(pending.indices, sae.shape.n_latents)
        enc = torch_ops.scatter_transposed(
            csc, grad_values, pending.centred, out=self._gradient("W_enc")
        )
        if aux is not None:
            enc.index_add_(0, aux.latents, aux.enc)
        sums = [
            mesh.start_all_reduce_sum("W_enc", enc, "data")
        ]  # runs while the decoder's is computed
        dec = torch_ops.scatter_transposed(csc, values, pending.error, out=self._gradient("W_dec"))
        bias = torch_ops.scatter_sum(csc, grad_values)
        radial_grad = torch_ops.scatter_sum(
            csc, values * pending.grad_values
        )  # <gradient, decoder row>, already available
        if aux is not None:
            dec.index_add_(0, aux.latents, aux.dec)
            bias.index_add_(0, aux.latents, aux.bias)
            radial_grad.index_add_(0, aux.latents, (aux.dec * sae.W_dec[aux.latents]).sum(1))
        if self.recipe.sae.unit_norm:
            dec.addcmul_(sae.W_dec, radial_grad[:, None], value=-1)
        sums.append(mesh.start_all_reduce_sum("W_dec", dec, "data"))
        mesh.all_reduce_sum("b_enc", bias, "data")
        for wait in sums:
            wait()
        return enc, dec, bias
