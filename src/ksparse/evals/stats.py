"""How good is the reconstruction, how many latents are alive, and what does each fire on?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.latents import coactivation
from ksparse.evals.latents.moments import Moments
from ksparse.evals.statistics import DocumentSums, Estimate, Result, Value, ratio, share
from ksparse.lm.direct_logits import read_head
from ksparse.lm.tokens import token_strings
from ksparse.sae.losses import prefix_reconstructions, recorded_prefixes
from ksparse.sae.model import Code
from ksparse.sae.normalization import input_rms

BEFORE, AFTER = 24, 8
"""Tokens shown before and after an example's own token."""
BANDS = 4
"""Bands of activation size, each with equally many of a latent's activations."""
BAND_EXAMPLES = 5
"""Examples of each band at most."""
BINS = 20
"""Bins of a latent's histogram, from 0 to its largest value."""
TOKENS = 8
"""Tokens listed for each latent: those with the largest sums of its values."""
BIN, BARS = 0.2, 128
"""Width and number of the bins of absolute values, in units of the root mean square of the inputs'
components: the bins of the published viewer for inputs of norm sqrt(d_model)."""
_EXAMPLE_TOKENS = 2**20  # of the first tokens, from which examples are drawn; held in memory
_EXAMPLE_VALUES = 2**27  # values of their codes, at most


