"""Attach an SAE to a model's forward pass, and clamp or scale its latents there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn

from ksparse.config import ActsConfig
from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.lm import provenance
from ksparse.lm.hooks import hooked, not_activations
from ksparse.lm.model import LM
from ksparse.sae import serialization
from ksparse.sae.model import SAE, Code
from ksparse.sae.ranges import in_values, largest_acts, warn_beyond
from ksparse.steering.calls import CallTracker, Positions
from ksparse.steering.hosts import find_site, from_hook, torch_module

_log = logging.getLogger("ksparse")
Unit = Literal["max", "value"]
"""What clamped values are in: multiples of a latent's largest activation, or its own values."""
Change = Callable[[Code], Code]
"""Maps the code [..., k] of an activation to what is added to it: values [..., m] of either sign at
latents [..., m]."""


def load_lm(sae: SAE, device: str = "auto", *, name: str = "") -> LM:
    """Load the LM that an SAE was trained on, at the SAE's site and with its contexts.

    Args:
        sae: The autoencoder.
        device: Where the LM runs.
        name: A Hub name or a folder in place of the LM that the SAE's metadata names.
            `provenance.check` says whether it may be another LM.

    Raises:
        InputError: The SAE's metadata does not name its LM, or not its site.
    """
    device = resolve_device(device)
    trained = provenance.trained_on(sae.metadata)
    if name:
        if name != trained.get("lm"):
            trained.pop("revision", None)  # of the other LM
        trained["lm"] = name
        if not trained.get("site"):
            raise InputError(
                f"this SAE does not say at which site it was trained; give {name} with one: "
                f"ksparse.LM({name!r}, site=…)"
            )
    if sae.metadata.get("origin") and trained.get("lm") and trained.get("site"):
        return LM(acts=ActsConfig(**trained), device=device)
    own = {"acts": trained} if name else sae.metadata
    return LM(acts=serialization.acts_of(own), device=device)


class Tap:
    """What an attached SAE read in the last forward pass, before any change.

    Attributes:
        x: Raw activations [b, t, d] in the SAE's precision.
        code: Their code [b, t, k].
        recon: Their reconstruction [b, t, d], on the scale of `x`.
        keep: bool [b, t], the positions that may be changed.
    """

    x: Tensor
    code: Code
    keep: Tensor

    def __init__(self, sae: SAE):
        self._sae = sae

    def __getattr__(self, name: str) -> Tensor:
        if name in ("x", "code", "keep"):
            raise InputError(
                f"no activation has reached the site yet, so there is no {name}; run the model "
                "inside the `with` block"
            )
        raise AttributeError(name)

    @property
    def recon(self) -> Tensor:
        """The reconstruction [b, t, d] of `x`."""
        return self._sae.normalize(self.x).restore(self._sae.decode_normalized(self.code))


@contextmanager
def attach(
    model: nn.Module,
    sae: SAE,
    site: str = "",
    *,
    change: Change | None = None,
    error: Literal["keep", "drop"] = "keep",
    positions: Positions = "trained",
) -> Iterator[Tap]:
    """Run an SAE in every forward pass of a causal LM inside a `with` block.

    Gradients flow through the SAE.

    Args:
        model: A causal LM of Hugging Face, TransformerLens or nnsight; of a `ksparse.LM`, `model`.
        sae: The autoencoder, on the model's device.
        site: Where to attach it: an alias such as `resid_post.8`, a module's name (its output),
            NAME:in (its input), or the model library's own name (`ksparse.steering.hosts`).
            Defaults to the site the SAE was trained at.
        change: Computes what is added to the code. By default nothing is, and the SAE only reads.
        error: "keep" gives x + what the change decodes to; "drop" replaces x by the reconstruction
            of the changed code.
        positions: "trained" changes only positions of the kind the SAE was trained on (usually not
            the first position, BOS, EOS or separators); "all" changes all; or a mask bool [b, t].

    Returns:
        A context manager that gives a `Tap` with what the SAE read in the last forward pass.

    Raises:
        InputError: The site does not exist, was not reached, or gives no activations; or an
            argument is invalid.

    Example:
        >>> import ksparse
        >>> from ksparse.sae.model import Shape
        >>> lm = ksparse.LM("pylm/0.3m", site="resid_post.1")
        >>> sae = ksparse.SAE(Shape(d_model=lm.d_model, n_latents=128, k=4))
        >>> with ksparse.attach(lm.model, sae, "resid_post.1") as tap:
        ...     output = lm.model(lm.tokenize("import os"))
        >>> tap.code.values.shape[-1], tap.recon.shape == tap.x.shape
        (4, True)
    """
    if error not in ("keep", "drop"):
        raise InputError(f"error is {error!r}; it must be 'keep' or 'drop'")
    model = torch_module(model)
    place = find_site(model, site or _trained_site(sae))
    if site:
        _warn_of_other_site(model, sae, site)
    site = site or _trained_site(sae)
    tap, calls = Tap(sae), CallTracker(sae, positions)
    replace = _replacement(sae, tap, calls, site, change, error)
    with calls.follow(model, place.place.module), hooked(place, replace):
        yield tap
    if calls.calls and not calls.reads:
        raise InputError(
            f"site {site!r} was not reached in {calls.calls} calls of the model, so nothing was "
            "read or changed there; choose another site, or, if the model was compiled with "
            "torch.compile, call the original model"
        )


