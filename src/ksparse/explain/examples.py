"""Windows of held-out text in which a latent fires, or does not.

Explanations, and N2G's patterns, are made from two of the four parts of the documents; they are
scored on the two others (`ksparse.evals.explanations.builder`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ksparse import progress
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals.base import EvalContext
from ksparse.evals.batches import HeldOut, HeldOutPass, SAEBatch, acts_of
from ksparse.evals.explanations.builder import (
    BUILD,
    SCALE,
    SCORE,
    Activations,
    N2GBuilder,
    batch_activations,
    in_parts,
)
from ksparse.evals.explanations.patterns import Matcher, TokenPattern
from ksparse.explain.options import ExplainConfig
from ksparse.lm.model import LM
from ksparse.lm.tokens import token_strings
from ksparse.sae.model import SAE

BEFORE, AFTER = 24, 8
"""Tokens of a window before and after the position that it was chosen for."""
MARKED = 0.3
"""Tokens above this share of a window's largest value are marked."""
_CANDIDATES = 8  # latents looked at for each one to be explained, since many fire too rarely
_ATTEMPTS = 50  # positions drawn for each window in which a latent must not fire


class Window(NamedTuple):
    """A piece of text of one document, and a latent's values on its tokens."""

    tokens: np.ndarray
    """Token ids, [w]."""
    acts: np.ndarray
    """The latent's value on each, [w]."""
    marked: np.ndarray
    """The tokens that are marked, [w]: those it fires on, or as many others at random."""
    begins: bool
    """Whether the document begins with the window."""
    predicted: np.ndarray
    """Where the latent's N2G patterns predict it, [w]."""
    dealt: np.ndarray
    """Where the patterns of the latent whose explanation it is dealt predict it, [w]."""

    @property
    def active(self) -> bool:
        """Whether the latent fires in it."""
        return bool((self.acts > 0).any())


class Specimen(NamedTuple):
    """A latent with the windows to explain it from, and to score explanations on."""

    latent: int
    train: list[Window]
    test: list[Window]


@dataclass
class Specimens:
    """All latents to explain, and what they come from."""

    of: list[Specimen]
    strings: dict[int, str]
    """The tokens of all windows as text."""
    too_few: list[int]
    """Latents that were looked at and fire too rarely, or too often."""
    origin: dict[str, object] = field(default_factory=dict)
    """The fields of the result that say what was read."""


@torch.inference_mode()
def collect(sae: SAE, lm: LM, options: ExplainConfig) -> Specimens:
    """Read held-out text, and choose latents and windows.

    Raises:
        InputError: a latent does not exist, or none fires often enough.
    """
    n = sae.shape.n_latents
    for latent in options.latent:
        if not 0 <= latent < n:
            raise InputError(f"there is no latent {latent}; this SAE has latents 0 to {n - 1}")
    generator = np.random.default_rng(options.seed)
    wanted = np.array(list(dict.fromkeys(options.latent)), int)
    if not len(wanted):
        wanted = generator.permutation(n)[: _CANDIDATES * options.latents]
    evaluation = EvalConfig(tokens=options.tokens, seed=options.seed).resolved()
    data = HeldOut(lm, acts_of(sae, lm, evaluation), evaluation)
    context = EvalContext(sae.to(lm.device).eval(), data)
    builder = context.part(N2GBuilder)
    builder.request(wanted)
    builder.prepare()
    text, pages, found = HeldOutPass(data), _Pages(), []
    for held_out in text:
        batch = SAEBatch(context.sae, held_out)
        found.append(batch_activations(batch, builder.requested, builder.n_contexts))
        builder.update(batch)
        pages.add(held_out.contexts.documents, held_out.keep)
        progress.report("choosing texts", min(text.tokens, options.tokens), options.tokens)
    if not text.tokens:
        raise data.nothing()
    builder.compute(progress.report)
    pages.join(builder.tokens)
    activations = Activations(*(np.concatenate(column) for column in zip(*found)))
    limit = len(wanted) if options.latent else options.latents
    chosen, too_few = _choose(activations, wanted, limit, pages, options, generator)
    if not chosen:
        raise InputError(
            f"no latent fires often enough in {text.tokens:,} held-out activations to be explained "
            f"from {options.examples} texts and scored on {options.test}; read more with --tokens, "
            "or ask for fewer with --examples and --test"
        )
    builder.explain(np.array([specimen.latent for specimen in chosen]), progress.report)
    _predict(chosen, builder.explanations)
    ids = sorted({int(t) for s in chosen for w in [*s.train, *s.test] for t in w.tokens})
    origin = {
        "lm": data.acts.lm,
        "site": data.acts.site,
        "text": data.acts.text,
        "checkpoint": sae.metadata.get("step"),
        "policy": data.corpus.policy(),
        "n_tokens": text.tokens,
        "n_documents": len(text.documents),
    }
    strings = dict(zip(ids, token_strings(lm.tokenizer, ids)))
    return Specimens(chosen, strings, sorted(too_few), origin)


