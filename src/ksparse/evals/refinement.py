"""Are the values of a code the best ones for its latents? Gao et al. 2024, section 5.1.

The active latents of each token are kept, and their values alone are optimised: at least 0, for the
least squared error, the decoder fixed. Where an L1 penalty has shrunk the values they go up; a TopK
code should stay where it is on average.

    refine(sae, x, code)   accelerated projected gradient, all tokens at once      exact(sae, x,
                           code)   an active-set method, one by one
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, Value, ratio
from ksparse.evals.stats import spread
from ksparse.sae.model import SAE, Code

TOLERANCE, MOST_STEPS, CHECK_EVERY = 1e-6, 5_000, 20
_ENTRIES = 2**20  # numbers of Gram matrices in one piece, which stays in cache
_BINS = np.linspace(-2, 2, 161)  # of (refined - raw) over the mean active value


class Refinement(Metric):
    """Error and loss of the LM with values as encoded and refined, and the distribution of the
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
        self.tokens = self.most_steps = self.checked = 0
        self.excess = 0.0
        self.shifts: list[Tensor] = []
        self.shift_documents: list[Tensor] = []
        self.draw = np.random.default_rng(context.options.seed)

    def update(self, batch: SAEBatch) -> None:
        if self.tokens >= self.context.options.refine_tokens:
            return
        held_out, sae, x, code = batch.held_out, batch.sae, batch.inputs.x, batch.code
        self.tokens += len(x)
        found = refine(sae, x, code)
        self.most_steps = max(self.most_steps, found.steps)
        self._check(sae, x, code, found)
        recon = sae.decode_normalized(Code(found.values.to(code.values), code.indices))
        x64, active = x.cpu().double(), (code.values > 0).cpu()
        raw, refined = code.values.cpu().double(), found.values.cpu()
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
            converged=found.converged,
        )
        self.shifts.append(shift[active].float())
        self.shift_documents.append(
            held_out.documents.cpu()[:, None].expand(active.shape)[active].int()
        )
        self.sums.add(
            held_out.predicted_documents,
            tokens=torch.ones(int(held_out.predicted.sum())),
            ce_clean=held_out.losses(held_out.clean),
            ce_raw=batch.spliced.losses,
            ce_refined=batch.losses_with(recon),
        )

    def _check(self, sae: SAE, x: Tensor, code: Code, found: Refined) -> None:
        """Hold some tokens' errors against those of the exact solution."""
        rows = self.draw.permutation(len(x))[: self.context.options.refine_exact - self.checked]
        for row in rows.tolist():
            target = (x[row] - sae.b_pre).cpu().double()
            best = exact(sae, x[row], Code(code.values[row], code.indices[row]))
            ours, theirs = (
                _error(sae, target, code.indices[row], values)
                for values in (found.values[row], best)
            )
            self.excess = max(
                self.excess, (ours - theirs) / max(float(target.square().sum()), 1e-300)
            )
        self.checked += len(rows)

    def finalize(self) -> Result:
        sums = self.sums
        error, count = spread(sums["square"], sums["sum"], sums["count"]), sums["count"]
        active, tokens, ce = (
            sums["active"],
            sums["tokens"],
            {name: sums[f"ce_{name}"] for name in ("clean", "raw", "refined")},
        )
        unit = float(sums["acts"].sum() / max(1.0, active.sum()))
        shifts, documents = (
            torch.cat(self.shifts).numpy() / (unit or 1.0),
            torch.cat(self.shift_documents).numpy(),
        )
        counts, edges = np.histogram(shifts.clip(_BINS[0], _BINS[-1]), _BINS)
        notes = []
        if missed := int(count.sum() - sums["converged"].sum()):
            notes.append(
                f"{missed} tokens had not converged after {MOST_STEPS:,} steps; their values are "
                "those of the last one"
            )
        return Result(
            {
                "nmse_raw": ratio(sums["raw"], error),
                "nmse_refined": ratio(sums["refined"], error),
                "nmse_gain": ratio(sums["raw"] - sums["refined"], error),
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
                "mean_act": unit,
                "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
                "converged": ratio(sums["converged"], count),
                "steps": self.most_steps,
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
    """values[b, k] as float64, 0 where the code had none; which tokens met the stopping rule, [b];
    the most steps a token took."""

    values: Tensor
    converged: Tensor
    steps: int


@torch.no_grad()
def refine(
    sae: SAE, x: Tensor, code: Code, *, tolerance: float = TOLERANCE, most: int = MOST_STEPS
) -> Refined:
    """Return the non-negative values of a code's active latents that have the least squared error
    on normalised x[b, d].

    Projected gradient with Nesterov's momentum, which restarts where it points uphill. A token is
    done when no component of its projected gradient, max(g, -z), is larger than `tolerance` times
    the largest correlation of a latent with the input.
    """
    if len(x) != len(code.values):
        raise InputError(f"refinement got {len(x)} activations and codes of {len(code.values)}")
    device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
    order = (
        (code.values <= 0).long().argsort(dim=1, stable=True)
    )  # active ones first, so that groups are no wider than they must be
    start, indices = (part.gather(1, order).to(device) for part in code)
    start, active = start.double().clamp_min(0), start > 0
    widths, weight, target = (
        active.sum(1),
        sae.W_dec.detach().to(device),
        (x - sae.b_pre).to(device).double(),
    )
    values, converged, steps = (
        torch.zeros_like(start),
        torch.ones(len(x), dtype=torch.bool, device=device),
        0,
    )
    for rows in _groups(widths, weight.shape[1]):
        width = int(widths[rows].max())
        if not width:
            continue
        directions = weight[indices[rows, :width]].double() * active[rows, :width, None]
        norms = directions.norm(dim=2)
        directions /= torch.where(norms > 0, norms, 1.0)[..., None]
        gram, pull = (
            directions @ directions.mT,
            torch.einsum("bkd,bd->bk", directions, target[rows]),
        )
        found, done, taken = _descend(gram, pull, start[rows, :width] * norms, tolerance, most)
        values[rows, :width], converged[rows], steps = (
            found / torch.where(norms > 0, norms, 1.0),
            done,
            max(steps, taken),
        )
    return Refined(
        torch.zeros_like(values)
        .scatter_(1, order.to(device), values)
        .to(x.device if x.device.type != "mps" else "cpu"),
        converged.cpu(),
        steps,
    )


def _groups(widths: Tensor, d: int) -> list[Tensor]:
    """Return rows in groups of like width, each small enough for its Gram matrices to stay in
    cache."""
    groups, order = [], widths.argsort(descending=True)
    at = 0
    while at < len(order):
        width = max(1, int(widths[order[at]]))
        size = max(1, _ENTRIES // (width * max(width, d)))
        groups.append(order[at : at + size])
        at += size
    return groups


def _descend(
    gram: Tensor, pull: Tensor, start: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor, int]:
    """Minimise z G z / 2 - c z over z >= 0 for G = gram[b, k, k], c = pull[b, k]; return (z,
    whether converged [b], steps)."""
    result, converged = (
        start.clone(),
        torch.zeros(len(start), dtype=torch.bool, device=start.device),
    )
    rows = torch.arange(len(start), device=start.device)
    rate = (
        1 / gram.abs().sum(2).amax(1).clamp_min(1e-12)[:, None]
    )  # 1 over a bound of the largest eigenvalue
    limit = tolerance * pull.abs().amax(1).clamp_min(1e-300)
    z = ahead = start
    momentum = torch.ones_like(rate)
    for step in range(most + 1):
        if step % CHECK_EVERY == 0 or step == most:
            slope = _times(gram, z) - pull
            done = (
                torch.minimum(slope.abs(), torch.where(slope > 0, z, slope.abs())).amax(1) <= limit
            )
            result[rows], converged[rows] = z, done
            if done.all() or step == most:
                return result, converged, step
            if done.any():
                left = ~done
                rows, gram, pull, rate, limit, z, ahead, momentum = (
                    part[left] for part in (rows, gram, pull, rate, limit, z, ahead, momentum)
                )
        new = (ahead - rate * (_times(gram, ahead) - pull)).clamp_min(0)
        uphill = ((ahead - new) * (new - z)).sum(1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead, z, momentum = new + (momentum - 1) / following * (new - z), new, following
    raise AssertionError("the last step returns")


def _times(gram: Tensor, z: Tensor) -> Tensor:
    return torch.bmm(gram, z.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def exact(sae: SAE, x: Tensor, code: Code) -> Tensor:
    """Return the same for one token, x[d] with its code [k], by Lawson and Hanson's active-set
    method (scipy.optimize.nnls), as float64."""
    from scipy.optimize import nnls

    active = (code.values > 0).cpu()
    values = torch.zeros(len(active), dtype=torch.float64)
    if active.any():
        directions = sae.W_dec.detach().cpu()[code.indices.cpu()[active]].double().numpy()
        values[active] = torch.from_numpy(
            nnls(
                directions.T,
                (x - sae.b_pre).detach().cpu().double().numpy(),
                maxiter=100 * len(directions),
            )[0]
        )
    return values


@torch.no_grad()
def _error(sae: SAE, target: Tensor, indices: Tensor, values: Tensor) -> float:
    directions = sae.W_dec.detach().cpu()[indices.cpu()].double()
    return float((target - values.cpu().double() @ directions).square().sum())


def median(values: np.ndarray, documents: np.ndarray) -> Value:
    """Return the median of values that come from documents; its standard error is that of the share
    below it over the density there."""
    if not len(values):
        return {"value": None, "se": None}
    low, middle, high = np.quantile(values, (0.4, 0.5, 0.6))
    _, inverse = np.unique(documents, return_inverse=True)
    below = ratio(np.bincount(inverse, values < middle), np.bincount(inverse).astype(float))
    return {
        "value": float(middle),
        "se": None if below["se"] is None else float(below["se"] * (high - low) / 0.2),
    }
