"""An LM with its weights drawn anew: a control that has the architecture of an LM and nothing that
it has learnt (Heap et al. 2025, arXiv 2501.17727)."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from ksparse.errors import InputError


@torch.no_grad()
def redraw_(model: nn.Module, *, keep_embedding: bool = False) -> None:
    """Draw every weight tensor of a model from a Gaussian of its own mean and variance, in place.

    The draw is a function of the tensor's name, so it is the same each time and on every device.

    Args:
        model: The model, with weights of real numbers in memory.
        keep_embedding: Leave the tables of embeddings as they are, of positions too, and whatever
            shares their weights, such as a tied head.

    Raises:
        InputError: A weight is quantized, or not in memory.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 200)
        >>> before = layer.weight.clone()
        >>> redraw_(layer)
        >>> bool((layer.weight != before).all()), f"{layer.weight.std() / before.std():.0f}"
        (True, '1')
    """
    kept = (
        {
            id(weight)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for weight in module.parameters()
        }
        if keep_embedding
        else set()
    )
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            raise InputError(
                f"weights can be drawn anew only where they are real numbers in memory; {name} is "
                f"{'not in memory' if weight.is_meta else weight.dtype}. Leave out "
                "acts.lm_device_map and acts.lm_quantize, or acts.lm_weights"
            )
        if id(weight) in kept:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = weight.double()
        noise = torch.randn(weight.shape, generator=generator).to(values)
        weight.copy_(values.mean() + values.std(correction=0) * noise)
