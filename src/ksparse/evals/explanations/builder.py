"""Build explanations of latents from random activations: Neuron-to-Graph, as in Gao et al. 2024,
section 4.3.

1. For each example, find the shortest suffix of its context on which the latent keeps at least half
   of its activation.
2. Replace each token of the suffix by a padding token; where the latent keeps more than half, the
   token becomes ANY.
3. If a padding token in front of the suffix takes more than half of the activation away, anchor the
   pattern to the beginning of a document.

The LM reads a suffix in place of a whole context, after BOS if contexts have one. The examples of
all latents are read together, and equal sequences only once.

Documents are split into four parts by number: explanations are built on two of them, scaled on the
third, and scored on the fourth (`n2g` scores on the last two).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.explanations.patterns import (
    ANY,
    GreedyMatcher,
    Matcher,
    Predictor,
    TokenPattern,
    merge_patterns,
)
from ksparse.lm.model import LM
from ksparse.lm.tokens import token_strings
from ksparse.progress import FINDING_SUFFIXES, FINDING_WILDCARDS, Progress, no_progress
from ksparse.sae.model import SAE, Code

MIN_EXAMPLES = 2
"""Examples that a latent needs to be explained."""
HALF = 0.5
"""Share of an activation that a shortened or changed text has to keep."""
_ROW = 2  # tokens that a sequence costs besides its own: BOS, and the SAE at the last token
BUILD, SCALE, SCORE = (0, 1), (2,), (3,)
"""The parts of the documents, by number modulo 4."""
_PADS = (" _", "_", " ", ".", "\n")
_TOKENS = 8_192  # in one forward pass
_COMPACT = 2_000_000  # activations in memory before those outside of the sample are dropped

Explanations = dict[int, list[TokenPattern]]
"""{latent: patterns}"""

_Numbers = TypeVar("_Numbers", np.ndarray, Tensor)


def in_parts(documents: _Numbers, parts: tuple[int, ...]) -> _Numbers:
    """Return a mask of the documents, given by number, that are in some of the four parts.

    Example:
        >>> import numpy as np
        >>> in_parts(np.arange(8), SCALE + SCORE).tolist()
        [False, False, True, True, False, False, True, True]
    """
    part = documents % 4
    return (part >= parts[0]) & (part <= parts[-1])


def pair_keys(
    context: np.ndarray, position: np.ndarray, latent: np.ndarray, length: int, n: int
) -> np.ndarray:
    """Return one number for each (context, position, latent), to compare two sets of them.

    Args:
        context: numbers of contexts, [m].
        position: positions in them, [m].
        latent: latents, [m].
        length: tokens of a context.
        n: the number of latents.
    """
    return (context.astype(np.int64) * length + position) * n + latent


class ActivationExample(NamedTuple):
    """An activation: its latent, the tokens up to its position without the context's BOS, its
    value."""

    latent: int
    tokens: tuple[int, ...]
    value: float


class N2GBuilder(Metric):
    """Samples activations of each requested latent, and builds explanations from them.

    `n2g` and `explained_loss` share it: they call `request` when they are constructed, and
    `explain` once the first pass is complete.

    Attributes:
        text_start: tokens of a context before its text: 1 with BOS, else 0.
        tokens: all contexts of the first pass, [c, t].
        counts: examples of each latent, [n].
        explanations: {latent: patterns}, built from `n2g_examples` activations each.
    """

    def __init__(self, context: EvalContext):
        super().__init__(context)
        corpus, options = context.data.corpus, context.options
        self.text_start = int(corpus.bos is not None)
        self.special_ids = np.array(sorted(corpus.special), int)
        self.requested = np.zeros(context.sae.shape.n_latents, bool)
        self.reservoir = Reservoir(options.n2g_examples, options.seed)
        self.contexts: list[np.ndarray] = []
        self.n_contexts = 0
        self._explanations: dict[int, Explanations] = {}  # by activations per latent

    @property
    def explanations(self) -> Explanations:
        return self._explanations.setdefault(self.context.options.n2g_examples, {})

    def known(self) -> Explanations:
        """Return an explanation of each latent that has one, from as many activations as any is."""
        known: Explanations = {}
        for examples in sorted(self._explanations):
            known |= self._explanations[examples]
        return known

    def request(self, latents: np.ndarray) -> None:
        """Sample activations of these latents too."""
        self.requested[latents] = True

    def prepare(self) -> None:
        self.pad, self.pad_text = choose_pad(
            self.context.lm.tokenizer,
            self.context.options.n2g_pad,
            set(self.context.data.corpus.special),
        )

    def update(self, batch: SAEBatch) -> None:
        self.contexts.append(batch.held_out.contexts.tokens.cpu().numpy().astype(np.int32))
        activations = batch_activations(batch, self.requested, self.n_contexts)
        self.reservoir.add(activations.select(in_parts(activations.document, BUILD)))
        self.n_contexts += len(self.contexts[-1])

    def compute(self, progress: Progress) -> None:
        self.tokens = np.concatenate(self.contexts)
        self.sample = self.reservoir.sample()
        self.counts = np.bincount(self.sample.latent, minlength=len(self.requested))

    def explain(
        self, latents: np.ndarray, progress: Progress, per_latent: int | None = None
    ) -> Explanations:
        """Build the missing explanations of those latents that have enough examples.

        Args:
            latents: the latents.
            progress: called after each round of reading.
            per_latent: activations to build each from, at most `n2g_examples`, which is the
                default.

        Returns:
            All explanations that were built from so many.
        """
        most = self.context.options.n2g_examples
        per_latent = min(per_latent or most, most)
        built = self._explanations.setdefault(per_latent, {})
        missing = np.zeros(len(self.requested), bool)
        missing[latents] = True
        missing &= self.counts >= MIN_EXAMPLES
        missing[list(built)] = False
        latent = self.sample.latent
        place = np.arange(len(latent)) - np.searchsorted(latent, latent)  # in random order
        selected = self.sample.select(missing[latent] & (place < per_latent))
        columns = (selected.latent, selected.context, selected.position, selected.value)
        examples = [
            ActivationExample(
                latent, tuple(self.tokens[context, self.text_start : position + 1].tolist()), value
            )
            for latent, context, position, value in zip(*(column.tolist() for column in columns))
        ]
        context = self.context
        reader = LatentReader(context.sae, context.lm, context.data.acts, self.official)
        built |= explain(examples, reader, self.pad, official=self.official, progress=progress)
        return built

    @property
    def official(self) -> bool:
        """Whether to do as the published code does, faults included."""
        return self.context.options.n2g_variant == "official"

    def predictor(self, explanations: Explanations) -> Predictor:
        """Return a predictor by these explanations."""
        return GreedyMatcher(explanations) if self.official else Matcher(explanations)

    def text(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return contexts[c, t] without their BOS, and a mask of where a document begins."""
        begins = np.zeros(tokens.shape, bool)
        begins[:, 0] = True
        begins[:, self.text_start] = True
        begins[:, 1:] |= np.isin(tokens[:, :-1], self.special_ids)
        return tokens[:, self.text_start :], begins[:, self.text_start :]


