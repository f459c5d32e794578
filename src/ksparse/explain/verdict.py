"""What a result of `ksparse explain` allows to say about single latents."""

from __future__ import annotations

from typing import Any

SCORES = ("detection", "fuzzing")
ERRORS = 2
"""Standard errors that own explanations must be ahead of dealt ones."""


def tells_apart(result: dict[str, Any], score: str) -> bool | None:
    """Return whether a latent's own explanation scores better than that of another latent.

    The mean paired difference must exceed `ERRORS` standard errors over latents. Where it does not,
    the judge cannot tell latents apart by their explanations, and the scores of single latents rank
    nothing.

    Args:
        result: of `ksparse explain`.
        score: "detection" or "fuzzing".

    Returns:
        None if the result has no such difference, as with one latent.

    Example:
        >>> tells_apart({"fuzzing_over_shuffled": {"value": 0.1, "se": 0.02}}, "fuzzing")
        True
    """
    difference = result.get(f"{score}_over_shuffled")
    found = difference if isinstance(difference, dict) else {}
    value, se = found.get("value"), found.get("se")
    if not isinstance(value, (int, float)) or not isinstance(se, (int, float)):
        return None
    return value > ERRORS * se