class _Pages:
    """The contexts that were read: documents, and positions that are evaluated, [c, t]."""

    def __init__(self) -> None:
        self._documents: list[np.ndarray] = []
        self._keep: list[np.ndarray] = []

    def add(self, documents: torch.Tensor, keep: torch.Tensor) -> None:
        self._documents.append(documents.cpu().numpy())
        self._keep.append(keep.cpu().numpy())

    def join(self, tokens: np.ndarray) -> None:
        """Complete the pages; `positions` are the (context, position) windows can be drawn at."""
        self.tokens = tokens
        self.documents, self.keep = np.concatenate(self._documents), np.concatenate(self._keep)
        self.positions = np.argwhere(self.keep & in_parts(self.documents, SCALE + SCORE))

    def window(self, context: int, position: int, values: dict[int, float]) -> Window:
        """Return the window around a position, inside its document.

        Args:
            context: the context.
            position: the position in it.
            values: the latent's values in this context, by position.
        """
        inside = self.keep[context] & (self.documents[context] == self.documents[context, position])
        first, last = position, position + 1
        while first > max(0, position - BEFORE) and inside[first - 1]:
            first -= 1
        while last < min(len(inside), position + AFTER + 1) and inside[last]:
            last += 1
        acts = np.array([values.get(place, 0.0) for place in range(first, last)])
        begins = first == 0 or not self.keep[context, first - 1]
        nothing = np.zeros(last - first, bool)
        marked = (acts > 0) & (acts >= MARKED * acts.max())
        tokens = self.tokens[context, first:last]
        return Window(tokens, acts, marked, bool(begins), nothing, nothing)


def _choose(
    activations: Activations,
    wanted: np.ndarray,
    limit: int,
    pages: _Pages,
    options: ExplainConfig,
    generator: np.random.Generator,
) -> tuple[list[Specimen], list[int]]:
    """Return the first latents that have enough windows, and those before them that have not."""
    order = np.argsort(activations.latent, kind="stable")
    sorted_latents = activations.latent[order]
    chosen: list[Specimen] = []
    too_few: list[int] = []
    for latent in wanted.tolist():
        low, high = np.searchsorted(sorted_latents, (latent, latent + 1))
        specimen = _specimen(latent, activations.select(order[low:high]), pages, options, generator)
        if specimen is not None:
            chosen.append(specimen)
            if len(chosen) == limit:
                break
        elif high > low or options.latent:
            too_few.append(latent)
    return chosen, too_few


def _specimen(
    latent: int,
    activations: Activations,
    pages: _Pages,
    options: ExplainConfig,
    generator: np.random.Generator,
) -> Specimen | None:
    values: dict[int, dict[int, float]] = {}
    columns = (activations.context, activations.position, activations.value)
    for context, position, value in zip(*(column.tolist() for column in columns)):
        values.setdefault(context, {})[position] = value
    sides = []
    for parts in (BUILD, SCALE + SCORE):
        side = _strongest(activations.select(in_parts(activations.document, parts)))
        sides.append([(int(c), int(p)) for c, p in zip(side.context, side.position)])
    train, test = sides
    if len(train) < options.examples or len(test) < options.test:
        return None
    half = options.examples // 2
    places = train[:half] + _stratified(train[half:], options.examples - half, generator)
    windows = [
        [pages.window(context, position, values[context]) for context, position in side]
        for side in (places, _stratified(test, options.test, generator))
    ]
    marks = round(float(np.mean([window.marked.sum() for window in windows[1]])))
    silent = _silent(values, pages, options.test, max(1, marks), generator)
    if silent is None:
        return None
    tests = [*windows[1], *silent]
    return Specimen(latent, windows[0], [tests[i] for i in generator.permutation(len(tests))])


def _strongest(activations: Activations) -> Activations:
    """Return the largest activation of each context, the largest first."""
    order = np.lexsort((activations.position, activations.context, -activations.value))
    ordered = activations.select(order)
    _, first = np.unique(ordered.context, return_index=True)
    return ordered.select(np.sort(first))


def _stratified(
    places: list[tuple[int, int]], count: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Return one of each of `count` equal bands of places that are sorted by value."""
    bands = np.array_split(np.arange(len(places)), count)
    return [places[int(generator.choice(band))] for band in bands]


def _silent(
    values: dict[int, dict[int, float]],
    pages: _Pages,
    count: int,
    marks: int,
    generator: np.random.Generator,
) -> list[Window] | None:
    """Return windows in which the latent is silent, with tokens marked at random; None if too few
    are found."""
    windows: list[Window] = []
    for _ in range(_ATTEMPTS * count):
        context, position = pages.positions[generator.integers(len(pages.positions))].tolist()
        window = pages.window(context, position, values.get(context, {}))
        if window.active:
            continue
        marked = np.zeros(len(window.tokens), bool)
        size = min(marks, len(marked))
        marked[generator.choice(len(marked), size, replace=False)] = True
        windows.append(window._replace(marked=marked))
        if len(windows) == count:
            return windows
    return None


def _predict(chosen: list[Specimen], explanations: dict[int, list[TokenPattern]]) -> None:
    """Set where N2G's patterns predict: each latent's own, and those that it is dealt."""
    for number, specimen in enumerate(chosen):
        own = explanations.get(specimen.latent, [])
        dealt = explanations.get(chosen[number - 1].latent, [])
        for place, window in enumerate(specimen.test):
            specimen.test[place] = window._replace(
                predicted=_matches(window, own), dealt=_matches(window, dealt)
            )


def _matches(window: Window, patterns: list[TokenPattern]) -> np.ndarray:
    """Return where one of the patterns predicts an activation in a window, [w]."""
    predicted = np.zeros(len(window.tokens), bool)
    if patterns:
        tokens = window.tokens[None].astype(np.int64)
        begins = np.zeros(tokens.shape, bool)
        begins[0, 0] = window.begins
        found = Matcher({0: patterns}).match(tokens, begins, np.ones(tokens.shape, bool))
        predicted[found.position[found.value > 0]] = True
    return predicted
