"""How the weights move (Gao et al. 2024, appendices A.3-A.6): the step by autograd, for any recipe.

Order within a step: remove the part of the gradient along each decoder row, clip, Adam, renormalise
the decoder, average. The official code renormalises and averages *before* the step, so that it
computes with a decoder that is off norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ksparse.config import Recipe, auxk_tokens
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.limits import PRE_ACTS
from ksparse.sae.losses import LMPull, Losses, LossInputs, losses
from ksparse.sae.model import SAE, Code
from ksparse.training.resample import resample_dead, resampling

FROZEN: dict[str, tuple[str, ...]] = {
    "none": (),
    "decoder": ("W_dec",),
    "encoder": ("W_enc", "b_enc"),
}
"""The tensors that each value of `sae.freeze` leaves at their start values."""


class AutogradStep:
    """Adam over one SAE's weights, float32 moments, and the exponential average of the weights.

    Args:
        sae: the SAE, or this process's shard of it. It is trained in place.
        recipe: the recipe.
        mesh: the processes that share the run.
    """

    def __init__(self, sae: SAE, recipe: Recipe, mesh: Mesh = SINGLE_PROCESS):
        options = recipe.optim
        self.sae, self.recipe, self.mesh = sae, recipe, mesh
        self.activation = sae.activation.configured(recipe.sae.activation)
        # Adam's steps are absolute and biases live on the scale of the input, so their rate is in
        # its unit: training is then the same whichever normalisation fixes that scale.
        biases = recipe.lr * sae.input_rms
        self.frozen = FROZEN[recipe.sae.freeze]
        for key, weight in sae.named_parameters():
            weight.requires_grad_(key not in self.frozen and (key != "b_enc" or recipe.sae.b_enc))
        self.start = sae.W_dec.detach().clone() if recipe.sae.decoder_cosine_min else None
        """The decoder's start values [n, d], near which its rows are held; None: they are free."""
        weights = dict(sae.named_parameters())
        relative = [weights.pop(name) for name in ("W_enc", "W_dec", *self.activation.SCALE_FREE)]
        groups = [
            {"params": relative, "lr": recipe.lr, "base": recipe.lr},
            {"params": list(weights.values()), "lr": biases, "base": biases},
        ]
        self.adam = torch.optim.Adam(
            groups, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
        )
        self.average = (
            {
                key: torch.zeros_like(weight)
                for key, weight in sae.named_parameters()
                if key not in self.frozen
            }
            if recipe.ema
            else {}
        )
        self.updates = 0
        self.total: Tensor | float = 0.0
        """The loss of this step."""
        self.lm_loss: Callable[[Tensor], LMPull] | None = None
        """The loss of the LM for reconstructions [b, d] of the coming batch, where the recipe has
        it."""
        self.dead = torch.zeros(0, dtype=torch.long)
        """The latents that are dead in this step."""
        self.seen: tuple[Tensor, Code, Tensor] | None = None
        """The batch of this step (x, code, dead), where the step updates more than weights."""
        self.batch: Tensor | None = None
        """The last batch that moved the weights, where the activation has followed statistics."""
        self.settled: dict[str, Tensor] = {}
        """Those statistics as last set for the averaged weights."""

    def backward(self, x: Tensor, *, baseline: float, dead: Tensor, k_aux: int) -> Losses:
        """Accumulate the gradients of a batch, in parts where n is large.

        Args:
            x: normalised activations [b, d]; on a mesh, this process's part of the batch.
            baseline: mean squared error per component of predicting the mean.
            dead: indices of the latents that are dead now.
            k_aux: how many of them AuxK uses per token.

        Returns:
            The losses of the batch, on a mesh of the whole batch, and the code, of this process's
            part and shard.
        """
        batch_size = len(x) * self.mesh.data
        options, at = self.recipe.sae, self.mesh.batch_range(batch_size).start
        aux_tokens = auxk_tokens(options, batch_size)
        scalars: list[Tensor] = []
        codes: list[Code] = []
        names: list[str] = []
        parts = x.split(max(1, PRE_ACTS // self.sae.shape.n_latents))
        pulls = self._lm_pulls(parts, baseline)
        for part, pull in zip(parts, pulls, strict=True):
            share, counted = len(part) / batch_size, min(len(part), max(0, aux_tokens - at))
            starts = range(at % len(x), batch_size, len(x))  # of this part in all processes
            of = sum(min(len(part), max(0, aux_tokens - start)) for start in starts)
            inputs = LossInputs(
                options,
                baseline,
                dead,
                k_aux,
                auxk_tokens=counted,
                auxk_of=of,
                auxk_weight=counted / aux_tokens / share,
                penalty_share=self.penalty_share,
                seed=step_seed(self.updates + 1, self.recipe),
                lm=pull,
            )
            result = losses(self.sae, part, inputs)
            at += len(part)
            (result.total * share).backward()
            names = list(result.terms)
            scalars.append(torch.stack((result.total, *result.terms.values())).detach() * share)
            codes.append(Code(*(field.detach() for field in result.code)))
        code = Code.concat(codes)
        self.dead = dead
        self.seen = (
            (x, code, dead)
            if self.activation.followed or resampling(self.updates + 1, self.recipe)
            else None
        )
        total, *values = self.mesh.all_reduce_sum(
            "loss", sum(scalars[1:], start=scalars[0]), "data"
        )
        self.total = total
        return Losses(total, dict(zip(names, values)), code)

    @torch.no_grad()
    def _lm_pulls(self, parts: Sequence[Tensor], baseline: float) -> Sequence[LMPull | None]:
        """Return the loss of the LM for each part of a batch; None where the recipe has none.

        All reconstructions are computed beforehand: the LM reads whole contexts, and its loss is
        scaled by those of the whole batch.
        """
        if self.lm_loss is None:
            return [None] * len(parts)
        recons = [self.activation(self.sae, part).recon for part in parts]
        pull = self.lm_loss(torch.cat(recons))
        if self.recipe.sae.lm_balance:
            errors = [(recon - part).square().sum().item() for recon, part in zip(recons, parts)]
            nmse = sum(errors) / sum(part.numel() for part in parts) / baseline
            pull = pull._replace(scale=pull.scale * nmse)
        shares = [len(part) / sum(map(len, parts)) for part in parts]
        gradients = pull.gradient.split([len(part) for part in parts])
        return [
            pull._replace(gradient=gradient / share)
            for gradient, share in zip(gradients, shares, strict=True)
        ]

    def set_k(self, k: int) -> None:
        """Choose `k` latents per token from now on (`sae.k_start`)."""
        self.sae.shape = dataclasses.replace(self.sae.shape, k=k)

    @property
    def penalty_share(self) -> float:
        """The share of its full weight that a penalty has in the coming step."""
        return self.recipe.sae.activation.penalty_share(self.updates + 1, self.recipe.steps)

    def constrain_gradient(self) -> float:
        """Sum the gradients over the parts of the batch, remove the part along decoder rows, clip,
        and return the norm before clipping."""
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
        """Apply the gradients of step number `step` (from 1).

        Returns:
            The gradient's norm before clipping; NaN, with nothing changed, if that or the loss is
            not finite; None, with nothing changed, if `backward` must be called again with the same
            batch, which only the Triton step asks for.
        """
        norm = self.constrain_gradient()
        if not (math.isfinite(norm) and math.isfinite(self.total)):
            return math.nan
        share = rate_share(step, self.recipe)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * share
        self.adam.step()
        self.adam.zero_grad()
        self._constrain_decoder(self.sae)
        self.activation.constrain_()
        self.activation.revive_(self.dead)
        self.updates += 1
        for key, weight in self.sae.named_parameters():
            if key in self.average:
                self.average[key].lerp_(weight.detach(), 1 - self.recipe.ema)
        if self.seen is not None:
            self._update_statistics(*self.seen)
            self.seen = None
        return norm

    def _constrain_decoder(self, sae: SAE) -> None:
        """Bring an SAE's decoder rows to norm 1 and near their start values, where the recipe asks
        for it. A frozen decoder keeps its bits."""
        if "W_dec" in self.frozen:
            return
        if self.recipe.sae.unit_norm:
            sae.normalize_decoder_()
        if self.start is not None:
            hold_(sae.W_dec, self.start, self.recipe.sae.decoder_cosine_min)

    @torch.no_grad()
    def _update_statistics(self, x: Tensor, code: Code, dead: Tensor) -> None:
        """Update what the activation follows, and resample dead latents if this step does."""
        if self.activation.followed:
            self.batch = x
            self.activation.follow_(self.sae, code, self.updates)
        if resampling(self.updates, self.recipe):
            new_rows = resample_dead(self.sae, x, code, dead, step_seed(self.updates, self.recipe))
            for key, rows in (new_rows or {}).items():
                if key not in self.frozen:
                    self._restart(key, dead, rows)
            if self.start is not None:
                hold_(self.sae.W_dec, self.start, self.recipe.sae.decoder_cosine_min)

    def _restart(self, key: str, latents: Tensor, rows: Tensor) -> None:
        """Replace the rows of some latents in one tensor, with Adam's moments at 0 and the average
        at the new rows."""
        weight = dict(self.sae.named_parameters())[key]
        weight[latents] = rows
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in self.adam.state.get(weight, {}):
                self.adam.state[weight][moment][latents] = 0
        if key in self.average:
            self.average[key][latents] = rows * (1 - self.recipe.ema**self.updates)

    def forget(self) -> None:
        """Drop the gradients of a batch that is skipped."""
        self.adam.zero_grad()
        self.seen = None

    def audit(self, x: Tensor) -> dict[str, float]:
        """Return metrics about approximations that the step makes on x[b, d]; this one makes
        none."""
        return {}

    @torch.no_grad()
    def averaged(self) -> SAE:
        """Return a copy of the SAE with the averaged weights, corrected for their start at zero,
        decoder rows at norm 1.

        Followed statistics are set for them on the last batch: BatchTopK's threshold of other
        weights would give another L0.
        """
        copy, current = self.sae.empty(), self.sae.state_dict()
        weight = 1 - self.recipe.ema**self.updates if self.average else 1.0
        for key, tensor in copy.state_dict().items():
            tensor.copy_(
                self.average[key] / weight
                if self.updates and key in self.average
                else self.settled.get(key, current[key])
            )
        self._constrain_decoder(copy)
        if self.batch is not None:
            copy.activation.calibrate_(copy, self.batch.to(copy.W_enc))
            statistics = copy.state_dict()
            self.settled = {key: statistics[key].clone() for key in copy.activation.followed}
        return copy

    def raw(self) -> SAE:
        """Return the SAE with the weights of this step, as it would be used; a copy where the
        activation has followed statistics."""
        if self.batch is None:
            return self.sae
        copy = self.sae.empty()
        copy.load_state_dict(self.sae.state_dict())
        copy.activation.calibrate_(copy, self.batch.to(copy.W_enc))
        return copy

    # ---- for checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        out = {f"raw.{key}": tensor for key, tensor in self.sae.state_dict().items()}
        out |= {f"average.{key}": mean for key, mean in (self.average | self.settled).items()}
        if self.start is not None:
            out["start.W_dec"] = self.start
        for key, weight in self.sae.named_parameters():
            for moment, value in self.adam.state.get(weight, {}).items():
                out[f"{moment}.{key}"] = value
        return out

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what `tensors` returned, after that many updates."""
        self.updates = updates
        self.settled = {
            key: tensors[f"average.{key}"]
            for key in self.activation.followed
            if f"average.{key}" in tensors
        }  # older files have none
        for key, tensor in self.sae.state_dict().items():
            tensor.copy_(tensors[f"raw.{key}"])
        for key, mean in self.average.items():
            mean.copy_(tensors[f"average.{key}"])
        if self.start is not None:
            self.start.copy_(tensors["start.W_dec"])
        for key, weight in self.sae.named_parameters():
            moments = {
                name: tensors[f"{name}.{key}"]
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{key}" in tensors
            }
            if moments:
                self.adam.state[weight] = {
                    name: value.clone().to(weight.device) for name, value in moments.items()
                }


def step_seed(step: int, recipe: Recipe) -> int:
    """Return the seed of what step `step` (from 1) draws, a function of the recipe and the step."""
    return recipe.seed * 1_000_003 + step


def rate_share(step: int, recipe: Recipe) -> float:
    """Return the learning rate of step `step` (from 1) as a share of its full value: it rises
    linearly over the warm-up, and falls linearly at the end."""
    rise = min(1.0, step / recipe.optim.warmup) if recipe.optim.warmup else 1.0
    falling = recipe.optim.decay * recipe.steps
    fall = min(1.0, (recipe.steps - step + 1) / falling) if falling else 1.0
    return min(rise, fall)


@torch.no_grad()
def hold_(rows: Tensor, start: Tensor, least: float) -> None:
    """Turn each row whose cosine with its start value is less than `least` back to that cosine, in
    place, within the plane of both; its norm stays.

    Args:
        rows: the rows [n, d].
        start: their start values [n, d], of norm 1.
        least: the smallest cosine, from 0 to 1.

    Example:
        >>> import torch
        >>> rows, start = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
        >>> hold_(rows, start, 0.8)
        >>> rows
        tensor([[1.6000, 1.2000]])
    """
    norm = rows.norm(dim=1, keepdim=True)
    along = (rows * start).sum(1, keepdim=True)
    far = (along < least * norm).squeeze(1)
    if not far.any():
        return
    target = least + (1 - least) * 1e-6  # so that rounding does not fall below the limit
    direction = start[far]
    aside = torch.nn.functional.normalize(rows[far] - along[far] * direction, dim=1)
    held = target * direction + math.sqrt(1 - target**2) * aside
    rows[far] = norm[far] * torch.nn.functional.normalize(held, dim=1)


@torch.no_grad()
def remove_parallel_(grad: Tensor, weight: Tensor) -> None:
    """Remove from each gradient row its component along the weight row of norm 1, in place (Bricken
    et al. 2023)."""
    along = (grad * weight).sum(1, keepdim=True)
    grad.sub_(along * weight)


@torch.no_grad()
def clip_(sae: SAE, limit: float, mesh: Mesh = SINGLE_PROCESS) -> float:
    """Scale the gradients so that their norm over all shards is at most `limit`, unless that is 0;
    return the norm before."""
    gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if mesh.latent > 1:
        shared = sae.b_pre.grad
        shard_norm = torch.nn.utils.get_total_norm(
            [gradient for gradient in gradients if gradient is not shared]
        )
        squares = mesh.all_reduce_sum("norm", shard_norm.double().square(), "latent")
        if shared is not None:
            squares = squares + shared.double().square().sum()
        norm = squares.sqrt().float()
    if limit:
        for gradient in gradients:
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()
