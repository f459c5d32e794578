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

import ctypes
import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ksparse.kernels import fast, native
from ksparse.mesh import ALONE, Mesh
from ksparse.recipe import Recipe, auxk_tokens
from ksparse.sae.loss import Losses
from ksparse.sae.model import SAE, Code
from ksparse.sae.sliced import SlicedSAE, narrowed
from ksparse.training import flops
from ksparse.training.optim import PRE_ACTS, Optimizer, clip_, rate_share

PIECE = PRE_ACTS
MARGIN = 6.0
"""A token's choice is taken for certain if its k-th value is above the best dropped score by so
many times the screen's own error there."""
KINDS = {"int8": 1, "bfloat16": 2}
MORE = {1: 1.0, 2: 0.5, native.PANELS: 1.5}
"""Candidates beyond k at the start, as a share of k: the coarser the product, the more."""


def fastest_screen() -> str:
    """Return the low-precision product that is fastest on this machine, measured once; 'off' where
    none beats float32 well."""
    return _fastest(torch.get_num_threads())


@functools.cache
def _fastest(threads: int) -> str:
    b, d, n = 1024, 512, 4096
    x, w, bias = torch.randn(b, d), torch.randn(n, d), torch.zeros(n)
    xb, wb, out, half = (
        x.bfloat16(),
        w.bfloat16(),
        torch.empty(b, n),
        torch.empty(b, n, dtype=torch.bfloat16),
    )
    products: dict[str, Callable[[], object]] = {
        "off": lambda: torch.mm(x, w.t(), out=out),
        "bfloat16": lambda: torch.mm(xb, wb.t(), out=half),
    }
    kind = int8_kind()
    (xi, _), (wi, scale) = native.lower(x, 1), native.lower(w, kind)
    if kind == native.PANELS:
        products["int8"] = lambda: native.screen(wi, scale, bias, x, w, 8, 32)
    else:
        low = torch.empty(b, n, dtype=torch.int32)
        products["int8"] = lambda: torch._int_mm(xi, wi.t(), out=low)
    seconds = _compared(products)
    for name in products.keys() - {"off"}:
        seconds[name] /= (
            0.8 if name == "int8" and kind == native.PANELS else 0.6
        )  # the rest of a screen costs something too; ours has most of it in
    return min(seconds, key=seconds.__getitem__)


@functools.cache
def int8_kind() -> Literal[1, 3]:
    """Return which product of whole numbers a screen uses here: torch's (1) where the processor has
    instructions for it, else our own."""
    b, d, n = 128, 512, 1024
    x, w = torch.randn(b, d), torch.randn(n, d)
    xi, wi, out, low = x.char(), w.char(), torch.empty(b, n), torch.empty(b, n, dtype=torch.int32)
    seconds = _compared(
        {
            "off": lambda: torch.mm(x, w.t(), out=out),
            "int8": lambda: torch._int_mm(xi, wi.t(), out=low),
        }
    )
    return 1 if seconds["int8"] < 0.7 * seconds["off"] else native.PANELS


