"""Which training step a recipe takes on a device: one rule for the trainer, the planner and sweeps.

    autograd   gradients by torch's autograd: any activation, any device
    torch      the gradient written out, in plain torch (`ExplicitStep`)
    native     the same with compiled C++ kernels, on a CPU
    triton     the same with Triton kernels, on a CUDA GPU

The rule reads the recipe, the type of the device, and which kernels are usable. Importing this
module needs no torch.
"""

from __future__ import annotations

from typing import Literal

from ksparse.config import Recipe
from ksparse.errors import InputError

StepKind = Literal["autograd", "torch", "native", "triton"]
"""The training steps; "torch" is the explicit step."""
NOT_COMPILED = "Multi-TopK, sae.freeze and sae.decoder_cosine_min"
"""What the compiled kernels cannot do with TopK, for messages."""


def choose_step(
    recipe: Recipe, device: str, *, processes: int = 1, elsewhere: bool = False
) -> StepKind:
    """Choose the fastest step that the recipe allows and the device can run.

    Args:
        recipe: what to train.
        device: a device as torch names it, such as "cpu" or "cuda:1".
        processes: how many processes share the run; several use no Triton.
        elsewhere: the device is in another machine, where all kernels for it are installed.

    Raises:
        InputError: if the recipe asks for kernels or a precision that the device cannot run.

    Example:
        >>> from ksparse import Recipe
        >>> choose_step(Recipe(), "cuda:1", elsewhere=True)
        'triton'
    """
    device_type = device.partition(":")[0]
    explicit = not recipe.needs_autograd and not recipe.sae.limits_weights
    kernels = recipe.run.kernels
    triton = (
        explicit
        and processes == 1
        and (device_type == "cuda" if elsewhere else triton_is_usable(device))
    )
    _check_triton(recipe, triton)
    bfloat16 = recipe.optim.precision != "float32"
    if bfloat16 or kernels == "triton" or (kernels == "auto" and device_type == "cuda" and triton):
        return "triton"
    native = explicit and device_type == "cpu" and kernels != "torch"
    if native and (elsewhere or native_is_usable()):
        return "native"
    _check_plain_torch(recipe)
    return _step_in_torch(recipe, device_type)


def _step_in_torch(recipe: Recipe, device_type: str) -> StepKind:
    explicit = not recipe.needs_autograd and device_type in ("cpu", "cuda")
    return "torch" if explicit else "autograd"


def _check_triton(recipe: Recipe, usable: bool) -> None:
    """Raise InputError if the recipe asks for what only Triton's kernels do, and they are not
    usable."""
    kernels = recipe.run.kernels
    if kernels == "triton" and not usable:
        raise InputError(
            "run.kernels is 'triton', which needs a CUDA GPU, the package triton and TopK without "
            f"{NOT_COMPILED}; leave it at 'auto'"
        )
    bfloat16 = recipe.optim.precision != "float32"
    if bfloat16 and not (usable and kernels in ("auto", "triton")):
        raise InputError(
            "optim.precision is 'bfloat16', which needs a CUDA GPU, the package triton and TopK "
            f"without {NOT_COMPILED}, run.kernels not 'torch'; leave it at 'float32'"
        )


def _check_plain_torch(recipe: Recipe) -> None:
    """Raise InputError if the recipe asks for what only compiled kernels do."""
    if recipe.run.kernels == "native":
        raise InputError(
            "run.kernels is 'native', which needs a CPU, a C++ compiler (g++ or clang++) and TopK "
            f"without {NOT_COMPILED}; leave it at 'auto', or give 'torch'"
        )
    if recipe.optim.approx_topk not in ("off", "auto"):
        raise InputError(
            f"optim.approx_topk is {recipe.optim.approx_topk!r}, which needs the compiled kernels "
            "(a CPU and a C++ compiler, or a CUDA GPU and triton; TopK without "
            f"{NOT_COMPILED}, run.kernels not 'torch'); leave it at 'off' or 'auto'"
        )


def native_is_usable() -> bool:
    """Return whether the compiled C++ kernels can be loaded; builds them if need be."""
    from ksparse.kernels import native

    return native.load() is not None


def triton_is_usable(device: str) -> bool:
    """Return whether Triton's kernels run on a device: on a CUDA GPU, or in the interpreter."""
    import torch

    from ksparse.kernels import triton_ops

    return triton_ops.usable(torch.device(device))


def prefilters(recipe: Recipe, shards: int = 0) -> bool:
    """Return whether candidates are preselected in low precision, by a step that can do it.

    `optim.approx_topk = "auto"` does so only where candidates are few among the latents of a
    process; elsewhere they would save nothing.

    Args:
        recipe: the recipe.
        shards: into how many shards the latents are split; 0: `mesh.latent`.
    """
    screen, sae = recipe.optim.approx_topk, recipe.sae
    latents = sae.n_latents // max(1, shards or recipe.mesh.latent)
    return screen != "off" and (screen != "auto" or latents >= 64 * sae.k)


def prefetches(recipe: Recipe, device: str) -> bool:
    """Return whether a thread computes activations ahead of the step."""
    if recipe.sae.uses_lm:  # the step runs the LM itself
        return False
    return recipe.run.ahead == "on" or (recipe.run.ahead == "auto" and device.startswith("cuda"))
