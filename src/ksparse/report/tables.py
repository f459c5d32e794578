"""Results -> the table of numbers, a Row for each: how to show it, what to hold it against, how to
read it.

A new evaluation adds a Group to GROUPS, and nothing else here changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ksparse.report.source import Number, RunSource

Kind = Literal["number", "percent", "count"]


@dataclass(frozen=True)
class NumberRow:
    """One number of a result."""

    label: str
    key: str
    kind: Kind
    compare: str | Callable[[RunSource], str]
    """What to hold it against: a sentence, or how to make one of the run's other numbers."""
    reading: str
    absent: str = "Not in this result."
    """Why there is no value, if the result has none under this key."""


@dataclass(frozen=True)
class NumberGroup:
    """The numbers of one evaluation."""

    eval: str
    title: str
    rows: tuple[NumberRow, ...]


def _k(source: RunSource) -> str:
    sae = source.recipe.sae
    return f"k = {sae.k}: the most there can be" if sae.activation.kind == "topk" else sae.bound


def _dead_in_training(source: RunSource) -> str:
    seen = source.number("stats", "dead_fraction_training")
    if seen is None:
        return "0 %: every latent is of use"
    return (
        f"0 %; at the end of training {percent(seen.value)} had not fired for "
        f"{source.recipe.dead_after:,} tokens"
    )


def _above_the_lm(key: str) -> Callable[[RunSource], str]:
    """Return a comparison of one loss with the unchanged LM's."""

    def compare(source: RunSource) -> str:
        clean, loss = source.number("downstream", "ce_clean"), source.number("downstream", key)
        return (
            "The LM as it is"
            if clean is None or loss is None
            else f"{loss.value - clean.value:+.2f} on the LM as it is"
        )

    return compare


def _ablations(source: RunSource) -> str:
    clean, zero, mean = (
        source.number("downstream", f"ce_{name}") for name in ("clean", "zero", "mean")
    )
    if clean is None or zero is None or mean is None:
        return "0: the LM as it was"
    return (
        f"0: the LM as it was; {mean.value - clean.value:.2f}: the mean activation; "
        f"{zero.value - clean.value:.2f}: zeros"
    )


def beside(name: str, kind: Kind, **words: str) -> Callable[[RunSource], str]:
    """Return a comparison with other numbers of a result, as far as it has them."""

    def compare(source: RunSource) -> str:
        found = ((source.number(name, key), text) for key, text in words.items())
        return "; ".join(
            f"{brief(number.value, kind)}: {text}" for number, text in found if number is not None
        )

    return compare


def _probes_of_others(source: RunSource) -> str:
    return beside(
        "probes",
        "number",
        channel_loss="the best channel",
        random_sae_loss="the best latent of an untrained SAE",
        dense_probe_loss="all channels together",
        prior_loss="the label’s share alone",
    )(source)


def _changeable(source: RunSource) -> str:
    """Return how many logits an ablation could change: the vocabulary at each position of the
    horizon."""
    effective, share = (
        source.number("ablation", "effective_tokens"),
        source.number("ablation", "ablation_sparsity"),
    )
    if effective is None or share is None or not share.value:
        return "The whole vocabulary at each position"
    return f"{effective.value / share.value:,.0f}: the whole vocabulary at each position"


GAUSSIAN = 2 / math.pi
"""Ablation sparsity of an effect whose sizes are Gaussian: noise, without anything sparse in it."""


