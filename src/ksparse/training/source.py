"""What all members of a cohort share: the stream, the sample that they start from, and held-out
activations.

Feed(recipe, device).stream          batches of raw activations
                    .look            factor, baseline and normalised rows of the first activations;
                                     read once
                    .lm_parameters   what a pass of the LM costs
                    .held_out        raw activations of text that is not trained on, for the curves
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksparse.config import Recipe
from ksparse.data.base import ActivationBatch, ActivationStream
from ksparse.data.contexts import Corpus
from ksparse.data.live import LiveStream
from ksparse.data.prefetch import Prefetcher
from ksparse.data.sharded import ShardStream
from ksparse.data.shards import Shards
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.planning import flops
from ksparse.planning.steps import prefetches
from ksparse.sae.init import center
from ksparse.sae.normalization import dataset_factor, normalize

log = logging.getLogger("ksparse")

SAMPLE = 32_768  # activations for b_pre and the constants, as in the official code
SHARD_BATCHES = 4  # read ahead
PER_DOCUMENT = 256  # held-out tokens of a document, so that few rows come from many documents


class Calibration(NamedTuple):
    """The first activations: their constant of normalize = 'dataset', normalised rows x[s, d], and
    the error of predicting their mean."""

    factor: float
    x: Tensor
    baseline: float


class ActivationSource:
    """One stream of activations for one SAE or many."""

    def __init__(self, recipe: Recipe, device: torch.device, mesh: Mesh = SINGLE_PROCESS):
        self.recipe, self.device, self.mesh = recipe, device, mesh
        self.source, self.policy = open_stream(recipe, device, mesh)
        depth = (
            SHARD_BATCHES
            if isinstance(self.source, ShardStream)
            else getattr(self.source, "per_block", 1)
        )
        together = (
            mesh.size > 1 and not recipe.acts.shards
        )  # then processes compute a block together, between two steps
        self.stream = (
            Prefetcher(self.source, depth)
            if prefetches(recipe, device.type) and not together
            else self.source
        )
        self.waited = 0.0  # seconds
        self._centers: dict[str, Tensor] = {}

    def wait(self, batches: Iterator[ActivationBatch]) -> ActivationBatch:
        """Return the next batch, and count how long that took."""
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        return batch

    @cached_property
    def look(self) -> Calibration:
        log.info("reading the first activations")
        raw, kind = self.source.sample(SAMPLE), self.recipe.acts.normalize
        factor = dataset_factor(raw) if kind == "dataset" else 1.0
        x = normalize(raw, kind, factor).x
        baseline = (x - x.mean(0)).cpu().double().square().mean().item()
        if not baseline > 0:
            raise InputError(
                f"all {len(raw):,} activations at {self.recipe.acts.site} are the same: there is "
                "nothing to learn"
            )
        return Calibration(factor, x, baseline)

    def center(self, kind: str) -> Tensor:
        """Return where b_pre starts, [d]; found once for all members that start so."""
        if kind not in self._centers:
            self._centers[kind] = center(self.look.x, kind)
        return self._centers[kind]

    @cached_property
    def lm_parameters(self) -> int:
        """The parameters of the LM's matrices up to the site; none where activations come from
        shards."""
        lm = getattr(self.source, "lm", None)
        return flops.before_site(lm.model, lm.module, lm.at) if lm else 0

    @cached_property
    def held_out(self) -> Tensor:
        """Raw activations [rows, d] of the validation side of the text; as many as `curve.held_out`
        says. To be read before the stream is, whose thread uses the LM."""
        rows, recipe = self.recipe.curve.held_out, self.recipe
        acts = dataclasses.replace(recipe.acts, mix=rows)
        lm = (
            self.source.lm
            if isinstance(self.source, LiveStream)
            else LM(acts=acts, device=str(self.device))
        )
        return LiveStream(
            lm,
            Corpus(acts, lm.tokenizer, "validation", per_document=PER_DOCUMENT),
            batch=rows,
            seed=0,
        ).sample(rows)


def open_stream(
    recipe: Recipe, device: torch.device, mesh: Mesh = SINGLE_PROCESS
) -> tuple[ActivationStream, dict[str, Any]]:
    """Return the stream of activations that a recipe names, and the policy by which they are
    kept."""
    acts = recipe.acts
    if acts.shards:
        shards = Shards(acts.shards)
        shards.check_fits(acts)
        return ShardStream(
            shards, batch=recipe.batch, seed=recipe.data_seed, device=device, mesh=mesh
        ), shards.manifest["policy"]
    if acts.mix < recipe.batch:
        raise InputError(
            f"acts.mix is {acts.mix}, less than one batch of {recipe.batch}; give several batches"
        )
    lm = LM(acts=acts, device=str(device))
    corpus = Corpus(acts, lm.tokenizer, "train")
    return LiveStream(
        lm, corpus, batch=recipe.batch, seed=recipe.data_seed, mesh=mesh
    ), corpus.policy()
