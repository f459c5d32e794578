"""Logistic regression by Newton-Raphson: one probe for each latent, thousands at once, and one on
all of d_model.

    minimise over w, b     mean_s [softplus(a_s) - y_s a_s] + l2 / 2 (sigma w)^2,     a_s = w z_s +
                           b

sigma is the standard deviation of z, so that the penalty does not depend on the latent's scale; b
has none. With d the largest change that a step makes to any a_s, the objective falls by at least 1
- (e^d - 1 - d) / d^2 times the squared Newton decrement, since logistic loss is self-concordant in
that sense (Bach 2010; Sun & Tran-Dinh 2019). So a step with d <= 1 is taken whole, and a larger one
shortened to log(1 + d) / d of itself, which lowers the objective too: no look at its value is
needed. Dense problems come near the optimum in float32; what counts, the last steps, is float64. A
latent without variance gets w = 0 and the label's log-odds. Labels of only one kind have no optimum
and are refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ksparse.errors import InputError

_STEPS = 100
_NEAR = 1e-3
# a step that changes no logit by more is the last: what it leaves is of the order of its square
_LAST = 1e-5
_BLOCK = 1 << 18  # values of z worked on at a time: in cache


class ProbeFit(NamedTuple):
    """Probes sigmoid(weight z + bias), each field [n] float64; loss is the mean cross-entropy on
    the rows of the fit, without penalty."""

    weight: Tensor
    bias: Tensor
    loss: Tensor


def fit(z: Tensor, y: Tensor, *, l2: float, finish: int | None = None) -> ProbeFit:
    """Fit a probe for each row of z[n, s] to labels y[s].

    finish: take only so many, those of lowest loss, from float32 to float64; the others stay within
    about 1e-5 of their optimum.
    """
    base = log_odds(y)
    size = max(1, _BLOCK // max(1, z.shape[1]))
    found = ProbeFit(
        *(
            torch.cat(columns)
            for columns in zip(*(_near(part, y, l2, base) for part in z.split(size)))
        )
    )
    chosen = (
        torch.arange(len(z), device=z.device) if finish is None else found.loss.argsort()[:finish]
    )
    for some in chosen.split(size):
        exact = _exact(
            z[some].double(), y.double(), l2, base, ProbeFit(*(column[some] for column in found))
        )
        for column, new in zip(found, exact):
            column[some] = new
    return found


def fit_sparse(
    latents: Tensor, rows: Tensor, values: Tensor, y: Tensor, n: int, *, l2: float
) -> ProbeFit:
    """Fit a probe for each of n latents whose value is values[e] on row rows[e] and 0 on all rows
    that are not named.

    The same as `fit` on the dense matrix, at the cost of the entries: all rows at 0 share one term.
    """
    base = log_odds(y)
    order = latents.argsort(stable=True)
    problem = _Sparse(latents[order], rows[order], values[order].double(), y.double(), n)
    weight, bias = _solve(
        problem, l2, torch.zeros_like(problem.low), torch.full_like(problem.low, base)
    )
    return ProbeFit(weight / problem.scale, bias, problem.loss(weight, bias))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each row in nats."""
    return softplus(logits) - y * logits


def log_odds(y: Tensor) -> float:
    """Return the log-odds of the label; raise InputError if there is only one label."""
    positive, rows = int(y.sum()), len(y)
    if not 0 < positive < rows:
        raise InputError(
            f"a probe needs rows of both labels, got {positive} of {rows} with label 1"
        )
    return math.log(positive / (rows - positive))


