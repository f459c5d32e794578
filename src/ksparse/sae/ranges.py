"""The range of a latent's values. A value far beyond it is one that the LM has never seen, and
what the LM does there says little about the latent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from ksparse.errors import InputError
from ksparse.sae.model import SAE
from ksparse.storage.run_folder import RunFolder

FAR = 3.0
"""A value is far if it is more than this many times the largest one."""
_log = logging.getLogger("ksparse")


@torch.no_grad()
def reach(sae: SAE, latent: int) -> float:
    """Return the largest value that a latent has on any input of typical norm; its values on text
    are hardly larger."""
    row = sae.W_enc[latent]
    product = float(sae.input_norm * row.norm() - row @ sae.b_pre)
    return sae.activation.value_at(sae, latent, product)


def recorded(sae: SAE, name: str) -> Tensor | None:
    """Return an array [n_latents] of the result of `stats` in the folder that an SAE was loaded
    from, such as "max_act"; None without such a result.

    Raises:
        InputError: the result is of another checkpoint or another SAE.
    """
    run = results_of(sae)
    file = run.arrays_file("stats") if run else None
    if file is None:
        return None
    with safe_open(file, framework="pt") as arrays:
        return arrays.get_tensor(name) if name in arrays.keys() else None  # noqa: SIM118


def results_of(sae: SAE) -> RunFolder | None:
    """Return the folder with results of `stats` that an SAE was loaded from; None if there is none.

    Raises:
        InputError: the result is of another checkpoint.
    """
    run = RunFolder(sae.source) if sae.source is not None else None
    result = run.eval("stats") if run and run.keeps_results() else None
    if run is None or result is None:
        return None
    judged, own = result.get("checkpoint"), sae.metadata.get("step")
    if judged is not None and own is not None and judged != own:
        raise InputError(
            f"the result of `stats` in {run.path} is of step {judged:,}, this SAE of step "
            f"{own:,}; run `ksparse eval {run.path} stats`"
        )
    return run


def largest_acts(
    sae: SAE, latents: Iterable[int], given: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Return the largest value of each latent on text, where it is known and above 0.

    Args:
        sae: the SAE; what `stats` found for it is read from the folder it was loaded from.
        latents: the latents.
        given: {latent: its largest value}, which counts before what `stats` found.
    """
    known = dict(given or {})
    missing = [latent for latent in latents if latent not in known]
    found = recorded(sae, "max_act") if missing else None
    if found is not None and len(found) == sae.n_latents:
        known |= {latent: float(found[latent]) for latent in missing}
    return {latent: value for latent, value in known.items() if value > 0}


def in_values(
    sae: SAE, multiples: Mapping[int, float], largest: Mapping[int, float]
) -> dict[int, float]:
    """Return values of latents that are given in multiples of their largest ones; 0 needs none.

    Raises:
        InputError: the largest value of a latent is not known.
    """
    for latent, multiple in multiples.items():
        if multiple and latent not in largest:
            where = sae.source if sae.source is not None else "SAE --out DIR"
            raise InputError(
                f"the largest value of latent {latent} is not known, or it never fired, so "
                f"unit='max' has no meaning: run `ksparse eval {where} stats` and load what it "
                f"writes to, or give largest={{{latent}: …}}, or values with unit='value'"
            )
    return {i: multiple * largest.get(i, 0.0) for i, multiple in multiples.items()}


def warn_beyond(
    sae: SAE, values: Mapping[int, float], largest: Mapping[int, float] | None = None
) -> None:
    """Log a warning for each latent that is to be held at a value far beyond its range.

    Args:
        sae: the SAE.
        values: {latent: the value to hold it at}.
        largest: {latent: its largest value on a text}; for latents that are not in it, `reach`.
    """
    for latent, value in values.items():
        known = (largest or {}).get(latent, 0.0)
        most = known or reach(sae, latent)
        if abs(value) > FAR * most:
            _log.warning(
                "latent %s at %g is %s times its largest value%s, %.3g: what the LM does there "
                "says little of the latent",
                latent,
                value,
                f"{abs(value) / most:.3g}" if most else "infinitely many",
                "" if known else " on any input",
                most,
            )