GROUPS = (
    NumberGroup(
        "stats",
        "What it reconstructs, and with how many latents",
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
                "One less the same ratio, on activations as the LM has them: large ones weigh "
                "more. Higher is better.",
            ),
            NumberRow(
                "L0",
                "l0",
                "number",
                _k,
                "Values above zero per token. Less than k where a chosen latent has nothing to "
                "say.",
            ),
            NumberRow(
                "Dead latents",
                "dead_fraction",
                "percent",
                _dead_in_training,
                "Share that never fires on the evaluation's tokens. On few tokens rare latents "
                "count as dead too.",
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
    ),
    NumberGroup(
        "downstream",
        "What the LM makes of it",
        (
            NumberRow(
                "Loss added (ΔCE)",
                "ce_delta",
                "number",
                _ablations,
                "Nats per token that the LM's loss rises by when it goes on from the "
                "reconstruction. Lower is better.",
            ),
            NumberRow(
                "KL from the LM",
                "kl",
                "number",
                "0: the same predictions",
                "Nats per token between the two predictions. Counts every change, also those that "
                "happen to help.",
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
                "Share of its training compute after which the LM had the spliced loss. Higher is "
                "better.",
                absent="Needs the LM's loss at earlier points of its training, which this LM comes "
                "without.",
            ),
            NumberRow(
                "Loss, LM as it is",
                "ce_clean",
                "number",
                "What reconstructions are held against",
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
                "The same with the mean activation everywhere: the site tells nothing about the "
                "token.",
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
    NumberGroup(
        "probes",
        "What single latents know",
        (
            NumberRow(
                "Probe loss",
                "probe_loss",
                "number",
                _probes_of_others,
                "Nats per label, mean over tasks: each task’s best latent, chosen on one half of "
                "the rows, judged on the other. Lower is better.",
            ),
            NumberRow(
                "Gain over channels",
                "gain_over_channels",
                "number",
                "0: the LM’s own channels do as well",
                "Loss of the best channel less that of the best latent, on the same rows. There "
                "are more latents than channels to choose from.",
            ),
            NumberRow(
                "Gain over random latents",
                "gain_over_random_sae",
                "number",
                "0: as many random directions do as well",
                "The same against an untrained SAE of the same size. This is what training "
                "brought.",
            ),
            NumberRow(
                "Probe loss, in sample",
                "probe_loss_in_sample",
                "number",
                beside(
                    "probes", "number", probe_loss="on rows that the latents were not chosen on"
                ),
                "Loss on the very rows that the latents were chosen on, as the paper has it. "
                "Falls with the number of latents, even random ones, so it says nothing across "
                "sizes.",
            ),
        ),
    ),
    NumberGroup(
        "n2g",
        "How well patterns of tokens explain latents",
        (
            NumberRow(
                "Recall",
                "recall",
                "percent",
                beside(
                    "n2g", "percent", shuffled_recall="by another latent’s patterns, so by chance"
                ),
                "Share of a latent’s activations that its patterns catch, mean over scored "
                "latents. Higher is better.",
            ),
            NumberRow(
                "Precision",
                "precision",
                "percent",
                beside(
                    "n2g",
                    "percent",
                    shuffled_precision="by another latent’s patterns, so by chance",
                ),
                "Share of a latent’s predictions at which it is active, mean over scored latents "
                "that have any. Higher is better.",
            ),
            NumberRow(
                "F1",
                "f1",
                "percent",
                beside("n2g", "percent", shuffled_f1="by another latent’s patterns, so by chance"),
                "Harmonic mean of each latent’s recall and precision, then the mean over latents. "
                "High only where both are.",
            ),
            NumberRow(
                "Precision, pooled",
                "precision_pooled",
                "percent",
                beside("n2g", "percent", precision="each latent counts the same"),
                "Over all predictions at once. A few latents whose patterns match almost anywhere "
                "make most of them.",
            ),
            NumberRow(
                "Latents scored",
                "n_latents",
                "count",
                "Drawn at random from those that fire",
                "Latents that fire too rarely to be explained and scored are left out, so the "
                "numbers do not speak of them.",
            ),
        ),
    ),
    NumberGroup(
        "explained_loss",
        "What the LM makes of the explanations",
        (
            NumberRow(
                "Loss, explanations spliced in",
                "ce_n2g",
                "number",
                beside(
                    "explained_loss",
                    "number",
                    ce_clean="the LM as it is",
                    ce_spliced="the SAE’s reconstruction",
                    ce_bigram="bigrams",
                    ce_unigram="unigrams",
                    ce_bias="b_pre alone",
                    ce_zero="zeros",
                ),
                "Nats per token when each latent’s value is what its patterns predict. "
                "The gap to the reconstruction is what the patterns miss. Lower is better.",
            ),
            NumberRow(
                "Loss above bigrams",
                "delta_to_bigram",
                "number",
                "0: the LM predicts as well as counts of token pairs",
                "On the same tokens. Below 0 the explanations carry more than the last token "
                "alone. Counts of little text are easy to beat.",
            ),
        ),
    ),
    NumberGroup(
        "ablation",
        "How many predictions a latent matters to",
        (
            NumberRow(
                "Ablation sparsity",
                "ablation_sparsity",
                "percent",
                lambda source: "; ".join(
                    part
                    for part in (
                        beside("ablation", "percent", channel_sparsity="a channel set to zero")(
                            source
                        ),
                        f"{percent(GAUSSIAN)}: noise",
                    )
                    if part
                ),
                "Effective share of the LM’s logits, at this position and those after it, that "
                "change when one active latent is taken out. "
                "Lower is sparser.",
            ),
            NumberRow(
                "Sparser than channels by",
                "difference",
                "percent",
                "0 %: latents and channels are alike",
                "Channels’ sparsity less latents’, at the same positions. Above 0 a latent is the "
                "more specific of the two.",
            ),
            NumberRow(
                "Of the next prediction alone",
                "sparsity_here",
                "percent",
                beside("ablation", "percent", channel_sparsity_here="a channel set to zero"),
                "The same for the prediction at the position itself: the share of the vocabulary "
                "that the latent matters to. Lower is sparser.",
            ),
            NumberRow(
                "Reach",
                "later",
                "percent",
                beside("ablation", "percent", channel_later="a channel set to zero"),
                "Share of the squared effect that falls on later predictions. The first number "
                "mixes this with the one above: "
                "an effect that reaches further counts as less sparse.",
            ),
            NumberRow(
                "Effective logits",
                "effective_tokens",
                "count",
                _changeable,
                "The first number, as a count of logits. Fewer is sparser.",
            ),
            NumberRow(
                "Ablation sparsity, weighted",
                "ablation_sparsity_weighted",
                "percent",
                beside("ablation", "percent", ablation_sparsity="each ablation counts the same"),
                "Each ablation weighted by the size of its effect, so that the many that hardly "
                "change anything count little.",
            ),
            NumberRow(
                "KL of an ablation",
                "kl",
                "number",
                beside("ablation", "number", channel_kl="a channel set to zero"),
                "Nats per position by which taking out one latent changes the predictions. Where "
                "this is tiny, sparsity is about little.",
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Cell:
    """A row as the page shows it."""

    row: NumberRow
    number: Number | None
    value: str
    se: str
    compare: str


def table(source: RunSource, groups: tuple[NumberGroup, ...] = GROUPS) -> list[dict[str, Any]]:
    """Return the groups with their cells; a group whose evaluation is missing has the command that
    adds it."""
    return [
        {
            "group": group,
            "result": source.result(group.eval),
            "command": source.command("eval", group.eval),
            "cells": [_cell(source, group, row) for row in group.rows],
        }
        for group in groups
    ]


def settings(source: RunSource, groups: tuple[NumberGroup, ...] = GROUPS) -> list[dict[str, Any]]:
    """Return what the results were measured on, once for all that were measured on the same."""
    found: list[dict[str, Any]] = []
    for group in groups:
        result = source.result(group.eval)
        if result is None:
            continue
        facts = _settings(source, result)
        same = next((entry for entry in found if entry["facts"] == facts), None)
        if same is None:
            found.append(same := {"titles": [], "facts": facts, "notes": [], "options": {}})
        same["titles"].append(group.title)
        same["options"][group.eval] = _options(result)
        same["notes"] += [note for note in result.get("notes") or [] if note not in same["notes"]]
    return [
        {
            "titles": entry["titles"],
            "facts": entry["facts"] | _written(entry["options"]),
            "notes": entry["notes"],
        }
        for entry in found
    ]


def _written(options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the options that all evaluations share, then what each has of its own."""
    shared = {
        key: value
        for key, value in next(iter(options.values())).items()
        if all(own.get(key) == value for own in options.values())
    }
    each = {
        f"Options of {name} alone": {key: value for key, value in own.items() if key not in shared}
        for name, own in options.items()
    }
    return {label: plain(some) for label, some in ({"Options": shared} | each).items() if some}


def _options(result: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in (result.get("options") or {}).items()
        if value not in (None, "")
    }


def _cell(source: RunSource, group: NumberGroup, row: NumberRow) -> Cell:
    number = source.number(group.eval, row.key)
    compare = row.compare if isinstance(row.compare, str) else row.compare(source)
    if number is None:
        return Cell(row, None, "", "", compare)
    value, se = written(number, row.kind)
    return Cell(row, number, value, se, compare)


def _settings(source: RunSource, result: dict[str, Any]) -> dict[str, str]:
    facts = {
        "Text": result.get("text"),
        "Tokens": result.get("n_tokens"),
        "Documents": result.get("n_documents"),
        "Suite of tasks": result.get("suite"),
        "Tasks": result.get("n_tasks"),
        "Checkpoint": _step(source, result.get("checkpoint")),
        "Positions": result.get("policy"),
    }
    return {key: plain(value) for key, value in facts.items() if value not in (None, "", {}, [])}


def _step(source: RunSource, step: Any) -> str | None:
    last = source.metrics[-1]["step"] if source.metrics else step
    if step is None:
        return None
    return (
        f"step {plain(step)}"
        if step == last
        else f"step {plain(step)}, though training went on to step {plain(last)}"
    )


# ---- how numbers are written


def written(number: Number, kind: Kind) -> tuple[str, str]:
    """Return a value and its standard error, with the digits that the standard error leaves a
    meaning."""
    scale, unit = (100, " %") if kind == "percent" else (1, "")
    value, se = number.value * scale, (number.se or 0) * scale
    if kind == "count":
        return f"{value:,.0f}", "" if number.se is None else f"± {se:,.0f}"
    if not se:
        return f"{significant(value)}{unit}", "" if number.se is None else "± 0"
    digits = decimals(se, 2 if f"{se:e}".startswith("1") else 1)
    return f"{value:,.{digits}f}{unit}", f"± {se:.{digits}f}"


def brief(value: float, kind: Kind) -> str:
    """Return a value with three significant digits at most."""
    return {"percent": percent, "count": lambda count: f"{count:,.0f}", "number": significant}[
        kind
    ](value)


def percent(share: float) -> str:
    """Return a share with two or three significant digits."""
    return f"{100 * share:.{min(4, decimals(100 * share, 2))}f} %"


def significant(value: float, digits: int = 3) -> str:
    return f"{value:,.{decimals(value, digits)}f}"


def amount(count: float) -> str:
    """Return a count in words of its size: 1.5 million."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if count >= size:
            return f"{count / size:.3g}{word}"
    return f"{count:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plain(value: Any) -> str:
    """Return any JSON value as a line of words."""
    if isinstance(value, dict):
        return " · ".join(
            f"{key} {plain(item)}" for key, item in value.items() if item not in (None, "")
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def decimals(value: float, digits: int) -> int:
    """Return how many digits after the point leave so many significant ones, at most eight."""
    return 0 if value == 0 else min(8, max(0, digits - 1 - math.floor(math.log10(abs(value)))))