def _compared(products: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of each; one that is far slower than the first is not tried again."""
    seconds: dict[str, float] = {}
    for name, product in products.items():
        product()
        seconds[name] = _seconds(product)
        if seconds[name] < 3 * next(iter(seconds.values())):
            seconds[name] = min(seconds[name], *(_seconds(product) for _ in range(3)))
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Pending(NamedTuple):
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
    extra: Extra | None


class Extra(NamedTuple):
    """AuxK's gradient, dense over the dead latents: their numbers, and rows [m, d], [m, d], [m]."""

    latents: Tensor
    dec: Tensor
    enc: Tensor
    bias: Tensor


class ExplicitOptimizer(Optimizer):
    """`Optimizer` with the gradient written out, in plain torch: no graph, no matrix of n latents
    twice. Without Multi-TopK."""

    sparse: ClassVar[ModuleType] = fast
    """Where its operations on lists come from."""

    def __init__(self, sae: SAE, recipe: Recipe, mesh: Mesh = ALONE):
        super().__init__(sae, recipe, mesh)
        self.pending: Pending | None = None
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
        nmse = self.mesh.sum(
            "loss", square.double().mean() / x.shape[1] / baseline / self.mesh.data, "data"
        )
        finite = self._finite(nmse, slopes)
        aux, extra = nmse.new_zeros(()), None
        if options.auxk_coef and sae.count(dead) and finite is not False:
            wanted = auxk_tokens(options, whole)
            some = slice(max(0, wanted - self.mesh.part(whole).start))
            aux, extra = self._auxk(centred[some], error[some], dead, k_aux, wanted)
        total = nmse + options.auxk_coef * aux
        scale = 2 / (whole * x.shape[1] * baseline)
        self.pending = Pending(x, centred, error, values, indices, slopes, scale, finite, extra)
        return Losses(total.float(), nmse.float(), aux.float(), Code(values, indices.long()))

    def _finite(self, nmse: Tensor, slopes: Tensor) -> bool | Tensor:
        """Return whether loss and slopes are finite, on all processes."""
        finite = bool(torch.isfinite(nmse)) and bool(torch.isfinite(slopes.sum()))
        return not self.mesh.agree("finite", [int(not finite)])[0]

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
        if not isinstance(self.sae, SlicedSAE):
            return values, indices
        kept, values, indices = narrowed(
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
            sae.offer(sae.shape.k) if isinstance(sae, SlicedSAE) else sae.shape.k,
        )

    def _select(self, product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of product + bias; the product may be overwritten."""
        indices = fast.topk(product.add_(bias), k)
        return product.gather(1, indices), indices

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Make the values >= 0 and write the error [b, d]; return (its squared norm [b], its
        product with each chosen decoder row [b, k])."""
        sae = self.sae
        recon = self.mesh.sum(
            "recon", fast.gather_sum(values.relu_(), indices, sae.W_dec.detach()), "latent"
        )
        torch.add(recon, sae.b_pre.detach(), out=error).sub_(x)
        return error.square().sum(1), fast.gather_dot(error, indices, sae.W_dec.detach()).mul_(
            values > 0
        )

    # ---- AuxK on the dead rows alone

    def _auxk(
        self, centred: Tensor, error: Tensor, dead: Tensor, k_aux: int, tokens: int
    ) -> tuple[Tensor, Extra]:
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
        return loss, Extra(dead, torch.mm(z.t(), slope), torch.mm(inner.t(), centred), inner.sum(0))

    def _auxk_listed(
        self,
        centred: Tensor,
        error: Tensor,
        dead: Tensor,
        W_dec: Tensor,
        values: Tensor,
        indices: Tensor,
        tokens: int,
    ) -> tuple[Tensor, Extra]:
        """The same from a code values, indices[s, k_aux] among the dead latents."""
        loss, slope = self._auxk_loss(self.sparse.gather_sum(values, indices, W_dec), error, tokens)
        inner = self.sparse.gather_dot(slope, indices, W_dec).mul_(values > 0)
        lists = self.sparse.transposed(indices, len(dead))
        bias = self.sparse.scatter_transposed(lists, inner, inner.new_ones(len(inner), 1)).squeeze(
            1
        )
        return loss, Extra(
            dead,
            self.sparse.scatter_transposed(lists, values, slope),
            self.sparse.scatter_transposed(lists, inner, centred),
            bias,
        )

    def _auxk_loss(self, predicted: Tensor, error: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient by the prediction [s, d], which takes the place of this
        slice's share; both are 0 where the loss is not finite."""
        options, tiny = self.recipe.sae, torch.finfo(error.dtype).tiny
        difference = self.mesh.sum("recon", predicted, "latent").add_(
            error
        )  # the prediction less x - recon
        if options.auxk_norm == "token":
            weights = 1 / error.square().sum(1).clamp_min(tiny) / tokens
        else:
            weights = (
                1 / (self._spread(error, tokens).clamp_min(tiny) * tokens * error.shape[1])
            ).expand(len(error))
        loss = self.mesh.sum("loss", (difference.square().sum(1) * weights).double().sum(), "data")
        finite = torch.isfinite(loss)  # nobody waits for a device to tell
        return torch.where(finite, loss, 0.0), torch.where(
            finite, difference.mul_((2 * options.auxk_coef * weights)[:, None]), 0.0
        )

    def _spread(self, error: Tensor, tokens: int) -> Tensor:
        """Return the variance over `tokens` of the batch, averaged over components, from this
        process's error[<= tokens, d]."""
        if self.mesh.data == 1:
            return (error - error.mean(0)).square().mean()
        mean = self.mesh.sum("spread", error.sum(0), "data") / tokens
        return self.mesh.sum("spread", (error - mean).square().sum(), "data") / (
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

    def _taken(self) -> Pending:
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
        lists = fast.transposed(pending.indices, n)
        sae.W_enc.grad = fast.scatter_transposed(
            lists, slopes, pending.centred, out=self._gradient("W_enc")
        )
        if extra is not None:
            sae.W_enc.grad.index_add_(0, extra.latents, extra.enc)
        sums = [
            mesh.start_sum("W_enc", sae.W_enc.grad, "data")
        ]  # on its way while the decoder's is computed
        sae.W_dec.grad = fast.scatter_transposed(
            lists, values, pending.error, out=self._gradient("W_dec")
        )
        g_bias = fast.scatter_sum(lists, slopes)
        along = fast.scatter_sum(lists, values * pending.slopes)  # <gradient, row>, for nothing
        if extra is not None:
            sae.W_dec.grad.index_add_(0, extra.latents, extra.dec)
            g_bias.index_add_(0, extra.latents, extra.bias)
            along.index_add_(0, extra.latents, (extra.dec * sae.W_dec[extra.latents]).sum(1))
        if self.recipe.sae.unit_norm:
            sae.W_dec.grad.addcmul_(sae.W_dec, along[:, None], value=-1)
        sums.append(mesh.start_sum("W_dec", sae.W_dec.grad, "data"))
        mesh.sum("b_enc", g_bias, "data")
        sae.b_pre.grad = mesh.sum("b_pre", pending.scale * pending.error.sum(0), "data") - mesh.sum(
            "b_pre_encoder", g_bias @ sae.W_enc, "latent"
        )
        sae.b_enc.grad = g_bias if self.recipe.sae.b_enc else None
        for wait in sums:
            wait()
        return clip_(sae, self.recipe.optim.clip, mesh)


class ScreenedOptimizer(ExplicitOptimizer, ABC):
    """The same where latents may be chosen by a product in low precision, and rows are moved in one
    pass; kernels are the heirs' affair."""

    patience: ClassVar[int] = 100
    """One token in so many may be computed in full before the screen keeps more candidates."""

    def __init__(self, sae: SAE, recipe: Recipe, screen: str = "off"):
        super().__init__(sae, recipe)
        self.screen, self.kind = screen, self._kind(screen)
        self.redone = self.screened = 0  # tokens
        self.candidates = sae.shape.k + max(16, int(sae.shape.k * MORE.get(self.kind, 0)))
        for weight in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_pre):
            self.adam.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self._lower()

    def _kind(self, screen: str) -> int:
        """Return the number of a screen's product; 0 of none."""
        return KINDS.get(screen, 0)

    @abstractmethod
    def _lower(self) -> None:
        """Make the low-precision copy of W_enc anew."""

    @abstractmethod
    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (values[b, k], indices[b, k], dropped[b], spread[b]): the k best by exact value of
        the c best by the low-precision product, the best score that is not among those, and the
        root mean square of the candidates' (exact - score)."""

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | (
            {"screen.candidates": torch.tensor(self.candidates)} if self.kind else {}
        )

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        super().restore(tensors, updates)
        if (
            "screen.candidates" in tensors
        ):  # which tokens are computed in full decides how their values are rounded
            self.candidates = int(tensors["screen.candidates"])
        for each in self.adam.state.values():
            each["step"] = each["step"].cpu()  # where it is read without a wait
        self._lower()

    def _choose(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        return self._screened(centred) if self.kind else self._exact(centred)

    def _screened(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Choose among candidates of the low-precision product; tokens that are not clear are
        computed in full."""
        values, indices, unclear = self._offered(centred)
        tokens = unclear.nonzero().squeeze(1)
        self._count(len(centred), len(tokens))
        self._exactly(centred, values, indices, tokens)
        return values, indices

    def _offered(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the choice among candidates, values[b, k] and indices[b, k], and which tokens' is
        not clear [b]."""
        values, indices, dropped, spread = self._candidates(
            centred, min(self.sae.shape.n_latents, self.candidates)
        )
        return values, indices, ~(values.amin(1) > dropped + MARGIN * spread)

    def _count(self, tokens: int, again: int) -> None:
        """Take note of how many tokens had to be computed in full; keep more candidates from now on
        if that costs less."""
        self.screened, self.redone = self.screened + tokens, self.redone + again
        if again > tokens // (self.patience if self.candidates < 3 * self.sae.shape.k else 100):
            self.candidates = min(self.sae.shape.n_latents, 1 + self.candidates * 5 // 4)

    def _exactly(self, centred: Tensor, values: Tensor, indices: Tensor, tokens: Tensor) -> None:
        """Choose for some tokens anew, by the whole product."""
        for some in tokens.split(max(1, PIECE // self.sae.shape.n_latents)) if len(tokens) else ():
            values[some], indices[some] = self._exact(centred[some])

    @torch.no_grad()
    def audit(self, x: Tensor) -> dict[str, float]:
        """Return how far the screen's choice is from the exact one on x[b, d]: shares of tokens,
        and of latents, that differ."""
        if not self.kind:
            return {}
        before = self.screened, self.redone, self.candidates
        centred = x - self.sae.b_pre.detach()
        (_, found), (_, exact) = self.choose(centred), self._exact(centred)
        self.screened, self.redone, self.candidates = before
        n = self.sae.shape.n_latents
        row = torch.arange(len(x), device=x.device)[:, None] * n
        missed = ~torch.isin(exact + row, found + row)
        return {
            "screen_latents_wrong": missed.float().mean().item(),
            "screen_tokens_wrong": missed.any(1).float().mean().item(),
            "screen_redone": self.redone / max(1, self.screened),
        }

    # ---- what the pass over the rows leaves

    def _bias(self, gradient: Tensor, step: int) -> None:
        """Move b_pre, count the step, and average what the pass over the rows did not."""
        self._move("b_pre", gradient, step)
        for each in self.adam.state.values():
            each["step"] += 1
        self.updates += 1

    def _move(self, key: str, gradient: Tensor, step: int) -> None:
        """Take a step of a bias, and average it."""
        weight, options = getattr(self.sae, key), self.recipe.optim
        state, rule = self.adam.state[weight], self._rule(step, self._rates(step)[1], 1.0)
        state["exp_avg"].lerp_(gradient, 1 - options.beta1)
        state["exp_avg_sq"].mul_(options.beta2).addcmul_(
            gradient, gradient, value=1 - options.beta2
        )
        denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(rule.correction2)).add_(options.eps)
        weight.addcdiv_(state["exp_avg"], denominator, value=-rule.rate / rule.correction1)
        if self.average:
            self.average[key].lerp_(weight.detach(), 1 - self.recipe.ema)

    def _rates(self, step: int) -> tuple[float, float]:
        share = rate_share(step, self.recipe)
        return tuple(group["base"] * share for group in self.adam.param_groups)

    def _rule(self, step: int, rate: float, clip: float) -> native.Adam:
        options, taken = self.recipe.optim, int(self.adam.state[self.sae.b_pre]["step"]) + 1
        return native.Adam(
            rate,
            options.beta1,
            options.beta2,
            options.eps,
            1 - options.beta1**taken,
            1 - options.beta2**taken,
            self.recipe.ema or 1.0,
            clip,
        )


class FusedOptimizer(ScreenedOptimizer):
    """The same by the compiled kernels, on a CPU."""

    def _kind(self, screen: str) -> int:
        return int8_kind() if screen == "int8" else super()._kind(screen)

    @torch.no_grad()
    def _lower(self) -> None:
        if self.kind:
            self.low, self.low_scale = native.lower(self.sae.W_enc.detach(), self.kind)

    def _piece(self) -> int:
        return 2**62 if self.kind == native.PANELS else PIECE  # panels have no product in memory

    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae, bias, weight = self.sae, self.sae.b_enc.detach(), self.sae.W_enc.detach()
        if self.kind == native.PANELS and self.low_scale is not None:
            return native.screen(self.low, self.low_scale, bias, centred, weight, sae.shape.k, c)
        low, scale = native.lower(centred, self.kind)
        product = self._buffer(
            "low",
            (len(centred), sae.shape.n_latents),
            torch.int32 if self.kind == 1 else torch.bfloat16,
        )
        torch._int_mm(low, self.low.t(), out=product) if self.kind == 1 else torch.mm(
            low, self.low.t(), out=product
        )
        return native.rescore(product, scale, self.low_scale, bias, centred, weight, sae.shape.k, c)

    def _select(self, product: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return native.select(product, bias, k)

    def _decode(
        self, x: Tensor, values: Tensor, indices: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        return native.decode(
            x, self.sae.b_pre.detach(), self.sae.W_dec.detach(), values, indices, error
        )

    # ---- the pass over the rows

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Apply the pending gradient; return its norm before clipping. NaN, and nothing is changed,
        if it is not finite."""
        pending, options = self._taken(), self.recipe.optim
        if not pending.finite:
            return math.nan
        lists = native.transpose(pending.values, pending.indices, self.sae.shape.n_latents)
        clip = 1.0
        if options.clip:
            norm, _ = self._pass(pending, lists, step, apply=False)
            clip = min(1.0, options.clip / (norm + 1e-6))
        norm, pull = self._pass(pending, lists, step, apply=True, clip=clip)
        self._bias(pull * clip, step)
        return norm

    def _pass(
        self,
        pending: Pending,
        lists: tuple[Tensor, Tensor],
        step: int,
        *,
        apply: bool,
        clip: float = 1.0,
    ) -> tuple[float, Tensor]:
        """Return the gradient's norm and b_pre's gradient [d], from one pass over the latents."""
        sae, recipe, threads = self.sae, self.recipe, torch.get_num_threads()
        n, d, k = sae.shape.n_latents, sae.shape.d_model, sae.shape.k
        norms, pull = torch.zeros(threads, dtype=torch.float64), torch.zeros(threads, d)
        extra, extra_of = pending.extra, None
        if extra is not None:
            extra_of = torch.full((n,), -1, dtype=torch.int32)
            extra_of[extra.latents] = torch.arange(len(extra.latents), dtype=torch.int32)
        rates = self._rates(step)
        rule = self._rule(step, rates[0], clip)
        state = self.adam.state[sae.b_enc]
        parts = [
            native.pointer(part)
            for part in (
                *lists,
                pending.values,
                pending.slopes,
                pending.error,
                pending.x,
                sae.b_pre.detach(),
            )
        ]
        more = [
            native.pointer(part)
            for part in (extra_of, *((extra.dec, extra.enc, extra.bias) if extra else (None,) * 3))
        ]
        native.library().ks_update(
            ctypes.c_int64(n),
            ctypes.c_int64(d),
            k,
            *parts,
            ctypes.c_float(pending.scale),
            *more,
            self._matrix("W_enc"),
            self._matrix("W_dec"),
            *(
                native.pointer(part)
                for part in (
                    sae.b_enc.detach(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    self.average.get("b_enc"),
                )
            ),
            ctypes.byref(rule),
            ctypes.c_float(rates[1]),
            int(recipe.sae.unit_norm),
            int(recipe.sae.b_enc),
            int(apply),
            self.kind,
            *(
                native.pointer(part)
                for part in ((self.low, self.low_scale) if self.kind else (None, None))
            ),
            native.pointer(norms),
            native.pointer(pull),
            threads,
        )
        gradient = pending.scale * pending.error.sum(0) - pull.sum(0)
        return math.sqrt(norms.sum().item() + gradient.double().square().sum().item()), gradient

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
