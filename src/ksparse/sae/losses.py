"""The loss as named terms: reconstruction, Multi-TopK, what the activation adds, and AuxK over dead
latents (Gao et al. 2024, sections 2.3, 5.3 and A.2).

To add a term: a key in `ksparse.config.schema` and, if only autograd computes it, a word in
`Recipe.needs_autograd`; a function here, and its line in `loss_terms`. It is then weighted, summed
over processes and logged under its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ksparse.config import SAEConfig
from ksparse.sae.activations import TrainingPass
from ksparse.sae.code import Code
from ksparse.sae.model import SAE
from ksparse.sae.terms import LossTerm, total_loss


class Losses(NamedTuple):
    """The loss of a batch, its terms by name, and the code that it came from.

    Args:
        total: the weighted sum of the terms.
        terms: each term in its unit, without its weight, by name.
        code: the code of the batch.
    """

    total: Tensor
    terms: dict[str, Tensor]
    code: Code

    @property
    def nmse(self) -> Tensor:
        """The squared error of the reconstruction, over the baseline."""
        return self.terms["nmse"]

    @property
    def auxk(self) -> Tensor:
        """The AuxK loss; 0 where the recipe has none."""
        return self.terms.get("auxk", self.total.new_zeros(()))


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a batch depends on besides the weights and the batch.

    Args:
        options: the section `sae` of the recipe.
        baseline: mean squared error per component of predicting the mean, one constant for the
            whole run (section A.6).
        dead: indices of the latents that are dead now; may be empty.
        k_aux: how many of them AuxK uses per token.
        auxk_tokens: AuxK is the mean over this many first tokens of the batch; all if None.
        auxk_weight: factor of AuxK where the batch is a part of a larger one.
        penalty_share: the share of its full weight that a penalty has in this step.
        seed: a function of the recipe's seed and the step, for terms that draw at random.
    """

    options: SAEConfig
    baseline: float
    dead: Tensor
    k_aux: int
    auxk_tokens: int | None = None
    auxk_weight: float = 1.0
    penalty_share: float = 1.0
    seed: int = 0


def losses(sae: SAE, x: Tensor, inputs: LossInputs) -> Losses:
    """Return the losses on normalised activations x[b, d], with gradient."""
    result = sae.activation.configured(inputs.options.activation)(sae, x)
    terms = loss_terms(sae, x, result, inputs)
    return Losses(
        total_loss(terms), {name: term.logged for name, term in terms.items()}, result.code
    )


def loss_terms(
    sae: SAE, x: Tensor, result: TrainingPass, inputs: LossInputs
) -> dict[str, LossTerm]:
    """Return the terms of the loss by name, in the order in which they are added.

    Which terms there are depends on the recipe alone, never on the batch.
    """
    options, activation = inputs.options, sae.activation.configured(inputs.options.activation)
    terms = {"nmse": LossTerm((result.recon - x).square().mean(), unit=inputs.baseline)}
    if options.multi_topk:
        terms["multi_topk"] = multi_topk(sae, x, result, inputs)
    terms |= activation.loss_terms(
        sae, x, result, baseline=inputs.baseline, penalty_share=inputs.penalty_share
    )
    if options.uses_auxk:
        terms["auxk"] = auxk(sae, x, result, inputs)
    return terms


def multi_topk(sae: SAE, x: Tensor, result: TrainingPass, inputs: LossInputs) -> LossTerm:
    """Return the error with 4k latents instead of k (section 5.3)."""
    if result.pre_acts is None:
        raise ValueError("Multi-TopK selects among pre-activations, which this pass does not have")
    wide = sae.decode_normalized(sae.code(x, result.pre_acts, 4 * sae.shape.k))
    return LossTerm((wide - x).square().mean(), inputs.options.multi_topk, inputs.baseline)


def auxk(sae: SAE, x: Tensor, result: TrainingPass, inputs: LossInputs) -> LossTerm:
    """Return the error of predicting the reconstruction's error by the k_aux largest dead latents
    (section A.2); 0 where no latent is dead, or none of the tokens counts."""
    if result.pre_acts is None:
        raise ValueError("AuxK selects among pre-activations, which this pass does not have")
    options, counted = inputs.options, slice(inputs.auxk_tokens)
    x, recon, pre_acts = x[counted], result.recon[counted], result.pre_acts[counted]
    loss = x.new_zeros(())
    if sae.count(inputs.dead) and len(x):
        predicted = sae.decoder(sae.code(x, pre_acts, inputs.k_aux, among=inputs.dead))
        loss = finite_or_zero(relative_error(predicted, (x - recon).detach(), options.auxk_norm))
    return LossTerm(inputs.auxk_weight * loss, options.auxk_coef)


def relative_error(predicted: Tensor, error: Tensor, norm: str) -> Tensor:
    """Return ||e - ê||² relative to the size of e.

    Args:
        predicted: ê[b, d], the decoding of the dead latents' code without bias.
        error: e[b, d], detached.
        norm: 'token', relative to each token's own ||e||² (section A.2), or 'batch', relative to
            the variance over the batch, as in the official code.
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
    (section A.2)."""
    return loss if torch.isfinite(loss) else loss.new_zeros(())
