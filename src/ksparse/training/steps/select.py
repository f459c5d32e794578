"""Build the training step that `ksparse.planning.steps` chooses for a recipe and a device."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ksparse.config import Recipe
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.planning import steps
from ksparse.sae.model import SAE
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.steps.native import NativeStep
from ksparse.training.steps.prefilter import fastest_prefilter
from ksparse.training.steps.triton import TritonStep

log = logging.getLogger("ksparse")

KINDS: tuple[steps.StepKind, ...] = ("triton", "native", "torch", "autograd")
"""The steps, the fastest first."""


def build_step(sae: SAE, recipe: Recipe, mesh: Mesh = SINGLE_PROCESS) -> AutogradStep:
    """Return the step of a recipe for an SAE.

    Args:
        sae: the SAE to train, on its device.
        recipe: what to train, and which kernels it allows.
        mesh: the processes that share the run.

    Raises:
        InputError: if the recipe asks for kernels or a precision that the device cannot run.
    """
    kind = steps.choose_step(recipe, str(sae.W_enc.device), processes=mesh.size)
    # all take the step that each can take: a machine may have no compiler
    (slowest,) = mesh.all_reduce_max_ints("kernels", [KINDS.index(kind)])
    kind = KINDS[slowest]
    if recipe.sae.limits_weights and recipe.run.kernels == "auto":
        log.info("sae.freeze and sae.decoder_cosine_min: the step is taken in plain torch")
    if kind == "triton":
        return TritonStep(sae, recipe, _prefilter(recipe, mesh, lambda: "int8"), mesh)
    if kind == "native":  # one choice for all: each process would time the products anew
        screen = mesh.broadcast_str("prefilter", _prefilter(recipe, mesh, fastest_prefilter))
        return NativeStep(sae, recipe, screen, mesh)
    return (ExplicitStep if kind == "torch" else AutogradStep)(sae, recipe, mesh)


def _prefilter(recipe: Recipe, mesh: Mesh, fastest: Callable[[], str]) -> str:
    """Return the precision in which candidates are preselected, or "off"; "auto" is `fastest()`."""
    if not steps.prefilters(recipe, mesh.latent):
        return "off"
    return fastest() if recipe.optim.approx_topk == "auto" else recipe.optim.approx_topk
