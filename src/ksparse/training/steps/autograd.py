"""How the weights move (Gao et al. 2024, appendices A.3-A.6).

Order within a step: take the gradient's part along each decoder row off, clip, Adam, renormalise
the decoder, average. The official code renormalises and averages *before* the step, so that it
computes with a decoder that is off norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ksparse.config import BatchTopKConfig, Recipe, auxk_tokens
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.limits import PRE_ACTS
from ksparse.sae.losses import Losses, losses
from ksparse.sae.model import SAE, Code
from ksparse.sae.normalization import input_rms
from ksparse.training.resample import resample_dead, resampling


class AutogradStep:
    """Adam over one SAE's weights, float32 moments, and the exponential average of the weights."""

    def __init__(self, sae: SAE, recipe: Recipe, mesh: Mesh = SINGLE_PROCESS):
        options = recipe.optim
        self.sae, self.recipe, self.mesh = sae, recipe, mesh
        # Adam's steps are absolute and biases live on the scale of the input, so their rate is in
        # its unit: training is then the same whichever normalisation fixes that scale.
        biases = recipe.lr * input_rms(sae.shape.normalize, sae.shape.d_model)
        sae.b_enc.requires_grad_(recipe.sae.b_enc)
        weights = {name: parameter for name, parameter in sae.named_parameters()}
        relative = [weights.pop(name) for name in ("W_enc", "W_dec", "r_mag") if name in weights]
        groups = [
            {"params": relative, "lr": recipe.lr, "base": recipe.lr},
            {"params": list(weights.values()), "lr": biases, "base": biases},
        ]
        self.adam = torch.optim.Adam(
            groups, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
        )
        self.average = (
            {key: torch.zeros_like(weight) for key, weight in sae.named_parameters()}
            if recipe.ema
            else {}
        )
        self.updates = 0
        self.total: Tensor | float = 0.0
        """The loss of this step."""
        self.seen: tuple[Tensor, Code, Tensor] | None = None
        """The batch of this step (x, code, dead), where something is followed that is not a
        gradient."""
        self.batch: Tensor | None = None
        """The last batch that counted, where the activation has tensors that are set on one."""
        self.settled: dict[str, Tensor] = {}
        """These tensors, as the averaged weights last had them."""

    def backward(self, x: Tensor, *, baseline: float, dead: Tensor, k_aux: int) -> Losses:
        """Accumulate the gradients of a batch of normalised activations, in parts where n is large;
        return its losses and code.

        On a mesh x[b, d] is this process's part of the batch, the losses are the whole batch's, the
        code is that of its part and slice.
        """
        whole = len(x) * self.mesh.data
        options, at = self.recipe.sae, self.mesh.batch_range(whole).start
        wanted = auxk_tokens(options, whole)
        scalars: list[Tensor] = []
        codes: list[Code] = []
        for some in x.split(max(1, PRE_ACTS // self.sae.shape.n_latents)):
            share, mine = len(some) / whole, min(len(some), max(0, wanted - at))
            part = losses(
                self.sae,
                some,
                baseline=baseline,
                dead=dead,
                k_aux=k_aux,
                options=options,
                auxk_tokens=mine,
                auxk_weight=mine / wanted / share,
                strength=self.strength,
            )
            at += len(some)
            (part.total * share).backward()
            scalars.append(torch.stack((part.total, part.nmse, part.auxk)).detach() * share)
            codes.append(Code(*(field.detach() for field in part.code)))
        code = Code.joined(codes)
        self.seen = (
            (x, code, dead)
            if self.sae.activation.running or resampling(self.updates + 1, self.recipe)
            else None
        )
        total, nmse, auxk = self.mesh.all_reduce_sum(
            "loss", sum(scalars[1:], start=scalars[0]), "data"
        )
        self.total = total
        return Losses(total, nmse, auxk, code)

    @property
    def strength(self) -> float:
        """The share of its full weight that a penalty has in the coming step: it rises over the
        first steps."""
        rise = getattr(self.recipe.sae.activation, "warmup", 0.0) * self.recipe.steps
        return min(1.0, (self.updates + 1) / rise) if rise else 1.0

    def constrain_gradient(self) -> float:
        """Sum over the parts of the batch, take the part along decoder rows off, clip, and return
        the norm before clipping."""
        sums = [
            self.mesh.start_all_reduce_sum(key, weight.grad, "data")
            for key, weight in self.sae.named_parameters()
            if weight.grad is not None
        ]
        for wait in sums:
            wait()
        if self.recipe.sae.unit_norm and self.sae.W_dec.grad is not None:
            remove_parallel_(self.sae.W_dec.grad, self.sae.W_dec)
        return clip_(self.sae, self.recipe.optim.clip, self.mesh)

    def step(self, step: int) -> float | None:
        """Apply the gradients of step number `step` (from 1); return their norm before clipping.
        NaN, and nothing is changed, if that or the loss is not finite.

        None where the batch has to be taken in again, which can be on a GPU alone.
        """
        norm = self.constrain_gradient()
        if not (math.isfinite(norm) and math.isfinite(self.total)):
            return math.nan
        share = rate_share(step, self.recipe)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * share
        self.adam.step()
        self.adam.zero_grad()
        if self.recipe.sae.unit_norm:
            self.sae.normalize_decoder_()
        self.sae.activation.constrain_(self.sae)
        self.updates += 1
        for key, mean in self.average.items():
            mean.lerp_(getattr(self.sae, key).detach(), 1 - self.recipe.ema)
        if self.seen is not None:
            self._follow(*self.seen)
            self.seen = None
        return norm

    @torch.no_grad()
    def _follow(self, x: Tensor, code: Code, dead: Tensor) -> None:
        """Move BatchTopK's threshold towards the smallest value that this batch kept; start dead
        latents anew where it is time to."""
        options = self.recipe.sae.activation
        if isinstance(options, BatchTopKConfig):
            self.batch = x
            if len(fired := code.values[code.values > 0]):
                self.sae.threshold.lerp_(
                    fired.min(), max(1 / self.updates, 1 - options.threshold_decay)
                )
        if resampling(self.updates, self.recipe):
            new = resample_dead(
                self.sae, x, code, dead, self.recipe.seed * 1_000_003 + self.updates
            )
            for key, rows in (new or {}).items():
                self._restart(key, dead, rows)

    def _restart(self, key: str, latents: Tensor, rows: Tensor) -> None:
        """Give latents new rows of one tensor, which Adam knows nothing of and the average takes as
        they are."""
        weight = getattr(self.sae, key)
        weight[latents] = rows
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in self.adam.state.get(weight, {}):
                self.adam.state[weight][moment][latents] = 0
        if key in self.average:
            self.average[key][latents] = rows * (1 - self.recipe.ema**self.updates)

    def forget(self) -> None:
        """Drop the gradients of a batch that is left out."""
        self.adam.zero_grad()
        self.seen = None

    def audit(self, x: Tensor) -> dict[str, float]:
        """Return what is to be logged of shortcuts that the step takes; this one takes none."""
        return {}

    @torch.no_grad()
    def averaged(self) -> SAE:
        """Return a copy of the SAE with the averaged weights, corrected for their start at zero,
        decoder rows at norm 1.

        What is followed is set anew for them, on the last batch: BatchTopK's threshold of other
        weights would give another L0.
        """
        copy = self.sae.empty()
        weight = 1 - self.recipe.ema**self.updates if self.average else 1.0
        for key in self.sae.keys:
            averaged = self.updates and key in self.average
            getattr(copy, key).copy_(
                self.average[key] / weight
                if averaged
                else self.settled.get(key, getattr(self.sae, key))
            )
        if self.recipe.sae.unit_norm:
            copy.normalize_decoder_()
        if self.batch is not None:
            copy.activation.settle_(copy, self.batch.to(copy.W_enc))
            self.settled = {key: getattr(copy, key).clone() for key in copy.activation.own}
        return copy

    def raw(self) -> SAE:
        """Return the SAE with the weights of this step, as it would be in use; a copy where
        something is followed."""
        if self.batch is None:
            return self.sae
        copy = self.sae.empty()
        copy.load_state_dict(self.sae.state_dict())
        copy.activation.settle_(copy, self.batch.to(copy.W_enc))
        return copy

    # ---- for checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        out = {f"raw.{key}": getattr(self.sae, key).detach() for key in self.sae.keys}
        out |= {f"average.{key}": mean for key, mean in (self.average | self.settled).items()}
        for key in self.sae.keys:
            for moment, value in self.adam.state.get(getattr(self.sae, key), {}).items():
                out[f"{moment}.{key}"] = value
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take back what `tensors` gave."""
        self.updates = updates
        followed = self.sae.activation.own if self.sae.activation.running else ()
        self.settled = {
            key: tensors[f"average.{key}"] for key in followed if f"average.{key}" in tensors
        }  # older files have none
        for key in self.sae.keys:
            weight = getattr(self.sae, key)
            weight.copy_(tensors[f"raw.{key}"])
            if key in self.average:
                self.average[key].copy_(tensors[f"average.{key}"])
            moments = {
                name: tensors[f"{name}.{key}"]
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{key}" in tensors
            }
            if moments:
                self.adam.state[weight] = {
                    name: value.clone().to(weight.device) for name, value in moments.items()
                }


def rate_share(step: int, recipe: Recipe) -> float:
    """Return the learning rate of step `step` (from 1) as a share of its full value: a linear rise,
    a linear fall at the end."""
    rise = min(1.0, step / recipe.optim.warmup) if recipe.optim.warmup else 1.0
    falling = recipe.optim.decay * recipe.steps
    fall = min(1.0, (recipe.steps - step + 1) / falling) if falling else 1.0
    return min(rise, fall)


@torch.no_grad()
def remove_parallel_(grad: Tensor, weight: Tensor) -> None:
    """Take off each gradient row its part along the weight row of norm 1, in place (Bricken et al.
    2023)."""
    along = (grad * weight).sum(1, keepdim=True)
    grad.sub_(along * weight)


@torch.no_grad()
def clip_(sae: SAE, limit: float, mesh: Mesh = SINGLE_PROCESS) -> float:
    """Scale the gradients so that their norm, over all slices, is at most `limit`, if that is not
    0; return the norm before."""
    gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if mesh.latent > 1:
        shared = sae.b_pre.grad
        own = torch.nn.utils.get_total_norm(
            [gradient for gradient in gradients if gradient is not shared]
        )
        squares = mesh.all_reduce_sum("norm", own.double().square(), "latent")
        if shared is not None:
            squares = squares + shared.double().square().sum()
        norm = squares.sqrt().float()
    if limit:
        for gradient in gradients:
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()
