"""Logistic regression by Newton-Raphson: thousands of one-dimensional probes, or a dense one.

    minimise over w, b:   mean_s [softplus(a_s) - y_s a_s] + l2 / 2 (sigma w)^2,   a_s = w z_s + b

sigma is the standard deviation of z, so that the penalty does not depend on the latent's scale; b
is not penalised.

No line search is needed. Let d be the largest change that a step makes to any a_s. Logistic loss is
self-concordant in the sense of Bach 2010 and Sun & Tran-Dinh 2019, so the objective falls by at
least 1 - (e^d - 1 - d) / d^2 times the squared Newton decrement. A step with d <= 1 is taken in
full; a larger one is shortened by log(1 + d) / d, which lowers the objective too.

Dense problems approach the optimum in float32 and take their last steps in float64. A latent
without variance gets w = 0 and the label's log-odds. Labels of a single class have no optimum and
raise InputError.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ksparse.errors import InputError

_STEPS = 100
# The last step is one that changes no logit by more; the error left is of the order of its square.
_COARSE = 1e-3  # in float32
_FINE = 1e-5  # in float64
_BLOCK = 1 << 18  # values of z processed at a time, to stay in cache


class ProbeFit(NamedTuple):
    """n probes sigmoid(weight z + bias), each field [n] float64.

    `loss` is the mean cross-entropy on the rows of the fit, in nats, without the penalty.
    """

    weight: Tensor
    bias: Tensor
    loss: Tensor


def fit(z: Tensor, y: Tensor, *, l2: float, finish: int | None = None) -> ProbeFit:
    """Fit a probe to each of n latents.

    Args:
        z: The latents' values [n, s].
        y: Labels 0 or 1, [s].
        l2: The penalty on the weight, for inputs scaled to variance 1.
        finish: How many probes, those of lowest loss, to refine in float64; all by default. The
            others stay within about 1e-5 of their optimum.

    Raises:
        InputError: All labels are equal.

    Example:
        >>> import torch
        >>> from ksparse.evals.probing import logistic
        >>> z, y = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([0, 1, 1, 0])
        >>> probe = logistic.fit(z, y, l2=1e-6)
        >>> round(probe.loss.item(), 3)  # z carries no information: log 2
        0.693
    """
    base = log_odds(y)
    size = max(1, _BLOCK // max(1, z.shape[1]))
    parts = [_fit_coarse(part, y, l2, base) for part in z.split(size)]
    probes = ProbeFit(*(torch.cat(columns) for columns in zip(*parts)))
    chosen = (
        torch.arange(len(z), device=z.device) if finish is None else probes.loss.argsort()[:finish]
    )
    for part in chosen.split(size):
        start = ProbeFit(*(column[part] for column in probes))
        exact = _fit_fine(z[part].double(), y.double(), l2, base, start)
        for column, refined in zip(probes, exact):
            column[part] = refined
    return probes


def fit_sparse(
    latents: Tensor, rows: Tensor, values: Tensor, y: Tensor, n: int, *, l2: float
) -> ProbeFit:
    """Fit a probe to each of n latents that are 0 on most rows.

    The same as `fit` on the dense matrix at a cost proportional to the e entries: all rows at 0
    share one term.

    Args:
        latents: The latent of each entry, [e].
        rows: The row of each entry, [e].
        values: The value of each entry, [e].
        y: Labels 0 or 1, [s].
        n: The number of latents.
        l2: The penalty on the weight, for inputs scaled to variance 1.
    """
    base = log_odds(y)
    order = latents.argsort(stable=True)
    problem = _SparseProblem(latents[order], rows[order], values[order].double(), y.double(), n)
    weight, bias = _solve(
        problem, l2, torch.zeros_like(problem.low), torch.full_like(problem.low, base)
    )
    return ProbeFit(weight / problem.scale, bias, problem.loss(weight, bias))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each row in nats."""
    return softplus(logits) - y * logits


