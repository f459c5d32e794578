"""Does a latent matter to few predictions, or a little to all? Gao et al. 2024, section 4.5.

One active latent is removed from the activation at one position p. The logits of V tokens at p and
at the T - 1 positions after it change; from each position's changes their median is subtracted.
The ablation sparsity, (L1 / L2)^2 / (V T) of all these changes, is the share of the predictions
that the latent matters to. It mixes two things, which are also reported alone: how many tokens of
the vocabulary are affected (`sparsity_here`, of the prediction at p), and how far into the text
the effect reaches (`later`, the share of the squared effect after p). The baseline is random
channels of the activation, set to zero at the same positions. Gaussian noise has 2 / pi.

What the paper leaves open is decided so: the reconstruction error stays in the activation (the
option `ablation_error` removes it); contexts are sampled at random, with one random position of
each; every active latent of that position is ablated, alone; and every pair of a position and a
latent counts once.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import (
    Clustered,
    DocumentSums,
    Estimate,
    Result,
    Value,
    no_value,
    ratio,
)
from ksparse.lm.continuations import Branch
from ksparse.lm.model import LM
from ksparse.lm.tokens import TokenBatch
from ksparse.planning.evaluation import ABLATING, FILLING_TABLES
from ksparse.progress import Progress
from ksparse.sae.model import Code
from ksparse.sae.normalization import Normalized

LISTED = 5
"""Tokens listed as raised, and as lowered, at each position of a latent's table."""
BINS = 40
"""Bins of the histograms of sparsities, from 0 to 1."""
_BYTES = 2**28  # of logits in memory at a time
_PART = 2**22  # changes of logits that are summed in float64 at a time


class AblationSite(NamedTuple):
    """A position of a context at which something is ablated.

    tokens: the context [t], of which the first `text` are not padding. position: where. document:
    the position's document. length: predictions that are compared, from `position` on.
    """

    tokens: Tensor
    text: int
    position: int
    document: int
    length: int


class AblationEffects(NamedTuple):
    """What m ablations at one site do to T predictions over V tokens.

    sparsity: ablation sparsity [m]; NaN without effect. sparsity_here: the same of the first
    prediction alone [m]. later: the share of the squared effect on the others [m]. norm: L2 norm of
    all changes [m]. kl: KL(original || ablated) [m, T], in nats. loss_difference: ablated less
    original [m, T]; NaN without a next token. changes: of the logits [m, T, V], less their median
    over V.
    """

    sparsity: Tensor
    sparsity_here: Tensor
    later: Tensor
    norm: Tensor
    kl: Tensor
    loss_difference: Tensor
    changes: Tensor


