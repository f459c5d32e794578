"""The k-sparse autoencoder as a plain nn.Module: no process group, no files, no logging.

Shapes: x[b, d], pre_acts[b, n], Code(values[b, k], indices[b, k]); every parameter has the latents
first. TopK is one of several activations (`ksparse.sae.activations`); codes of the others are as
wide as the batch's largest number of active latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ksparse import html, kernels
from ksparse.errors import InputError
from ksparse.lookup import function_of
from ksparse.sae.activations import ACTIVATIONS, build_activation
from ksparse.sae.code import Code as Code
from ksparse.sae.code import RawCode as RawCode
from ksparse.sae.code import TextCode as TextCode
from ksparse.sae.joint import Joint
from ksparse.sae.normalization import KINDS, PER_ACTIVATION, Normalized, input_rms, normalize

_LEAST_FACTOR = 1e-30  # beyond it or its inverse, float32 activations become 0 or infinity
_ACTIVATION = "activation."  # what torch puts before the names of the activation's tensors


@dataclass(frozen=True)
class Shape:
    """What an autoencoder is, apart from its weights.

    Args:
        d_model: width of the activations.
        n_latents: number of latents.
        k: latents that may be active at once; for activations other than TopK, what `sae.k` of a
            recipe says.
        normalize: how raw activations are normalised (`ksparse.sae.normalization`).
        factor: the constant of normalize = 'dataset'.
        activation: kind of the activation (`ksparse.sae.activations`).
    """

    d_model: int
    n_latents: int
    k: int
    normalize: str = "unit_norm"
    factor: float = 1.0
    activation: str = "topk"

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents", "k"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(
                    f"{name} of an SAE is {value!r}; it must be a whole number of at least 1"
                )
        if self.k > self.n_latents:
            raise InputError(
                f"k is {self.k}, more than the {self.n_latents} latents; give a smaller k"
            )
        for name, known in (("normalize", KINDS), ("activation", tuple(ACTIVATIONS))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                what = "normalisation" if name == "normalize" else name
                raise InputError(f"{what} {value!r} is unknown; there are {', '.join(known)}")
        if (
            type(self.factor) not in (int, float)
            or not _LEAST_FACTOR <= self.factor <= 1 / _LEAST_FACTOR
        ):
            raise InputError(
                f"factor of an SAE is {self.factor!r}; it must be a number from "
                f"{_LEAST_FACTOR:g} to {1 / _LEAST_FACTOR:g}"
            )


class SAE(nn.Module):
    """recon = W_dec^T z + b_pre,  z = ReLU(TopK(W_enc (x - b_pre) + b_enc))

    (Gao et al. 2024, eq. 2), or another activation in the place of TopK. An activation may have
    tensors of its own; `state_dict`, `named_parameters`, attributes and files list them beside
    `W_enc`, as in `sae.threshold`. `encode`, `decode`, `pre_acts` and `forward` take and return raw
    activations. The equation itself, on normalised activations, is in `encode_normalized`,
    `decode_normalized`, `pre_acts_normalized`, `activate`, `code`, `products` and `decoder`, which
    training calls.

    Parameters of an SAE that `ksparse.load` returns take no gradient until
    `sae.requires_grad_(True)`; a gradient with respect to the activations is taken where these ask
    for one.

    Args:
        shape: sizes, normalisation and activation; all weights start at 0.
        metadata: what the SAE was trained on. It is saved with the weights and may be empty.

    Example:
        >>> import torch
        >>> from ksparse import SAE
        >>> from ksparse.sae.model import Shape
        >>> sae = SAE(Shape(d_model=8, n_latents=32, k=4, activation="topk"))
        >>> x = torch.randn(5, 8)
        >>> code = sae.encode(x)
        >>> code.indices.shape
        torch.Size([5, 4])
        >>> torch.equal(sae.decode(code), sae(x))
        True
    """

    def __init__(self, shape: Shape, metadata: dict[str, Any] | None = None):
        super().__init__()
        self.shape, self.metadata = shape, dict(metadata or {})
        self.source: Path | None = None
        """The folder it was loaded from, with results beside it if that is a run's."""
        self.joint = Joint()
        n, d = shape.n_latents, shape.d_model
        self.W_enc = nn.Parameter(torch.zeros(n, d))
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.W_dec = nn.Parameter(torch.zeros(n, d))
        self.b_pre = nn.Parameter(torch.zeros(d))
        self.activation = build_activation(shape.activation, n)
        self.register_state_dict_post_hook(_drop_activation_prefix)
        self.register_load_state_dict_pre_hook(_add_activation_prefix)

    # ---- the activation's tensors have the names that they have in files

    def __getattr__(self, name: str) -> Tensor:
        """Look up a tensor that is not the SAE's own in its activation, as in `sae.threshold`."""
        try:
            return super().__getattr__(name)  # type: ignore[return-value]
        except AttributeError:
            activation = self.__dict__.get("_modules", {}).get("activation")
            if activation is not None and name in {**activation._parameters, **activation._buffers}:
                tensor: Tensor = getattr(activation, name)
                return tensor
            raise

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter), with the names of `state_dict`."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace(_ACTIVATION, "", 1), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, buffer), with the names of `state_dict`."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield name.replace(_ACTIVATION, "", 1), buffer

    def empty(self) -> SAE:
        """Return an SAE of the same class, shape and metadata, on the CPU, with weights of 0."""
        return SAE(self.shape, self.metadata)

    def count(self, latents: Tensor) -> int:
        """Return the number of latents in a list; a sharded SAE adds those of its other shards."""
        return len(latents)

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.shape.n_latents

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.shape.d_model

    @property
    def k(self) -> int:
        """Latents that may be active at once, as in `shape`."""
        return self.shape.k

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def config(self) -> dict[str, Any]:
        """What the SAE is: the fields of its `shape`, and `trained_on`, which names the LM, site,
        text and contexts of its training as far as they are known."""
        return {**asdict(self.shape), "trained_on": self._trained_on()}

    @property
    def cfg(self) -> dict[str, Any]:
        """The same as `config`, by the name that other libraries have for it."""
        return self.config

    def _trained_on(self) -> dict[str, Any]:
        return dict(self.metadata.get("origin") or self.metadata.get("acts") or {})

    @property
    def input_rms(self) -> float:
        """The root mean square of a component of normalised inputs. Biases and thresholds live on
        this scale. Of inputs that are left as they are it was measured when training began."""
        measured = self.metadata.get("input_rms")
        if isinstance(measured, float) and 0 < measured < math.inf:
            return measured
        return input_rms(self.shape.normalize, self.shape.d_model)

    @property
    def input_norm(self) -> float:
        """The norm of a typical normalised input: 1 with unit_norm, else input_rms sqrt(d)."""
        norm: float = self.input_rms * self.shape.d_model**0.5
        return norm

    # ---- for users: the LM and the latents

    def lm(self, device: str | None = None) -> Any:
        """Load the LM that the SAE was trained on, at its site and with its contexts.

        Args:
            device: where the LM runs; by default the SAE's device.

        Returns:
            The `ksparse.LM`.

        Raises:
            InputError: the SAE does not say which LM or site it was trained on.
        """
        return function_of("SAE.lm")(self, str(self.device) if device is None else device)

    def latent(self, number: int, *, text: Any = None, lm: Any = None) -> Any:
        """Return one latent: how often it fires, how strongly, and on what.

        Args:
            number: the latent.
            text: a text, or several, to measure it on; by default what `ksparse eval RUN stats`
                found on the held-out text of the run that the SAE was loaded from.
            lm: the LM for `text`; by default the one that the SAE was trained on.

        Returns:
            A `ksparse.interop.latents.Latent` with `density`, `max`, `examples` and `tokens`.

        Raises:
            InputError: there is no such latent, or without `text`, no result of `stats`.

        Example:
            >>> import ksparse
            >>> sae = ksparse.load("runs/demo")
            >>> strongest = sae.latent(0, text="import os").code.top(1)[0].latent
            >>> sae.latent(strongest, text="import os").max > 0
            True
        """
        return function_of("SAE.latent")(self, number, text=text, lm=lm)

    # ---- for users: raw activations

    def normalize(self, raw: Tensor) -> Normalized:
        """Normalise raw activations [..., d], keeping what `restore` needs.

        Raises:
            InputError: for anything but real numbers of width d_model.
        """
        if not isinstance(raw, Tensor) or not raw.ndim or raw.is_complex():
            what = (
                f"{raw.dtype} {list(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
            )
            raise InputError(
                f"activations are a tensor of real numbers [..., {self.shape.d_model}], got {what}"
            )
        if raw.shape[-1] != self.shape.d_model:
            raise InputError(
                f"this SAE is for activations of width d_model = {self.shape.d_model}, got "
                f"{raw.shape[-1]} (shape {list(raw.shape)}); is it the right model and site?"
            )
        return normalize(raw.to(self.W_enc.dtype), self.shape.normalize, self.shape.factor)

    def pre_acts(self, raw: Tensor) -> Tensor:
        """Return the pre-activations [..., n] of raw activations [..., d], without gradient."""
        x = self.normalize(raw).x
        rows = self.pre_acts_normalized(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def encode(self, raw: Tensor) -> RawCode:
        """Return the code of raw activations [..., d], the largest values first."""
        inputs = self.normalize(raw)
        return RawCode.of(self.encode_normalized(inputs.x), inputs, self.shape.n_latents)

    def decode(self, code: Code) -> Tensor:
        """Return the reconstruction [..., d] of raw activations: decode(encode(x)) is self(x).

        unit_norm, layer_norm and constant_norm remove a mean or a scale from each activation, which
        the values of a code do not contain. The code must then be one that `encode` returned, or
        such a code with other values or latents (`code._replace(values=…)`).

        Raises:
            InputError: for a code without that mean and scale, and for latents that do not exist.
        """
        if not isinstance(code, Code):
            raise InputError(
                f"a code is decoded, got {type(code).__name__}; give what `encode` returned, whole "
                "or rows of it: code.at(…)"
            )
        n = self.shape.n_latents
        if code.indices.is_floating_point() or ((code.indices < 0) | (code.indices >= n)).any():
            raise InputError(
                f"a code has latents that do not exist: this SAE has latents 0 to {n - 1}"
            )
        code = code._replace(values=code.values.to(self.W_dec))
        recon = self.decode_normalized(code)
        if self.shape.normalize in PER_ACTIVATION:
            return self._restorer(code).restore(recon)
        return normalize(recon[..., :1], self.shape.normalize, self.shape.factor).restore(recon)

    def _restorer(self, code: Code) -> Normalized:
        inputs = code.inputs if isinstance(code, RawCode) else None
        if inputs is None:
            raise InputError(
                "this code does not say what was taken off its activations, and "
                f"{self.shape.normalize} removes a mean or a scale from each: decode a code that "
                "`encode` returned (to change it: code._replace(values=…)), or use "
                "decode_normalized(code), which is on the scale of the normalised activations"
            )
        if inputs.scale.shape[:-1] != code.values.shape[:-1]:
            raise InputError(
                f"this code is of shape {list(code.values.shape)}, but it was made from "
                f"activations {list(inputs.scale.shape[:-1])}; slice it with code.at(…)"
            )
        return inputs

    def forward(self, raw: Tensor) -> Tensor:
        """Return the reconstruction of raw activations [..., d], on their own scale."""
        inputs = self.normalize(raw)
        return inputs.restore(self.decode_normalized(self.encode_normalized(inputs.x)))

    def encode_normalized(self, x: Tensor) -> Code:
        """Return the code of normalised activations [..., d], the largest values first."""
        code = self.activate(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
        values, order = code.values.sort(dim=-1, descending=True, stable=True)
        shape = (*x.shape[:-1], code.values.shape[-1])
        return Code(values.reshape(shape), code.indices.gather(-1, order).reshape(shape))

    # ---- the equation: normalised activations

    def activate(self, x: Tensor) -> Code:
        """Return the code of x[b, d] in use: of TopK as wide as k, else as the largest number of
        active latents."""
        return self.activation.encode(self, x)

    def products(self, x: Tensor) -> Tensor:
        """Return W_enc (x - b_pre) as [b, n], with gradient."""
        return (x - self.joint.b_pre(self.b_pre)) @ self.W_enc.t()

    @torch.no_grad()
    def pre_acts_normalized(self, x: Tensor) -> Tensor:
        """Return W_enc (x - b_pre) + b_enc as [b, n], without gradient: it only serves to select
        latents."""
        return torch.addmm(self.b_enc, x - self.b_pre, self.W_enc.t())

    def code(
        self, x: Tensor, pre_acts: Tensor, k: int | None = None, among: Tensor | None = None
    ) -> Code:
        """Select the k largest pre-activations, without gradient, and return their ReLU, with it.

        Args:
            x: normalised activations [b, d].
            pre_acts: their pre-activations [b, n].
            k: how many; the SAE's own k if not given, and fewer where `among` has fewer.
            among: indices of the latents to select from; all if not given.
        """
        k = self.shape.k if k is None else k
        if among is None:
            indices = kernels.topk(pre_acts, k)
        else:
            indices = among[kernels.topk(pre_acts[:, among], min(k, len(among)))]
        values = kernels.selected_pre_acts(x, self.b_pre, self.W_enc, self.b_enc, indices, pre_acts)
        return Code(torch.relu(values), indices)

    def decoder(self, code: Code) -> Tensor:
        """Return W_dec^T z without bias, [..., d]. AuxK needs it so: b_pre is in the reconstruction
        whose error it predicts."""
        *lead, k = code.values.shape
        values, indices = (part.reshape(math.prod(lead), k) for part in code)
        return kernels.gather_sum(values, indices, self.W_dec).reshape(*lead, self.shape.d_model)

    def decode_normalized(self, code: Code) -> Tensor:
        """Return the reconstruction of normalised activations, [..., d]."""
        return self.decoder(code) + self.b_pre

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give every decoder row norm 1, in place. A zero row stays zero."""
        norms = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norms > 0, norms, 1.0))

    def __repr__(self) -> str:
        fields = asdict(self.shape)
        if self.shape.normalize != "dataset":
            del fields["factor"]
        words = [f"{key}={value!r}" for key, value in fields.items()]
        trained = self._trained_on()
        if trained.get("lm"):
            words.append(f"trained_on='{trained['lm']} at {trained.get('site') or 'unknown site'}'")
        return f"{type(self).__name__}({', '.join([*words, f'device={str(self.device)!r}'])})"

    def _repr_html_(self) -> str:
        trained = self._trained_on()
        words = {
            "latents": self.n_latents,
            "k": self.k,
            "d_model": self.d_model,
            "activation": self.shape.activation,
            "normalisation": self.shape.normalize,
            "trained on": trained.get("lm"),
            "site": trained.get("site"),
            "tokens": self.metadata.get("tokens"),
            "loaded from": self.source,
            "device": self.device,
        }
        known = {key: value for key, value in words.items() if value is not None}
        return html.table("Sparse autoencoder", known)


def _drop_activation_prefix(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Rename activation.threshold to threshold in a state dict, in place."""
    for key in [key for key in state_dict if key.startswith(prefix + _ACTIVATION)]:
        state_dict[prefix + key.removeprefix(prefix + _ACTIVATION)] = state_dict.pop(key)


def _add_activation_prefix(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Rename threshold to activation.threshold in a state dict that is to be loaded, in place."""
    for name in module.get_submodule("activation").state_dict():
        if prefix + name in state_dict:
            state_dict[prefix + _ACTIVATION + name] = state_dict.pop(prefix + name)
