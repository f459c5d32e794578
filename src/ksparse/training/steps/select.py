"""TODO ksparse.training.steps.select."""

from __future__ import annotations

from ksparse.config import Recipe
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import InputError
from ksparse.kernels import native, triton_ops
from ksparse.sae.model import SAE
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.steps.native import NativeStep
from ksparse.training.steps.prefilter import fastest_prefilter
from ksparse.training.steps.triton import TritonStep


def choose_step(sae: SAE, recipe: Recipe, mesh: Mesh = SINGLE_PROCESS) -> AutogradStep:
    """Return the fastest step that can run here and is not refused: compiled, written out in plain
    torch, or by autograd; on a mesh one of the last two."""
    screen, kernels, device = recipe.optim.screen, recipe.run.kernels, sae.W_enc.device
    written_out = not recipe.needs_autograd
    if mesh.size > 1:
        return (
            ExplicitStep(sae, recipe, mesh)
            if written_out and device.type in ("cpu", "cuda")
            else AutogradStep(sae, recipe, mesh)
        )
    halves = recipe.optim.precision != "float32"
    if kernels == "triton" and not (written_out and triton_ops.usable(device)):
        raise InputError(
            "run.kernels is 'triton', which needs a CUDA GPU, the package triton and TopK without "
            "Multi-TopK; leave it at 'auto'"
        )
    if halves and not (written_out and kernels in ("auto", "triton") and triton_ops.usable(device)):
        raise InputError(
            "optim.precision is 'bfloat16', which needs a CUDA GPU, the package triton and TopK "
            "without Multi-TopK, run.kernels not 'torch'; leave it at 'float32'"
        )
    if (
        halves
        or kernels == "triton"
        or (kernels == "auto" and written_out and device.type == "cuda" and triton_ops.available())
    ):
        return TritonStep(sae, recipe, _screen(recipe, "int8") if screen == "auto" else screen)
    if kernels != "torch" and written_out and device.type == "cpu" and native.load() is not None:
        return NativeStep(
            sae, recipe, _screen(recipe, fastest_prefilter()) if screen == "auto" else screen
        )
    if kernels == "native":
        raise InputError(
            "run.kernels is 'native', which needs a CPU, a C++ compiler (g++ or clang++) and TopK "
            "without Multi-TopK; leave it at 'auto', or give 'torch'"
        )
    if screen not in ("off", "auto"):
        raise InputError(
            f"optim.screen is {screen!r}, which needs the compiled kernels (a CPU and a C++ "
            "compiler, or a CUDA GPU and triton; TopK without Multi-TopK, run.kernels not "
            "'torch'); "
            "leave it at 'off' or 'auto'"
        )
    return (
        ExplicitStep(sae, recipe)
        if written_out and device.type in ("cpu", "cuda")
        else AutogradStep(sae, recipe)
    )


def _screen(recipe: Recipe, fastest: str) -> str:
    """Return the fastest screen; none where candidates would be so many of the latents that it
    could save nothing."""
    return fastest if recipe.sae.n_latents >= 64 * recipe.sae.k else "off"
