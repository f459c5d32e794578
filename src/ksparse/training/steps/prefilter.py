"""The explicit step with a prefilter: a product in low precision preselects candidates.

The candidates' values are exact. A token whose k-th value is not clearly above the best score that
was dropped is uncertain, and its latents are selected again by the full product in float32. So the
result is that of the exact step up to rounding. `KINDS` numbers the products; `fastest_prefilter`
measures them once per process.
"""

from __future__ import annotations

import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ksparse.config import Recipe
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.kernels import native
from ksparse.sae.losses import Losses
from ksparse.sae.model import SAE
from ksparse.training.steps.autograd import rate_share
from ksparse.training.steps.explicit import PIECE, ExplicitStep

MARGIN = 6.0
"""A token's selection is certain if its k-th value exceeds the best dropped score by this many
times the prefilter's own error on that token."""
KINDS = {"int8": 1, "bfloat16": 2}
MORE = {1: 1.0, 2: 0.5, native.PANELS: 1.5}
"""Candidates beyond k at the start, as a share of k; the coarser the product, the more."""


def fastest_prefilter() -> str:
    """Return the fastest low-precision product on this machine, measured once per process; 'off'
    where none is clearly faster than float32."""
    return _measure_fastest(torch.get_num_threads())


@functools.cache
def _measure_fastest(threads: int) -> str:
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
    (xi, _), (wi, scale) = native.quantize(x, 1), native.quantize(w, kind)
    if kind == native.PANELS:
        products["int8"] = lambda: native.candidates(wi, scale, bias, x, w, 8, 32)
    else:
        low = torch.empty(b, n, dtype=torch.int32)
        products["int8"] = lambda: torch._int_mm(xi, wi.t(), out=low)
    seconds = _time_products(products)
    for name in products.keys() - {"off"}:
        seconds[name] /= (
            0.8 if name == "int8" and kind == native.PANELS else 0.6
        )  # selecting costs something too; our own kernel includes most of it
    return min(seconds, key=seconds.__getitem__)


@functools.cache
def int8_kind() -> Literal[1, 3]:
    """Return which int8 product the prefilter uses here: torch's (1) where the processor has
    instructions for it, else our own kernel's (PANELS)."""
    b, d, n = 128, 512, 1024
    x, w = torch.randn(b, d), torch.randn(n, d)
    xi, wi, out, low = x.char(), w.char(), torch.empty(b, n), torch.empty(b, n, dtype=torch.int32)
    seconds = _time_products(
        {
            "off": lambda: torch.mm(x, w.t(), out=out),
            "int8": lambda: torch._int_mm(xi, wi.t(), out=low),
        }
    )
    return 1 if seconds["int8"] < 0.7 * seconds["off"] else native.PANELS