class Ablation(Metric):
    """Ablation sparsity of random active latents and of random channels, and a table of the effects
    of each latent where it is strongest.
    """

    def __init__(self, context: EvalContext):
        super().__init__(context)
        options, length = context.options, context.data.acts.context
        self.horizon = min(options.ablation_horizon, length - 1)
        n = context.sae.shape.n_latents
        self.sample = _SiteSample(
            options.ablation_positions, self.horizon, _random(options.seed, 0)
        )
        self.strongest = _StrongestActivations(
            _random(options.seed, 1).permutation(n), options.ablation_latents or n
        )
        self.latents, self.channels = _AblationTable(), _AblationTable()
        self.tables: dict[str, Tensor] = {}

    @torch.inference_mode()
    def update(self, batch: SAEBatch) -> None:
        contexts = TokenBatch(*(field.cpu() for field in batch.held_out.contexts))
        self.sample.update(contexts)
        self.strongest.update(batch, contexts)

    @torch.inference_mode()
    def compute(self, progress: Progress) -> None:
        sites = self.sample.sites()
        if not sites:
            raise InputError(
                f"no context of the text has a kept position with {self.horizon - 1} tokens after "
                "it, as ablation needs; "
                "give longer texts, or a smaller --ablation-horizon"
            )
        latents, table_sites, values = self.strongest.sites(self.horizon)
        done, generator = 0, _random(self.context.options.seed, 2)
        progress(ABLATING, 0, len(sites))
        for indices, fork in _forks(self.context.lm, sites, self._max_contexts):
            self._ablate(fork, [sites[i] for i in indices], indices, generator)
            done += len(indices)
            progress(ABLATING, done, len(sites))
        done, self.tables = 0, self._empty_tables(latents, table_sites, values)
        progress(FILLING_TABLES, 0, len(table_sites))
        for indices, fork in _forks(self.context.lm, table_sites, self._max_contexts):
            self._fill_tables(fork, [table_sites[i] for i in indices], torch.tensor(indices))
            done += len(indices)
            progress(FILLING_TABLES, done, len(table_sites))

    # ---- ablations

    def _ablate(
        self,
        fork: Branch,
        sites: list[AblationSite],
        indices: list[int],
        generator: np.random.Generator,
    ) -> None:
        """Ablate each active latent, and as many random channels, at each site of a fork.

        `indices` are the sites' positions in the sample.
        """
        code, inputs, before = self._encode(fork.x)
        row, slot = (code.values > 0).nonzero(as_tuple=True)
        latent = code.indices[row, slot]
        after = before[row] - self._contribution(inputs, row, latent, code.values[row, slot])
        for part, site, effects in self._effects(fork, sites, row, before, after):
            self.latents.add(site, indices[int(row[part.start])], effects, latent=latent[part])
        for part, site, effects in self._effects(
            fork, sites, *_without_channels(fork.x, row, generator)
        ):
            self.channels.add(site, indices[int(row[part.start])], effects)

    def _fill_tables(self, fork: Branch, sites: list[AblationSite], indices: Tensor) -> None:
        """Ablate one latent at each site of a fork, and write its effects into the tables."""
        tables = self.tables
        _, inputs, before = self._encode(fork.x)
        row = torch.arange(len(sites), device=before.device)
        latent, value = (tables[name][indices].to(before.device) for name in ("latent", "value"))
        after = before - self._contribution(inputs, row, latent.long(), value)
        for part, site, effects in self._effects(fork, sites, row, before, after):
            index, length = indices[part.start], site.length
            tables["sparsity"][index] = effects.sparsity[0]
            tables["kl"][index, :length] = effects.kl[0].cpu()
            tables["loss_difference"][index, :length] = effects.loss_difference[0].cpu()
            added = -effects.changes[0]  # by the latent's presence: original less ablated logits
            for name, largest in (("up", True), ("down", False)):
                best = added.topk(LISTED, -1, largest)
                tables[f"{name}_tokens"][index, :length] = best.indices.int().cpu()
                tables[f"{name}_values"][index, :length] = best.values.cpu()

    def _encode(self, x: Tensor) -> tuple[Code, Normalized, Tensor]:
        """Return the codes and normalized inputs of x[c, d], and the raw activations [c, d] that
        latents are removed from."""
        sae = self.context.sae
        inputs = sae.normalize(x)
        code = sae.encode_normalized(inputs.x)
        keeps_error = self.context.options.ablation_error == "keep"
        return code, inputs, x if keeps_error else inputs.restore(sae.decode_normalized(code))

    def _contribution(
        self, inputs: Normalized, row: Tensor, latent: Tensor, value: Tensor
    ) -> Tensor:
        """Return what latents add to the raw activation, [m, d]: restore(recon) - restore(recon
        without the latent)."""
        return value[:, None] * self.context.sae.W_dec[latent] * inputs.scale[row]

    def _effects(
        self, fork: Branch, sites: list[AblationSite], row: Tensor, before: Tensor, after: Tensor
    ) -> Iterator[tuple[slice, AblationSite, AblationEffects]]:
        """Yield the effects of m edits, those of one site together, as (edits, site, effects).

        Edit i replaces before[c, d] at context row[i] by after[m, d] at i; rows are in ascending
        order. The original runs in the same call as its edits, so that both are rounded alike.
        """
        lm, acts = self.context.lm, self.context.data.acts
        size = max(
            1, min(_BYTES // fork.row_bytes, acts.lm_batch * acts.context // sites[0].length)
        )
        # equal in the LM's precision: no effect, so none by rounding either
        same = (after.to(lm.model.dtype) == before[row].to(lm.model.dtype)).all(1)
        for first in range(0, len(row), size):
            contexts, inverse = row[first : first + size].unique_consecutive(return_inverse=True)
            logits = fork(
                torch.cat([contexts, row[first : first + size]]),
                torch.cat([before[contexts], after[first : first + size]]),
            ).float()
            original, ablated = logits[: len(contexts)], logits[len(contexts) :]
            start = 0
            for i, count in enumerate(inverse.bincount().tolist()):
                part, site = slice(first + start, first + start + count), sites[int(contexts[i])]
                changes = ablated[start : start + count].sub_(original[i])
                changes[same[part]] = 0
                log_probs, targets = original[i].log_softmax(-1), _targets(site).to(changes.device)
                yield part, site, measure(log_probs, changes, targets)
                start += count

    @property
    def _max_contexts(self) -> int:
        """Contexts in one fork: a batch of the LM, or as many as have room for their logits."""
        return max(
            1,
            min(
                self.context.data.acts.lm_batch,
                _BYTES // (4 * self.horizon * self.context.lm.vocab),
            ),
        )

    # ---- the result

    def finalize(self) -> Result:
        latents, channels, size = self.latents, self.channels, self.horizon * self.context.lm.vocab
        sparsity = latents.mean("sparsity")
        values = {
            "ablation_sparsity": sparsity,
            "ablation_sparsity_per_position": latents.mean_per_position(),
            "ablation_sparsity_weighted": latents.weighted(),
            "channel_sparsity": channels.mean("sparsity"),
            "difference": _difference(channels, latents, "sparsity"),
            "sparsity_here": latents.mean("sparsity_here"),
            "channel_sparsity_here": channels.mean("sparsity_here"),
            "difference_here": _difference(channels, latents, "sparsity_here"),
            "later": latents.mean("later"),
            "channel_later": channels.mean("later"),
            "effective_tokens": {
                key: None if value is None else value * size for key, value in sparsity.items()
            },
            "kl": latents.mean("kl"),
            "channel_kl": channels.mean("kl"),
            "loss_difference": latents.mean("loss_difference"),
            "n_positions": len(self.sample.sites()),
            "n_ablations": len(latents),
            "n_without_effect": latents.without_effect,
            "n_channels": len(channels),
            "n_channels_without_effect": channels.without_effect,
            "horizon": self.horizon,
            "n_latents": len(self.tables["latent"]),
            "histogram": latents.histogram(),
            "channel_histogram": channels.histogram(),
            "notes": self._notes(),
        }
        pairs = {
            "pair_latent": latents["latent"].int(),
            "pair_document": latents["document"].int(),
            "pair_sparsity": latents["sparsity"].float(),
            "pair_norm": latents["norm"].float(),
        }
        return Result(values, {**self.tables, **pairs})

    def _notes(self) -> list[str]:
        options, lm, count = self.context.options, self.context.lm, len(self.sample.sites())
        notes = []
        if self.horizon < options.ablation_horizon:
            notes.append(
                f"ablation_horizon: contexts of {self.context.data.acts.context} tokens leave room "
                f"for {self.horizon}, not {options.ablation_horizon}"
            )
        if count < options.ablation_positions:
            notes.append(
                f"ablation_positions: the text has {count} contexts with a position to ablate, one "
                f"each, not {options.ablation_positions}"
            )
        if lm.options.lm_dtype != "float32":
            notes.append(
                f"the LM computes in {lm.options.lm_dtype}: small changes of logits are rounded, "
                "which makes them look less sparse"
            )
        return notes

    def _empty_tables(
        self, latents: Tensor, sites: list[AblationSite], values: Tensor
    ) -> dict[str, Tensor]:
        """Return the tables of m latents, with the effects still to be filled in."""
        m, length, context = len(sites), self.horizon, self.context.data.acts.context
        tokens = torch.zeros(0, context)
        if sites:
            positions = torch.arange(context)
            tokens = torch.stack(
                [site.tokens.masked_fill(positions >= site.text, -1) for site in sites]
            )
        nan, listed = torch.full((m, length), torch.nan), (m, length, LISTED)
        return {
            "latent": latents.int(),
            "context_tokens": tokens.int(),
            "value": values,
            "sparsity": torch.full((m,), torch.nan),
            "position": torch.tensor([site.position for site in sites], dtype=torch.int32),
            "kl": nan,
            "loss_difference": nan.clone(),
            "up_tokens": torch.full(listed, -1, dtype=torch.int32),
            "up_values": torch.zeros(listed),
            "down_tokens": torch.full(listed, -1, dtype=torch.int32),
            "down_values": torch.zeros(listed),
        }


# ---- the measure ---------------------------------------------------------------------------------


def sparsity(differences: Tensor) -> Tensor:
    """Return the ablation sparsity (L1 / L2)^2 / (T V), after subtracting medians over V.

    Gao et al. 2024, section 4.5. Of an even number of values, the median is the smaller of the two
    in the middle.

    Args:
        differences: changes of logits by r ablations, [r, T, V].

    Returns:
        [r] as float64, from 1 / (T V) for one changed logit to 1; NaN where nothing changes.

    Example:
        >>> import torch
        >>> one_of_ten = torch.zeros(1, 1, 10)
        >>> one_of_ten[0, 0, 3] = 2.0
        >>> round(sparsity(one_of_ten).item(), 6)
        0.1
    """
    return _sparsity(*_norms(_subtract_median(differences)), differences.shape[-1])


def measure(log_probs: Tensor, differences: Tensor, targets: Tensor) -> AblationEffects:
    """Measure what ablations do to the predictions at one site.

    Args:
        log_probs: the original log-probabilities, [T, V].
        differences: what each ablation adds to the logits, [m, T, V].
        targets: the next tokens, [T]; -1 where there is none.
    """
    changes = _subtract_median(differences)
    l1, l2 = _norms(changes)
    # from the changes alone, so that small ones are not lost in the rounding of the logits
    shift = (log_probs + changes).logsumexp(-1)
    kl = shift - (log_probs.exp() * changes).sum(-1)
    index = targets.clamp_min(0)[None, :, None].expand(len(changes), -1, 1)
    target_changes = changes.gather(-1, index).squeeze(-1)
    loss = (shift - target_changes).masked_fill(targets < 0, torch.nan)
    here, vocabulary = l2[:, 0].square() / l2.square().sum(1), changes.shape[-1]
    return AblationEffects(
        _sparsity(l1, l2, vocabulary),
        _sparsity(l1[:, :1], l2[:, :1], vocabulary),
        1 - here,
        l2.square().sum(1).sqrt(),
        kl,
        loss,
        changes,
    )


def _subtract_median(differences: Tensor) -> Tensor:
    return differences - differences.median(-1, keepdim=True).values


def _norms(changes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L1 and L2 norms [r, T] over V of changes[r, T, V], summed in float64, on the
    CPU."""
    parts = [
        part.cpu().double() if part.device.type == "mps" else part.double()  # mps has no float64
        for part in changes.split(max(1, _PART // max(1, changes[:1].numel())))
    ]
    l1 = torch.cat([part.abs().sum(-1).cpu() for part in parts])
    l2 = torch.cat([part.norm(dim=-1).cpu() for part in parts])
    return l1, l2


def _sparsity(l1: Tensor, l2: Tensor, vocabulary: int) -> Tensor:
    """Return [r] from the norms [r, T] of each prediction's changes."""
    return l1.sum(1).square() / l2.square().sum(1) / (vocabulary * l1.shape[1])  # 0 / 0 is NaN


def _targets(site: AblationSite) -> Tensor:
    """Return the next token of each of the site's predictions, [T]; -1 where there is none."""
    positions = torch.arange(site.position + 1, site.position + 1 + site.length)
    return torch.where(
        positions < site.text, site.tokens[positions.clamp_max(len(site.tokens) - 1)], -1
    )


def _without_channels(
    x: Tensor, row: Tensor, generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Set random channels of x[c, d] to zero, one in each edit; return (row, x, edits).

    Each context gets as many distinct channels as it has entries in `row`, at most d.
    """
    d = x.shape[1]
    counts = row.bincount(minlength=len(x)).clamp_max(d)
    channel = torch.from_numpy(
        np.concatenate([generator.permutation(d)[:count] for count in counts.tolist()])
    ).to(x.device)
    row = torch.arange(len(x), device=x.device).repeat_interleave(counts)
    after = x[row]
    after[torch.arange(len(row), device=x.device), channel] = 0
    return row, x, after


def _forks(
    lm: LM, sites: list[AblationSite], max_contexts: int
) -> Iterator[tuple[list[int], Branch]]:
    """Yield (indices of sites, their fork): sites of equal position and length share a fork."""

    def key(i: int) -> tuple[int, int]:
        return sites[i].position, sites[i].length

    for (position, length), group in groupby(sorted(range(len(sites)), key=key), key):
        equal = list(group)
        for first in range(0, len(equal), max_contexts):
            indices = equal[first : first + max_contexts]
            tokens = torch.stack([sites[i].tokens for i in indices])
            text = torch.tensor([sites[i].text for i in indices])
            attention = torch.arange(tokens.shape[1]) < text[:, None]
            yield indices, lm.branch_from(tokens, attention, position, length)


# ---- sampling ------------------------------------------------------------------------------------


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])


def _text_lengths(contexts: TokenBatch) -> Tensor:
    """Return how many tokens each context has before its padding, [b]."""
    return contexts.attention.long().cumprod(1).sum(1)


class _SiteSample:
    """A uniform sample of `size` contexts, with one random position of each that can be ablated."""

    def __init__(self, size: int, horizon: int, generator: np.random.Generator):
        self.size, self.horizon, self.generator = size, horizon, generator
        # the sites with the smallest random keys, as a heap whose top has the largest key
        self._heap: list[tuple[float, int, AblationSite]] = []
        self._count = 0

    def update(self, contexts: TokenBatch) -> None:
        position, text = torch.arange(contexts.keep.shape[1]), _text_lengths(contexts)
        possible = contexts.keep & (position >= 1) & (position + self.horizon <= text[:, None])
        for row, mask in enumerate(possible):
            # two draws for every context, so that the sample does not depend on batch sizes
            key, fraction = self.generator.random(2)
            self._count += 1
            positions = mask.nonzero().squeeze(1)
            full = len(self._heap) == self.size
            if not len(positions) or (full and -key <= self._heap[0][0]):
                continue
            at = int(positions[int(fraction * len(positions))])
            site = AblationSite(
                contexts.tokens[row].clone(),
                int(text[row]),
                at,
                int(contexts.documents[row, at]),
                self.horizon,
            )
            push = heapq.heapreplace if full else heapq.heappush
            push(self._heap, (-key, self._count, site))

    def sites(self) -> list[AblationSite]:
        """Return the sample in the order of the text."""
        return [site for _, _, site in sorted(self._heap, key=lambda entry: entry[1])]


class _StrongestActivations:
    """The strongest activation of each latent; of equal ones the first.

    `chosen` are the first `size` latents of `order` that have fired.
    """

    def __init__(self, order: np.ndarray, size: int):
        self.order, self.size = torch.from_numpy(order), size
        self.value = torch.zeros(len(order))
        self.context, self.position = (torch.zeros(len(order), dtype=torch.long) for _ in range(2))
        # (tokens, text, documents) of the contexts that hold a chosen latent's activation
        self._contexts: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._count = 0

    def update(self, batch: SAEBatch, contexts: TokenBatch) -> None:
        values, indices = (part.cpu() for part in batch.code)
        active = values > 0
        latent, value, row = indices[active], values[active].float(), active.nonzero()[:, 0]
        best = torch.zeros_like(self.value).scatter_reduce_(0, latent, value, "amax")
        at_best = value == best[latent]
        first_row = torch.full_like(self.context, len(values)).scatter_reduce_(
            0, latent[at_best], row[at_best], "amin"
        )
        better = (best > self.value).nonzero().squeeze(1)
        context, position = contexts.keep.nonzero(as_tuple=True)
        self.value[better] = best[better]
        self.context[better] = self._count + context[first_row[better]]
        self.position[better] = position[first_row[better]]
        self._store_contexts(contexts)

    def _store_contexts(self, contexts: TokenBatch) -> None:
        """Keep the contexts of chosen latents, and drop those that are no longer needed.

        A latent that an earlier one has displaced is never chosen again, so dropping is safe.
        """
        needed, text = set(self.context[self.chosen()].tolist()), _text_lengths(contexts)
        self._contexts = {
            number: stored for number, stored in self._contexts.items() if number in needed
        }
        for number in needed - set(self._contexts):
            i = number - self._count
            self._contexts[number] = (
                contexts.tokens[i].clone(),
                int(text[i]),
                contexts.documents[i].clone(),
            )
        self._count += len(contexts.tokens)

    def chosen(self) -> Tensor:
        """Return the chosen latents, [m]."""
        return self.order[self.value[self.order] > 0][: self.size]

    def sites(self, horizon: int) -> tuple[Tensor, list[AblationSite], Tensor]:
        """Return the chosen latents [m], their sites, and their values [m].

        A site has as much of the horizon as its context has text.
        """
        chosen, sites = self.chosen(), []
        for context, position in zip(self.context[chosen].tolist(), self.position[chosen].tolist()):
            tokens, text, documents = self._contexts[context]
            length = min(horizon, text - position)
            sites.append(AblationSite(tokens, text, position, int(documents[position]), length))
        return chosen, sites, self.value[chosen]


# ---- statistics ----------------------------------------------------------------------------------


class _AblationTable:
    """The effects of ablations in columns, a row for each pair of a sampled site and something
    ablated there."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = defaultdict(list)

    def add(
        self, site: AblationSite, number: int, effects: AblationEffects, **columns: Tensor
    ) -> None:
        """Add the m ablations at the sample's site of this number."""
        m = len(effects.sparsity)
        rows = {
            "position": torch.full((m,), number),
            "document": torch.full((m,), site.document),
            "sparsity": effects.sparsity,
            "sparsity_here": effects.sparsity_here,
            "later": effects.later,
            "norm": effects.norm,
            "kl": effects.kl.cpu().double().mean(1),
            "loss_difference": effects.loss_difference.nanmean(1),
            **columns,
        }
        for name, column in rows.items():
            self._columns[name].append(column.cpu())

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self._columns[name]) if self._columns[name] else torch.zeros(0)

    def __len__(self) -> int:
        return len(self["sparsity"])

    @property
    def without_effect(self) -> int:
        return int(self["sparsity"].isnan().sum())

    def clustered(self, name: str) -> list[Clustered]:
        """Return the values of a column that are not NaN, by document; an empty list if all are."""
        valid = ~self[name].isnan()
        return [Clustered(self["document"][valid], self[name][valid])] if valid.any() else []

    def mean(self, name: str) -> Value:
        """Return the mean of the values of a column that are not NaN."""
        return Clustered.mean(self.clustered(name))

    def mean_per_position(self) -> Value:
        """Return the mean over positions of each position's mean sparsity."""
        valid = ~self["sparsity"].isnan()
        if not valid.any():
            return no_value()
        _, inverse, counts = self["position"][valid].unique(return_inverse=True, return_counts=True)
        totals = torch.zeros(len(counts), dtype=torch.float64)
        totals.index_add_(0, inverse, self["sparsity"][valid])
        documents = torch.zeros(len(counts), dtype=torch.long)
        documents.index_copy_(0, inverse, self["document"][valid])
        return Clustered.mean([Clustered(documents, totals / counts)])

    def weighted(self) -> Value:
        """Return the mean sparsity, each ablation weighted by the L2 norm of its effect."""
        valid = ~self["sparsity"].isnan()
        if not valid.any():
            return no_value()
        sums = DocumentSums()
        sums.add(
            self["document"][valid],
            weight=self["norm"][valid],
            weighted=(self["norm"] * self["sparsity"])[valid],
        )
        return ratio(sums["weighted"], sums["weight"])

    def histogram(self) -> dict[str, list[float]]:
        values = self["sparsity"]
        counts, edges = np.histogram(values[~values.isnan()].numpy(), BINS, (0, 1))
        return {"edges": edges.tolist(), "counts": counts.tolist()}


def _difference(a: _AblationTable, b: _AblationTable, name: str) -> Value:
    """Return mean(a) - mean(b) of a column, paired by document."""
    first, second = a.mean(name), b.mean(name)
    if not isinstance(first, Estimate) or not isinstance(second, Estimate):
        return no_value()
    return first - second
