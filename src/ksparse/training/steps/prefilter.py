"""TODO ksparse.training.steps.prefilter."""

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
from ksparse.kernels import native
from ksparse.sae.model import SAE
from ksparse.training.steps.autograd import rate_share
from ksparse.training.steps.explicit import PIECE, ExplicitStep

MARGIN = 6.0
"""A token's choice is taken for certain if its k-th value is above the best dropped score by so
many times the screen's own error there."""
KINDS = {"int8": 1, "bfloat16": 2}
MORE = {1: 1.0, 2: 0.5, native.PANELS: 1.5}
"""Candidates beyond k at the start, as a share of k: the coarser the product, the more."""


def fastest_prefilter() -> str:
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
    (xi, _), (wi, scale) = native.quantize(x, 1), native.quantize(w, kind)
    if kind == native.PANELS:
        products["int8"] = lambda: native.candidates(wi, scale, bias, x, w, 8, 32)
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


class PrefilteredStep(ExplicitStep, ABC):
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
