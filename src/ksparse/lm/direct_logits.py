"""Direct logits: the tokens that a direction of the residual stream raises and lowers by itself.

    logits(row) = factor · U · (w ⊙ (row - mean(row)))  -  their mean over the vocabulary

U [v, d] is the unembedding, w the weight of the final norm, and factor what the head multiplies by.
mean(row) is subtracted only where the final norm subtracts it (LayerNorm). What depends on the
activation is left out: the norm's division, which scales all logits of a token alike, its bias, and
a soft cap, which keeps their order. The blocks behind the site are left out too: this is the direct
path, and only at the last block is it the whole path. The idea is the logit lens (nostalgebraist
2020), applied to decoder rows as in Bricken et al. 2023.

Nothing is looked up by name. One short pass finds the module that makes the last hidden states; its
weight is measured by running it on a vector of mean 0 and RMS 1, so that 1 + weight (Gemma) and
norms without a weight need no table. A norm or head of another form is refused with the reason.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse import progress
from ksparse.errors import InputError
from ksparse.lm.sites import ALIASES, blocks_of, resolve
from ksparse.lm.tokens import token_strings

if TYPE_CHECKING:
    from ksparse.lm.model import LM

COUNT = 10
"""Tokens listed at each end."""
BINS = 32
"""Bins of a row's histogram of logits."""
BIN = 0.5
"""Width of a bin in standard deviations of the row's logits; bin 0 begins at -8 of them. The first
and the last bin also count what lies beyond."""
_ROWS, _TOKENS = 1_024, 8_192  # of a product, at most: 34 MB of float32
_TOLERANCE = 1e-3  # relative; norms and heads in bfloat16 are compared in float32


class DirectLogits(NamedTuple):
    """The ends and the histogram of the direct logits of r rows."""

    up_token: Tensor
    """Tokens raised most, [r, count]; int32."""
    up_value: Tensor
    """Their logits, centred over the vocabulary, the largest first; [r, count]."""
    down_token: Tensor
    """Tokens lowered most, [r, count]; int32."""
    down_value: Tensor
    """Their logits, the smallest first; [r, count]."""
    spread: Tensor
    """Standard deviation of a row's logits over the vocabulary, [r]."""
    histogram: Tensor
    """Tokens in each bin of `BIN` standard deviations, [r, BINS]; int32."""


@dataclass(frozen=True)
class DirectHead:
    """What maps a direction of the residual stream to logits.

    Attributes:
        unembedding: [v, d], in the LM's precision and on its device.
        weight: the final norm's weight, [d] in float32.
        centred: whether the final norm subtracts the mean of what it is given.
        factor: what the head multiplies logits by.
        capped: whether something behind that is not linear, such as a soft cap.
        blocks_after: blocks between the site and the final norm; they are left out.
        site: the site as an alias, such as resid_post.8, also where the LM's is a module's name.
    """

    unembedding: Tensor
    weight: Tensor
    centred: bool
    factor: float
    capped: bool
    blocks_after: int
    site: str

    def describe(self) -> dict[str, Any]:
        """Return what the logits are of, for a result."""
        return {
            "path": "decoder row x weight of the final norm x unembedding, centred",
            "blocks_left_out": self.blocks_after,
            "centred_norm": self.centred,
            "factor": self.factor,
            "capped": self.capped,
            "bin": BIN,
        }

    def project(self, rows: Tensor) -> Tensor:
        """Return what the unembedding is applied to, [r, d] in float32."""
        rows = rows.detach().to(self.weight.device, torch.float32)
        if self.centred:
            rows = rows - rows.mean(1, keepdim=True)
        return rows * self.weight * self.factor

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Return all direct logits [r, v] of rows [r, d], centred over the vocabulary."""
        logits = self.project(rows) @ self.unembedding.float().T
        return logits - logits.mean(1, keepdim=True)

    @torch.no_grad()
    def ends(self, rows: Tensor, count: int = COUNT) -> DirectLogits:
        """Return the ends and the histogram of the direct logits of rows [r, d].

        Rows and tokens are taken a block at a time, so the memory does not depend on their product.
        """
        inner = self.project(rows)
        r, v = len(inner), len(self.unembedding)
        work = _Work((r + inner.shape[1]) * len(range(0, v, _TOKENS)))
        mean, covariance = self._moments(work)
        centre = inner @ mean
        spread = ((inner @ covariance) * inner).sum(1).clamp_min(0).sqrt()
        up, down = _Ends(r, min(count, v), inner), _Ends(r, min(count, v), inner)
        histogram = torch.zeros(r, BINS, dtype=torch.int32, device=inner.device)
        for first in range(0, v, _TOKENS):
            block = self.unembedding[first : first + _TOKENS].float().T
            for start in range(0, r, _ROWS):
                part = slice(start, start + _ROWS)
                logits = inner[part] @ block - centre[part, None]
                up.add(part, logits, first)
                down.add(part, -logits, first)
                histogram[part] += _count(logits, spread[part])
                work.add(len(logits))
        return DirectLogits(
            up.tokens.int(), up.values, down.tokens.int(), -down.values, spread, histogram
        )

    def _moments(self, work: _Work) -> tuple[Tensor, Tensor]:
        """Return mean [d] and covariance [d, d] of the unembedding's rows, summed in float64."""
        v, d = self.unembedding.shape
        device = self.weight.device
        total = torch.zeros(d, dtype=torch.float64, device=device)
        square = torch.zeros(d, d, dtype=torch.float64, device=device)
        for block in self.unembedding.split(_TOKENS):
            total += block.double().sum(0)
        mean = total / v
        for block in self.unembedding.split(_TOKENS):
            offset = (block.double() - mean).float()
            square += (offset.T @ offset).double()
            work.add(d)
        return mean.float(), (square / v).float()


