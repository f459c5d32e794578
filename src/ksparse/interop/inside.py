"""An SAE inside a model, by plain hooks: of transformers, TransformerLens, or any other whose module at the site passes hidden states.

    with attached(model, sae, "resid_post.8") as at: …                            reads: at.x, at.code, at.recon of the last forward pass
    with attached(model, sae, "resid_post.8", error="drop"): …                    the reconstruction in place of the activation
    with attached(model, sae, "resid_post.8", edit=ablate(12, 77)): …             without these latents; the rest of the activation as it is
    with attached(model, sae, "resid_post.8", edit=steer({12: 5.0})): …           with these latents at these values, on every token

Several may be attached at once. Gradients flow if the caller lets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ksparse.acts.lm import hooked, resolve
from ksparse.errors import InputError
from ksparse.sae.model import SAE, Code

Edit = Callable[[Code, SAE], Code]
"""Makes another code [..., k'] of a code [..., k]."""


class Attached:
    """What an SAE saw in the last forward pass: raw activations x[b, t, d], their code [b, t, k] and reconstruction recon[b, t, d]."""

    x: Tensor
    code: Code
    recon: Tensor

    def __init__(self, sae: SAE, site: str):
        self.sae, self.site = sae, site

    def __getattr__(self, name: str) -> Tensor:
        if name in ("x", "code", "recon"):
            raise InputError(f"nothing has gone through {self.site} yet, so there is no {name}; run the model inside the `with`")
        raise AttributeError(name)


@contextmanager
def attached(model: nn.Module, sae: SAE, site: str = "", *, edit: Edit | None = None, error: Literal["keep", "drop"] = "keep",
             where: Tensor | None = None) -> Iterator[Attached]:
    """Let an SAE read, and change, a model's activations at a site for as long as the context lasts.

    site: as in `acts.site`, or the name of a module; the SAE's own if not given.
    edit: what becomes of the code before it is decoded.
    error: keep: only what `edit` changes is changed, so without it nothing is. drop: the reconstruction takes the activation's place.
    where: bool[b, t], the tokens to change; all if not given. SAEs are mostly trained without BOS, whose activation is unlike all others.
    """
    site = site or (sae.metadata.get("acts") or sae.metadata.get("origin") or {}).get("site", "")
    if not site:
        raise InputError("this SAE does not say at which site it belongs; name it: attached(model, sae, \"resid_post.8\")")
    if error not in ("keep", "drop"):
        raise InputError(f"error is {error!r}; it must be 'keep' or 'drop'")
    module, place = resolve(model, site)
    seen = Attached(sae, site)

    def change(raw: Tensor) -> Tensor | None:
        if where is not None and where.shape != raw.shape[:-1]:
            raise InputError(f"where is of shape {list(where.shape)}, the activations at {site} are of {list(raw.shape[:-1])}, apart from their width")
        seen.x = raw
        inputs = sae.normalize(raw)
        seen.code = sae.encode_normalized(inputs.x)
        recon = sae.decode(seen.code)
        seen.recon = inputs.restore(recon)
        if edit is None and error == "keep":
            return None
        decoded = recon if edit is None else sae.decode(edit(seen.code, sae))
        new = inputs.restore(decoded) if error == "drop" else raw + (decoded - recon) * inputs.scale
        return (new if where is None else torch.where(where[..., None].to(new.device), new, raw)).to(raw.dtype)

    with hooked(module, place, change):
        yield seen


def ablate(*latents: int) -> Edit:
    """Return the edit that sets latents to 0."""

    def edit(code: Code, sae: SAE) -> Code:
        return Code(code.values.masked_fill(_is_one_of(code, _checked(latents, sae)), 0.0), code.indices)

    return edit


def steer(values: Mapping[int, float]) -> Edit:
    """Return the edit that sets latents to values, whether or not they were active, in the unit of the SAE's normalised input."""

    def edit(code: Code, sae: SAE) -> Code:
        latents = _checked(values, sae)
        others = code.values.masked_fill(_is_one_of(code, latents), 0.0)
        shape = (*code.values.shape[:-1], len(latents))
        new = torch.tensor([float(value) for value in values.values()], dtype=others.dtype, device=others.device)
        added = torch.tensor(latents, device=code.indices.device, dtype=code.indices.dtype)
        return Code(torch.cat([others, new.expand(shape)], -1), torch.cat([code.indices, added.expand(shape)], -1))

    return edit


def _checked(latents: Mapping[int, float] | tuple[int, ...], sae: SAE) -> list[int]:
    for latent in latents:
        if not 0 <= latent < sae.shape.n_latents:
            raise InputError(f"there is no latent {latent}; this SAE has 0 to {sae.shape.n_latents - 1}")
    return list(latents)


def _is_one_of(code: Code, latents: list[int]) -> Tensor:
    return torch.isin(code.indices, torch.tensor(latents, device=code.indices.device, dtype=code.indices.dtype))
