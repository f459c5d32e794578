"""How often do latents fire, how strongly, and on what kinds of position? Gao et al. 2024,
appendices E.4 to E.6.

    Firing     what is counted of each latent: how often it fires by position, by repetition, by
               token
    Latents    densities and importances and their laws, moments, dense solutions, opposite pairs,
               recurring latents, effective tokens

Recurring latents are found by rule: Somers' D between a latent being active and a property of the
position, from -1 to 1. For a property that is there or not, such as being the first, it is P(active
| property) - P(active | not); for the place in the context it is P(later | active) - P(earlier |
active), of an active and an inactive token drawn at random. Repetition is compared position by
position, because tokens are repeated more often late in a context, whatever a latent does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import SAEBatch
from ksparse.evals.latents.moments import Moments
from ksparse.evals.statistics import DocumentSums, Result, ratio

LEAST = (
    10  # activations of a latent that its density, importance and effective tokens are read from
)
OPPOSITE = -0.9  # decoder cosine of a pair that undoes itself
DENSE, FOUND = (
    0.05,
    0.5,
)  # a recurring latent fires on so many tokens, and its Somers' D is at least this; our choice
RULES = ("first", "late", "early", "repetition")
LISTED = 5
_PAIRED = 32_768  # latents among which opposite pairs are looked for, the densest
_COMPACT = 4_000_000  # (latent, token) sums held before they are put together
_PART = 2**25  # cosines at a time


class Firing(Metric):
    """Counts what each latent does over the text; `latents` and `subspaces` ask it."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        n, length = context.sae.shape.n_latents, context.data.acts.context
        self.sums = DocumentSums()
        self.powers = context.part(Moments)
        self.at = torch.zeros(n, length, dtype=torch.float64)  # how often it fires at each position
        self.repeated_at = torch.zeros(
            n, length, dtype=torch.float64
        )  # the same where the token was in the context before
        self.tokens_at, self.repeats_at = (
            torch.zeros(length, dtype=torch.float64),
            torch.zeros(length, dtype=torch.float64),
        )
        self.token_counts = torch.zeros(context.lm.vocab, dtype=torch.float64)
        self._keys: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []
        self._waiting = 0

    def update(self, batch: SAEBatch) -> None:
        held_out, values, indices = batch.held_out, *(part.cpu() for part in batch.code)
        keep, tokens = held_out.keep.cpu(), held_out.contexts.tokens.cpu()
        position = keep.nonzero(as_tuple=True)[1]
        repeated, token = repeats(tokens, held_out.contexts.attention.cpu())[keep], tokens[keep]
        row, slot = (values > 0).nonzero(as_tuple=True)
        latent, value = indices[row, slot], values[row, slot].double()
        length = self.at.shape[1]
        places, ones = latent * length + position[row], torch.ones_like(value)
        self.at.view(-1).index_add_(0, places, ones)
        self.repeated_at.view(-1).index_add_(0, places, repeated[row].double())
        self.tokens_at += torch.bincount(position, minlength=length)
        self.repeats_at += torch.bincount(position, repeated.double(), length)
        self.token_counts += torch.bincount(token, minlength=len(self.token_counts))
        self.sums.add(held_out.documents, count=torch.ones(len(values)), l0=(values > 0).sum(1))
        self._add_tokens(
            latent.numpy() * len(self.token_counts) + token[row].numpy(), value.square().numpy()
        )

    def _add_tokens(self, keys: np.ndarray, squares: np.ndarray) -> None:
        self._keys.append(keys)
        self._squares.append(squares)
        self._waiting += len(keys)
        if self._waiting > _COMPACT:
            keys, squares = self._together()
            self._keys, self._squares, self._waiting = [keys], [squares], 0

    def _together(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._keys:
            return np.zeros(0, np.int64), np.zeros(0)
        keys, inverse = np.unique(np.concatenate(self._keys), return_inverse=True)
        return keys, np.bincount(inverse, np.concatenate(self._squares), len(keys))

    @property
    def density(self) -> np.ndarray:
        """The share of tokens on which each latent fires, [n]."""
        return self.powers.means[0].numpy()

    @property
    def often(self) -> np.ndarray:
        """Which latents have fired often enough to be described, [n]."""
        return self.powers.sums[0].numpy() >= LEAST

    def effective_tokens(self) -> np.ndarray:
        """Return exp of the entropy of each latent's mean squared activation over tokens, [n]; NaN
        where it never fires."""
        keys, squares = self._together()
        vocabulary = len(self.token_counts)
        return effective(
            keys // vocabulary, squares / self.token_counts.numpy()[keys % vocabulary], len(self.at)
        )


def repeats(tokens: Tensor, attention: Tensor) -> Tensor:
    """Return where a token has been in its context before, [b, t]; padding has not."""
    out = torch.zeros_like(attention)
    order = tokens.sort(dim=1, stable=True)
    out.scatter_(1, order.indices[:, 1:], order.values[:, 1:] == order.values[:, :-1])
    return out & attention


def effective(group: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """Return exp(-sum p log p) of each group's weights, p their shares, [n]: m for m equal ones;
    NaN for a group with none.

    Gao et al. 2024, appendix E.7, with the sign that its formula lost.
    """
    total = np.bincount(group, weights, n)
    live = weights > 0
    shares = weights[live] / total[group[live]]
    entropy = -np.bincount(group[live], shares * np.log(shares), n)
    return np.where(total > 0, np.exp(entropy), np.nan)


class Latents(Metric):
    """What latents are like: how often they fire and how much they matter, dense and opposite and
    recurring ones, their tokens."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.firing = context.part(Firing)

    def compute(self, observe: Progress) -> None:
        sae, density = self.context.sae, self.firing.density
        order = np.argsort(-density, kind="stable")
        self.paired = order[: min(_PAIRED, int((density > 0).sum()))]
        self.opposite, self.partner = opposites(
            sae.W_dec[torch.from_numpy(self.paired.copy()).to(sae.W_dec.device)], observe
        )

    def finalize(self) -> Result:
        firing, sae = self.firing, self.context.sae
        n, d = sae.shape.n_latents, sae.shape.d_model
        density, often = firing.density, firing.often
        moments = firing.powers.means.numpy()
        importance = moments[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            skew, kurtosis = moments[3] / importance**1.5, moments[4] / importance**2
        scores, tokens = self._scores(), firing.effective_tokens()
        l0 = ratio(firing.sums["l0"], firing.sums["count"])
        densest = np.sort(density)[::-1][:d]
        values = {
            "l0": l0,
            "n_described": int(often.sum()),
            "least": LEAST,
            "density_fit": law(density[often]),
            "importance_fit": law(importance[often]),
            "density_histogram": histogram(density),
            "importance_histogram": histogram(importance),
            "densest_density": float(densest.mean()),
            "densest_over_l0": float(densest.mean() / l0["value"]) if l0["value"] else None,
            "densest_share": float(densest.sum() / density.sum()) if density.sum() else None,
            "skew": quartiles(skew[often]),
            "kurtosis": quartiles(kurtosis[often]),
            "effective_tokens": quartiles(tokens[often]),
            "effective_histogram": histogram(tokens[often]),
            **self._pairs(density),
            "recurring": self._recurring(scores, density),
            "rules": {"density": DENSE, "score": FOUND},
        }
        arrays = {
            "density": density,
            "mean_act": moments[1],
            "mean_act_squared": importance,
            "skew": skew,
            "kurtosis": kurtosis,
            "effective_tokens": tokens,
            **{f"score_{rule}": score for rule, score in scores.items()},
        }
        opposite, partner = np.full(n, np.nan), np.full(n, -1)
        opposite[self.paired], partner[self.paired] = (
            self.opposite,
            self.paired[self.partner] if len(self.paired) > 1 else -1,
        )
        tensors = {
            name: torch.from_numpy(np.asarray(array, np.float32))
            for name, array in (arrays | {"opposite_cosine": opposite}).items()
        }
        return Result(
            {**values, "notes": self._notes(density)},
            {**tensors, "opposite": torch.from_numpy(partner.astype(np.int32))},
        )

    def _scores(self) -> dict[str, np.ndarray]:
        """Return each rule's Somers' D of every latent, NaN where it is not defined."""
        firing = self.firing
        at, everywhere = firing.at.numpy(), firing.tokens_at.numpy()
        first = int(np.argmax(everywhere > 0))
        later = somers(at[:, first + 1 :], everywhere[first + 1 :])
        return {
            "first": difference(
                at[:, first],
                everywhere[first],
                at[:, first + 1 :].sum(1),
                everywhere[first + 1 :].sum(),
            ),
            "late": later,
            "early": -later,
            "repetition": stratified(
                firing.repeated_at.numpy(), firing.repeats_at.numpy(), at, everywhere
            ),
        }

    def _recurring(
        self, scores: dict[str, np.ndarray], density: np.ndarray
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the latents with the highest scores by each rule, and whether the rule has found
        them."""
        dense = density >= DENSE
        mean = self.firing.powers.mean_act.numpy()
        found: dict[str, list[dict[str, Any]]] = {}
        for rule in RULES:
            score = np.nan_to_num(scores[rule], nan=-1.0)
            among = (
                self.firing.often if rule == "first" else dense
            )  # one position cannot be many tokens
            best = [i for i in np.argsort(-score, kind="stable").tolist() if among[i]][:LISTED]
            found[rule] = [
                {
                    "latent": i,
                    "score": float(score[i]),
                    "density": float(density[i]),
                    "mean_act": float(mean[i]),
                    "found": bool(score[i] >= FOUND),
                }
                for i in best
            ]
        return found

    def _pairs(self, density: np.ndarray) -> dict[str, Any]:
        """Return the pairs of latents that write opposite directions, the most opposite first."""
        rows = np.flatnonzero(self.opposite <= OPPOSITE)
        cosines = {
            tuple(sorted((row, int(self.partner[row])))): float(self.opposite[row])
            for row in rows.tolist()
        }  # of a pair once, the denser first
        pairs = [
            {
                "latents": (both := self.paired[list(pair)]).tolist(),
                "cosine": cosine,
                "densities": density[both].tolist(),
            }
            for pair, cosine in sorted(cosines.items(), key=lambda item: item[1])
        ]
        ten = set(self.paired[:10].tolist())
        return {
            "n_opposite_pairs": len(pairs),
            "n_opposite_among_densest": sum(set(pair["latents"]) <= ten for pair in pairs),
            "opposite_pairs": pairs[:20],
            "opposite_cosine": quartiles(self.opposite),
            "n_paired": len(self.paired),
        }

    def _notes(self, density: np.ndarray) -> list[str]:
        keep, live = self.context.data.acts.keep, int((density > 0).sum())
        notes = [
            f"laws, moments and effective tokens are of latents that fire on at least {LEAST} "
            "tokens"
        ]
        if keep == "text":
            notes.append(
                "the first position of a context is not read (acts.keep is text): 'first' is the "
                "first that is"
            )
        if live > _PAIRED:
            notes.append(
                f"opposite pairs were looked for among the {_PAIRED:,} densest of {live:,} live "
                "latents"
            )
        return notes


# ---- laws ----------------------------------------------------------------------------------------


def law(values: np.ndarray) -> dict[str, Any]:
    """Fit a Gaussian and a Laplace distribution to log10 of values > 0 by maximum likelihood.

    margin: the mean log-likelihood of a value by the Gaussian less that by the Laplace law, nats;
    its standard error is over values (Vuong 1989).
    mode: where the density of log10 is highest, by Gaussian kernels of Scott's width.
    """
    from scipy.stats import gaussian_kde

    logs = np.log10(values[values > 0])
    n = len(logs)
    if n < 3 or not logs.std():
        return {
            "n": n,
            "gaussian": None,
            "laplace": None,
            "margin": {"value": None, "se": None},
            "better": None,
            "mode": None,
        }
    mean, sd = logs.mean(), logs.std()
    centre, scale = np.median(logs), np.abs(logs - np.median(logs)).mean()
    gaussian = -0.5 * ((logs - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))
    laplace = -np.abs(logs - centre) / scale - np.log(2 * scale)
    margin = gaussian - laplace
    grid = np.linspace(logs.min(), logs.max(), 401)
    return {
        "n": n,
        "gaussian": {
            "mean": float(mean),
            "sd": float(sd),
            "log_likelihood": float(gaussian.mean()),
        },
        "laplace": {
            "median": float(centre),
            "scale": float(scale),
            "log_likelihood": float(laplace.mean()),
        },
        "margin": {"value": float(margin.mean()), "se": float(margin.std(ddof=1) / np.sqrt(n))},
        "better": "gaussian" if margin.mean() > 0 else "laplace",
        "mode": float(10 ** grid[np.argmax(gaussian_kde(logs)(grid))]),
    }


def histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Return a histogram of log10 of values > 0: edges (log10) and counts."""
    logs = np.log10(values[values > 0])
    counts, edges = (
        np.histogram(logs, 40, (np.floor(logs.min()), np.floor(logs.max()) + 1))
        if len(logs)
        else (np.zeros(40, int), np.linspace(-6, 0, 41))
    )
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def quartiles(values: np.ndarray) -> list[float] | None:
    """Return the least, the quartiles and the largest of the finite values; None if there is
    none."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(finite) else None


# ---- rules ---------------------------------------------------------------------------------------


def difference(active: np.ndarray, of: float, other: np.ndarray, other_of: float) -> np.ndarray:
    """Return the share of tokens with a property that are active less the share of the others, [n];
    NaN where either has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (
            np.asarray(active) / of - np.asarray(other) / other_of
            if of and other_of
            else np.full(len(active), np.nan)
        )


def somers(active: np.ndarray, everywhere: np.ndarray) -> np.ndarray:
    """Return Somers' D of being active with the position, [n], from counts active[n, t] of
    everywhere[t] tokens; NaN where nothing differs."""
    idle = everywhere - active
    before = np.cumsum(idle, 1) - idle
    after = idle.sum(1, keepdims=True) - before - idle
    pairs = active.sum(1) * idle.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, (active * (before - after)).sum(1) / pairs, np.nan)


def stratified(
    active_with: np.ndarray, with_: np.ndarray, active: np.ndarray, everywhere: np.ndarray
) -> np.ndarray:
    """Return P(active | property) - P(active | not) within positions, [n], as the Mantel-Haenszel
    risk difference; NaN where it is not defined.

    active_with[n, t] and with_[t] count what has the property; active[n, t] and everywhere[t] count
    all.
    """
    without = everywhere - with_
    there = (with_ > 0) & (without > 0)
    if not there.any():
        return np.full(len(active), np.nan)
    weight = with_[there] * without[there] / everywhere[there]
    gap = active_with[:, there] / with_[there] - (active - active_with)[:, there] / without[there]
    return (gap * weight).sum(1) / weight.sum()


@torch.no_grad()
def opposites(directions: Tensor, observe: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return the most negative cosine of each row of directions[m, d] with another, and which row
    that is."""
    m = len(directions)
    if m < 2:
        return np.full(m, np.nan), np.zeros(m, int)
    unit = directions.float() / directions.float().norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines, partners, done = [], [], 0
    for part in unit.split(max(1, _PART // m)):
        found = (part @ unit.T).min(1)
        cosines.append(found.values.cpu())
        partners.append(found.indices.cpu())
        observe("comparing latents", done := done + len(part), m)
    return torch.cat(cosines).double().numpy(), torch.cat(partners).numpy()
