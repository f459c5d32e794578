"""Where activations come from: the parts that SAEs on one stream share.

ActivationSource(recipe, device)
    .stream          batches of raw activations
    .calibration     the calibration sample, read once: input scale, baseline, normalized rows
    .lm_parameters   the size of the LM, for FLOPs
    .held_out        raw activations of held-out text, for curves
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksparse.config import ActsConfig, Planted, Recipe
from ksparse.data.base import ActivationBatch, ActivationStream, Cursor
from ksparse.data.contexts import Corpus
from ksparse.data.generated import HELD_OUT, GeneratedStream
from ksparse.data.live import COMPUTING, LiveStream
from ksparse.data.planted import PlantedFeatures, PlantedStream
from ksparse.data.prefetch import Prefetcher
from ksparse.data.sharded import ShardStream, open_shards
from ksparse.data.tensors import Tensors
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import InputError
from ksparse.limits import SAMPLE
from ksparse.lm.model import LM
from ksparse.planning import flops
from ksparse.planning.steps import prefetches
from ksparse.progress import Expected, report
from ksparse.sae.init import center
from ksparse.sae.normalization import dataset_factor, normalize
from ksparse.training.lm_loss import LMLoss

SHARD_BATCHES = 4
"""Batches that are prefetched from shards."""
TRAINING = "training"
"""What the steps are called in progress reports."""
PER_DOCUMENT = 256
"""Most held-out tokens of a document, so that a few rows come from many documents."""


class Calibration(NamedTuple):
    """The first activations of a stream, and the constants computed from them."""

    factor: float
    """The input scale of `acts.normalize = "dataset"`; 1 for other normalizations."""
    x: Tensor
    """Normalized activations, [rows, d_model]."""
    baseline: float
    """Mean squared error per component of predicting their mean."""


class ActivationSource:
    """One stream of activations, for one SAE or many.

    Args:
        recipe: names the activations; of several SAEs' recipes, any.
        device: where to put them.
        mesh: the processes that share the stream.
        sites: sites of the LM that one pass reads; by default the recipe's alone. `at` gives the
            source of the SAEs at each; this one is that of the first.
    """

    number = 0
    """Which of the stream's sites this is."""
    _whole: ActivationSource | None = None

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        mesh: Mesh = SINGLE_PROCESS,
        sites: Sequence[str] = (),
    ):
        self.recipe, self.device, self.mesh = recipe, device, mesh
        self.source, self.policy = open_stream(recipe, device, mesh, sites[1:])
        depth = (
            SHARD_BATCHES
            if isinstance(self.source, ShardStream)
            else getattr(self.source, "batches_per_buffer", 1)
        )
        # Several processes fill the shuffle buffer together, between two steps.
        collective = mesh.size > 1 and not recipe.acts.shards
        prefetch = prefetches(recipe, device.type) and not collective
        self.stream = Prefetcher(self.source, depth) if prefetch else self.source
        self.prefetches = prefetch
        self.seconds_waited = 0.0
        """Seconds that training has waited for batches."""
        self._centers: dict[str, Tensor] = {}

    @property
    def whole(self) -> ActivationSource:
        """The source that has the stream and counts the time: this one, or that of the first
        site."""
        return self._whole or self

    def at(self, number: int, recipe: Recipe) -> ActivationSource:
        """Return the source of the SAEs at one of the sites.

        Args:
            number: of the site, among `sites`; 0 is this source itself.
            recipe: a recipe at that site.
        """
        if number == 0:
            return self
        other = copy.copy(self)
        other.recipe, other.number, other._whole, other._centers = recipe, number, self, {}
        for name in _OF_A_SITE:
            other.__dict__.pop(name, None)
        return other

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        if isinstance(self.source, LiveStream):
            return self.source.lms[self.number].d_model
        return self.stream.d_model

    @property
    def lm(self) -> LM | None:
        """The LM at the site; None where activations come from elsewhere."""
        return self.source.lms[self.number] if isinstance(self.source, LiveStream) else None

    def forget_calibration(self) -> None:
        """Free the calibration sample, of which an SAE needs nothing once it has begun."""
        self.__dict__.pop("calibration", None)

    def next_batch(self, batches: Iterator[ActivationBatch]) -> ActivationBatch:
        """Return the next batch, and add the time that it took to `waited`."""
        began = time.monotonic()
        batch = next(batches)
        self.seconds_waited += time.monotonic() - began
        return batch

    def seconds_per_token(self, elapsed: float, tokens: int) -> float:
        """Return how long training takes for a token, as the average of whole shuffle buffers.

        The LM computes a buffer between two steps, or, prefetching, beside them. Each token bears
        its share of the buffer's time, wherever in the buffer training is.

        Args:
            elapsed: seconds of training so far, in which `next_batch` was called.
            tokens: tokens trained on in this time.
        """
        stream = self.source
        if not (isinstance(stream, LiveStream) and stream.rows_computed):
            return elapsed / tokens
        lm = stream.seconds_computing / stream.rows_computed
        step = max(0.0, elapsed - self.whole.seconds_waited) / tokens
        return max(step, lm) if self.prefetches else step + lm

    def expected_parts(self, cursor: Cursor | None, steps: int, tokens: int) -> dict[str, Expected]:
        """Return the work of training for a number of steps, for `progress.expect`.

        Args:
            cursor: where in the stream training begins; None: at its start.
            steps: batches that are still to be read.
            tokens: tokens of all SAEs, those that they have already trained on included.
        """
        recipe, d_model = self.recipe, self.d_model
        flops_of_step = (
            flops.encoder(recipe, d_model) + flops.decoder(recipe, d_model) + self.flops_of_lm_loss
        )
        parts = {TRAINING: Expected(float(flops_of_step * tokens), tokens)}
        if isinstance(self.source, LiveStream):
            rows = self.source.rows_to_compute(cursor, steps)
            parts[COMPUTING] = Expected(float(flops.lm(self.lm_parameters) * rows), rows)
        return parts

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration sample; reading it does not move the stream."""
        normalization = self.recipe.acts.normalize
        raw = (
            self.source.sample(SAMPLE, self.number)
            if isinstance(self.source, LiveStream)
            else self.source.sample(SAMPLE)
        )
        report("measuring the first activations")
        factor = dataset_factor(raw) if normalization == "dataset" else 1.0
        x = normalize(raw, normalization, factor).x
        baseline = (x - x.mean(0)).cpu().double().square().mean().item()
        if not baseline > 0:
            raise InputError(
                f"all {len(raw):,} activations at {self.recipe.acts.site} are the same: there is "
                "nothing to learn"
            )
        return Calibration(factor, x, baseline)

    def center(self, method: str) -> Tensor:
        """Return the initial b_pre, [d_model]; each `sae.b_pre_init` is computed once."""
        if method not in self._centers:
            report("initializing")
            self._centers[method] = center(self.calibration.x, method)
        return self._centers[method]

    @cached_property
    def lm_parameters(self) -> int:
        """Parameters of the LM's matrices up to the site; 0 if activations come from shards."""
        lm = self.lm
        return flops.before_site(lm.model, lm.module, lm.at) if lm else 0

    @cached_property
    def lm_loss(self) -> LMLoss | None:
        """The loss of the LM behind the site; None where the recipes have none."""
        return LMLoss(self.lm) if self.recipe.sae.uses_lm and self.lm else None

    @cached_property
    def flops_of_lm_loss(self) -> int:
        """FLOPs per activation of the loss of the LM behind the site; 0 where there is none."""
        if self.lm_loss is None:
            return 0
        model = self.lm_loss.lm.model
        return flops.lm_loss(flops.before_site(model, model, "out"), self.lm_parameters)

    @cached_property
    def held_out(self) -> Tensor:
        """Raw activations [`curve.held_out`, d_model] of the held-out documents. Read it before the
        stream, which may run the LM in a thread."""
        return self.whole._held_out_of_sites[self.number]

    @cached_property
    def _held_out_of_sites(self) -> list[Tensor]:
        """The held-out activations of each site, from one pass."""
        rows, recipe = self.recipe.curve.held_out, self.recipe
        if isinstance(self.source, GeneratedStream):
            return [self.source.rows(rows, HELD_OUT)]
        if isinstance(self.source, ShardStream) and isinstance(self.source.shards, Tensors):
            apart = Tensors(self.source.shards.folder, "validation")
            window = recipe.acts.shard_window
            shards = ShardStream(apart, batch=rows, seed=0, device=self.device, window=window)
            return [shards.sample(rows)]
        # The same passes in a resumed run, which reads these before its cursor is known.
        lm_batch = recipe.acts.lm_batch or ActsConfig.lm_batch
        acts = dataclasses.replace(recipe.acts, mix=rows, lm_batch=lm_batch)
        lm, *others = (
            self.source.lms
            if isinstance(self.source, LiveStream)
            else (LM(acts=acts, device=str(self.device)),)
        )
        stream = LiveStream(
            lm,
            Corpus(acts, lm.tokenizer, "validation", per_document=PER_DOCUMENT),
            batch=rows,
            seed=0,
            what="computing held-out activations",
            others=others,
        )
        return [stream.sample(rows, number) for number in range(1 + len(others))]


