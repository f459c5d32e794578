"""How good is the reconstruction, how many latents live, and what does each of them fire on?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.latents import coactivation
from ksparse.evals.latents.moments import Moments
from ksparse.evals.statistics import DocumentSums, Result, ratio, share
from ksparse.lm.tokens import token_strings
from ksparse.sae.model import Code
from ksparse.sae.normalization import input_rms

BEFORE, AFTER = 24, 8  # tokens of an example's window around its token
BANDS = 4  # of equally many activations of a latent, by size
BINS = 20  # of a latent's histogram, from 0 to its largest value
TOKENS = 8  # tokens that a latent fires on most
BIN, BARS = (
    0.2,
    128,
    # of histograms of values, in the size of a component of the input: the published viewer's bins
    # for inputs of norm sqrt(d_model)
)
_EXAMPLE_TOKENS = (
    2**20
)  # examples are drawn from so many tokens at most, all of whose codes are in memory
_EXAMPLE_VALUES = 2**27  # and their codes have so many values at most


class Stats(Metric):
    """Normalised MSE, explained variance, L0, dead latents; density, size and examples of each
    latent."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.sums, n = DocumentSums(), context.sae.shape.n_latents
        self.powers = context.part(Moments)
        self.bars = torch.zeros(n, BARS, dtype=torch.int32)
        self.bin = BIN * input_rms(context.sae.shape.normalize, context.sae.shape.d_model)
        self.tokens: list[Tensor] = []
        self.codes: list[Code] = []

    def update(self, batch: SAEBatch) -> None:
        raw, inputs, recon = batch.held_out.x, batch.inputs, batch.recon
        x, x_hat, y, y_hat = (
            part.cpu().double() for part in (inputs.x, recon, raw, inputs.restore(recon))
        )
        self.sums.add(
            batch.held_out.documents,
            count=torch.ones(len(x)),
            l0=(batch.code.values > 0).sum(1),
            error=(x - x_hat).square().sum(1),
            square=x.square().sum(1),
            sum=x,
            raw_error=(y - y_hat).square().sum(1),
            raw_square=y.square().sum(1),
            raw_sum=y,
        )
        active = batch.code.values > 0
        indices, values = batch.code.indices[active].cpu(), batch.code.values[active].cpu()
        bins = (values / self.bin).ceil().long().clamp(1, BARS) - 1
        self.bars.view(-1).index_add_(
            0, indices * BARS + bins, torch.ones_like(indices, dtype=torch.int32)
        )
        held = sum(map(len, self.tokens)) * batch.held_out.keep.shape[1]
        width = max(code.values.shape[-1] for code in [batch.code, *self.codes])
        if (
            self.context.options.examples
            and held < _EXAMPLE_TOKENS
            and (held + batch.held_out.keep.numel()) * width <= _EXAMPLE_VALUES
        ):
            contexts = batch.held_out.contexts
            self.tokens.append(torch.where(contexts.attention, contexts.tokens, -1).cpu())
            self.codes.append(
                Code(batch.code_grid.values.half().cpu(), batch.code_grid.indices.int().cpu())
            )

    def finalize(self) -> Result:
        sae, sums = self.context.sae, self.sums
        count = sums["count"]
        nmse = ratio(sums["error"], spread(sums["square"], sums["sum"], count))
        fvu = ratio(sums["raw_error"], spread(sums["raw_square"], sums["raw_sum"], count))
        n = sae.shape.n_latents
        density = self.powers.means[0]
        norms = sae.W_enc.norm(dim=1), sae.W_dec.norm(dim=1)
        cosine = (
            ((sae.W_enc * sae.W_dec).sum(1) / (norms[0] * norms[1]).clamp_min(1e-30)).detach().cpu()
        )
        live = density[density > 0].log10().numpy()
        counts, edges = np.histogram(live, bins=40, range=(-6, 0))
        values = {
            "nmse": nmse,
            "explained_variance": {"value": 1 - fvu["value"], "se": fvu["se"]}
            if fvu["value"] is not None
            else fvu,
            "l0": ratio(sums["l0"], count),
            "dead_fraction": share(int((density == 0).sum()), n),
            "density_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "cosine": cosine.mean().item(),
            "window": {"before": BEFORE, "after": AFTER},
            "bands": bands(self.context.options.examples),
            "act_bin": self.bin,
        }
        if "dead_fraction_training" in sae.metadata:
            values["dead_fraction_training"] = share(
                round(sae.metadata["dead_fraction_training"] * n), n
            )
        arrays = {
            "density": density.float(),
            "mean_act": self.powers.mean_act.float(),
            "max_act": self.powers.largest,
            "encoder_norm": norms[0].detach().cpu(),
            "cosine": cosine,
            "power_means": self.powers.means[1:].float(),
            **self._bars(),
            **self._examples(),
        }
        held, read = sum(map(len, self.tokens)), self.context.data.contexts
        values["notes"] = (
            [
                f"examples, and what is counted beside them, are of the first {held:,} of {read:,} "
                "contexts"
            ]
            if 0 < held < read
            else []
        )
        vocabulary = token_strings(self.context.lm.tokenizer, range(self.context.lm.vocab))
        return Result(values, arrays, {"vocabulary": vocabulary})

    def _bars(self) -> dict[str, Tensor]:
        """Return the histograms' bars that are not 0, by latent."""
        latent, bar = self.bars.nonzero(as_tuple=True)
        start = torch.zeros(len(self.bars) + 1, dtype=torch.int32)
        start[1:] = torch.bincount(latent, minlength=len(self.bars)).cumsum(0)
        return {"bar_start": start, "bar": (bar + 1).short(), "bar_count": self.bars[latent, bar]}

    def _examples(self) -> dict[str, Tensor]:
        """Choose contexts for each latent: its strongest, random ones in which it fires, and some
        of each band of sizes; count the rest."""
        if not self.tokens:
            return {}
        tokens = torch.cat(self.tokens)
        values, indices = Code.joined(self.codes)
        active = (values > 0).nonzero(as_tuple=True)
        value, latent = values[active].float().numpy(), indices[active].numpy()
        token = tokens[active[:2]].numpy()
        context, position = (place.numpy() for place in active[:2])
        noise, other_noise = np.random.default_rng(self.context.options.seed).random(
            (2, len(value)), np.float32
        )
        m, n = self.context.options.examples, self.context.sae.shape.n_latents
        drawn = {
            "top": best_per_group(latent, context, value, n, m),
            "random": best_per_group(latent, context, noise, n, m),
            "band": best_per_band(latent, context, value, other_noise, n, m),
        }
        arrays: dict[str, Tensor] = {}
        for kind, (chosen, place) in drawn.items():
            for name, column in (("context", context), ("position", position), ("value", value)):
                out = np.full(
                    (n, m),
                    -1 if name != "value" else 0,
                    np.int32 if name != "value" else np.float32,
                )
                out[latent[chosen], place] = column[chosen]
                arrays[f"{kind}_{name}"] = torch.from_numpy(out)
            arrays[f"{kind}_acts"] = windows(
                values, indices, arrays[f"{kind}_context"], arrays[f"{kind}_position"]
            )
        counted = {
            "histogram": histograms(latent, value, self.powers.largest.numpy()),
            **fired_on(latent, token, n, self.context.lm.vocab),
            **coactivation.coactivating(context * tokens.shape[1] + position, latent, n),
        }
        return (
            arrays
            | {"contexts": tokens.int()}
            | {name: torch.from_numpy(array) for name, array in counted.items()}
        )