class Stats(Metric):
    """Normalized MSE, explained variance, L0 and dead latents; density, size and examples of each
    latent."""

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        shape = context.sae.shape
        self.sums = DocumentSums()
        self.moments = context.part(Moments)
        self.bars = torch.zeros(shape.n_latents, BARS, dtype=torch.int32)
        self.bin = BIN * input_rms(shape.normalize, shape.d_model)
        self.contexts = 0
        self.tokens: list[Tensor] = []
        self.codes: list[Code] = []
        self._logit_notes: list[str] = []

    def update(self, batch: SAEBatch) -> None:
        held_out, code = batch.held_out, batch.code
        inputs, recon = batch.inputs, batch.recon
        x, x_hat, raw, raw_hat = (
            part.cpu().double() for part in (inputs.x, recon, held_out.x, inputs.restore(recon))
        )
        active = code.values > 0
        self.sums.add(
            held_out.documents,
            count=torch.ones(len(x)),
            l0=active.sum(1),
            error=(x - x_hat).square().sum(1),
            square=x.square().sum(1),
            sum=x,
            raw_error=(raw - raw_hat).square().sum(1),
            raw_square=raw.square().sum(1),
            raw_sum=raw,
            **self._prefix_sums(batch, x),
        )
        indices, values = code.indices[active].cpu(), code.values[active].cpu()
        bars = (values / self.bin).ceil().long().clamp(1, BARS) - 1
        self.bars.view(-1).index_add_(
            0, indices * BARS + bars, torch.ones_like(indices, dtype=torch.int32)
        )
        self.contexts += len(held_out.keep)
        if self._has_room(batch):
            contexts, grid = held_out.contexts, batch.code_grid
            self.tokens.append(torch.where(contexts.attention, contexts.tokens, -1).cpu())
            self.codes.append(Code(grid.values.half().cpu(), grid.indices.int().cpu()))

    def _has_room(self, batch: SAEBatch) -> bool:
        """Return whether the batch is kept in memory, to draw examples from."""
        if not (self.context.options.examples and self.context.data.has_text):
            return False
        keep = batch.held_out.keep
        held = sum(map(len, self.tokens)) * keep.shape[1]
        width = max(code.values.shape[-1] for code in [batch.code, *self.codes])
        return held < _EXAMPLE_TOKENS and (held + keep.numel()) * width <= _EXAMPLE_VALUES

    def _prefix_sums(self, batch: SAEBatch, x: Tensor) -> dict[str, Tensor]:
        """Return L0 and squared error of each token from each prefix of a Matryoshka SAE."""
        sizes, code, sums = recorded_prefixes(batch.sae), batch.code, {}
        for size, recon in zip(sizes, prefix_reconstructions(batch.sae, code, sizes)):
            sums[f"l0 {size}"] = ((code.values > 0) & (code.indices < size)).sum(1)
            sums[f"error {size}"] = (x - recon.cpu().double()).square().sum(1)
        return sums

    def _prefixes(self) -> dict[str, list[dict[str, object]]]:
        """Return L0 and normalised MSE from each prefix of a Matryoshka SAE; {} for others."""
        sums, count = self.sums, self.sums["count"]
        total = spread(sums["square"], sums["sum"], count)
        points: list[dict[str, object]] = [
            {
                "latents": size,
                "l0": ratio(sums[f"l0 {size}"], count),
                "nmse": ratio(sums[f"error {size}"], total),
            }
            for size in recorded_prefixes(self.context.sae)
        ]
        return {"prefixes": points} if points else {}

    def finalize(self) -> Result:
        sae = self.context.sae
        density = self.moments.means[0]
        norms = sae.W_enc.norm(dim=1), sae.W_dec.norm(dim=1)
        cosine = (
            ((sae.W_enc * sae.W_dec).sum(1) / (norms[0] * norms[1]).clamp_min(1e-30)).detach().cpu()
        )
        logits, of_logits = self._direct_logits()
        values = {
            **self._reconstruction(),
            "dead_fraction": share(int((density == 0).sum()), len(density)),
            "density_histogram": _log_histogram(density),
            "cosine": cosine.mean().item(),
            "window": {"before": BEFORE, "after": AFTER},
            "bands": bands(self.context.options.examples),
            "on_share_of": "mass",
            "act_bin": self.bin,
            **self._dead_in_training(),
            **self._prefixes(),
            **of_logits,
            "notes": self._notes() + self._logit_notes,
        }
        arrays = {
            "density": density.float(),
            "mean_act": self.moments.mean_act.float(),
            "max_act": self.moments.largest,
            "encoder_norm": norms[0].detach().cpu(),
            "cosine": cosine,
            "power_means": self.moments.means[1:].float(),
            **self._bars(),
            **self._examples(),
            **logits,
        }
        if not self.context.data.has_text:
            return Result(values, arrays)
        vocabulary = token_strings(self.context.lm.tokenizer, range(self.context.lm.vocab))
        return Result(values, arrays, {"vocabulary": vocabulary})

    def _reconstruction(self) -> dict[str, Value]:
        sums = self.sums
        count = sums["count"]
        nmse = ratio(sums["error"], spread(sums["square"], sums["sum"], count))
        fvu = ratio(sums["raw_error"], spread(sums["raw_square"], sums["raw_sum"], count))
        explained = fvu.affine(-1, 1) if isinstance(fvu, Estimate) else fvu
        return {"nmse": nmse, "explained_variance": explained, "l0": ratio(sums["l0"], count)}

    def _dead_in_training(self) -> dict[str, Value]:
        metadata, n = self.context.sae.metadata, self.context.sae.shape.n_latents
        if "dead_fraction_training" not in metadata:
            return {}
        return {"dead_fraction_training": share(round(metadata["dead_fraction_training"] * n), n)}

    def _notes(self) -> list[str]:
        held = sum(map(len, self.tokens))
        if not 0 < held < self.contexts:
            return []
        return [
            f"examples, and what is counted beside them, are of the first {held:,} of "
            f"{self.contexts:,} contexts"
        ]

    def _direct_logits(self) -> tuple[dict[str, Tensor], dict[str, Value]]:
        """Return the ends of each latent's direct logits, and what they are of.

        Both are empty, with a note, where a decoder row has no logits of its own.
        """
        if not self.context.data.has_text:
            self._logit_notes = ["no examples, tokens or direct logits: there is no LM or text"]
            return {}, {}
        try:
            head = read_head(self.context.lm)
        except InputError as error:
            self._logit_notes = [f"no direct logits: {error}"]
            return {}, {}
        ends = head.ends(self.context.sae.W_dec)._asdict()
        arrays = {f"logits_{name}": part.cpu() for name, part in ends.items()}
        return arrays, {"direct_logits": head.describe()}

    def _bars(self) -> dict[str, Tensor]:
        """Return the non-zero bars of the histograms of absolute values, sorted by latent."""
        latent, bar = self.bars.nonzero(as_tuple=True)
        start = torch.zeros(len(self.bars) + 1, dtype=torch.int32)
        start[1:] = torch.bincount(latent, minlength=len(self.bars)).cumsum(0)
        return {"bar_start": start, "bar": (bar + 1).short(), "bar_count": self.bars[latent, bar]}

    def _examples(self) -> dict[str, Tensor]:
        """Choose example contexts for each latent, and count what it fires on and with.

        There are three sets of examples: its strongest activations, random ones, and random ones of
        each band of sizes.
        """
        if not self.tokens:
            return {}
        tokens = torch.cat(self.tokens)
        values, indices = Code.concat(self.codes)
        active = (values > 0).nonzero(as_tuple=True)
        value, latent = values[active].float().numpy(), indices[active].numpy()
        token = tokens[active[:2]].numpy()
        context, position = (column.numpy() for column in active[:2])
        noise, band_noise = np.random.default_rng(self.context.options.seed).random(
            (2, len(value)), np.float32
        )
        m, n = self.context.options.examples, self.context.sae.shape.n_latents
        samples = {
            "top": best_per_group(latent, context, value, n, m),
            "random": best_per_group(latent, context, noise, n, m),
            "band": best_per_band(latent, context, value, band_noise, n, m),
        }
        arrays: dict[str, Tensor] = {}
        columns = {
            "context": (context, -1, np.int32),
            "position": (position, -1, np.int32),
            "value": (value, 0, np.float32),
        }
        for sample, (entry, rank) in samples.items():
            for name, (column, empty, dtype) in columns.items():
                width = int(np.prod(list(bands(m).values()))) if sample == "band" else m
                table = np.full((n, width), empty, dtype)
                table[latent[entry], rank] = column[entry]
                arrays[f"{sample}_{name}"] = torch.from_numpy(table)
            arrays[f"{sample}_acts"] = windows(
                values, indices, arrays[f"{sample}_context"], arrays[f"{sample}_position"]
            )
        arrays["contexts"] = tokens.int()
        counts = {
            "histogram": histograms(latent, value, self.moments.largest.numpy()),
            **fired_on(latent, token, value, n, self.context.lm.vocab),
            **coactivation.find_coactivating(context * tokens.shape[1] + position, latent, n),
        }
        return arrays | {name: torch.from_numpy(array) for name, array in counts.items()}