class _Work:
    """Reports how many rows have met blocks of the unembedding; for its covariance, d of them."""

    def __init__(self, total: int):
        self.done, self.total = 0, total
        self.add(0)

    def add(self, rows: int) -> None:
        self.done += rows
        progress.report(progress.DIRECT_LOGITS, self.done, self.total)


class _Ends:
    """The largest logits of each row among the tokens seen so far."""

    def __init__(self, rows: int, count: int, like: Tensor):
        self.values = torch.full((rows, count), -torch.inf, device=like.device)
        self.tokens = torch.full((rows, count), -1, device=like.device)

    def add(self, part: slice, logits: Tensor, first: int) -> None:
        count = self.values.shape[1]
        best = logits.topk(min(count, logits.shape[1]), dim=1)
        values = torch.cat([self.values[part], best.values], 1)
        tokens = torch.cat([self.tokens[part], best.indices + first], 1)
        self.values[part], chosen = values.topk(count, dim=1)
        self.tokens[part] = tokens.gather(1, chosen)


def _count(logits: Tensor, spread: Tensor) -> Tensor:
    """Count each row's logits in bins of BIN standard deviations, [r, BINS]."""
    unit = BIN * torch.where(spread > 0, spread, 1)[:, None]
    bins = (logits / unit).floor_().add_(BINS // 2).clamp_(0, BINS - 1).long()
    bins += torch.arange(len(bins), device=bins.device)[:, None] * BINS
    return torch.bincount(bins.view(-1), minlength=len(bins) * BINS).view(-1, BINS).int()


def read_head(lm: LM) -> DirectHead:
    """Find what maps the LM's residual stream, at its site, to logits.

    Args:
        lm: the LM at the site whose decoder rows are meant.

    Returns:
        The head; `ends` and `logits` apply it to rows.

    Raises:
        InputError: what is at the site is not part of the residual stream or added to it, or the
            final norm or the head has a form in which a direction has no logits of its own.

    Example:
        >>> import ksparse
        >>> head = read_head(ksparse.LM("pylm/0.3m", site="resid_post.1"))
        >>> head.ends(head.unembedding[:1]).up_token.shape
        torch.Size([1, 10])
    """
    model = lm.model
    site = _find_alias(model, lm.options.site)
    alias, _, number = site.partition(".")
    unembedding = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(unembedding, Tensor) or not unembedding.is_floating_point():
        raise InputError(f"{lm.options.lm} has no unembedding in floating point to read")
    bias = getattr(model.get_output_embeddings(), "bias", None)
    norm, hidden, logits = _run(lm)
    if unembedding.shape[1] != hidden.shape[-1] or hidden.shape[-1] != lm.d_model:
        raise InputError(
            f"the unembedding of {lm.options.lm} is {list(unembedding.shape)}, its last hidden "
            f"states have {hidden.shape[-1]} components and the site {lm.d_model}: no direct logits"
        )
    unembedding = unembedding.detach()
    weight, centred = _measure_norm(norm, hidden.shape[-1], unembedding.device, lm.options.lm)
    linear = hidden.to(unembedding.device, torch.float32) @ unembedding.float().T
    factor, capped = _compare_head(linear, logits, bias)
    blocks = len(blocks_of(model))
    after = blocks - 1 - int(number) % blocks
    after += alias == "resid_pre"
    return DirectHead(unembedding, weight, centred, factor, capped, after, site)


def _find_alias(model: nn.Module, site: str) -> str:
    """Return the alias of a site that is an alias or the name of a module at the same place."""
    if site.partition(".")[0] in ALIASES:
        return site
    place = resolve(model, site)
    for number, block in enumerate(blocks_of(model)):
        if place.module not in block.modules():
            continue
        for alias in ALIASES:
            try:
                if resolve(model, f"{alias}.{number}") == place:
                    return f"{alias}.{number}"
            except InputError:  # the model does not confirm this alias
                continue
    raise InputError(
        f"direct logits need a site in the residual stream ({', '.join(ALIASES)}); "
        f"{site!r} is another place"
    )


def latent_logits(lm: LM, row: Tensor, count: int = COUNT) -> dict[str, list[tuple[str, float]]]:
    """Return the tokens that a decoder row raises and lowers most.

    Args:
        lm: the LM at the SAE's site.
        row: the latent's row of W_dec, [d].
        count: tokens of each list.

    Returns:
        "raises" and "lowers": (token, logit), the strongest first.

    Raises:
        InputError: as `read_head`.

    Example:
        >>> import ksparse
        >>> lm = ksparse.LM("pylm/0.3m", site="resid_post.1")
        >>> [len(tokens) for tokens in latent_logits(lm, lm("import os")[0], 3).values()]
        [3, 3]
    """
    ends = read_head(lm).ends(row[None], count)
    return {
        name: list(zip(token_strings(lm.tokenizer, tokens[0].tolist()), values[0].tolist()))
        for name, tokens, values in (
            ("raises", ends.up_token, ends.up_value),
            ("lowers", ends.down_token, ends.down_value),
        )
    }


@torch.inference_mode()
def _run(lm: LM) -> tuple[nn.Module | None, Tensor, Tensor]:
    """Return the module that makes the last hidden states, these [t, d], and the logits [t, v].

    The module is None if a block makes them, so that there is no final norm.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    last: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.dim() == 3:
            outputs.append((module, first))

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    base = lm.model.base_model
    tokens = torch.arange(4)[None] % lm.vocab
    with ExitStack() as hooks:
        for module in base.modules():
            if module is not base:
                hooks.callback(module.register_forward_hook(record).remove)
        hooks.callback(base.register_forward_hook(keep).remove)
        logits = lm.forward(tokens, torch.ones_like(tokens, dtype=torch.bool)).logits
    makers = [module for module, output in outputs if output.data_ptr() == last[0].data_ptr()]
    blocks = blocks_of(lm.model)
    inside = {part for block in blocks for part in block.modules()}
    norms = [module for module in makers if not any(module.children()) and module not in inside]
    if not norms and not any(module in inside for module in makers):
        raise InputError(f"no module makes the last hidden states of {lm.options.lm}")
    return norms[-1] if norms else None, last[0][0].float(), logits[0].float()


@torch.inference_mode()
def _measure_norm(
    norm: nn.Module | None, d: int, device: torch.device, lm: str
) -> tuple[Tensor, bool]:
    """Return a final norm's weight [d], and whether it subtracts the mean; by running it."""
    if norm is None:
        return torch.ones(d, device=device), False
    place = next((tensor.device for tensor in norm.parameters()), device)
    plain = copy.deepcopy(norm).float()
    generator = torch.Generator().manual_seed(0)

    def sample(mean: float) -> Tensor:
        # Large, so that the norm's epsilon does not count; no component near 0.
        signs = torch.randint(2, (d,), generator=generator) * 2.0 - 1
        x = signs * (1 + torch.rand(d, generator=generator))
        x = (x - x.mean()) / x.std(correction=0)
        return (1e3 * (x + mean)).to(place)

    def apply(x: Tensor) -> Tensor:
        return plain(x[None, None])[0, 0].float()

    x, other = sample(0), sample(2)
    bias = apply(torch.zeros_like(x))
    weight = (apply(x) - bias) / (x / x.square().mean().sqrt())
    found = apply(other) - bias
    for centred in (False, True):
        inner = other - other.mean() if centred else other
        expected = inner / inner.square().mean().sqrt() * weight
        if (found - expected).norm() <= _TOLERANCE * found.norm():
            return weight.to(device), centred
    raise InputError(
        f"the final norm of {lm}, a {type(norm).__name__}, is neither an RMSNorm nor a LayerNorm: "
        "a direction has no direct logits"
    )


def _compare_head(linear: Tensor, logits: Tensor, bias: Tensor | None) -> tuple[float, bool]:
    """Return what the head multiplies by, and whether it does something else too, as a soft cap."""
    linear, logits = linear.cpu().double(), logits.cpu().double()
    if isinstance(bias, Tensor):
        linear = linear + bias.cpu().double()
    factor = float((linear * logits).sum() / linear.square().sum().clamp_min(1e-30))
    # Logits in bfloat16 have 8 bits.
    tolerance = 2e-2
    if abs(factor - 1) < tolerance and (logits - linear).norm() <= tolerance * linear.norm():
        return 1.0, False
    if (logits - factor * linear).norm() <= tolerance * logits.norm():
        return factor, False
    return 1.0, True