class _Problem(Protocol):
    """The sums that a Newton step needs, of probes on inputs scaled to variance 1."""

    low: Tensor
    high: Tensor

    def sums(
        self, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
    def among(self, chosen: Tensor) -> _Problem: ...


def _solve(
    problem: _Problem, l2: float, weight: Tensor, bias: Tensor, last: float = _LAST
) -> tuple[Tensor, Tensor]:
    """Return (weight, bias), each [n], from where the steps begin; they end after one that changes
    no logit by more than `last`."""
    weight, bias = weight.clone(), bias.clone()
    at = torch.arange(len(weight), device=weight.device)
    w, b = weight, bias
    for _ in range(_STEPS):
        gw, gb, haa, hab, hbb = problem.sums(w, b)
        gw, haa = gw + l2 * w, haa + l2
        det = (haa * hbb - hab * hab).clamp_min(torch.finfo(w.dtype).tiny)
        dw, db = -(hbb * gw - hab * gb) / det, -(haa * gb - hab * gw) / det
        largest = torch.maximum((dw * problem.low + db).abs(), (dw * problem.high + db).abs())
        step = torch.where(largest > 1, torch.log1p(largest) / largest, 1.0)
        w, b = w + step * dw, b + step * db
        weight[at], bias[at] = w, b
        going = largest > last
        if not going.any():
            break
        if going.double().mean() < 0.75:  # most are done: go on with the others alone
            problem, at, w, b = problem.among(going), at[going], w[going], b[going]
    return weight, bias


# ---- dense ---------------------------------------------------------------------------------------


class _Dense:
    """z[n, s] scaled to mean 0 and variance 1."""

    def __init__(self, z: Tensor, y: Tensor):
        self.z, self.low, self.high = z, z.amin(1), z.amax(1)
        self.mean_y, self.mean_yz = y.to(z).mean(), z @ y.to(z) / len(y)

    def first(self, l2: float, bias: float) -> tuple[Tensor, Tensor]:
        """Return where the first step from weight 0 leads: all rows have the same prediction there,
        so it needs no look at them."""
        p = 1 / (1 + math.exp(-bias))
        weight = self.mean_yz / (p * (1 - p) + l2)
        largest = weight.abs() * torch.maximum(-self.low, self.high)
        weight = torch.where(largest > 1, weight * torch.log1p(largest) / largest, weight)
        return weight, torch.full_like(weight, bias)

    def sums(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        p = torch.addcmul(bias[:, None], self.z, weight[:, None]).sigmoid_()
        part = p * self.z
        gw, gb = part.mean(1) - self.mean_yz, p.mean(1) - self.mean_y
        v = torch.addcmul(p, p, p, value=-1, out=p)
        hab = torch.mul(v, self.z, out=part).mean(1)
        return gw, gb, part.mul_(self.z).mean(1), hab, v.mean(1)

    def among(self, chosen: Tensor) -> _Dense:
        part = object.__new__(_Dense)
        part.mean_y = self.mean_y
        part.z, part.mean_yz, part.low, part.high = (
            each[chosen] for each in (self.z, self.mean_yz, self.low, self.high)
        )
        return part


def _near(z: Tensor, y: Tensor, l2: float, base: float) -> ProbeFit:
    """Fit in float32, from the first step on."""
    mean = z.mean(1, keepdim=True, dtype=torch.float64)
    scaled, scale = _scaled(z, mean.to(z.dtype))
    scaled = scaled.float()
    problem = _Dense(scaled, y)
    weight, bias = _solve(problem, l2, *problem.first(l2, base), _NEAR)
    return _as_given(scaled, y, mean, scale, weight, bias)


def _exact(z: Tensor, y: Tensor, l2: float, base: float, near: ProbeFit) -> ProbeFit:
    """Fit in float64, from a fit that is near; from nothing where that is not finite."""
    mean = z.mean(1, keepdim=True)
    scaled, scale = _scaled(z, mean)
    weight = torch.where(torch.isfinite(scale), near.weight[:, None] * scale, 0.0).squeeze(1)
    bias = near.bias + near.weight * mean.squeeze(1)
    good = torch.isfinite(weight) & torch.isfinite(bias)
    weight, bias = _solve(
        _Dense(scaled, y), l2, torch.where(good, weight, 0.0), torch.where(good, bias, base)
    )
    return _as_given(scaled, y, mean, scale, weight, bias)


def _scaled(z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return z[n, s] with mean 0 and variance 1, and its standard deviation [n, 1]; of a latent
    without variance, zeros and infinity."""
    z = z - mean
    scale = torch.linalg.vector_norm(z, dim=1, keepdim=True) / math.sqrt(z.shape[1])
    scale = torch.where(
        scale > 4 * torch.finfo(z.dtype).eps * mean.abs().clamp_min(torch.finfo(z.dtype).tiny),
        scale,
        math.inf,
    )
    return z.div_(scale), scale


def _as_given(
    scaled: Tensor, y: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> ProbeFit:
    """Return probes on the inputs as they were given, and their loss."""
    logits = torch.addcmul(bias[:, None], scaled, weight[:, None])
    loss = cross_entropy(logits, y.to(scaled)).mean(1, dtype=torch.float64)
    weight = weight.double() / scale.squeeze(1).double()
    return ProbeFit(weight, bias.double() - weight * mean.squeeze(1).double(), loss)


# ---- sparse --------------------------------------------------------------------------------------


class _Sparse:
    """Entries sorted by latent, their values scaled by the latent's standard deviation, rows at
    zero counted."""

    def __init__(self, latents: Tensor, rows: Tensor, values: Tensor, y: Tensor, n: int):
        self.rows, self.n, self.j, self.t = len(y), n, latents, y[rows]
        total, square = self.add(values), self.add(values.square())
        variance = square / self.rows - (total / self.rows).square()
        self.scale = torch.where(
            variance > 1e-24 * square.clamp_min(1e-300), variance.clamp_min(0).sqrt(), math.inf
        )
        self.z = values / self.scale[latents]
        self.zeros, self.zero_positive = (
            self.rows - self.add(torch.ones_like(values)),
            y.sum() - self.add(self.t),
        )
        any_zero = torch.where(self.zeros > 0, 0.0, math.nan).to(values)
        self.low, self.high = (
            torch.full((n,), bound, dtype=values.dtype, device=values.device).scatter_reduce(
                0, latents, self.z, kind
            )
            for bound, kind in ((math.inf, "amin"), (-math.inf, "amax"))
        )
        self.low, self.high = torch.fmin(self.low, any_zero), torch.fmax(self.high, any_zero)

    def add(self, values: Tensor) -> Tensor:
        return torch.zeros(self.n, dtype=values.dtype, device=values.device).index_add_(
            0, self.j, values
        )

    def sums(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        p, p0 = torch.sigmoid(self.z * weight[self.j] + bias[self.j]), torch.sigmoid(bias)
        r, v, v0 = p - self.t, p * (1 - p), p0 * (1 - p0)
        sums = (
            self.add(r * self.z),
            self.add(r) + self.zeros * p0 - self.zero_positive,
            self.add(v * self.z.square()),
            self.add(v * self.z),
            self.add(v) + self.zeros * v0,
        )
        return tuple(each / self.rows for each in sums)  # type: ignore[return-value]

    def among(self, chosen: Tensor) -> _Sparse:
        part = object.__new__(_Sparse)
        entries = chosen[self.j]
        part.rows, part.n, part.j = (
            self.rows,
            int(chosen.sum()),
            (chosen.long().cumsum(0) - 1)[self.j[entries]],
        )
        part.t, part.z = self.t[entries], self.z[entries]
        part.zeros, part.zero_positive, part.low, part.high = (
            each[chosen] for each in (self.zeros, self.zero_positive, self.low, self.high)
        )
        return part

    def loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        active = self.add(cross_entropy(self.z * weight[self.j] + bias[self.j], self.t))
        return (active + self.zeros * softplus(bias) - self.zero_positive * bias) / self.rows


# ---- all of d_model ------------------------------------------------------------------------------

_PENALTIES = tuple(10.0**power for power in range(-4, 3))


def fit_whole(x: Tensor, y: Tensor, *, l2: float) -> tuple[Tensor, Tensor]:
    """Return (weight[d], bias) of the probe on x[s, d], its columns as they are, with penalty l2 /
    2 |w|^2.

    The weight lies in the span of the rows, so the problem has no more unknowns than rows.
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
    penalty[-1] = 1e-12  # the bias has none, but the matrix must be invertible
    beta = torch.zeros(u.shape[1], dtype=x.dtype)
    beta[-1] = log_odds(y)
    for _ in range(_STEPS):
        p = torch.sigmoid(u @ beta)
        gradient = u.T @ (p - y) / len(y) + penalty * beta
        hessian = (u * (p * (1 - p))[:, None]).T @ u / len(y) + penalty.diag()
        change = -torch.linalg.solve(hessian, gradient)
        largest = (u @ change).abs().max()
        beta += change * (torch.log1p(largest) / largest if largest > 1 else 1.0)
        if largest < _LAST:
            break
    weight = basis @ beta[:-1]
    return weight, beta[-1] - weight @ mean


def choose_penalty(x: Tensor, y: Tensor, clusters: Tensor) -> float:
    """Return the penalty, of powers of ten, that is best on every fourth cluster of rows after a
    fit to the others.

    Whole clusters are set aside, since rows of one document are alike; rows, if that would leave a
    side with one label.
    """
    aside = clusters.unique(return_inverse=True)[1] % 4 == 3
    if any(len(side.unique()) < 2 for side in (y[aside], y[~aside])):
        aside = torch.arange(len(y)) % 4 == 3
    losses = {}
    for l2 in _PENALTIES:
        weight, bias = fit_whole(x[~aside], y[~aside], l2=l2)
        losses[l2] = (
            cross_entropy(x[aside].double() @ weight + bias, y[aside].double()).mean().item()
        )
    return min(losses, key=losses.__getitem__)
