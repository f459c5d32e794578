"""How often latents fire, how strongly and where (Gao et al. 2024, appendices E.4 to E.6).

    Firing    counts for each latent: by position, by repetition, by token
    Latents   densities, importances and their distributions, moments, dense solutions,
              opposite pairs, recurring latents, effective tokens

Recurring latents are found by a rule each: Somers' D, from -1 to 1, between a latent being active
and a property of the position. For a binary property, such as being the first position, D is
P(active | property) - P(active | not property). For the position in the context, take an active and
an inactive token at random: D is P(active one is later) - P(active one is earlier). Repetition is
compared position by position, because tokens repeat more often late in a context whatever a latent
does.
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

LEAST = 10
"""Activations that a latent needs for its density, importance and effective tokens to count."""
OPPOSITE = -0.9
"""Largest decoder cosine of an opposite pair."""
DENSE, MIN_SCORE = 0.05, 0.5
"""Smallest density and Somers' D of a recurring latent; our choice."""
RULES = ("first", "late", "early", "repetition")
LISTED = 5
"""Latents listed for each rule."""
_PAIRED = 32_768  # opposite pairs are searched among this many densest latents
_COMPACT = 4_000_000  # (latent, token) sums held before they are merged
_PART = 2**25  # cosines computed at a time


class Firing(Metric):
    """Counts of each latent's firing over the text, shared by `Latents` and `Subspaces`.

    Attributes:
        sums: L0 and token counts by document.
        moments: The latents' moments.
        fired_at: How often each latent fires at each position, [n, t].
        fired_on_repeats: The same, for tokens that occurred before in the context, [n, t].
        tokens_at: Tokens at each position, [t].
        repeats_at: Repeated tokens at each position, [t].
        token_counts: Occurrences of each token of the vocabulary.
    """

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        n, length = context.sae.shape.n_latents, context.data.context
        self.sums = DocumentSums()
        self.moments = context.part(Moments)
        self.fired_at = torch.zeros(n, length, dtype=torch.float64)
        self.fired_on_repeats = torch.zeros(n, length, dtype=torch.float64)
        self.tokens_at, self.repeats_at = (
            torch.zeros(length, dtype=torch.float64),
            torch.zeros(length, dtype=torch.float64),
        )
        self.token_counts = torch.zeros(context.data.vocab, dtype=torch.float64)
        self._keys: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []
        self._pending = 0

    def update(self, batch: SAEBatch) -> None:
        held_out, values, indices = batch.held_out, *(part.cpu() for part in batch.code)
        keep, tokens = held_out.keep.cpu(), held_out.contexts.tokens.cpu()
        position = keep.nonzero(as_tuple=True)[1]
        repeated, token = repeats(tokens, held_out.contexts.attention.cpu())[keep], tokens[keep]
        row, slot = (values > 0).nonzero(as_tuple=True)
        latent, value = indices[row, slot], values[row, slot].double()
        length = self.fired_at.shape[1]
        cells, ones = latent * length + position[row], torch.ones_like(value)
        self.fired_at.view(-1).index_add_(0, cells, ones)
        self.fired_on_repeats.view(-1).index_add_(0, cells, repeated[row].double())
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
        self._pending += len(keys)
        if self._pending > _COMPACT:
            keys, squares = self._merge()
            self._keys, self._squares, self._pending = [keys], [squares], 0

    def _merge(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of squared activations of each (latent, token) key."""
        if not self._keys:
            return np.zeros(0, np.int64), np.zeros(0)
        keys, inverse = np.unique(np.concatenate(self._keys), return_inverse=True)
        return keys, np.bincount(inverse, np.concatenate(self._squares), len(keys))

    @property
    def density(self) -> np.ndarray:
        """Share of tokens on which each latent fires, [n]."""
        return self.moments.means[0].numpy()

    @property
    def fires_enough(self) -> np.ndarray:
        """Which latents fire often enough to be described, bool [n]."""
        return self.moments.sums[0].numpy() >= LEAST

    def favourite_tokens(self, most: int) -> np.ndarray:
        """Return the tokens with the largest sums of each latent's squared values, the largest
        first, [n, most]; -1 where it fires on fewer."""
        keys, squares = self._merge()
        vocabulary = len(self.token_counts)
        return favourites(keys // vocabulary, keys % vocabulary, squares, len(self.fired_at), most)

    def effective_tokens(self) -> np.ndarray:
        """Return exp of the entropy of each latent's mean squared activation over tokens, [n].

        NaN for a latent that never fires, and for activations without tokens.
        """
        if not self.context.data.has_text:
            return np.full(len(self.fired_at), np.nan)
        keys, squares = self._merge()
        vocabulary = len(self.token_counts)
        return effective(
            keys // vocabulary,
            squares / self.token_counts.numpy()[keys % vocabulary],
            len(self.fired_at),
        )


def favourites(
    group: np.ndarray, token: np.ndarray, weight: np.ndarray, n: int, most: int
) -> np.ndarray:
    """Return the tokens with the largest weights of each group, the largest first, [n, most]; -1
    where there are fewer.

    Args:
        group: the group of each weight, [m], from 0 to n - 1.
        token: its token, [m].
        weight: the weights, [m].
        n: the number of groups.
        most: tokens of each.

    Example:
        >>> import numpy as np
        >>> group, token = np.array([0, 0, 2]), np.array([7, 8, 9])
        >>> favourites(group, token, np.array([1.0, 2.0, 3.0]), 3, 2).tolist()
        [[8, 7], [-1, -1], [9, -1]]
    """
    order = np.lexsort((-weight, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    kept, place = order[place < most], place[place < most]
    found = np.full((n, most), -1)
    found[group[kept], place] = token[kept]
    return found


def repeats(tokens: Tensor, attention: Tensor) -> Tensor:
    """Return where a token occurred before in its context, bool [b, t]; False for padding."""
    repeated = torch.zeros_like(attention)
    order = tokens.sort(dim=1, stable=True)
    repeated.scatter_(1, order.indices[:, 1:], order.values[:, 1:] == order.values[:, :-1])
    return repeated & attention


def effective(group: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """Return the effective number of weights in each group, [n]: m for m equal weights.

    exp(-sum p log p), with p the shares of a group's weights; NaN for a group without any. Gao et
    al. 2024, appendix E.7, whose formula lacks the minus sign.
    """
    total = np.bincount(group, weights, n)
    live = weights > 0
    shares = weights[live] / total[group[live]]
    entropy = -np.bincount(group[live], shares * np.log(shares), n)
    return np.where(total > 0, np.exp(entropy), np.nan)


class Latents(Metric):
    """Properties of latents: densities, importances, dense, opposite and recurring ones, tokens."""

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.firing = context.part(Firing)

    def compute(self, progress: Progress) -> None:
        sae, density = self.context.sae, self.firing.density
        order = np.argsort(-density, kind="stable")
        self.paired = order[: min(_PAIRED, int((density > 0).sum()))]
        self.opposite, self.partner = opposites(
            sae.W_dec[torch.from_numpy(self.paired.copy()).to(sae.W_dec.device)], progress
        )

    def finalize(self) -> Result:
        firing, sae = self.firing, self.context.sae
        n, d = sae.shape.n_latents, sae.shape.d_model
        density, enough = firing.density, firing.fires_enough
        moments = firing.moments.means.numpy()
        importance = moments[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            skew, kurtosis = moments[3] / importance**1.5, moments[4] / importance**2
        scores, tokens = self._scores(), firing.effective_tokens()
        l0 = ratio(firing.sums["l0"], firing.sums["count"])
        densest = np.sort(density)[::-1][:d]
        values = {
            "l0": l0,
            "n_described": int(enough.sum()),
            "least": LEAST,
            "density_fit": law(density[enough]),
            "importance_fit": law(importance[enough]),
            "density_histogram": histogram(density),
            "importance_histogram": histogram(importance),
            "densest_density": float(densest.mean()),
            "densest_over_l0": float(densest.mean() / l0["value"]) if l0["value"] else None,
            "densest_share": float(densest.sum() / density.sum()) if density.sum() else None,
            "skew": quartiles(skew[enough]),
            "kurtosis": quartiles(kurtosis[enough]),
            "effective_tokens": quartiles(tokens[enough]),
            "effective_histogram": histogram(tokens[enough]),
            **self._describe_pairs(density),
            "recurring": self._list_recurring(scores, density),
            "rules": {"density": DENSE, "score": MIN_SCORE},
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
        """Return Somers' D of every latent by each rule, [n]; NaN where it is undefined."""
        firing = self.firing
        if not self.context.data.has_text:
            return {rule: np.full(len(firing.fired_at), np.nan) for rule in RULES}
        fired, tokens = firing.fired_at.numpy(), firing.tokens_at.numpy()
        first = int(np.argmax(tokens > 0))
        after = slice(first + 1, None)
        later = somers(fired[:, after], tokens[after])
        return {
            "first": difference(
                fired[:, first], tokens[first], fired[:, after].sum(1), tokens[after].sum()
            ),
            "late": later,
            "early": -later,
            "repetition": stratified(
                firing.fired_on_repeats.numpy(), firing.repeats_at.numpy(), fired, tokens
            ),
        }

    def _list_recurring(
        self, scores: dict[str, np.ndarray], density: np.ndarray
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the latents with the highest scores by each rule, and whether it accepts them."""
        dense = density >= DENSE
        mean = self.firing.moments.mean_act.numpy()
        listed: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
        for rule in RULES if self.context.data.has_text else ():
            score = np.nan_to_num(scores[rule], nan=-1.0)
            # A latent of a single position cannot be dense.
            eligible = self.firing.fires_enough if rule == "first" else dense
            best = [i for i in np.argsort(-score, kind="stable").tolist() if eligible[i]][:LISTED]
            listed[rule] = [
                {
                    "latent": i,
                    "score": float(score[i]),
                    "density": float(density[i]),
                    "mean_act": float(mean[i]),
                    "found": bool(score[i] >= MIN_SCORE),
                }
                for i in best
            ]
        return listed

    def _describe_pairs(self, density: np.ndarray) -> dict[str, Any]:
        """Return the pairs of latents that write opposite directions, most opposite first."""
        rows = np.flatnonzero(self.opposite <= OPPOSITE)
        # Each pair once, its denser latent first.
        cosines = {
            tuple(sorted((row, int(self.partner[row])))): float(self.opposite[row])
            for row in rows.tolist()
        }
        pairs = [
            {
                "latents": (both := self.paired[list(pair)]).tolist(),
                "cosine": cosine,
                "densities": density[both].tolist(),
            }
            for pair, cosine in sorted(cosines.items(), key=lambda item: item[1])
        ]
        ten_densest = set(self.paired[:10].tolist())
        return {
            "n_opposite_pairs": len(pairs),
            "n_opposite_among_densest": sum(set(pair["latents"]) <= ten_densest for pair in pairs),
            "opposite_pairs": pairs[:20],
            "opposite_cosine": quartiles(self.opposite),
            "n_paired": len(self.paired),
        }

    def _notes(self, density: np.ndarray) -> list[str]:
        keep, live = self.context.data.acts.keep, int((density > 0).sum())
        notes = [
            "distributions, moments and effective tokens are of latents that fire on at least "
            f"{LEAST} tokens"
        ]
        if not self.context.data.has_text:
            notes.append("no effective tokens or recurring latents: there are no tokens, positions")
        elif keep == "text":
            notes.append(
                "the first position of a context is left out (acts.keep is text): 'first' is the "
                "first that is kept"
            )
        if live > _PAIRED:
            notes.append(
                f"opposite pairs were searched among the {_PAIRED:,} densest of {live:,} live "
                "latents"
            )
        return notes


# ---- distributions -------------------------------------------------------------------------------


def law(values: np.ndarray) -> dict[str, Any]:
    """Fit a Gaussian and a Laplace distribution to log10 of values > 0 by maximum likelihood.

    Args:
        values: Values; those that are not above 0 are ignored.

    Returns:
        The parameters of both and `better`, the likelier one; `margin`, the mean log-likelihood of
        a value under the Gaussian minus that under the Laplace distribution, in nats, with its
        standard error over values (Vuong 1989); and `mode`, where the density of log10 is highest,
        by Gaussian kernels of Scott's width. All are None with fewer
        than 3 values, or if all are equal.
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
    """Return a histogram of log10 of values > 0: 41 edges (log10) and 40 counts."""
    logs = np.log10(values[values > 0])
    counts, edges = (
        np.histogram(logs, 40, (np.floor(logs.min()), np.floor(logs.max()) + 1))
        if len(logs)
        else (np.zeros(40, int), np.linspace(-6, 0, 41))
    )
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def quartiles(values: np.ndarray) -> list[float] | None:
    """Return minimum, quartiles and maximum of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(finite) else None


# ---- rules ---------------------------------------------------------------------------------------


def difference(
    active_with: np.ndarray, with_: float, active_without: np.ndarray, without: float
) -> np.ndarray:
    """Return P(active | property) - P(active | not property), [n]; NaN where either is undefined.

    Args:
        active_with: Tokens with the property on which each latent is active, [n].
        with_: Tokens with the property.
        active_without: Tokens without it on which each latent is active, [n].
        without: Tokens without it.
    """
    if not with_ or not without:
        return np.full(len(active_with), np.nan)
    return np.asarray(active_with) / with_ - np.asarray(active_without) / without


def somers(active: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return Somers' D between being active and the position, [n].

    NaN for a latent that is always or never active.

    Args:
        active: On how many tokens each latent is active at each position, [n, t].
        tokens: The tokens at each position, [t].
    """
    idle = tokens - active
    before = np.cumsum(idle, 1) - idle
    after = idle.sum(1, keepdims=True) - before - idle
    pairs = active.sum(1) * idle.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, (active * (before - after)).sum(1) / pairs, np.nan)


def stratified(
    active_with: np.ndarray, with_: np.ndarray, active: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Return P(active | property) - P(active | not property) within positions, [n].

    The Mantel-Haenszel risk difference; NaN where no position has tokens of both kinds.

    Args:
        active_with: Tokens with the property on which each latent is active, [n, t].
        with_: Tokens with the property, [t].
        active: All tokens on which each latent is active, [n, t].
        tokens: All tokens, [t].
    """
    without = tokens - with_
    both = (with_ > 0) & (without > 0)
    if not both.any():
        return np.full(len(active), np.nan)
    weight = with_[both] * without[both] / tokens[both]
    gap = active_with[:, both] / with_[both] - (active - active_with)[:, both] / without[both]
    return (gap * weight).sum(1) / weight.sum()


@torch.no_grad()
def opposites(directions: Tensor, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's most negative cosine with another row of directions[m, d], and which."""
    m = len(directions)
    if m < 2:
        return np.full(m, np.nan), np.zeros(m, int)
    unit = directions.float() / directions.float().norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines, partners, done = [], [], 0
    for part in unit.split(max(1, _PART // m)):
        lowest = (part @ unit.T).min(1)
        cosines.append(lowest.values.cpu())
        partners.append(lowest.indices.cpu())
        progress("comparing latents", done := done + len(part), m)
    return torch.cat(cosines).double().numpy(), torch.cat(partners).numpy()