def _replacement(
    sae: SAE,
    tap: Tap,
    calls: CallTracker,
    site: str,
    change: Change | None,
    error: Literal["keep", "drop"],
) -> Callable[[Tensor], Tensor | None]:
    """Return the hook at the site: it fills the tap, and returns the new activations, or None to
    leave them."""

    def replace(old: Tensor) -> Tensor | None:
        calls.mark_read(site)
        if problem := not_activations(old, calls.shape):
            raise InputError(
                f"site {site!r} gives {problem}, not activations [contexts, tokens, width]; choose "
                "another"
            )
        tap.x = old.to(sae.W_enc, copy=True)  # a copy, since the model may change `old` in place
        tap.keep = calls.positions_to_change(old)
        new = _read_and_change(sae, tap, change, error)
        return None if new is None else torch.where(tap.keep[..., None], new.to(old), old)

    return replace


def _warn_of_other_site(model: nn.Module, sae: SAE, site: str) -> None:
    trained = provenance.trained_on(sae.metadata).get("site")
    same = trained and (
        from_hook(site) == from_hook(trained)
        or provenance.same_site(model, site, trained, find=find_site)
    )
    if trained and not same:
        _log.warning("the autoencoder is attached at %s, but was trained at %s", site, trained)


def _trained_site(sae: SAE) -> str:
    site = (sae.metadata.get("acts") or sae.metadata.get("origin") or {}).get("site")
    if not site:
        raise InputError(
            "this SAE does not say at which site it was trained; give one, such as "
            "site='resid_post.8'"
        )
    return site


def _read_and_change(
    sae: SAE, tap: Tap, change: Change | None, error: Literal["keep", "drop"]
) -> Tensor | None:
    """Encode `tap.x` into `tap.code`; return the new raw activations, or None to leave x as is."""
    inputs = sae.normalize(tap.x)
    code = tap.code = sae.encode_normalized(inputs.x)
    added = None if change is None else sae.decoder(change(code))
    if error == "drop":
        recon = sae.decode_normalized(code)
        return inputs.restore(recon if added is None else recon + added)
    return None if added is None else tap.x + inputs.scale * added