_OF_A_SITE = ("calibration", "lm_parameters", "lm_loss", "flops_of_lm_loss", "held_out")
"""What `ActivationSource` computes once for each site."""


def open_stream(
    recipe: Recipe,
    device: torch.device,
    mesh: Mesh = SINGLE_PROCESS,
    others: Sequence[str] = (),
) -> tuple[ActivationStream, dict[str, Any]]:
    """Open the stream of activations that a recipe names, and of the same LM's at other sites.

    Returns:
        The stream, and the policy that says which tokens it keeps.

    Raises:
        InputError: if shards do not fit the recipe, or the shuffle buffer is less than one batch.
    """
    acts = recipe.acts
    if planted := Planted.from_text(acts.text):
        features = PlantedFeatures(planted)
        return (
            PlantedStream(features, batch=recipe.batch, seed=recipe.data_seed, device=device),
            {},
        )
    if acts.shards:
        report("reading activations")
        shards = open_shards(acts.shards)
        shards.check_fits(acts)
        return ShardStream(
            shards,
            batch=recipe.batch,
            seed=recipe.data_seed,
            device=device,
            mesh=mesh,
            window=acts.shard_window,
        ), shards.policy
    if acts.mix < recipe.batch:
        raise InputError(
            f"acts.mix is {acts.mix}, less than one batch of {recipe.batch}; give several batches"
        )
    report("loading the LM")
    lm = LM(acts=acts, device=str(device))
    corpus = Corpus(acts, lm.tokenizer, "train")
    at_others = [lm.at_site(site) for site in others]
    if recipe.sae.uses_lm:
        for each in (lm, *at_others):
            each.check_changes()
    stream = LiveStream(
        lm,
        corpus,
        batch=recipe.batch,
        seed=recipe.data_seed,
        mesh=mesh,
        whole_contexts=recipe.sae.uses_lm,
        others=at_others,
    )
    return stream, corpus.policy()