# ---- sampling activations ------------------------------------------------------------------------


class Activations(NamedTuple):
    """Activations above 0; each field is [m]. Contexts are numbered over the whole pass."""

    latent: np.ndarray
    context: np.ndarray
    position: np.ndarray
    value: np.ndarray
    document: np.ndarray

    def select(self, index: np.ndarray) -> Activations:
        """Return the activations under a mask or index."""
        return Activations(*(column[index] for column in self))


def batch_activations(batch: SAEBatch, latents: np.ndarray, first_context: int) -> Activations:
    """Return the activations of some latents in a batch.

    Args:
        batch: the batch.
        latents: mask of the latents, [n].
        first_context: the number of the batch's first context in the pass.
    """
    values, indices = (part.cpu() for part in batch.code)
    row, slot = (values > 0).nonzero(as_tuple=True)
    latent = indices[row, slot].numpy()
    selected = latents[latent]
    row, slot, latent = row[selected], slot[selected], latent[selected]
    keep = batch.held_out.keep.cpu()
    context, position = (axis.numpy() for axis in keep.nonzero(as_tuple=True))
    document = batch.held_out.documents.cpu().numpy()
    return Activations(
        latent,
        context[row] + first_context,
        position[row],
        values[row, slot].float().numpy(),
        document[row],
    )


class Reservoir:
    """A uniform sample of at most `size` activations of each latent, without all in memory.

    Every activation draws a random number, and those with the lowest numbers are kept.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.generator = size, np.random.default_rng(seed)
        self._parts: list[tuple[Activations, np.ndarray]] = []
        self._uncompacted = 0

    def __len__(self) -> int:
        """Return the number of activations in memory."""
        return sum(len(numbers) for _, numbers in self._parts)

    def add(self, activations: Activations) -> None:
        """Offer activations to the sample."""
        self._parts.append((activations, self.generator.random(len(activations.latent))))
        self._uncompacted += len(activations.latent)
        if self._uncompacted > _COMPACT:
            self._compact()

    def sample(self) -> Activations:
        """Return the sample, sorted by latent."""
        self._compact()
        return self._parts[0][0]

    def _compact(self) -> None:
        dtypes = (int, int, int, np.float32, int)
        if not self._parts:
            empty = Activations(*(np.zeros(0, dtype) for dtype in dtypes))
            self._parts = [(empty, np.zeros(0))]
        *columns, numbers = (
            np.concatenate(column)
            for column in zip(*((*activations, numbers) for activations, numbers in self._parts))
        )
        order = np.lexsort((numbers, columns[0]))
        latent = columns[0][order]
        place = np.arange(len(order)) - np.searchsorted(latent, latent)
        keep = order[place < self.size]
        self._parts = [(Activations(*(column[keep] for column in columns)), numbers[keep])]
        self._uncompacted = 0


# ---- reading -------------------------------------------------------------------------------------

ReadFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes sequences [m, l] and a latent for each, [m]; returns each latent's activation on the last
token of its sequence, [m]."""


