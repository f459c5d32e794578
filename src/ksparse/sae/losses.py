"""The loss as named terms: reconstruction, Multi-TopK, Matryoshka's prefixes, what the activation
adds, and AuxK over dead latents (Gao et al. 2024, sections 2.3, 5.3 and A.2; Bussmann et al. 2025).

To add a term: a key in `ksparse.config.schema` and, if only autograd computes it, a word in
`Recipe.needs_autograd`; a function here, and its line in `loss_terms`. It is then weighted, summed
over processes and logged under its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ksparse.config import SAEConfig
from ksparse.sae.activations import TrainingPass
from ksparse.sae.activations.base import list_columns
from ksparse.sae.code import Code
from ksparse.sae.model import SAE
from ksparse.sae.terms import LossTerm, total_loss

PREFIX_POWER = 0.5
"""Exponent of the law that Matryoshka's random prefixes are drawn from (Nabeshima 2024)."""

LM_TERMS = {"kl": "kl", "ce": "ce_delta"}
"""The term of each `sae.lm_loss`: KL(unchanged || spliced), or how much the spliced loss is higher
than the unchanged LM's; in nats."""


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


class LMPull(NamedTuple):
    """The loss of the LM behind the site, as the reconstructions of a batch feel it.

    Args:
        value: the loss in nats, the mean over the predictions of the whole batch.
        gradient: its gradient with respect to the reconstructions, [b, d].
        scale: what a nat counts as, in units of the normalised MSE.
    """

    value: Tensor
    gradient: Tensor
    scale: float = 1.0


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
        auxk_of: how many tokens those are in all processes; None: in this one.
        auxk_weight: factor of AuxK where the batch is a part of a larger one.
        penalty_share: the share of its full weight that a penalty has in this step.
        seed: a function of the recipe's seed and the step, for terms that draw at random.
        lm: the loss of the LM with these reconstructions, where the recipe has it.
    """

    options: SAEConfig
    baseline: float
    dead: Tensor
    k_aux: int
    auxk_tokens: int | None = None
    auxk_of: int | None = None
    auxk_weight: float = 1.0
    penalty_share: float = 1.0
    seed: int = 0
    lm: LMPull | None = None


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
    if options.nested_sizes:
        terms |= matryoshka(sae, x, result, inputs, terms["nmse"])
    terms |= activation.loss_terms(
        sae, x, result, baseline=inputs.baseline, penalty_share=inputs.penalty_share
    )
    if options.uses_auxk:
        terms["auxk"] = auxk(sae, x, result, inputs)
    if inputs.lm is not None:
        terms |= lm_loss(result, options, inputs.lm, terms["nmse"])
    return terms


def lm_loss(
    result: TrainingPass, options: SAEConfig, lm: LMPull, nmse: LossTerm
) -> dict[str, LossTerm]:
    """Return the loss of the LM behind the site beside the reconstruction error, in the share that
    the recipe gives it (Karvonen 2025).

    Its value and gradient are known; the term is linear in the reconstructions, so that it has
    both.
    """
    # Adds 0, with the gradient of the sum of gradient x reconstruction.
    slope = (lm.gradient * (result.recon - result.recon.detach())).sum()
    share, name = options.lm_share, LM_TERMS[options.lm_loss]
    return {
        "nmse": nmse._replace(weight=nmse.weight * (1 - share)),
        name: LossTerm(lm.value + slope, nmse.weight * share * lm.scale),
    }


def multi_topk(sae: SAE, x: Tensor, result: TrainingPass, inputs: LossInputs) -> LossTerm:
    """Return the error with 4k latents instead of k (section 5.3)."""
    if result.pre_acts is None:
        raise ValueError("Multi-TopK selects among pre-activations, which this pass does not have")
    wide = sae.decode_normalized(sae.code(x, result.pre_acts, 4 * sae.shape.k))
    return LossTerm((wide - x).square().mean(), inputs.options.multi_topk, inputs.baseline)


def matryoshka(
    sae: SAE, x: Tensor, result: TrainingPass, inputs: LossInputs, nmse: LossTerm
) -> dict[str, LossTerm]:
    """Return the errors of reconstructing from the first m latents, for each prefix m and for all
    latents, b_pre in each (Bussmann et al. 2025, section 3).

    The sum is the paper's loss, the mean is Nabeshima's (2024). Fixed prefixes are terms of their
    own, nmse_m; of drawn ones there is the mean, nmse_prefixes, since their sizes change.
    """
    options = inputs.options
    sizes = options.prefixes or draw_prefixes(options.n_latents, options.prefix_draws, inputs.seed)
    recons = prefix_reconstructions(sae, result.code, sizes)
    errors = [(recon - x).square().mean() for recon in recons]
    weight = 1.0 if options.prefix_loss == "sum" else 1 / (1 + len(errors))
    terms = {"nmse": nmse._replace(weight=weight)}
    if not options.prefixes:
        mean = torch.stack(errors).mean()
        return terms | {"nmse_prefixes": LossTerm(mean, weight * len(errors), inputs.baseline)}
    return terms | {
        f"nmse_{size}": LossTerm(error, weight, inputs.baseline)
        for size, error in zip(sizes, errors)
    }


def draw_prefixes(n_latents: int, count: int, seed: int) -> tuple[int, ...]:
    """Draw prefixes below n_latents without replacement, rising.

    The chance of a size up to m is that of a Pareto-like law, (m / n)^PREFIX_POWER, so that small
    prefixes are more frequent (Nabeshima 2024). The result is a function of the arguments alone.
    """
    shares = (torch.arange(n_latents, dtype=torch.float64) / n_latents) ** PREFIX_POWER
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(shares.diff(), count, generator=generator) + 1
    return tuple(sorted(drawn.tolist()))


def prefix_reconstructions(sae: SAE, code: Code, sizes: Sequence[int]) -> list[Tensor]:
    """Return the reconstructions of normalised activations from the first latents of a code alone.

    Args:
        sae: the SAE.
        code: a code [b, m] of all latents.
        sizes: rising numbers of latents.

    Returns:
        A reconstruction [b, d] for each size, b_pre included.
    """
    recons, recon = [], sae.b_pre.expand(len(code.values), -1)
    numbers = code.indices + sae.joint.first_latent
    for start, stop in itertools.pairwise((0, *sizes)):
        places, mask = list_columns((numbers >= start) & (numbers < stop))
        group = Code(code.values.gather(1, places) * mask, code.indices.gather(1, places))
        recon = recon + sae.decoder(group)
        recons.append(recon)
    return recons


def recorded_prefixes(sae: SAE) -> tuple[int, ...]:
    """Return the prefixes that a Matryoshka SAE's metadata records; () of any other SAE."""
    return _valid_prefixes(sae.metadata.get("prefixes"), sae.shape.n_latents)


