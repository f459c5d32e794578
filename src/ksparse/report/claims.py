"""Numbers -> what a run should show if its SAE is any good, and whether it does.

A Claim has a margin: above zero where the claim holds. It holds, or does not, where the margin is
two standard errors from zero. A new claim is an entry in CLAIMS; one whose evaluation has not been
run is not on the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ksparse.report.source import Number, RunSource
from ksparse.report.tables import brief, percent, significant, written

Verdict = Literal["holds", "does not hold", "unclear"]
FAR = 10
"""The reconstruction's damage is far below the mean activation's if it is less than one part in so
many. Our choice."""


@dataclass(frozen=True)
class Claim:
    """Something that a good SAE shows."""

    says: str
    margin: Callable[[RunSource], Number | None]
    numbers: Callable[[RunSource], str]
    otherwise: str | Callable[[RunSource], str]
    """What it means if it does not hold, and why, as far as the run's other numbers tell."""


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim and what the run's numbers say of it."""

    says: str
    verdict: Verdict
    numbers: str
    meaning: str


def judged(source: RunSource) -> list[ClaimVerdict]:
    """Return the claims that the run's results decide."""
    return [
        _judge(claim, margin, source)
        for claim in CLAIMS
        if (margin := claim.margin(source)) is not None
    ]


def tally(found: list[ClaimVerdict]) -> str:
    """Return how many hold, in words."""
    counts = {
        name: sum(each.verdict == name for each in found) for name in ("does not hold", "unclear")
    }
    words = [f"{len(found) - sum(counts.values())} of {len(found)} hold"]
    if counts["does not hold"]:
        words.append(
            f"{counts['does not hold']} do{'es' if counts['does not hold'] == 1 else ''} not"
        )
    return ", ".join(words + [f"{counts['unclear']} cannot be told"] * bool(counts["unclear"]))


def verdict(margin: Number) -> Verdict:
    """Return what a margin says at two standard errors; without a standard error it says
    nothing."""
    if margin.se is None or abs(margin.value) <= 2 * margin.se:
        return "unclear"
    return "holds" if margin.value > 0 else "does not hold"


def _judge(claim: Claim, margin: Number, source: RunSource) -> ClaimVerdict:
    found = verdict(margin)
    unclear = (
        "It has no standard error to judge by."
        if margin.se is None
        else "The difference is within two standard errors; more text, rows or latents may tell."
    )
    otherwise = claim.otherwise if isinstance(claim.otherwise, str) else claim.otherwise(source)
    return ClaimVerdict(
        claim.says,
        found,
        claim.numbers(source),
        {"holds": "", "does not hold": otherwise, "unclear": unclear}[found],
    )


def _gain(says: str, key: str, rival: str, words: str, otherwise: str) -> Claim:
    """Return a claim that the probe loss is below a rival's."""

    def numbers(source: RunSource) -> str:
        losses = [
            f"{brief(found.value, 'number')} {what}"
            for name, what in (("probe_loss", "with its latents"), (rival, words))
            if (found := source.number("probes", name)) is not None
        ]
        return (
            f"Probe loss {', '.join(losses) or 'not measured'}: a gain of "
            f"{_with_se(source.number('probes', key), 'number')} nats."
        )

    return Claim(says, lambda source: source.number("probes", key), numbers, otherwise)


def _above_chance(says: str, key: str, otherwise: str) -> Claim:
    """Return a claim that a score of explanations is above that of explanations dealt to the wrong
    latents."""

    def margin(source: RunSource) -> Number | None:
        return less(source.number("n2g", key), source.number("n2g", f"shuffled_{key}"))

    def numbers(source: RunSource) -> str:
        own, chance = (
            _with_se(source.number("n2g", name), "percent") for name in (key, f"shuffled_{key}")
        )
        return f"{own}; with another latent’s patterns {chance}."

    return Claim(says, margin, numbers, otherwise)


