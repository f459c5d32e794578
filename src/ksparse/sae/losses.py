"""What is minimised: reconstruction, AuxK over dead latents, Multi-TopK. Gao et al. 2024, sections
2.3, 5.3, A.2. And the penalties of other activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ksparse import config, kernels
from ksparse.config import WITH_AUXK
from ksparse.config import SAEConfig as Options
from ksparse.sae import activations
from ksparse.sae.activations import Activation, Gated, JumpReLU, SparsePreActs
from ksparse.sae.model import SAE, Code


class Losses(NamedTuple):
    """Scalars that carry gradient, and the code they came from."""

    total: Tensor
    nmse: Tensor
    auxk: Tensor
    code: Code


def losses(
    sae: SAE,
    x: Tensor,
    *,
    baseline: float,
    dead: Tensor,
    k_aux: int,
    options: Options,
    auxk_tokens: int | None = None,
    auxk_weight: float = 1.0,
    strength: float = 1.0,
) -> Losses:
    """Return the losses on normalised activations x[b, d].

    baseline: the mean squared error per component of predicting the mean, one constant for the
    whole run (A.6).
    dead: the indices of the latents that are dead now; none is fine.
    auxk_tokens: AuxK is the mean over the first so many of x (all if not given), times auxk_weight
    where x is a part of a batch.
    strength: the share of its weight that a penalty has by now.
    """
    if sae.shape.activation != "topk":
        return _others(
            sae,
            x,
            baseline=baseline,
            dead=dead,
            k_aux=k_aux,
            options=options,
            auxk_tokens=auxk_tokens,
            auxk_weight=auxk_weight,
            strength=strength,
        )
    pre_acts = sae.pre_acts_normalized(x)
    code = sae.code(x, pre_acts)
    recon = sae.decode_normalized(code)
    nmse = (recon - x).square().mean() / baseline
    total = nmse
    if options.multi_topk:
        wide = sae.decode_normalized(sae.code(x, pre_acts, 4 * sae.shape.k))
        total = total + options.multi_topk * (wide - x).square().mean() / baseline
    aux = auxk_weight * revived(
        sae, x, recon, pre_acts, slice(auxk_tokens), dead=dead, k_aux=k_aux, options=options
    )
    return Losses(total + options.auxk_coef * aux, nmse, aux, code)


def _others(
    sae: SAE,
    x: Tensor,
    *,
    baseline: float,
    dead: Tensor,
    k_aux: int,
    options: Options,
    auxk_tokens: int | None,
    auxk_weight: float,
    strength: float,
) -> Losses:
    """Return the losses with another activation than TopK: reconstruction, its own penalty, AuxK
    where its kind has that."""
    activation = activations.build_activation(options.activation)
    products = sae.products(x)
    chosen = choose(sae, x, products, activation)
    values = activation.values(sae, chosen)
    recon = chosen.decoder(values, sae.W_dec) + sae.b_pre
    nmse = (recon - x).square().mean() / baseline
    total = (
        nmse
        + strength * penalty(sae, x, chosen, values, activation)
        + extra(sae, x, chosen, activation, baseline)
    )
    aux = nmse.new_zeros(())
    if options.activation.kind in WITH_AUXK:
        pre_acts = products.detach() + sae.b_enc.detach()
        aux = auxk_weight * revived(
            sae, x, recon, pre_acts, slice(auxk_tokens), dead=dead, k_aux=k_aux, options=options
        )
    return Losses(total + options.auxk_coef * aux, nmse, aux, Code(values, chosen.everywhere()))


def revived(
    sae: SAE,
    x: Tensor,
    recon: Tensor,
    pre_acts: Tensor,
    some: slice,
    *,
    dead: Tensor,
    k_aux: int,
    options: Options,
) -> Tensor:
    """Return AuxK's loss on some tokens of a batch; 0 where there are none, no dead latent, or no
    use for it."""
    x, recon, pre_acts = x[some], recon[some], pre_acts[some]
    if not options.auxk_coef or not sae.count(dead) or not len(x):
        return x.new_zeros(())
    predicted = sae.decoder(sae.code(x, pre_acts, k_aux, among=dead))
    return finite_or_zero(auxk(predicted, (x - recon).detach(), options.auxk_norm))


def choose(
    sae: SAE, x: Tensor, products: Tensor, activation: Activation[config.ActivationConfig]
) -> SparsePreActs:
    """Return the products[b, n] that count in training, listed where they are few, else all of
    them."""
    with torch.no_grad():
        reach = activation.reach(sae, products)
        width = max(1, int(reach.sum(1).max()))
    if width > sae.shape.n_latents // activations.SPARSE:
        return SparsePreActs(products, None, reach)
    indices, real = activations.listed(reach, width)
    return SparsePreActs(
        kernels.selected(x, sae.b_pre, sae.W_enc, None, indices, products.detach()), indices, real
    )


def penalty(
    sae: SAE,
    x: Tensor,
    chosen: SparsePreActs,
    values: Tensor,
    activation: Activation[config.ActivationConfig],
) -> Tensor:
    """Return what an activation pays for the values[b, m] of its chosen latents, at its full
    weight."""
    if isinstance(activation, JumpReLU):
        coef, aim = activation.options.coef, activation.options.penalty
        excess = activation.count(sae, chosen).mean() / sae.shape.k
        return coef * ((excess - 1) ** 2 if aim == "target" else excess)
    options = activation.options
    if (
        not isinstance(options, config.ReLUConfig | config.GatedConfig | config.ProLUConfig)
        or not options.l1
    ):
        return x.new_zeros(())
    paid = activation.gates(sae, chosen) if isinstance(activation, Gated) else values
    if isinstance(options, config.ReLUConfig) and options.penalty == "decoder_norm":
        paid = paid * chosen.of(sae.W_dec.norm(dim=1))
    return options.l1 * (paid.sum(1) / x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)).mean()


def extra(
    sae: SAE,
    x: Tensor,
    chosen: SparsePreActs,
    activation: Activation[config.ActivationConfig],
    baseline: float,
) -> Tensor:
    """Return Gated's auxiliary loss: the error of decoding the gates by a decoder that gets no
    gradient from it; 0 of other kinds."""
    if not isinstance(activation, Gated):
        return x.new_zeros(())
    recon = chosen.decoder(activation.gates(sae, chosen), sae.W_dec.detach()) + sae.b_pre.detach()
    return activation.options.aux * (recon - x).square().mean() / baseline


def auxk(predicted: Tensor, error: Tensor, norm: str) -> Tensor:
    """Return ||e - ê||² relative to the error's size: per token (A.2), or over the batch as in the
    official code.

    `error` must be detached; `predicted` is the bias-free decoding of the dead latents' code.
    """
    tiny = torch.finfo(error.dtype).tiny
    if norm == "token":
        return (
            (predicted - error).square().sum(-1) / error.square().sum(-1).clamp_min(tiny)
        ).mean()
    spread = (error - error.mean(0)).square().mean()
    return (predicted - error).square().mean() / spread.clamp_min(tiny)


def finite_or_zero(loss: Tensor) -> Tensor:
    """Return the loss, or a constant 0 where it is not finite, so that no NaN reaches the weights
    (A.2)."""
    return loss if torch.isfinite(loss) else loss.new_zeros(())