@contextmanager
def steer(
    model: nn.Module,
    sae: SAE,
    clamp: Mapping[int, float] | None = None,
    *,
    unit: Unit = "max",
    scale: Mapping[int, float] | None = None,
    site: str = "",
    error: Literal["keep", "drop"] = "keep",
    positions: Positions = "trained",
    largest: Mapping[int, float] | None = None,
) -> Iterator[Tap]:
    """Clamp latents, or scale their activations, inside a `with` block.

    A clamped value further than 3 times a latent's largest one from 0 is warned about.

    Args:
        model: A Hugging Face causal LM; for a `ksparse.LM`, its `model`.
        sae: The autoencoder, on the model's device.
        clamp: {latent: value}, of either sign; 0 removes the latent.
        unit: What values are in. "max": multiples of the latent's largest activation, as
            `ksparse eval RUN stats` found it for the run that the SAE was loaded from, or as
            `largest` says. "value": the latent's own values.
        scale: {latent: factor} by which the latent's own activation is multiplied.
        site: As in `attach`.
        error: As in `attach`.
        positions: As in `attach`.
        largest: {latent: its largest value on a text}, in place of what `stats` found. Where
            neither is known, `unit` must be "value", and values far beyond what the latent can
            reach are warned about.

    Returns:
        A context manager that gives the `Tap` of `attach`.

    Raises:
        InputError: No latent is given, one does not exist or is given twice, a value is not
            finite, or the unit is "max" and not known; and whatever `attach` raises.

    Example:
        >>> import ksparse
        >>> from ksparse.sae.model import Shape
        >>> lm = ksparse.LM("pylm/0.3m", site="resid_post.1")
        >>> sae = ksparse.SAE(Shape(d_model=lm.d_model, n_latents=128, k=4))
        >>> with ksparse.steer(lm.model, sae, {12: 3.0}, site="resid_post.1", largest={12: 0.1}):
        ...     ids = lm.model.generate(lm.tokenize("import os"), max_new_tokens=2)
        >>> ids.shape[0]
        1
    """
    clamp, scale = dict(clamp or {}), dict(scale or {})
    if not clamp and not scale:
        raise InputError("steering needs a latent: clamp={latent: value} or scale={latent: factor}")
    if both := sorted(set(clamp) & set(scale)):
        raise InputError(f"latent {both[0]} is both clamped and scaled; give it in one of the two")
    check_latents(sae, [*clamp, *scale])
    for latent, value in (clamp | scale).items():
        is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if not is_number or not math.isfinite(value):
            raise InputError(
                f"latent {latent} cannot be clamped to or scaled by {value!r}; give a finite number"
            )
    if unit not in ("max", "value"):
        raise InputError(f"unit is {unit!r}; it must be 'max' or 'value'")
    known = largest_acts(sae, clamp, largest)
    clamp = in_values(sae, clamp, known) if unit == "max" else clamp
    warn_beyond(sae, clamp, known)
    change = sum_changes(clamped(clamp), scaled(scale))
    with attach(model, sae, site, change=change, error=error, positions=positions) as tap:
        yield tap


def check_latents(sae: SAE, latents: Sequence[int]) -> None:
    """Raise InputError for a latent that the SAE does not have."""
    for latent in latents:
        if not isinstance(latent, Integral) or isinstance(latent, bool):
            raise InputError(f"latent {latent!r} is not a latent; give a whole number")
        if not 0 <= latent < sae.shape.n_latents:
            raise InputError(
                f"latent {latent} does not exist: this SAE has latents 0 to "
                f"{sae.shape.n_latents - 1}"
            )


def clamped(values: Mapping[int, float]) -> Change:
    """Return the change that sets latents to these values, whatever they were."""
    return lambda code: _change_latents(code, values, lambda acts, value: value - acts)


def scaled(factors: Mapping[int, float]) -> Change:
    """Return the change that multiplies latents' activations by these factors."""
    return lambda code: _change_latents(code, factors, lambda acts, factor: (factor - 1) * acts)


def sum_changes(*parts: Change) -> Change:
    """Return the sum of several changes, each computed from the original code."""

    def change(code: Code) -> Code:
        added = [part(code) for part in parts]
        return Code(*(torch.cat(columns, dim=-1) for columns in zip(*added)))

    return change


def acts_at(code: Code, latents: Tensor) -> Tensor:
    """Return the activations [..., m] of latents[m] in a code [..., k]; 0 where inactive."""
    return torch.stack(
        [(code.values * (code.indices == latent)).sum(-1) for latent in latents.tolist()], dim=-1
    )


def _change_latents(
    code: Code, numbers: Mapping[int, float], rule: Callable[[Tensor, Tensor], Tensor]
) -> Code:
    """Return what `rule(activation, number)` adds to each latent of `numbers`."""
    if not numbers:
        return Code(code.values[..., :0], code.indices[..., :0])
    latents = torch.tensor(list(numbers), device=code.indices.device)
    targets = torch.tensor(
        list(numbers.values()), dtype=code.values.dtype, device=code.values.device
    )
    values = rule(acts_at(code, latents), targets)
    return Code(values, latents.expand(values.shape))