class LatentReader:
    """Reads the activation of latents on the last token of short texts.

    Args:
        sae: the SAE.
        lm: the LM.
        acts: how contexts are made: with BOS, and with or without their first position.
        official: read without BOS, as the published code does.
    """

    def __init__(self, sae: SAE, lm: LM, acts: ActsConfig, official: bool = False):
        bos = lm.tokenizer.bos_token_id if acts.bos == "auto" and not official else None
        self.sae, self.lm, self.head = sae, lm, [] if bos is None else [bos]
        # else a first position is not kept in contexts, so it has no activation here either
        self.keeps_first = acts.keep == "all" or bool(self.head) or official

    @torch.inference_mode()
    def __call__(self, sequences: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """Return the activations [m] of latents[m] at the end of sequences[m, l]."""
        activations = np.zeros(len(sequences), np.float32)
        if sequences.shape[1] == 1 and not self.keeps_first:
            return activations
        first, inverse = _distinct_rows(sequences)
        rows, latent = torch.from_numpy(sequences[first]).long(), torch.from_numpy(latents)
        order = np.argsort(inverse, kind="stable")
        size = max(1, _TOKENS // (sequences.shape[1] + len(self.head)))
        for start in range(0, len(rows), size):
            code = self._encode_last(rows[start : start + size])
            low, high = np.searchsorted(inverse[order], (start, start + size))
            part = order[low:high]  # the sequences that are equal to one of these rows
            values, indices = (
                field.cpu()[torch.from_numpy(inverse[part]) - start] for field in code
            )
            matching = (indices == latent[part, None]) * values
            activations[part] = matching.sum(1).float().numpy()
        return activations

    def _encode_last(self, rows: Tensor) -> Code:
        head = torch.tensor(self.head, dtype=torch.long).expand(len(rows), -1)
        tokens = torch.cat([head, rows], 1).to(self.lm.device)
        x = self.lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))
        return self.sae.encode(x[:, -1])


