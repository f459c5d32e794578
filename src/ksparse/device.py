"""TODO ksparse.device."""

from __future__ import annotations

import torch

from ksparse.errors import InputError


def resolve_device(name: str) -> str:
    """Return the device that a recipe asks for; auto takes an accelerator if there is one."""
    if name == "auto":
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name!r} is not to be had here: {str(error).splitlines()[0]}; cpu always is"
        ) from None
    return name
