"""`stats` and `downstream`: what the SAE reconstructs, and what the LM loses by it."""

from __future__ import annotations

from collections.abc import Callable

from ksparse.report.claims import Claim, subtract, write_number
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import Number, RunSource
from ksparse.report.tables import NumberGroup, NumberRow, format_percent, format_significant

MOST_DAMAGE = 0.1
"""Largest share of the mean activation's damage at which a reconstruction is "far" less harmful.
Our choice."""


# ---- comparisons


def _bound_of_l0(source: RunSource) -> str:
    subject = source.subject
    if subject.activation == "topk":
        return f"k = {subject.k}: the upper limit"
    return subject.bound


def _dead_in_training(source: RunSource) -> str:
    dead = source.number("stats", "dead_fraction_training")
    if dead is None:
        return "0 %: every latent is used"
    period = f"{source.recipe.dead_after:,} tokens" if source.recipe else "tokens"
    share = format_percent(dead.value)
    return f"0 %: every latent is used; {share}: in training, silent for the last {period}"


def _above_the_lm(key: str) -> Callable[[RunSource], str]:
    """Return a comparison of one loss with the unchanged LM's."""

    def compare(source: RunSource) -> str:
        clean, loss = source.number("downstream", "ce_clean"), source.number("downstream", key)
        if clean is None or loss is None:
            return "The unchanged LM"
        return f"{loss.value - clean.value:+.2f} on the unchanged LM"

    return compare


def _replacements(source: RunSource) -> str:
    """Compare the loss added with what the mean activation and zeros add."""
    clean, zero, mean = (
        source.number("downstream", f"ce_{name}") for name in ("clean", "zero", "mean")
    )
    if clean is None or zero is None or mean is None:
        return "0: the unchanged LM"
    return (
        f"0: the unchanged LM; {mean.value - clean.value:.2f}: the mean activation; "
        f"{zero.value - clean.value:.2f}: zeros"
    )


# ---- the claim


def _mean_damage(source: RunSource) -> Number | None:
    """Return the loss that the mean activation adds."""
    return subtract(source.number("downstream", "ce_mean"), source.number("downstream", "ce_clean"))


def _damage_margin(source: RunSource) -> Number | None:
    """Return a tenth of the mean activation's damage less that of the reconstruction."""
    damage = _mean_damage(source)
    if damage is None:
        return None
    most = Number(
        damage.value * MOST_DAMAGE, None if damage.se is None else damage.se * MOST_DAMAGE
    )
    return subtract(most, source.number("downstream", "ce_delta"))


def _damage_evidence(source: RunSource) -> str:
    added, mean = source.number("downstream", "ce_delta"), _mean_damage(source)
    share = (
        f", {format_percent(added.value / mean.value)} of the mean activation’s "
        f"{format_significant(mean.value)}"
        if added and mean and mean.value > 0
        else ""
    )
    return f"Loss added: {write_number(added)} nats per token{share}."


STATS = EvaluationPart(
    NumberGroup(
        "stats",
        "Reconstruction error and sparsity",
        (
            NumberRow(
                "Normalised MSE",
                "nmse",
                "number",
                "1: predicting the mean",
                "Squared error over that of predicting the mean, on normalised activations. Lower "
                "is better.",
            ),
            NumberRow(
                "Explained variance",
                "explained_variance",
                "percent",
                "0 %: predicting the mean",
                "One minus the same ratio, on the LM’s raw activations, where large ones weigh "
                "more. Higher is better.",
            ),
            NumberRow(
                "L0",
                "l0",
                "number",
                _bound_of_l0,
                "Active latents (values above zero) per token. Below k where the value of a chosen "
                "latent is not positive.",
                key_number=True,
            ),
            NumberRow(
                "Dead latents",
                "dead_fraction",
                "percent",
                _dead_in_training,
                "Share of latents that never fire on the evaluation’s tokens. On few tokens, rare "
                "latents count as dead too.",
            ),
            NumberRow(
                "Encoder–decoder cosine",
                "cosine",
                "number",
                "1: a latent reads what it writes",
                "Mean over latents. Low where latents read one direction and write another, as "
                "dead ones do.",
            ),
        ),
    )
)

DOWNSTREAM = EvaluationPart(
    NumberGroup(
        "downstream",
        "Effect on the LM’s predictions",
        (
            NumberRow(
                "Loss added (ΔCE)",
                "ce_delta",
                "number",
                _replacements,
                "Nats per token by which the LM’s loss rises when the reconstruction replaces the "
                "activation. Lower is better.",
            ),
            NumberRow(
                "KL from the LM",
                "kl",
                "number",
                "0: the same predictions",
                "Nats per token between the two predictions. Counts every change, also those that "
                "happen to help.",
                key_number=True,
            ),
            NumberRow(
                "Loss recovered",
                "recovered",
                "percent",
                "0 %: zeros; 100 %: the LM",
                "Share of the damage of zeros that is avoided. Flattering, since zeros do much "
                "damage: read ΔCE first.",
            ),
            NumberRow(
                "Compute fraction",
                "compute_fraction",
                "percent",
                "100 %: the LM",
                "Share of the LM’s training compute at which it had the spliced loss. Higher is "
                "better.",
                absent="Needs the LM’s loss at earlier points of its training, which are not known "
                "for this LM.",
            ),
            NumberRow(
                "Loss, unchanged LM",
                "ce_clean",
                "number",
                "The reference for all others",
                "Cross-entropy in nats per token.",
            ),
            NumberRow(
                "Loss, reconstruction spliced in",
                "ce_spliced",
                "number",
                _above_the_lm("ce_spliced"),
                "The same, on reconstructions.",
            ),
            NumberRow(
                "Loss, mean activation",
                "ce_mean",
                "number",
                _above_the_lm("ce_mean"),
                "The same with the mean activation everywhere: the site carries no information "
                "about the token.",
            ),
            NumberRow(
                "Loss, zeros",
                "ce_zero",
                "number",
                _above_the_lm("ce_zero"),
                "The same with zeros, which the LM has never seen.",
            ),
        ),
    ),
    claims=(
        Claim(
            "The reconstruction costs the LM far less than the mean activation does: under a tenth "
            "of the loss.",
            _damage_margin,
            _damage_evidence,
            "The reconstruction misses much of what the LM uses, whatever share of the variance it "
            "explains.",
        ),
    ),
)
