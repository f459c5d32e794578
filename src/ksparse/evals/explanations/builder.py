"""Random activations of each latent -> an explanation of it: Neuron-to-Graph as in Gao et al. 2024,
section 4.3.

Of each example the shortest suffix is sought on which the latent still has half of its activation;
then each of its tokens is replaced by a padding token, and becomes ANY if the latent keeps more
than half. If a padding token put before the suffix takes half of the activation away, the pattern
is anchored to the beginning of a document. What the LM reads is a suffix in the place of a whole
context: behind BOS, if contexts have it. All latents' examples go forward together, and equal
sequences run once.

Documents are dealt to four parts: explanations are built from two, scaled on the third, judged on
the fourth (`n2g`: on both).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import SAEBatch
from ksparse.evals.explanations.patterns import (
    ANY,
    Greedy,
    Matcher,
    Predictor,
    TokenPattern,
    merged,
)
from ksparse.lm.model import LM
from ksparse.lm.tokens import token_strings
from ksparse.sae.model import SAE

LEAST = 2  # examples of a latent to explain it
HALF = 0.5
_PADS = (" _", "_", " ", ".", "\n")
_TOKENS = 8_192  # in one forward pass
_COMPACT = 2_000_000  # activations held before all but the drawn ones are dropped
BUILD, SCALE, SCORE = (0, 1), (2,), (3,)


_Numbers = TypeVar("_Numbers", np.ndarray, Tensor)


def of_parts(documents: _Numbers, parts: tuple[int, ...]) -> _Numbers:
    """Return which documents, by number, are dealt to these parts."""
    dealt = documents % 4
    return (dealt >= parts[0]) & (dealt <= parts[-1])


def key(
    context: np.ndarray, position: np.ndarray, latent: np.ndarray, length: int, n: int
) -> np.ndarray:
    """Return one number for each position and latent, of contexts of that length and n latents."""
    return (context.astype(np.int64) * length + position) * n + latent


class ActivationExample(NamedTuple):
    """An activation: its latent, the tokens up to its position (without the context's BOS), its
    value."""

    latent: int
    tokens: tuple[int, ...]
    value: float


class N2GBuilder(Metric):
    """Draws activations of each latent and builds its patterns; `n2g` and `explained_loss` ask
    it."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        data, options = context.data, context.options
        self.first = int(data.corpus.bos is not None)
        self.specials = np.array(sorted(data.corpus.special), int)
        self.wanted = np.zeros(context.sae.shape.n_latents, bool)
        self.build = Reservoir(options.n2g_examples, options.seed)
        self.contexts: list[np.ndarray] = []
        self.count = 0
        self.explanations: dict[int, list[TokenPattern]] = {}
        self.pad, self.pad_text = choose_pad(
            context.lm.tokenizer, options.n2g_pad, set(data.corpus.special)
        )

    def want(self, latents: np.ndarray) -> None:
        """Ask for explanations of these latents."""
        self.wanted[latents] = True

    def update(self, batch: SAEBatch) -> None:
        self.contexts.append(batch.held_out.contexts.tokens.cpu().numpy().astype(np.int32))
        entries = activations(batch, self.wanted, self.count)
        self.build.add(entries.among(of_parts(entries.document, BUILD)))
        self.count += len(self.contexts[-1])

    def compute(self, observe: Progress) -> None:
        self.tokens = np.concatenate(self.contexts)
        self.drawn = self.build.drawn()
        self.counts = np.bincount(self.drawn.latent, minlength=len(self.wanted))

    def explain(self, latents: np.ndarray, observe: Progress) -> None:
        """Build the explanations of those of the latents that have examples and no explanation
        yet."""
        asked = np.zeros(len(self.wanted), bool)
        asked[latents] = True
        asked &= self.counts >= LEAST
        asked[list(self.explanations)] = False
        mine = self.drawn.among(asked[self.drawn.latent])
        examples = [
            ActivationExample(
                latent, tuple(self.tokens[context, self.first : position + 1].tolist()), value
            )
            for latent, context, position, value in zip(*(column.tolist() for column in mine[:4]))
        ]
        reader = Reader(self.context.sae, self.context.lm, self.context.data.acts, self.official)
        self.explanations |= explain(
            examples, reader, self.pad, official=self.official, observe=observe
        )

    @property
    def official(self) -> bool:
        return self.context.options.n2g_variant == "official"

    def predictor(self, latents: np.ndarray | None = None) -> Predictor:
        """Return what predicts the given latents, or all that are explained."""
        chosen = (
            self.explanations
            if latents is None
            else {int(i): self.explanations[int(i)] for i in latents}
        )
        return Greedy(chosen) if self.official else Matcher(chosen)

    def text(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return contexts without their BOS, and where in them a document begins."""
        begins = np.zeros(tokens.shape, bool)
        begins[:, 0] = True
        begins[:, self.first] = True
        begins[:, 1:] |= np.isin(tokens[:, :-1], self.specials)
        return tokens[:, self.first :], begins[:, self.first :]


# ---- drawing activations -------------------------------------------------------------------------


class Activations(NamedTuple):
    """Activations above 0, each field [m]; context counts over the pass."""

    latent: np.ndarray
    context: np.ndarray
    position: np.ndarray
    value: np.ndarray
    document: np.ndarray

    def among(self, chosen: np.ndarray) -> Activations:
        return Activations(*(column[chosen] for column in self))


def activations(batch: SAEBatch, wanted: np.ndarray, first_context: int) -> Activations:
    """Return the activations of the wanted latents in a batch."""
    values, indices = (part.cpu() for part in batch.code)
    at, slot = (values > 0).nonzero(as_tuple=True)
    latent = indices[at, slot].numpy()
    mine = wanted[latent]
    at, slot, latent = at[mine], slot[mine], latent[mine]
    context, position = (
        column.numpy() for column in batch.held_out.keep.cpu().nonzero(as_tuple=True)
    )
    document = batch.held_out.documents.cpu().numpy()
    return Activations(
        latent,
        context[at] + first_context,
        position[at],
        values[at, slot].float().numpy(),
        document[at],
    )


class Reservoir:
    """The activations of each latent that drew the lowest random numbers, `size` of them: a sample
    of all, without all in memory."""

    def __init__(self, size: int, seed: int):
        self.size, self.generator = size, np.random.default_rng(seed)
        self.held: list[tuple[Activations, np.ndarray]] = []
        self.waiting = 0

    def add(self, found: Activations) -> None:
        self.held.append((found, self.generator.random(len(found.latent))))
        self.waiting += len(found.latent)
        if self.waiting > _COMPACT:
            self._compact()

    def drawn(self) -> Activations:
        """Return the sample, ordered by latent."""
        self._compact()
        return self.held[0][0]

    def _compact(self) -> None:
        if not self.held:
            self.held = [
                (
                    Activations(*(np.zeros(0, kind) for kind in (int, int, int, np.float32, int))),
                    np.zeros(0),
                )
            ]
        columns = [
            np.concatenate(parts) for parts in zip(*((*found, noise) for found, noise in self.held))
        ]
        order = np.lexsort((columns[-1], columns[0]))
        latent = columns[0][order]
        place = np.arange(len(order)) - np.searchsorted(latent, latent)
        keep = order[place < self.size]
        self.held, self.waiting = (
            [(Activations(*(column[keep] for column in columns[:-1])), columns[-1][keep])],
            0,
        )


# ---- building ------------------------------------------------------------------------------------

Read = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes sequences [m, l] and a latent for each, [m]; returns the latent's activation on each
sequence's last token."""


class Reader:
    """The activation of latents at the end of short texts, read as a context would be."""

    def __init__(self, sae: SAE, lm: LM, acts: ActsConfig, official: bool = False):
        bos = lm.tokenizer.bos_token_id if acts.bos == "auto" and not official else None
        self.sae, self.lm, self.head = sae, lm, [] if bos is None else [bos]
        self.first_counts = (
            acts.keep == "all" or bool(self.head) or official
        )  # a first position is no activation elsewhere either

    @torch.inference_mode()
    def __call__(self, sequences: np.ndarray, latents: np.ndarray) -> np.ndarray:
        if sequences.shape[1] == 1 and not self.first_counts:
            return np.zeros(len(sequences), np.float32)
        first, inverse = _distinct(sequences)
        rows, wanted, out = (
            torch.from_numpy(sequences[first]).long(),
            torch.from_numpy(latents),
            np.zeros(len(sequences), np.float32),
        )
        order = np.argsort(inverse, kind="stable")
        size = max(1, _TOKENS // (sequences.shape[1] + len(self.head)))
        for at in range(0, len(rows), size):
            code = self._codes(rows[at : at + size])
            mine = order[
                np.searchsorted(inverse[order], at) : np.searchsorted(inverse[order], at + size)
            ]
            values, indices = (part.cpu()[torch.from_numpy(inverse[mine]) - at] for part in code)
            out[mine] = ((indices == wanted[mine, None]) * values).sum(1).float().numpy()
        return out

    def _codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        head = torch.tensor(self.head, dtype=torch.long).expand(len(rows), -1)
        tokens = torch.cat([head, rows], 1).to(self.lm.device)
        return self.sae.encode(
            self.lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, -1]
        )


def _distinct(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each distinct sequence, and for each row which of those it equals."""
    whole = (
        np.ascontiguousarray(sequences)
        .view(np.dtype((np.void, sequences.dtype.itemsize * sequences.shape[1])))
        .ravel()
    )
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse.ravel()


def explain(
    examples: list[ActivationExample],
    read: Read,
    pad: int,
    *,
    official: bool = False,
    observe: Progress = lambda what, done, total: None,
) -> dict[int, list[TokenPattern]]:
    """Return {latent: patterns}. Examples without activation say nothing and are left out."""
    examples = [example for example in examples if example.value > 0]
    suffixes = shortest_suffixes(examples, read, observe)
    anchored = _apart(
        suffixes,
        lambda rows: np.concatenate([np.full((len(rows), 1), pad, rows.dtype), rows], 1),
        read,
    )
    patterns: dict[int, list[TokenPattern]] = {}
    for number, (example, suffix, act, wild) in enumerate(
        zip(examples, *_saliency(suffixes, read, pad, observe))
    ):
        tokens = tuple(ANY if any_ else token for token, any_ in zip(suffix, wild))
        lost = anchored[number] < HALF * example.value
        patterns.setdefault(example.latent, []).append(TokenPattern(tokens, bool(lost), act))
    return patterns if official else {latent: merged(found) for latent, found in patterns.items()}


class Suffixes(NamedTuple):
    """For each example: its latent, its suffix, the activation on that."""

    latents: np.ndarray
    tokens: list[tuple[int, ...]]
    values: np.ndarray


def shortest_suffixes(
    examples: list[ActivationExample],
    read: Read,
    observe: Progress = lambda what, done, total: None,
) -> Suffixes:
    """Return the shortest suffix of each example on which its latent has half of the activation;
    the whole where none has."""
    latents, wanted = (
        np.array([example.latent for example in examples], int),
        np.array([example.value for example in examples]),
    )
    chosen = [example.tokens for example in examples]
    values, open_, length = wanted.astype(np.float32), np.arange(len(examples)), 0
    while len(open_):
        length += 1
        open_ = open_[[len(examples[i].tokens) >= length for i in open_]]
        if not len(open_):
            break
        rows = np.array([examples[i].tokens[-length:] for i in open_], np.int32)
        act = read(rows, latents[open_])
        enough = act >= HALF * wanted[open_]
        for i, value in zip(open_[enough], act[enough]):
            chosen[i], values[i] = examples[i].tokens[-length:], value
        open_ = open_[~enough]
        observe("explaining latents: suffixes", len(examples) - len(open_), len(examples))
    return Suffixes(latents, chosen, values)


def _saliency(
    suffixes: Suffixes, read: Read, pad: int, observe: Progress
) -> tuple[list[tuple[int, ...]], list[float], list[list[bool]]]:
    """Return the suffixes, their activations, and which of their tokens can be anything."""
    wild: list[list[bool]] = [[False] * len(tokens) for tokens in suffixes.tokens]
    lengths = np.array([len(tokens) for tokens in suffixes.tokens], int)
    done, total = 0, int((lengths**2).sum())  # tokens to read
    for length in np.unique(lengths):
        mine = np.flatnonzero(lengths == length)
        rows = np.array([suffixes.tokens[i] for i in mine], np.int32)
        for place in range(length):
            changed = rows.copy()
            changed[:, place] = pad
            kept = read(changed, suffixes.latents[mine]) > HALF * suffixes.values[mine]
            for i, any_ in zip(mine, kept):
                wild[i][place] = bool(any_)
        done += int(length) ** 2 * len(mine)
        observe("explaining latents: which tokens matter", done, total)
    return suffixes.tokens, suffixes.values.tolist(), wild


def _apart(
    suffixes: Suffixes, change: Callable[[np.ndarray], np.ndarray], read: Read
) -> np.ndarray:
    """Return the activation on each suffix as changed."""
    out = np.zeros(len(suffixes.tokens), np.float32)
    lengths = np.array([len(tokens) for tokens in suffixes.tokens], int)
    for length in np.unique(lengths):
        mine = np.flatnonzero(lengths == length)
        out[mine] = read(
            change(np.array([suffixes.tokens[i] for i in mine], np.int32)), suffixes.latents[mine]
        )
    return out


def choose_pad(tokenizer: Any, asked: str, specials: set[int]) -> tuple[int, str]:
    """Return the id and text of the token that stands for a removed one: the one asked for, or the
    first of a list that is a token.

    The published code has GPT-2's " _". Where none of the list is a token, the unknown token is
    taken, else the first that is no special one.
    """
    strings = token_strings(tokenizer, range(len(tokenizer)))
    ids = {text: i for i, text in reversed(list(enumerate(strings))) if i not in specials}
    found = next((text for text in ((asked,) if asked else _PADS) if text in ids), None)
    if found is not None:
        return ids[found], found
    if asked:
        raise InputError(
            f"n2g_pad {asked!r} is no single token of this tokenizer; give a text that is one, or "
            "leave it out"
        )
    unknown = tokenizer.unk_token_id
    chosen = unknown if unknown is not None else min(ids.values())
    return chosen, strings[chosen]
