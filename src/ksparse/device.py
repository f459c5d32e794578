"""The device on which a recipe or an evaluation runs."""

from __future__ import annotations

import torch

from ksparse.errors import InputError


def resolve_device(name: str) -> str:
    """Return a device that is available.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", or "auto" for an accelerator if there is one.

    Raises:
        InputError: if the device is not available.

    Example:
        >>> resolve_device("cpu")
        'cpu'
    """
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
            f"device {name!r} is not available: {str(error).splitlines()[0]}; cpu always is"
        ) from None
    return name