def log_odds(y: Tensor) -> float:
    """Return the log-odds of label 1; raise InputError if all labels are equal."""
    positive, rows = int(y.sum()), len(y)
    if not 0 < positive < rows:
        raise InputError(
            f"a probe needs rows of both labels, got {positive} of {rows} with label 1"
        )
    return math.log(positive / (rows - positive))


class _Problem(Protocol):
    """n probes on inputs scaled to variance 1, whose smallest and largest are low[n], high[n]."""

    low: Tensor
    high: Tensor

    def derivatives(
        self, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return d/dw, d/db, d2/dw2, d2/dwdb, d2/db2 of the mean cross-entropy, [n] each."""

    def select(self, chosen: Tensor) -> _Problem:
        """Return the problem of some of the probes (a mask)."""


def _solve(
    problem: _Problem, l2: float, weight: Tensor, bias: Tensor, tolerance: float = _FINE
) -> tuple[Tensor, Tensor]:
    """Take Newton steps from (weight, bias), [n] each.

    A probe is done after a step that changes none of its logits by more than `tolerance`.
    """
    weight, bias = weight.clone(), bias.clone()
    active = torch.arange(len(weight), device=weight.device)
    w, b = weight, bias
    for _ in range(_STEPS):
        gw, gb, haa, hab, hbb = problem.derivatives(w, b)
        gw, haa = gw + l2 * w, haa + l2
        det = (haa * hbb - hab * hab).clamp_min(torch.finfo(w.dtype).tiny)
        dw, db = -(hbb * gw - hab * gb) / det, -(haa * gb - hab * gw) / det
        largest = torch.maximum((dw * problem.low + db).abs(), (dw * problem.high + db).abs())
        step = torch.where(largest > 1, torch.log1p(largest) / largest, 1.0)
        w, b = w + step * dw, b + step * db
        weight[active], bias[active] = w, b
        unfinished = largest > tolerance
        if not unfinished.any():
            break
        if unfinished.double().mean() < 0.75:  # worth copying the others
            problem, active = problem.select(unfinished), active[unfinished]
            w, b = w[unfinished], b[unfinished]
    return weight, bias


# ---- dense ---------------------------------------------------------------------------------------


class _DenseProblem:
    """z[n, s] scaled to mean 0 and variance 1."""

    def __init__(self, z: Tensor, y: Tensor):
        self.z, self.low, self.high = z, z.amin(1), z.amax(1)
        self.mean_y, self.mean_yz = y.to(z).mean(), z @ y.to(z) / len(y)

    def first_step(self, l2: float, bias: float) -> tuple[Tensor, Tensor]:
        """Return weight and bias after the first step from weight 0.

        All rows have the same prediction there, so the step needs no pass over them.
        """
        p = 1 / (1 + math.exp(-bias))
        weight = self.mean_yz / (p * (1 - p) + l2)
        largest = weight.abs() * torch.maximum(-self.low, self.high)
        weight = torch.where(largest > 1, weight * torch.log1p(largest) / largest, weight)
        return weight, torch.full_like(weight, bias)

    def derivatives(
        self, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        p = torch.addcmul(bias[:, None], self.z, weight[:, None]).sigmoid_()
        part = p * self.z
        gw, gb = part.mean(1) - self.mean_yz, p.mean(1) - self.mean_y
        v = torch.addcmul(p, p, p, value=-1, out=p)
        hab = torch.mul(v, self.z, out=part).mean(1)
        return gw, gb, part.mul_(self.z).mean(1), hab, v.mean(1)

    def select(self, chosen: Tensor) -> _DenseProblem:
        part = object.__new__(_DenseProblem)
        part.mean_y = self.mean_y
        part.z, part.mean_yz, part.low, part.high = (
            tensor[chosen] for tensor in (self.z, self.mean_yz, self.low, self.high)
        )
        return part


def _fit_coarse(z: Tensor, y: Tensor, l2: float, base: float) -> ProbeFit:
    """Fit in float32."""
    mean = z.mean(1, keepdim=True, dtype=torch.float64)
    scaled, scale = _standardize(z, mean.to(z.dtype))
    scaled = scaled.float()
    problem = _DenseProblem(scaled, y)
    weight, bias = _solve(problem, l2, *problem.first_step(l2, base), _COARSE)
    return _to_original_scale(scaled, y, mean, scale, weight, bias)


def _fit_fine(z: Tensor, y: Tensor, l2: float, base: float, start: ProbeFit) -> ProbeFit:
    """Fit in float64 from a coarse fit; from weight 0 where that is not finite."""
    mean = z.mean(1, keepdim=True)
    scaled, scale = _standardize(z, mean)
    weight = torch.where(torch.isfinite(scale), start.weight[:, None] * scale, 0.0).squeeze(1)
    bias = start.bias + start.weight * mean.squeeze(1)
    finite = torch.isfinite(weight) & torch.isfinite(bias)
    weight, bias = _solve(
        _DenseProblem(scaled, y),
        l2,
        torch.where(finite, weight, 0.0),
        torch.where(finite, bias, base),
    )
    return _to_original_scale(scaled, y, mean, scale, weight, bias)


def _standardize(z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Scale z[n, s] to mean 0 and variance 1; return it and its standard deviation [n, 1].

    A latent without variance becomes zeros, with an infinite standard deviation.
    """
    z = z - mean
    scale = torch.linalg.vector_norm(z, dim=1, keepdim=True) / math.sqrt(z.shape[1])
    scale = torch.where(
        scale > 4 * torch.finfo(z.dtype).eps * mean.abs().clamp_min(torch.finfo(z.dtype).tiny),
        scale,
        math.inf,
    )
    return z.div_(scale), scale


def _to_original_scale(
    scaled: Tensor, y: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> ProbeFit:
    """Return the probes on unscaled inputs, and their loss."""
    logits = torch.addcmul(bias[:, None], scaled, weight[:, None])
    loss = cross_entropy(logits, y.to(scaled)).mean(1, dtype=torch.float64)
    weight = weight.double() / scale.squeeze(1).double()
    return ProbeFit(weight, bias.double() - weight * mean.squeeze(1).double(), loss)


# ---- sparse --------------------------------------------------------------------------------------


class _SparseProblem:
    """Entries sorted by latent, scaled by the latent's standard deviation, and counts of zeros."""

    def __init__(self, latents: Tensor, rows: Tensor, values: Tensor, y: Tensor, n: int):
        self.rows, self.n, self.j, self.t = len(y), n, latents, y[rows]
        total, square = self._sum_by_latent(values), self._sum_by_latent(values.square())
        variance = square / self.rows - (total / self.rows).square()
        self.scale = torch.where(
            variance > 1e-24 * square.clamp_min(1e-300), variance.clamp_min(0).sqrt(), math.inf
        )
        self.z = values / self.scale[latents]
        self.zeros, self.zero_positive = (
            self.rows - self._sum_by_latent(torch.ones_like(values)),
            y.sum() - self._sum_by_latent(self.t),
        )
        any_zero = torch.where(self.zeros > 0, 0.0, math.nan).to(values)
        self.low, self.high = (
            torch.full((n,), bound, dtype=values.dtype, device=values.device).scatter_reduce(
                0, latents, self.z, reduce
            )
            for bound, reduce in ((math.inf, "amin"), (-math.inf, "amax"))
        )
        self.low, self.high = torch.fmin(self.low, any_zero), torch.fmax(self.high, any_zero)

    def _sum_by_latent(self, values: Tensor) -> Tensor:
        return torch.zeros(self.n, dtype=values.dtype, device=values.device).index_add_(
            0, self.j, values
        )

    def derivatives(
        self, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        p, p0 = torch.sigmoid(self.z * weight[self.j] + bias[self.j]), torch.sigmoid(bias)
        r, v, v0 = p - self.t, p * (1 - p), p0 * (1 - p0)
        sums = (
            self._sum_by_latent(r * self.z),
            self._sum_by_latent(r) + self.zeros * p0 - self.zero_positive,
            self._sum_by_latent(v * self.z.square()),
            self._sum_by_latent(v * self.z),
            self._sum_by_latent(v) + self.zeros * v0,
        )
        return tuple(total / self.rows for total in sums)  # type: ignore[return-value]

    def select(self, chosen: Tensor) -> _SparseProblem:
        part = object.__new__(_SparseProblem)
        entries = chosen[self.j]
        part.rows, part.n, part.j = (
            self.rows,
            int(chosen.sum()),
            (chosen.long().cumsum(0) - 1)[self.j[entries]],
        )
        part.t, part.z = self.t[entries], self.z[entries]
        part.zeros, part.zero_positive, part.low, part.high = (
            tensor[chosen] for tensor in (self.zeros, self.zero_positive, self.low, self.high)
        )
        return part

    def loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the mean cross-entropy of each probe, [n]."""
        active = self._sum_by_latent(cross_entropy(self.z * weight[self.j] + bias[self.j], self.t))
        return (active + self.zeros * softplus(bias) - self.zero_positive * bias) / self.rows


# ---- all of d_model ------------------------------------------------------------------------------

_PENALTIES = tuple(10.0**power for power in range(-4, 3))


def fit_dense(x: Tensor, y: Tensor, *, l2: float) -> tuple[Tensor, Tensor]:
    """Fit one probe on all columns of x, unscaled, with penalty l2 / 2 |w|^2.

    The weight lies in the span of the rows, so the problem has no more unknowns than rows.

    Args:
        x: The inputs [s, d].
        y: Labels 0 or 1, [s].
        l2: The penalty.

    Returns:
        weight[d] and bias.
    """
    x, y = x.double(), y.double()
    mean = x.mean(0)
    basis = (
        torch.linalg.qr((x - mean).T).Q
        if len(x) < x.shape[1]
        else torch.eye(x.shape[1], dtype=x.dtype)
    )
    u = torch.cat([(x - mean) @ basis, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = torch.full((u.shape[1],), l2, dtype=x.dtype)
    penalty[-1] = 1e-12  # the bias is free, but the matrix must be invertible
    beta = torch.zeros(u.shape[1], dtype=x.dtype)
    beta[-1] = log_odds(y)
    for _ in range(_STEPS):
        p = torch.sigmoid(u @ beta)
        gradient = u.T @ (p - y) / len(y) + penalty * beta
        hessian = (u * (p * (1 - p))[:, None]).T @ u / len(y) + penalty.diag()
        change = -torch.linalg.solve(hessian, gradient)
        largest = (u @ change).abs().max()
        beta += change * (torch.log1p(largest) / largest if largest > 1 else 1.0)
        if largest < _FINE:
            break
    weight = basis @ beta[:-1]
    return weight, beta[-1] - weight @ mean


def choose_penalty(x: Tensor, y: Tensor, clusters: Tensor) -> float:
    """Return the power of ten that is the best penalty of `fit_dense`, by validation.

    Every fourth cluster is held out, since rows of one document are alike; every fourth row if that
    would leave a side with a single label.
    """
    held_out = clusters.unique(return_inverse=True)[1] % 4 == 3
    if any(len(side.unique()) < 2 for side in (y[held_out], y[~held_out])):
        held_out = torch.arange(len(y)) % 4 == 3
    losses = {}
    for l2 in _PENALTIES:
        weight, bias = fit_dense(x[~held_out], y[~held_out], l2=l2)
        losses[l2] = (
            cross_entropy(x[held_out].double() @ weight + bias, y[held_out].double()).mean().item()
        )
    return min(losses, key=losses.__getitem__)
