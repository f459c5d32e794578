"""Are the values of a code the best ones for its latents? Gao et al. 2024, section 5.1.

The active latents of each token and the decoder are kept, and the values alone are optimized: the
least squared error with values of at least 0. Where an L1 penalty has shrunk the values, they grow;
those of a TopK code should stay the same on average.

    refine(sae, x, code)    accelerated projected gradient, all tokens at once
    exact(sae, x, code)     an active-set method, one token, as a check
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, Value, no_value, ratio
from ksparse.evals.stats import spread
from ksparse.sae.model import SAE, Code

TOLERANCE, MAX_STEPS, CHECK_EVERY = 1e-6, 5_000, 20
_ENTRIES = 2**20  # numbers of one group's Gram matrices, which then stay in the cache
_BINS = np.linspace(-2, 2, 161)  # of (refined - raw) / mean active value


class Refinement(Metric):
    """Error and the LM's loss with values as encoded and as refined, and the distribution of the
    difference."""

    comparison_keys = (
        "histogram",
        "nmse_raw",
        "nmse_refined",
        "ce_delta_raw",
        "ce_delta_refined",
        "l0",
        "shift_mean",
        "shift_median",
    )

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.sums = DocumentSums()
        self.tokens = self.max_steps = self.checked = 0
        self.excess = 0.0
        self.shifts: list[Tensor] = []
        self.shift_documents: list[Tensor] = []
        self.generator = np.random.default_rng(context.options.seed)

    def update(self, batch: SAEBatch) -> None:
        if self.tokens >= self.context.options.refine_tokens:
            return
        held_out, sae, x, code = batch.held_out, batch.sae, batch.inputs.x, batch.code
        self.tokens += len(x)
        solution = refine(sae, x, code)
        self.max_steps = max(self.max_steps, solution.steps)
        self._check_exactly(sae, x, code, solution)
        recon = sae.decode_normalized(Code(solution.values.to(code.values), code.indices))
        x64, active = x.cpu().double(), (code.values > 0).cpu()
        raw, refined = code.values.cpu().double(), solution.values.cpu()
        shift = refined - raw
        self.sums.add(
            held_out.documents,
            count=torch.ones(len(x)),
            square=x64.square().sum(1),
            sum=x64,
            raw=(x64 - batch.recon.cpu().double()).square().sum(1),
            refined=(x64 - recon.cpu().double()).square().sum(1),
            active=active.sum(1),
            acts=raw.sum(1),
            shift=shift.sum(1),
            up=(shift > 0).sum(1),
            zeroed=(active & (refined == 0)).sum(1),
            converged=solution.converged,
        )
        self.shifts.append(shift[active].float())
        self.shift_documents.append(
            held_out.documents.cpu()[:, None].expand(active.shape)[active].int()
        )
        self.sums.add(
            held_out.predicted_documents,
            tokens=torch.ones(int(held_out.predicted.sum())),
            ce_clean=held_out.clean_losses,
            ce_raw=batch.spliced.losses,
            ce_refined=batch.losses_with(recon),
        )

    def _check_exactly(self, sae: SAE, x: Tensor, code: Code, solution: Refined) -> None:
        """Compare the errors of a few random tokens with those of the exact solution."""
        remaining = self.context.options.refine_exact - self.checked
        rows = self.generator.permutation(len(x))[:remaining]
        for row in rows.tolist():
            target = (x[row] - sae.b_pre).cpu().double()
            best = exact(sae, x[row], Code(code.values[row], code.indices[row]))
            error, least = (
                _error(sae, target, code.indices[row], values)
                for values in (solution.values[row], best)
            )
            self.excess = max(
                self.excess, (error - least) / max(float(target.square().sum()), 1e-300)
            )
        self.checked += len(rows)

    def finalize(self) -> Result:
        sums = self.sums
        variance, count = spread(sums["square"], sums["sum"], sums["count"]), sums["count"]
        active, tokens = sums["active"], sums["tokens"]
        ce = {name: sums[f"ce_{name}"] for name in ("clean", "raw", "refined")}
        mean_act = float(sums["acts"].sum() / max(1.0, active.sum()))
        shifts = torch.cat(self.shifts).numpy() / (mean_act or 1.0)
        documents = torch.cat(self.shift_documents).numpy()
        counts, edges = np.histogram(shifts.clip(_BINS[0], _BINS[-1]), _BINS)
        notes = []
        if unconverged := int(count.sum() - sums["converged"].sum()):
            notes.append(
                f"{unconverged} tokens had not converged after {MAX_STEPS:,} steps; their values "
                "are those of the last one"
            )
        return Result(
            {
                "nmse_raw": ratio(sums["raw"], variance),
                "nmse_refined": ratio(sums["refined"], variance),
                "nmse_gain": ratio(sums["raw"] - sums["refined"], variance),
                "ce_clean": ratio(ce["clean"], tokens),
                "ce_delta_raw": ratio(ce["raw"] - ce["clean"], tokens),
                "ce_delta_refined": ratio(ce["refined"] - ce["clean"], tokens),
                "ce_gain": ratio(ce["raw"] - ce["refined"], tokens),
                "shift_mean": ratio(sums["shift"], sums["acts"]),
                "shift_median": median(shifts, documents),
                "shift_sd": float(shifts.std()) if len(shifts) else None,
                "upward": ratio(sums["up"], active),
                "zeroed": ratio(sums["zeroed"], active),
                "l0": ratio(active, count),
                "mean_act": mean_act,
                "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
                "converged": ratio(sums["converged"], count),
                "steps": self.max_steps,
                "tolerance": TOLERANCE,
                "exact_tokens": self.checked,
                "exact_excess": self.excess if self.checked else None,
                "n_tokens": self.tokens,
                "n_documents": len(sums),
                "n_predictions": int(tokens.sum()),
                "notes": notes,
            }
        )


class Refined(NamedTuple):
    """Optimized values of codes.

    values: [b, k] as float64; 0 where the code has no activation. converged: which tokens met the
    stopping rule, [b]. steps: the most steps that a token took.
    """

    values: Tensor
    converged: Tensor
    steps: int


@torch.no_grad()
def refine(
    sae: SAE, x: Tensor, code: Code, *, tolerance: float = TOLERANCE, max_steps: int = MAX_STEPS
) -> Refined:
    """Optimize the values of a code's active latents, with the decoder fixed.

    The result has the least squared error with values of at least 0: Gao et al. 2024, section 5.1.
    The method is projected gradient descent with Nesterov's momentum, restarted where it points
    uphill. A token has converged when no component of its projected gradient max(g, -z) exceeds
    `tolerance` times the largest correlation of one of its latents with the input.

    Args:
        sae: the SAE.
        x: normalized activations, [b, d].
        code: their codes, [b, k].
        tolerance: of the stopping rule.
        max_steps: steps after which a token that has not converged is left as it is.

    Raises:
        InputError: if there are not as many codes as activations.
    """
    if len(x) != len(code.values):
        raise InputError(f"refinement got {len(x)} activations and codes of {len(code.values)}")
    device = torch.device("cpu") if x.device.type == "mps" else x.device  # mps has no float64
    # active latents first, so that a group is no wider than its longest code
    order = (code.values <= 0).long().argsort(dim=1, stable=True)
    start, indices = (part.gather(1, order).to(device) for part in code)
    start, active = start.double().clamp_min(0), start > 0
    widths, weight = active.sum(1), sae.W_dec.detach().to(device)
    target = (x - sae.b_pre).to(device).double()
    values, steps = torch.zeros_like(start), 0
    converged = torch.ones(len(x), dtype=torch.bool, device=device)
    for rows in _groups(widths, weight.shape[1]):
        width = int(widths[rows].max())
        if not width:
            continue
        directions = weight[indices[rows, :width]].double() * active[rows, :width, None]
        norms = directions.norm(dim=2)
        divisors = torch.where(norms > 0, norms, 1.0)
        directions /= divisors[..., None]
        gram = directions @ directions.mT
        correlation = torch.einsum("bkd,bd->bk", directions, target[rows])
        z, converged[rows], group_steps = _descend(
            gram, correlation, start[rows, :width] * norms, tolerance, max_steps
        )
        values[rows, :width], steps = z / divisors, max(steps, group_steps)
    unsorted = torch.zeros_like(values).scatter_(1, order.to(device), values)
    return Refined(
        unsorted.to(x.device if x.device.type != "mps" else "cpu"), converged.cpu(), steps
    )


def _groups(widths: Tensor, d: int) -> list[Tensor]:
    """Return the rows in groups of similar width, each small enough for its Gram matrices to stay
    in the cache."""
    groups, order = [], widths.argsort(descending=True)
    first = 0
    while first < len(order):
        width = max(1, int(widths[order[first]]))
        size = max(1, _ENTRIES // (width * max(width, d)))
        groups.append(order[first : first + size])
        first += size
    return groups


def _descend(
    gram: Tensor, correlation: Tensor, start: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, int]:
    """Minimize z G z / 2 - c z over z >= 0 for G = gram[b, k, k] and c = correlation[b, k]; return
    (z, whether converged [b], steps)."""
    solution = start.clone()
    converged = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    rows = torch.arange(len(start), device=start.device)
    # 1 over an upper bound of the largest eigenvalue
    rate = 1 / gram.abs().sum(2).amax(1).clamp_min(1e-12)[:, None]
    limit = tolerance * correlation.abs().amax(1).clamp_min(1e-300)
    z = ahead = start
    momentum = torch.ones_like(rate)
    for step in range(max_steps + 1):
        if step % CHECK_EVERY == 0 or step == max_steps:
            slope = _times(gram, z) - correlation
            projected = torch.minimum(slope.abs(), torch.where(slope > 0, z, slope.abs()))
            done = projected.amax(1) <= limit
            solution[rows], converged[rows] = z, done
            if done.all() or step == max_steps:
                return solution, converged, step
            if done.any():
                rows, gram, correlation, rate, limit, z, ahead, momentum = (
                    part[~done]
                    for part in (rows, gram, correlation, rate, limit, z, ahead, momentum)
                )
        new = (ahead - rate * (_times(gram, ahead) - correlation)).clamp_min(0)
        uphill = ((ahead - new) * (new - z)).sum(1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        next_momentum = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - z)
        z, momentum = new, next_momentum
    raise AssertionError("the last step returns")


def _times(gram: Tensor, z: Tensor) -> Tensor:
    return torch.bmm(gram, z.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def exact(sae: SAE, x: Tensor, code: Code) -> Tensor:
    """Solve the problem of `refine` for one token by an active-set method.

    The method is that of Lawson and Hanson, `scipy.optimize.nnls`.

    Args:
        sae: the SAE.
        x: a normalized activation, [d].
        code: its code, [k].

    Returns:
        Values [k] as float64.
    """
    from scipy.optimize import nnls

    active = (code.values > 0).cpu()
    values = torch.zeros(len(active), dtype=torch.float64)
    if active.any():
        directions = sae.W_dec.detach().cpu()[code.indices.cpu()[active]].double().numpy()
        target = (x - sae.b_pre).detach().cpu().double().numpy()
        solution, _ = nnls(directions.T, target, maxiter=100 * len(directions))
        values[active] = torch.from_numpy(solution)
    return values


@torch.no_grad()
def _error(sae: SAE, target: Tensor, indices: Tensor, values: Tensor) -> float:
    directions = sae.W_dec.detach().cpu()[indices.cpu()].double()
    return float((target - values.cpu().double() @ directions).square().sum())


def median(values: np.ndarray, documents: np.ndarray) -> Value:
    """Return the median of values that come from documents.

    Its standard error is that of the share of values below it, over the density around it.

    Args:
        values: [m].
        documents: the document of each value, [m].
    """
    if not len(values):
        return no_value()
    low, middle, high = np.quantile(values, (0.4, 0.5, 0.6))
    _, inverse = np.unique(documents, return_inverse=True)
    below = ratio(np.bincount(inverse, values < middle), np.bincount(inverse).astype(float))
    return {
        "value": float(middle),
        "se": None if below["se"] is None else float(below["se"] * (high - low) / 0.2),
    }