def _log_histogram(density: Tensor) -> dict[str, list[float]]:
    """Count log10 of the densities that are not 0, in 40 bins from -6 to 0."""
    counts, edges = np.histogram(density[density > 0].log10().numpy(), bins=40, range=(-6, 0))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


# ---- examples ------------------------------------------------------------------------------------
#
# The functions below take activations as columns [a]: the latent, its context, its value. n is the
# number of latents, m the number of examples of each.


def bands(examples: int) -> dict[str, int]:
    """Return the number of size bands ("count") and of examples from each of them ("each").

    Example:
        >>> bands(9)
        {'count': 4, 'each': 5}
    """
    count = min(BANDS, examples)
    return {"count": count, "each": min(BAND_EXAMPLES, examples)}


def best_per_group(
    latent: np.ndarray, context: np.ndarray, rank: np.ndarray, n: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose each latent's m entries of highest rank, at most one of each context.

    Args:
        latent: the group of each entry, [a], from 0 to n - 1.
        context: its context, [a].
        rank: what to order by, [a].
        n: the number of groups.
        m: entries of each group, at most.

    Returns:
        The chosen entries, and the place of each in its group, from 0 (the highest) to m - 1.
    """
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


def best_per_band(
    latent: np.ndarray, context: np.ndarray, value: np.ndarray, rank: np.ndarray, n: int, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Do the same as `best_per_group`, with equally many entries from each band of values.

    The first places, 0 to `bands(m)["each"]` - 1, belong to the band of the largest values.
    """
    count, per_band = bands(m).values()
    band = band_of(latent, value, n, count)
    entry, place = best_per_group(
        latent.astype(np.int64) * count + band, context, rank, n * count, per_band
    )
    return entry, band[entry] * per_band + place


def band_of(latent: np.ndarray, value: np.ndarray, n: int, count: int) -> np.ndarray:
    """Return the band of each activation by its rank in its latent, [a].

    Band 0 has the largest values, band count - 1 the smallest; all hold equally many.
    """
    order = np.lexsort((-value, latent))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.searchsorted(latent[order], latent[order])
    return ranks * count // np.bincount(latent, minlength=n)[latent]


def windows(values: Tensor, indices: Tensor, context: Tensor, position: Tensor) -> Tensor:
    """Return the activation of each example's latent on the tokens around the example.

    Args:
        values: codes of all contexts, [c, t, k].
        indices: their latents, [c, t, k].
        context: the context of each example, [n, m]; -1: none.
        position: its position, [n, m].

    Returns:
        [n, m, BEFORE + 1 + AFTER] as float16; 0 outside of the context.
    """
    n, m = context.shape
    offsets = torch.arange(-BEFORE, AFTER + 1)
    out = torch.zeros(n, m, len(offsets), dtype=torch.float16)
    size = max(1, 16_384 // values.shape[-1])
    for first in range(0, n, size):
        part = slice(first, first + size)
        at = position[part, :, None].long() + offsets
        inside = (at >= 0) & (at < values.shape[1]) & (context[part, :, None] >= 0)
        rows = context[part, :, None].long().clamp_min(0).expand_as(at)
        columns = at.clamp(0, values.shape[1] - 1)
        latents = torch.arange(first, min(first + size, n)).view(-1, 1, 1, 1)
        hit = indices[rows, columns] == latents
        out[part] = ((values[rows, columns] * hit).sum(-1) * inside).half()
    return out


# ---- counts --------------------------------------------------------------------------------------


def histograms(latent: np.ndarray, value: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Count each latent's activations in equal bins from 0 to its largest value.

    Args:
        latent: the latent of each activation, [a].
        value: its value, [a].
        largest: the largest value of each latent, [n].

    Returns:
        Counts [n, BINS] as int32.
    """
    at = np.minimum(BINS - 1, value / largest[latent] * BINS).astype(np.int64)
    return (
        np.bincount(latent * BINS + at, minlength=len(largest) * BINS)
        .reshape(-1, BINS)
        .astype(np.int32)
    )


def fired_on(
    latent: np.ndarray, token: np.ndarray, value: np.ndarray, n: int, vocabulary: int
) -> dict[str, np.ndarray]:
    """Return the tokens that each latent fires on most, by the sum of its values.

    Args:
        latent: the latent of each activation, [a].
        token: the token it fired on, [a].
        value: its value there, [a].
        n: the number of latents.
        vocabulary: the number of token ids.

    Returns:
        on_token: token ids, the largest sum first, [n, TOKENS]; -1 where there are fewer.
        on_share: the token's share of the sum of the latent's values, [n, TOKENS].
    """
    pairs, of = np.unique(latent.astype(np.int64) * vocabulary + token, return_inverse=True)
    mass = np.bincount(of, value.astype(np.float64), minlength=len(pairs))
    total = np.bincount(latent, value.astype(np.float64), minlength=n)
    owner = pairs // vocabulary
    order = np.lexsort((-mass, owner))
    place = np.arange(len(order)) - np.searchsorted(owner, owner[order])
    order, place = order[place < TOKENS], place[place < TOKENS]
    tokens, shares = np.full((n, TOKENS), -1, np.int32), np.zeros((n, TOKENS), np.float32)
    tokens[owner[order], place] = pairs[order] % vocabulary
    shares[owner[order], place] = mass[order] / total[owner[order]]
    return {"on_token": tokens, "on_share": shares}


def spread(square: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return each document's squared distance to the mean over all documents, [documents].

    This is the squared error of predicting the mean, the denominator of a normalized MSE.

    Args:
        square: each document's sum of squared norms, [documents].
        total: each document's sum of vectors, [documents, d].
        count: each document's number of vectors, [documents].
    """
    return squared_distance(square, total, count, total.sum(0) / max(1, count.sum()))


def squared_distance(
    square: np.ndarray, total: np.ndarray, count: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """Return each document's squared distance to a given mean[d]; the rest as in `spread`."""
    return square - 2 * total @ mean + count * (mean @ mean)