def bands(examples: int) -> dict[str, int]:
    """Return into how many bands of sizes activations are dealt, and how many of so many examples
    come from each."""
    count = min(BANDS, examples)
    return {"count": count, "each": examples // max(1, count)}


def best_per_band(
    latent: np.ndarray, context: np.ndarray, value: np.ndarray, rank: np.ndarray, n: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `best_per_group`, as many of each band: places 0 .. each - 1 are the
    largest activations' band."""
    count, each = bands(m).values()
    band = band_of(latent, value, n, count)
    chosen, place = best_per_group(
        latent.astype(np.int64) * count + band, context, rank, n * count, each
    )
    return chosen, band[chosen] * each + place


def band_of(latent: np.ndarray, value: np.ndarray, n: int, count: int) -> np.ndarray:
    """Return the band of each activation among its latent's, by rank: 0 has the largest, count - 1
    the smallest, all equally many."""
    order = np.lexsort((-value, latent))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.searchsorted(latent[order], latent[order])
    return ranks * count // np.bincount(latent, minlength=n)[latent]


def histograms(latent: np.ndarray, value: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Count each latent's activations in bins of equal width from 0 to its largest value, [n,
    BINS]."""
    at = np.minimum(BINS - 1, value / largest[latent] * BINS).astype(np.int64)
    return (
        np.bincount(latent * BINS + at, minlength=len(largest) * BINS)
        .reshape(-1, BINS)
        .astype(np.int32)
    )


def fired_on(
    latent: np.ndarray, token: np.ndarray, n: int, vocabulary: int
) -> dict[str, np.ndarray]:
    """Return on_token, the tokens that each latent fires on most often, [n, TOKENS] (-1: none), and
    on_share, of its activations."""
    pairs, counts = np.unique(latent.astype(np.int64) * vocabulary + token, return_counts=True)
    owner = pairs // vocabulary
    order = np.lexsort((-counts, owner))
    place = np.arange(len(order)) - np.searchsorted(owner, owner[order])
    order, place = order[place < TOKENS], place[place < TOKENS]
    on, shares = np.full((n, TOKENS), -1, np.int32), np.zeros((n, TOKENS), np.float32)
    on[owner[order], place] = pairs[order] % vocabulary
    shares[owner[order], place] = counts[order] / np.bincount(latent, minlength=n)[owner[order]]
    return {"on_token": on, "on_share": shares}


def spread(square: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return each document's squared distance to the mean over all documents, from sums: the error
    of predicting the mean."""
    mean = total.sum(0) / max(1, count.sum())
    return square - 2 * total @ mean + count * (mean @ mean)


def best_per_group(
    latent: np.ndarray, context: np.ndarray, rank: np.ndarray, n: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which entries are the m of highest rank of their latent, at most one of each context,
    and their place in 0..m-1."""
    order = np.lexsort((-rank, context, latent))
    first = np.ones(len(order), bool)
    first[1:] = (latent[order][1:] != latent[order][:-1]) | (
        context[order][1:] != context[order][:-1]
    )
    order = order[first]
    order = order[np.lexsort((-rank[order], latent[order]))]
    starts = np.searchsorted(latent[order], np.arange(n))
    place = np.arange(len(order)) - starts[latent[order]]
    return order[place < m], place[place < m]


def windows(values: Tensor, indices: Tensor, context: Tensor, position: Tensor) -> Tensor:
    """Return each example's latent on the tokens around its own, [n, m, BEFORE + 1 + AFTER] as
    float16."""
    n, m = context.shape
    offsets = torch.arange(-BEFORE, AFTER + 1)
    out = torch.zeros(n, m, len(offsets), dtype=torch.float16)
    size = max(1, 16_384 // values.shape[-1])
    for first in range(0, n, size):
        part = slice(first, first + size)
        at = position[part, :, None].long() + offsets
        inside = (at >= 0) & (at < values.shape[1]) & (context[part, :, None] >= 0)
        rows, columns = (
            context[part, :, None].long().clamp_min(0).expand_as(at),
            at.clamp(0, values.shape[1] - 1),
        )
        latents = torch.arange(first, min(first + size, n)).view(-1, 1, 1, 1)
        hit = indices[rows, columns] == latents
        out[part] = ((values[rows, columns] * hit).sum(-1) * inside).half()
    return out