def _distinct_rows(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each distinct sequence, and for each row the number of its distinct
    sequence."""
    row_type = np.dtype((np.void, sequences.dtype.itemsize * sequences.shape[1]))
    rows = np.ascontiguousarray(sequences).view(row_type).ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    return first, inverse.ravel()


# ---- building ------------------------------------------------------------------------------------


def explain(
    examples: list[ActivationExample],
    read: ReadFunction,
    pad: int,
    *,
    official: bool = False,
    progress: Progress = no_progress,
) -> dict[int, list[TokenPattern]]:
    """Build explanations from examples.

    Args:
        examples: activations of one or several latents; those of 0 are left out.
        read: returns the activation of latents at the end of sequences.
        pad: the token that replaces a removed one.
        official: keep equal patterns apart, as the published code does.
        progress: called after each round of reading.

    Returns:
        {latent: patterns}, merged unless `official`.
    """
    examples = [example for example in examples if example.value > 0]
    suffixes = shortest_suffixes(examples, read, progress)
    wildcards, padded = _read_changed(suffixes, read, pad, progress)
    patterns: dict[int, list[TokenPattern]] = {}
    for example, suffix, value, is_any, after_pad in zip(
        examples, suffixes.tokens, suffixes.values.tolist(), wildcards, padded
    ):
        tokens = tuple(ANY if any_ else token for token, any_ in zip(suffix, is_any))
        anchored = bool(after_pad < HALF * example.value)
        patterns.setdefault(example.latent, []).append(TokenPattern(tokens, anchored, value))
    if official:
        return patterns
    return {latent: merge_patterns(by_example) for latent, by_example in patterns.items()}


class Suffixes(NamedTuple):
    """The suffix of each example: its latent [m], its tokens, the activation on them [m]."""

    latents: np.ndarray
    tokens: list[tuple[int, ...]]
    values: np.ndarray

    def by_length(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (indices [s], tokens [s, l]) of the suffixes of each length l."""
        lengths = np.array([len(tokens) for tokens in self.tokens], int)
        groups = []
        for length in np.unique(lengths):
            indices = np.flatnonzero(lengths == length)
            groups.append((indices, np.array([self.tokens[i] for i in indices], np.int32)))
        return groups


def shortest_suffixes(
    examples: list[ActivationExample], read: ReadFunction, progress: Progress = no_progress
) -> Suffixes:
    """Find the shortest suffix of each example on which its latent has half of the activation.

    Args:
        examples: the examples.
        read: returns the activation of latents at the end of sequences.
        progress: called after each length.

    Returns:
        The suffixes; all tokens of an example, with its own value, where no suffix has half.
    """
    latents = np.array([example.latent for example in examples], int)
    full = np.array([example.value for example in examples])
    tokens = [example.tokens for example in examples]
    values, remaining, length = full.astype(np.float32), np.arange(len(examples)), 0
    longest, done = max(map(len, tokens), default=0), 0
    progress(FINDING_SUFFIXES, 0, 1)
    while len(remaining):
        length += 1
        remaining = remaining[[len(examples[i].tokens) >= length for i in remaining]]
        if not len(remaining):
            break
        rows = np.array([examples[i].tokens[-length:] for i in remaining], np.int32)
        activations = read(rows, latents[remaining])
        enough = activations >= HALF * full[remaining]
        for i, value in zip(remaining[enough], activations[enough]):
            tokens[i], values[i] = examples[i].tokens[-length:], value
        before, remaining = len(remaining), remaining[~enough]
        done += before * (length + _ROW)
        left = _tokens_left(len(remaining), before, length, longest)
        progress(FINDING_SUFFIXES, done, done + left)
    return Suffixes(latents, tokens, values)


def _tokens_left(remaining: int, before: int, length: int, longest: int) -> int:
    """Estimate the tokens that are still to be read for suffixes, if as large a share of the
    examples goes on to each length as has gone on to the last one.

    Args:
        remaining: examples without a suffix of `length` tokens.
        before: examples that had none of `length` - 1 tokens.
        length: the length that was tried last.
        longest: the most tokens of an example.
    """
    lengths = np.arange(length + 1, longest + 1)
    going_on = remaining * (remaining / before) ** (lengths - length - 1)
    return round(float((going_on * (lengths + _ROW)).sum()))


def _read_changed(
    suffixes: Suffixes, read: ReadFunction, pad: int, progress: Progress
) -> tuple[list[list[bool]], np.ndarray]:
    """Return for each suffix which of its tokens can be any token, and the activation with a
    padding token in front of it, [m]."""
    wildcards = [[False] * len(tokens) for tokens in suffixes.tokens]
    padded = np.zeros(len(suffixes.tokens), np.float32)
    done = 0
    total = sum((len(tokens) + 1) * (len(tokens) + _ROW) + 1 for tokens in suffixes.tokens)
    progress(FINDING_WILDCARDS, 0, total)
    for indices, rows in suffixes.by_length():
        length = rows.shape[1]
        in_front = np.concatenate([np.full((len(rows), 1), pad, rows.dtype), rows], 1)
        padded[indices] = read(in_front, suffixes.latents[indices])
        done += len(indices) * (length + 1 + _ROW)
        for place in range(length):
            changed = rows.copy()
            changed[:, place] = pad
            kept = read(changed, suffixes.latents[indices]) > HALF * suffixes.values[indices]
            for i, is_any in zip(indices, kept):
                wildcards[i][place] = bool(is_any)
            done += len(indices) * (length + _ROW)
            progress(FINDING_WILDCARDS, done, total)
    return wildcards, padded


def choose_pad(tokenizer: Any, text: str, special_ids: set[int]) -> tuple[int, str]:
    """Return the padding token: the one that replaces a removed token.

    By default it is the first of a short list that is a single token; the published code has
    GPT-2's " _". Where none of the list is, it is the unknown token, or else the first token that
    is not special.

    Args:
        tokenizer: the LM's tokenizer.
        text: the token's text; empty for the default.
        special_ids: tokens that are never chosen.

    Returns:
        The token's id and its text.

    Raises:
        InputError: if `text` is not a single token.
    """
    strings = token_strings(tokenizer, range(len(tokenizer)))
    ids = {string: i for i, string in reversed(list(enumerate(strings))) if i not in special_ids}
    for candidate in (text,) if text else _PADS:
        if candidate in ids:
            return ids[candidate], candidate
    if text:
        raise InputError(
            f"n2g_pad {text!r} is no single token of this tokenizer; give a text that is one, or "
            "leave it out"
        )
    unknown_id = tokenizer.unk_token_id
    pad = unknown_id if unknown_id is not None else min(ids.values())
    return pad, strings[pad]