def _time_products(products: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of each product; one that is far slower than the first is timed once."""
    seconds: dict[str, float] = {}
    for name, product in products.items():
        product()
        seconds[name] = _time_once(product)
        if seconds[name] < 3 * next(iter(seconds.values())):
            seconds[name] = min(seconds[name], *(_time_once(product) for _ in range(3)))
    return seconds


def _time_once(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class PrefilteredStep(ExplicitStep, ABC):
    """The explicit step with a prefilter, and with rows updated in one pass; subclasses provide the
    kernels."""

    patience: ClassVar[int] = 100
    """The number of candidates grows once more than 1 / patience of the tokens are recomputed."""

    def __init__(self, sae: SAE, recipe: Recipe, screen: str = "off", mesh: Mesh = SINGLE_PROCESS):
        super().__init__(sae, recipe, mesh)
        self.screen, self.kind = screen, self._product_kind(screen)
        self.redone = self.screened = 0  # tokens
        self.candidates = sae.shape.k + max(16, int(sae.shape.k * MORE.get(self.kind, 0)))
        for weight in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_pre):
            self.adam.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self._quantize()

    def _product_kind(self, screen: str) -> int:
        """Return the number of a prefilter's product; 0 for none."""
        return KINDS.get(screen, 0)

    @abstractmethod
    def _quantize(self) -> None:
        """Renew the low-precision copy of W_enc."""

    @abstractmethod
    def _candidates(self, centred: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Select among the c best by the low-precision product.

        Returns:
            values[b, k] and indices[b, k], the k best candidates by exact value; dropped[b], the
            best score that is no candidate; spread[b], the root mean square of exact - score over
            the candidates.
        """

    def set_k(self, k: int) -> None:
        self.candidates += k - self.sae.shape.k
        super().set_k(k)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | (
            {"screen.candidates": torch.tensor(self.candidates)} if self.kind else {}
        )

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        super().restore(tensors, updates)
        if (
            "screen.candidates" in tensors
        ):  # which tokens are recomputed decides how their values are rounded
            self.candidates = int(tensors["screen.candidates"])
        for state in self.adam.state.values():
            state["step"] = state["step"].cpu()  # read without waiting for the device
        self._quantize()

    def backward(self, x: Tensor, *, baseline: float, dead: Tensor, k_aux: int) -> Losses:
        losses = super().backward(x, baseline=baseline, dead=dead, k_aux=k_aux)
        if self.kind:  # one number for all shards, since a checkpoint holds one
            (self.candidates,) = self.mesh.all_reduce_max_ints("candidates", [self.candidates])
        return losses

    def _choose(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        return self._choose_prefiltered(centred) if self.kind else self._choose_exact(centred)

    def _choose_prefiltered(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Select among candidates; recompute uncertain tokens in full."""
        values, indices, uncertain = self._preselect(centred)
        tokens = uncertain.nonzero().squeeze(1)
        self._count_recomputed(len(centred), len(tokens))
        self._recompute_(centred, values, indices, tokens)
        return values, indices

    def _preselect(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the selection among candidates, values[b, k] and indices[b, k], and which tokens
        are uncertain, bool[b]."""
        values, indices, dropped, spread = self._candidates(
            centred, min(self.sae.shape.n_latents, self.candidates)
        )
        return values, indices, ~(values.amin(1) > dropped + MARGIN * spread)

    def _count_recomputed(self, tokens: int, recomputed: int) -> None:
        """Count the tokens that were recomputed; keep more candidates from now on if there were
        many."""
        self.screened, self.redone = self.screened + tokens, self.redone + recomputed
        if recomputed > tokens // (
            self.patience if self.candidates < 3 * self.sae.shape.k else 100
        ):
            self.candidates = min(self.sae.shape.n_latents, 1 + self.candidates * 5 // 4)

    def _recompute_(self, centred: Tensor, values: Tensor, indices: Tensor, tokens: Tensor) -> None:
        """Select again for these tokens by the full product, in place."""
        for part in tokens.split(max(1, PIECE // self.sae.shape.n_latents)) if len(tokens) else ():
            values[part], indices[part] = self._choose_exact(centred[part])

    @torch.no_grad()
    def audit(self, x: Tensor) -> dict[str, float]:
        """Compare the prefilter's selection with the exact one on x[b, d], of each process among
        its own latents.

        Returns:
            Metrics by name: the shares of latents and of tokens that differ, and the share of all
            tokens so far that were recomputed; on a mesh, the means of all processes.
        """
        if not self.kind:
            return {}
        before = self.screened, self.redone, self.candidates
        centred = x - self.sae.b_pre.detach()
        (_, chosen), (_, exact) = self._choose(centred), self._choose_exact(centred)
        self.screened, self.redone, self.candidates = before
        n = self.sae.shape.n_latents
        row = torch.arange(len(x), device=x.device)[:, None] * n
        missed = ~torch.isin(exact + row, chosen + row)
        found = {
            "screen_latents_wrong": missed.float().mean().item(),
            "screen_tokens_wrong": missed.any(1).float().mean().item(),
            "screen_redone": self.redone / max(1, self.screened),
        }
        shares = torch.tensor(list(found.values()), dtype=torch.float64)
        means = self.mesh.all_reduce_sum("audit", shares, "all") / self.mesh.size
        return dict(zip(found, means.tolist()))

    # ---- what the pass over the rows leaves to do

    def _finish_step(self, gradient: Tensor, step: int) -> None:
        """Update b_pre, and count the step."""
        self._adam_bias("b_pre", gradient, step)
        for state in self.adam.state.values():
            state["step"] += 1
        self.updates += 1

    def _adam_bias(self, key: str, gradient: Tensor, step: int) -> None:
        """Update a bias by Adam, and its average."""
        weight, options = getattr(self.sae, key), self.recipe.optim
        state, rule = self.adam.state[weight], self._adam_rule(step, self._rates(step)[1], 1.0)
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

    def _adam_rule(self, step: int, rate: float, clip: float) -> native.Adam:
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
