"""Does a latent matter to few predictions, or a little to all? Ablation sparsity: Gao et al. 2024,
section 4.5.

One active latent at one position p is taken out of the activation. The V logits at p and at the T -
1 positions after it change; from each position's changes their median is subtracted; (L1 / L2)^2 /
(V T) of all of them says which share of the predictions the latent matters to. That mixes two
things, which are reported apart too: how many tokens of the vocabulary (`sparsity_here`, of the
prediction at p alone), and how far into the text (`later`, the share of the squared effect after
p). Random channels of the activation, set to zero at the same positions, are what to compare with:
noise would give 2 / pi.

What the paper leaves open is decided so: the reconstruction's error stays in the activation (or
not: ablation_error); one random position is drawn from each of a random sample of contexts; every
active latent of such a position is ablated, alone; and every such pair of position and latent
counts once.
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
from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import Clustered, DocumentSums, Result, Value, ratio
from ksparse.lm.continuations import Fork
from ksparse.lm.model import LM
from ksparse.lm.tokens import TokenBatch
from ksparse.sae.model import Code
from ksparse.sae.normalization import Normalized

LISTED = 5  # tokens that a latent raises, and that it lowers, at each position of its table
BINS = 40  # of the histograms of sparsities
_BYTES = 2**28  # of the logits in memory at a time
_PART = 2**22  # changes of logits that are summed in float64 at a time


class AblationSite(NamedTuple):
    """A position in a context tokens[t], of which the first `text` are no padding; the predictions
    of `length` positions are looked at."""

    tokens: Tensor
    text: int
    position: int
    document: int
    length: int


class AblationEffects(NamedTuple):
    """What m ablations at one place do: sparsity[m] (NaN: nothing), the same of the prediction at
    the place alone, which share of the squared effect is on the predictions after it, norm[m] (L2),
    kl[m, T], loss_difference[m, T] (NaN: no next token), and the changes of logits [m, T, V] less
    their median over V."""

    sparsity: Tensor
    sparsity_here: Tensor
    later: Tensor
    norm: Tensor
    kl: Tensor
    loss_difference: Tensor
    changes: Tensor


class Ablation(Metric):
    """Ablation sparsity of random active latents and of random channels, and tables of what single
    latents do."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        options, length = context.options, context.data.acts.context
        if length < 2:
            raise InputError(
                f"contexts of {length} token have no position to ablate; train and evaluate with "
                "--acts.context of 2 or more"
            )
        self.horizon = min(options.ablation_horizon, length - 1)
        n = context.sae.shape.n_latents
        self.sample = _Sample(options.ablation_positions, self.horizon, _random(options.seed, 0))
        self.strongest = _Strongest(
            _random(options.seed, 1).permutation(n), options.ablation_latents or n
        )
        self.latents, self.channels = _Pairs(), _Pairs()
        self.tables: dict[str, Tensor] = {}

    @torch.inference_mode()
    def update(self, batch: SAEBatch) -> None:
        contexts = TokenBatch(*(field.cpu() for field in batch.held_out.contexts))
        self.sample.offer(contexts)
        self.strongest.update(batch, contexts)

    @torch.inference_mode()
    def compute(self, observe: Progress) -> None:
        places = self.sample.places()
        if not places:
            raise InputError(
                f"no context of the text has a kept position with {self.horizon - 1} tokens after "
                "it, as ablation needs; "
                "give longer texts, or a smaller --ablation-horizon"
            )
        numbers, tops, values = self.strongest.found(self.horizon)
        total, done = len(places) + len(tops), 0
        draw = _random(self.context.options.seed, 2)
        for some, fork in _forks(self.context.lm, places, self._most_contexts):
            self._ablate(fork, [places[i] for i in some], some, draw)
            done += len(some)
            observe("ablating latents", done, total)
        self.tables = self._empty_tables(numbers, tops, values)
        for some, fork in _forks(self.context.lm, tops, self._most_contexts):
            self._tabulate(fork, [tops[i] for i in some], torch.tensor(some))
            done += len(some)
            observe("ablating latents", done, total)

    # ---- ablations

    def _ablate(
        self, fork: Fork, places: list[AblationSite], numbers: list[int], draw: np.random.Generator
    ) -> None:
        """Ablate each active latent, and as many random channels, at the one place of each of the
        fork's contexts."""
        code, inputs, before = self._encoded(fork.x)
        row, slot = (code.values > 0).nonzero(as_tuple=True)
        latent = code.indices[row, slot]
        after = before[row] - self._contribution(inputs, row, latent, code.values[row, slot])
        for part, place, effects in self._effects(fork, places, row, before, after):
            self.latents.add(place, numbers[int(row[part.start])], effects, latent=latent[part])
        for part, place, effects in self._effects(
            fork, places, *_without_channels(fork.x, row, draw)
        ):
            self.channels.add(place, numbers[int(row[part.start])], effects)

    def _tabulate(self, fork: Fork, places: list[AblationSite], numbers: Tensor) -> None:
        """Ablate one latent at each of the fork's contexts, where it is strongest."""
        _, inputs, before = self._encoded(fork.x)
        row = torch.arange(len(places), device=before.device)
        latent, value = (
            self.tables[name][numbers].to(before.device) for name in ("latent", "value")
        )
        after = before - self._contribution(inputs, row, latent.long(), value)
        for part, place, effects in self._effects(fork, places, row, before, after):
            tables, number, length = self.tables, numbers[part.start], place.length
            tables["sparsity"][number] = effects.sparsity[0]
            tables["kl"][number, :length] = effects.kl[0].cpu()
            tables["loss_difference"][number, :length] = effects.loss_difference[0].cpu()
            present = -effects.changes[
                0
            ]  # what the latent's presence adds to the logits: original less ablated
            for name, largest in (("up", True), ("down", False)):
                best = present.topk(LISTED, -1, largest)
                tables[f"{name}_tokens"][number, :length] = best.indices.int().cpu()
                tables[f"{name}_values"][number, :length] = best.values.cpu()

    def _encoded(self, x: Tensor) -> tuple[Code, Normalized, Tensor]:
        """Return (code, normalised activations, raw activations that a latent is taken out of) of
        x[c, d]."""
        sae = self.context.sae
        inputs = sae.normalize(x)
        code = sae.encode_normalized(inputs.x)
        return (
            code,
            inputs,
            x
            if self.context.options.ablation_error == "keep"
            else inputs.restore(sae.decode_normalized(code)),
        )

    def _contribution(
        self, inputs: Normalized, row: Tensor, latent: Tensor, value: Tensor
    ) -> Tensor:
        """Return what latents add to the raw activation, [m, d]: restore(recon) - restore(recon
        without the latent)."""
        return value[:, None] * self.context.sae.W_dec[latent] * inputs.scale[row]

    def _effects(
        self, fork: Fork, places: list[AblationSite], row: Tensor, before: Tensor, after: Tensor
    ) -> Iterator[tuple[slice, AblationSite, AblationEffects]]:
        """Yield (which rows, their place, what they do) of m edits after[m, d] of contexts row[m],
        in order, before[c, d] their originals.

        The original is run in the same call as its edits, so that both are rounded alike.
        """
        lm, acts = self.context.lm, self.context.data.acts
        most = max(
            1, min(_BYTES // fork.row_bytes, acts.lm_batch * acts.context // places[0].length)
        )
        same = (after.to(lm.model.dtype) == before[row].to(lm.model.dtype)).all(
            1
        )  # no effect, and none by rounding either
        for first in range(0, len(row), most):
            own, inverse = row[first : first + most].unique_consecutive(return_inverse=True)
            logits = fork(
                torch.cat([own, row[first : first + most]]),
                torch.cat([before[own], after[first : first + most]]),
            ).float()
            original, ablated = logits[: len(own)], logits[len(own) :]
            start = 0
            for i, count in enumerate(inverse.bincount().tolist()):
                part, place = slice(first + start, first + start + count), places[int(own[i])]
                changes = ablated[start : start + count].sub_(original[i])
                changes[same[part]] = 0
                yield (
                    part,
                    place,
                    measure(
                        original[i].log_softmax(-1), changes, _targets(place).to(changes.device)
                    ),
                )
                start += count

    @property
    def _most_contexts(self) -> int:
        """How many contexts are forked at a time: a batch of the LM, if their logits are not too
        large."""
        return max(
            1,
            min(
                self.context.data.acts.lm_batch,
                _BYTES // (4 * self.horizon * self.context.lm.vocab),
            ),
        )

    # ---- the answer

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
            "n_positions": len(self.sample.places()),
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
        options, lm, found = self.context.options, self.context.lm, len(self.sample.places())
        notes = []
        if self.horizon < options.ablation_horizon:
            notes.append(
                f"ablation_horizon: contexts of {self.context.data.acts.context} tokens leave room "
                f"for {self.horizon}, "
                f"not {options.ablation_horizon}"
            )
        if found < options.ablation_positions:
            notes.append(
                f"ablation_positions: the text has {found} contexts with a position to ablate, one "
                f"each, not {options.ablation_positions}"
            )
        if lm.options.lm_dtype != "float32":
            notes.append(
                f"the LM computes in {lm.options.lm_dtype}: small changes of logits are rounded, "
                "which makes them look less sparse"
            )
        return notes

    def _empty_tables(
        self, numbers: Tensor, tops: list[AblationSite], values: Tensor
    ) -> dict[str, Tensor]:
        m, length, context = len(tops), self.horizon, self.context.data.acts.context
        tokens = (
            torch.stack(
                [
                    place.tokens.masked_fill(torch.arange(context) >= place.text, -1)
                    for place in tops
                ]
            )
            if tops
            else torch.zeros(0, context)
        )
        nan, listed = torch.full((m, length), torch.nan), (m, length, LISTED)
        return {
            "latent": numbers.int(),
            "context_tokens": tokens.int(),
            "value": values,
            "sparsity": torch.full((m,), torch.nan),
            "position": torch.tensor([place.position for place in tops], dtype=torch.int32),
            "kl": nan,
            "loss_difference": nan.clone(),
            "up_tokens": torch.full(listed, -1, dtype=torch.int32),
            "up_values": torch.zeros(listed),
            "down_tokens": torch.full(listed, -1, dtype=torch.int32),
            "down_values": torch.zeros(listed),
        }


# ---- the measure ---------------------------------------------------------------------------------


def sparsity(differences: Tensor) -> Tensor:
    """Return (L1 / L2)^2 / (T V) of differences of logits[r, T, V] less their median over V, [r] as
    float64: Gao et al. 2024, section 4.5.

    Of an even number of values, the median is the smaller of the two in the middle. NaN where
    nothing differs.
    """
    return _sparsity(*_norms(_centred(differences)), differences.shape[-1])


def measure(log_probs: Tensor, differences: Tensor, targets: Tensor) -> AblationEffects:
    """Return what ablations do that change the logits of log_probs[T, V] by differences[m, T, V];
    targets[T]: the next tokens, -1: none.

    kl is KL(original || ablated) of each position's prediction, loss_difference the loss of the
    next token, ablated - original, in nats.
    """
    changes = _centred(differences)
    l1, l2 = _norms(changes)
    shift = (log_probs + changes).logsumexp(
        -1
    )  # of the changes alone, so that small ones do not drown in the logits
    kl = shift - (log_probs.exp() * changes).sum(-1)
    chosen = changes.gather(
        -1, targets.clamp_min(0)[None, :, None].expand(len(changes), -1, 1)
    ).squeeze(-1)
    loss = (shift - chosen).masked_fill(targets < 0, torch.nan)
    here, size = l2[:, 0].square() / l2.square().sum(1), changes.shape[-1]
    return AblationEffects(
        _sparsity(l1, l2, size),
        _sparsity(l1[:, :1], l2[:, :1], size),
        1 - here,
        l2.square().sum(1).sqrt(),
        kl,
        loss,
        changes,
    )


def _centred(differences: Tensor) -> Tensor:
    return differences - differences.median(-1, keepdim=True).values


def _norms(changes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L1 and L2 norms [r, T] over V of changes[r, T, V], summed in float64, on the
    CPU."""
    parts = [
        part.cpu().double() if part.device.type == "mps" else part.double()  # which has no float64
        for part in changes.split(max(1, _PART // max(1, changes[:1].numel())))
    ]
    return torch.cat([part.abs().sum(-1).cpu() for part in parts]), torch.cat(
        [part.norm(dim=-1).cpu() for part in parts]
    )


def _sparsity(l1: Tensor, l2: Tensor, vocabulary: int) -> Tensor:
    """Return [r] from the norms [r, T] of each prediction's changes."""
    return l1.sum(1).square() / l2.square().sum(1) / (vocabulary * l1.shape[1])  # 0 / 0 is NaN


def _targets(place: AblationSite) -> Tensor:
    """Return the token after each of the place's positions, [T]; -1 where there is none."""
    positions = torch.arange(place.position + 1, place.position + 1 + place.length)
    return torch.where(
        positions < place.text, place.tokens[positions.clamp_max(len(place.tokens) - 1)], -1
    )


def _without_channels(
    x: Tensor, row: Tensor, draw: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, x[c, d], edits): in each context as many distinct random channels set to zero as
    it has rows, at most all."""
    d = x.shape[1]
    counts = row.bincount(minlength=len(x)).clamp_max(d)
    channel = torch.from_numpy(
        np.concatenate([draw.permutation(d)[:count] for count in counts.tolist()])
    ).to(x.device)
    row = torch.arange(len(x), device=x.device).repeat_interleave(counts)
    after = x[row]
    after[torch.arange(len(row), device=x.device), channel] = 0
    return row, x, after


def _forks(lm: LM, places: list[AblationSite], most: int) -> Iterator[tuple[list[int], Fork]]:
    """Yield (numbers of places, their fork), places at the same position together, at most so
    many."""

    def key(i: int) -> tuple[int, int]:
        return places[i].position, places[i].length

    for (at, length), group in groupby(sorted(range(len(places)), key=key), key):
        numbers = list(group)
        for some in (numbers[first : first + most] for first in range(0, len(numbers), most)):
            tokens = torch.stack([places[i].tokens for i in some])
            attention = (
                torch.arange(tokens.shape[1])
                < torch.tensor([places[i].text for i in some])[:, None]
            )
            yield some, lm.fork(tokens, attention, at, length)


# ---- what is ablated -----------------------------------------------------------------------------


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])


def _texts(contexts: TokenBatch) -> Tensor:
    """Return how many tokens each context has before its padding, [b]."""
    return contexts.attention.long().cumprod(1).sum(1)


class _Sample:
    """A random sample of contexts, so many of all that come by, and in each a random position that
    can be ablated."""

    def __init__(self, size: int, horizon: int, draw: np.random.Generator):
        self.size, self.horizon, self.draw = size, horizon, draw
        self._heap: list[
            tuple[float, int, AblationSite]
        ] = []  # those with the smallest random keys, the largest of them first
        self._count = 0

    def offer(self, contexts: TokenBatch) -> None:
        position, texts = torch.arange(contexts.keep.shape[1]), _texts(contexts)
        possible = contexts.keep & (position >= 1) & (position + self.horizon <= texts[:, None])
        for row, where in enumerate(possible):
            key, at = self.draw.random(
                2
            )  # for each context, so that the sample does not depend on batches
            self._count += 1
            where = where.nonzero().squeeze(1)
            if not len(where) or (len(self._heap) == self.size and -key <= self._heap[0][0]):
                continue
            p = int(where[int(at * len(where))])
            place = AblationSite(
                contexts.tokens[row].clone(),
                int(texts[row]),
                p,
                int(contexts.documents[row, p]),
                self.horizon,
            )
            (heapq.heappush if len(self._heap) < self.size else heapq.heapreplace)(
                self._heap, (-key, self._count, place)
            )

    def places(self) -> list[AblationSite]:
        """Return the sample in the order of the text."""
        return [place for _, _, place in sorted(self._heap, key=lambda entry: entry[1])]


class _Strongest:
    """Where each of the first so many latents of an order that fire is strongest. The first of
    equals counts."""

    def __init__(self, order: np.ndarray, most: int):
        self.order, self.most = torch.from_numpy(order), most
        self.value = torch.zeros(len(order))
        self.context, self.position = (torch.zeros(len(order), dtype=torch.long) for _ in range(2))
        self._contexts: dict[
            int, tuple[Tensor, int, Tensor]
        ] = {}  # tokens, text, documents of those that are still somebody's
        self._count = 0

    def update(self, batch: SAEBatch, contexts: TokenBatch) -> None:
        values, indices = (part.cpu() for part in batch.code)
        active = values > 0
        latent, value, row = indices[active], values[active].float(), active.nonzero()[:, 0]
        best = torch.zeros_like(self.value).scatter_reduce_(0, latent, value, "amax")
        at_best = value == best[latent]
        where = torch.full_like(self.context, len(values)).scatter_reduce_(
            0, latent[at_best], row[at_best], "amin"
        )
        better = (best > self.value).nonzero().squeeze(1)
        context, position = contexts.keep.nonzero(as_tuple=True)
        self.value[better] = best[better]
        self.context[better] = self._count + context[where[better]]
        self.position[better] = position[where[better]]
        self._remember(contexts)

    def _remember(self, contexts: TokenBatch) -> None:
        needed, texts = set(self.context[self.chosen()].tolist()), _texts(contexts)
        self._contexts = {
            number: kept for number, kept in self._contexts.items() if number in needed
        }
        for number in needed - set(self._contexts):
            i = number - self._count
            self._contexts[number] = (
                contexts.tokens[i].clone(),
                int(texts[i]),
                contexts.documents[i].clone(),
            )
        self._count += len(contexts.tokens)

    def chosen(self) -> Tensor:
        """Return the chosen latents [m]. One that is left out for an earlier one never comes back,
        so its context may be forgotten."""
        return self.order[self.value[self.order] > 0][: self.most]

    def found(self, horizon: int) -> tuple[Tensor, list[AblationSite], Tensor]:
        """Return (latents [m], their places, with as much of the horizon as the context has, their
        values [m])."""
        chosen, places = self.chosen(), []
        for context, position in zip(self.context[chosen].tolist(), self.position[chosen].tolist()):
            tokens, text, documents = self._contexts[context]
            places.append(
                AblationSite(
                    tokens, text, position, int(documents[position]), min(horizon, text - position)
                )
            )
        return chosen, places, self.value[chosen]


# ---- what ablations did --------------------------------------------------------------------------


class _Pairs:
    """Pairs of a sampled position and something ablated there, one row each."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = defaultdict(list)

    def add(
        self, place: AblationSite, number: int, effects: AblationEffects, **columns: Tensor
    ) -> None:
        m = len(effects.sparsity)
        rows = {
            "position": torch.full((m,), number),
            "document": torch.full((m,), place.document),
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
        """Return the rows of a column that have a value, each in its document; nothing if none
        has."""
        there = ~self[name].isnan()
        return [Clustered(self["document"][there], self[name][there])] if there.any() else []

    def mean(self, name: str) -> Value:
        """Return the mean over pairs that have a value."""
        return Clustered.mean(self.clustered(name))

    def mean_per_position(self) -> Value:
        """Return the mean over positions of the mean sparsity of the position's pairs."""
        there = ~self["sparsity"].isnan()
        if not there.any():
            return {"value": None, "se": None}
        _, inverse, counts = self["position"][there].unique(return_inverse=True, return_counts=True)
        means = (
            torch.zeros(len(counts), dtype=torch.float64).index_add_(
                0, inverse, self["sparsity"][there]
            )
            / counts
        )
        documents = torch.zeros(len(counts), dtype=torch.long).index_copy_(
            0, inverse, self["document"][there]
        )
        return Clustered.mean([Clustered(documents, means)])

    def weighted(self) -> Value:
        """Return the mean sparsity, each pair weighted by the L2 norm of its effect."""
        there = ~self["sparsity"].isnan()
        if not there.any():
            return {"value": None, "se": None}
        sums = DocumentSums()
        sums.add(
            self["document"][there],
            weight=self["norm"][there],
            weighted=(self["norm"] * self["sparsity"])[there],
        )
        return ratio(sums["weighted"], sums["weight"])

    def histogram(self) -> dict[str, list[float]]:
        values = self["sparsity"]
        counts, edges = np.histogram(values[~values.isnan()].numpy(), BINS, (0, 1))
        return {"edges": edges.tolist(), "counts": counts.tolist()}


def _difference(a: _Pairs, b: _Pairs, name: str) -> Value:
    """Return mean(a) - mean(b) of a column on the same documents, as twice the mean of the two
    means a and -b."""
    ours, theirs = a.clustered(name), b.clustered(name)
    if not ours or not theirs:
        return {"value": None, "se": None}
    half = Clustered.mean(
        [
            ours[0],
            Clustered(torch.from_numpy(theirs[0].clusters), torch.from_numpy(-theirs[0].values)),
        ]
    )
    return {key: None if value is None else 2 * value for key, value in half.items()}