def _sparser(source: RunSource) -> str:
    ours, theirs = (
        _with_se(source.number("ablation", name), "percent")
        for name in ("ablation_sparsity", "channel_sparsity")
    )
    difference = _with_se(source.number("ablation", "difference"), "percent")
    return (
        f"{ours} of the logits for a latent, {theirs} for a channel; the paired difference is "
        f"{difference}."
    )


def _spread(source: RunSource) -> str:
    """Say whether a latent's effect is on more of the vocabulary, or reaches further into the
    text."""
    here, later, channel_later = (
        source.number("ablation", name) for name in ("difference_here", "later", "channel_later")
    )
    if here is None or later is None or channel_later is None:
        return "By this measure a latent’s effect is spread over more predictions than a channel’s."
    reach = (
        f"{percent(later.value)} of a latent’s squared effect falls on later predictions, "
        f"{percent(channel_later.value)} of a channel’s, "
        "and the measure counts reach as lack of sparsity"
    )
    if verdict(here) == "holds":
        return (
            "On the next prediction alone a latent does matter to less of the vocabulary, by "
            f"{_with_se(here, 'percent')}; but {reach}."
        )
    return (
        "On the next prediction alone a latent matters to no less of the vocabulary than a "
        f"channel; and {reach}."
    )


def _harmless(source: RunSource) -> Number | None:
    """Return a tenth of the mean activation's damage less that of the reconstruction."""
    damage = _damage(source)
    tenth = (
        Number(damage.value / FAR, None if damage.se is None else damage.se / FAR)
        if damage
        else None
    )
    return less(tenth, source.number("downstream", "ce_delta"))


def _damages(source: RunSource) -> str:
    added, mean = source.number("downstream", "ce_delta"), _damage(source)
    share = (
        f", {percent(added.value / mean.value)} of the mean activation’s {significant(mean.value)}"
        if added and mean and mean.value > 0
        else ""
    )
    return f"Loss added: {_with_se(added, 'number')} nats per token{share}."


def _damage(source: RunSource) -> Number | None:
    """Return the loss that the mean activation adds."""
    return less(source.number("downstream", "ce_mean"), source.number("downstream", "ce_clean"))


def less(one: Number | None, other: Number | None) -> Number | None:
    """Return a difference of which no more is known than its parts: its standard error is at most
    their sum, whatever they share."""
    if one is None or other is None:
        return None
    return Number(
        one.value - other.value, None if one.se is None or other.se is None else one.se + other.se
    )


def _with_se(number: Number | None, kind: Literal["number", "percent"]) -> str:
    return (
        "not measured"
        if number is None
        else " ".join(part for part in written(number, kind) if part)
    )


CLAIMS = (
    Claim(
        "The LM loses far less by the reconstruction than by the mean activation: under a tenth as "
        "much.",
        _harmless,
        _damages,
        "The reconstruction misses much of what the LM uses, whatever share of the variance it "
        "explains.",
    ),
    _gain(
        "Its best latents tell the tasks’ labels better than the LM’s own channels do.",
        "gain_over_channels",
        "channel_loss",
        "with channels",
        "For what these tasks ask, the SAE’s latents are worse to read than the activation as it "
        "was.",
    ),
    _gain(
        "They tell them better than the best latents of an untrained SAE do.",
        "gain_over_random_sae",
        "random_sae_loss",
        "with random latents",
        "As many random directions do better: what the probes find here comes from having many to "
        "choose from, not from training.",
    ),
    _above_chance(
        "Patterns of tokens catch more of a latent’s activations than another latent’s patterns do "
        "(recall).",
        "recall",
        "The explanations catch no more than chance: they are not about their latents.",
    ),
    _above_chance(
        "Where its patterns predict a latent, it is active more often than where another’s do "
        "(precision).",
        "precision",
        "The explanations are right no more often than chance: they are not about their latents.",
    ),
    Claim(
        "Taking out a latent changes fewer predictions than taking out a channel.",
        lambda source: source.number("ablation", "difference"),
        _sparser,
        _spread,
    ),
)