def with_prefixes(sae: SAE, sizes: object) -> SAE:
    """Record the prefixes that another library's file names, if it names any; return the SAE."""
    if prefixes := _valid_prefixes(sizes, sae.shape.n_latents):
        sae.metadata["prefixes"] = list(prefixes)
    return sae


def _valid_prefixes(sizes: object, n_latents: int) -> tuple[int, ...]:
    """Return a list of sizes, rising and without all latents; () for anything else."""
    if not isinstance(sizes, list) or any(type(size) is not int for size in sizes):
        return ()
    return tuple(sorted({size for size in sizes if 0 < size < n_latents}))


def auxk(sae: SAE, x: Tensor, result: TrainingPass, inputs: LossInputs) -> LossTerm:
    """Return the error of predicting the reconstruction's error by the k_aux largest dead latents
    (section A.2); 0 where no latent is dead, or none of the tokens counts."""
    if result.pre_acts is None:
        raise ValueError("AuxK selects among pre-activations, which this pass does not have")
    options, counted = inputs.options, slice(inputs.auxk_tokens)
    x, recon, pre_acts = x[counted], result.recon[counted], result.pre_acts[counted]
    loss, error = x.new_zeros(()), (x - recon).detach()
    of = len(x) if inputs.auxk_of is None else inputs.auxk_of
    if sae.count(inputs.dead) and of:
        by_batch = options.auxk_divisor == "batch"
        spread = sae.joint.spread(error, of) if by_batch else None  # of all processes
        if len(x):
            predicted = sae.decoder(sae.code(x, pre_acts, inputs.k_aux, among=inputs.dead))
            loss = finite_or_zero(relative_error(predicted, error, spread))
    return LossTerm(inputs.auxk_weight * loss, options.auxk_coef)


def relative_error(predicted: Tensor, error: Tensor, spread: Tensor | None = None) -> Tensor:
    """Return ||e - ê||² relative to the size of e.

    Args:
        predicted: ê[b, d], the decoding of the dead latents' code without bias.
        error: e[b, d], detached.
        spread: what it is relative to: the variance over the batch, as in the official code; None:
            each token's own ||e||² (section A.2).
    """
    tiny = torch.finfo(error.dtype).tiny
    if spread is None:
        return (
            (predicted - error).square().sum(-1) / error.square().sum(-1).clamp_min(tiny)
        ).mean()
    return (predicted - error).square().mean() / spread.clamp_min(tiny)


def finite_or_zero(loss: Tensor) -> Tensor:
    """Return the loss, or a constant 0 where it is not finite, so that no NaN reaches the weights
    (section A.2)."""
    return loss if torch.isfinite(loss) else loss.new_zeros(())
