"""Results of `refinement`, `progressive`, `latents` and `subspaces` -> the section on them."""

from __future__ import annotations

from typing import Any

from ksparse.report import code_figures, latents, tables
from ksparse.report.source import RunSource, is_number
from ksparse.report.tables import NumberGroup, NumberRow, beside, brief, percent

RULES = {
    "first": "fires at the beginning of a context",
    "late": "fires late in a context",
    "early": "fires early in a context, after the first position",
    "repetition": "fires where a token was in the context before",
}
"""What a recurring latent does, by the name of its rule."""


def _noise(source: RunSource) -> str:
    chance = source.number("subspaces", "separation_of_noise")
    return "1: two subspaces" + (
        ""
        if chance is None
        else f"; {brief(chance.value, 'number')}: as many rows of noise, cut in the same way"
    )


GROUPS = (
    NumberGroup(
        "refinement",
        "The best values for the latents that are active",
        (
            NumberRow(
                "Normalised MSE, refined",
                "nmse_refined",
                "number",
                beside("refinement", "number", nmse_raw="as encoded"),
                "With the values of each token’s active latents at their optimum, at least 0. What "
                "is left is the choice of latents and the decoder.",
            ),
            NumberRow(
                "Loss added, refined",
                "ce_delta_refined",
                "number",
                beside("refinement", "number", ce_delta_raw="as encoded"),
                "Nats per token that the LM’s loss rises by with the refined reconstruction.",
            ),
            NumberRow(
                "Mean shift",
                "shift_mean",
                "percent",
                "0 %: values are right on average; far above: they had shrunk",
                "Mean of refined less encoded values, in the unit of the mean active value. An L1 "
                "penalty makes it large.",
            ),
            NumberRow(
                "Median shift",
                "shift_median",
                "percent",
                "0 %: as many go up as down",
                "The same for the value in the middle, which a few large shifts do not move.",
            ),
            NumberRow(
                "Values that go up",
                "upward",
                "percent",
                "50 %: no side is favoured",
                "Share of active values that refinement raises.",
            ),
        ),
    ),
    NumberGroup(
        "progressive",
        "Other k, and a threshold in the place of k",
        (
            NumberRow(
                "Normalised MSE",
                "nmse",
                "number",
                "What other k are held against, on the same tokens",
                "With the SAE’s own activation.",
            ),
            NumberRow(
                "Loss added (ΔCE)",
                "ce_delta",
                "number",
                "The same",
                "With the SAE’s own activation, nats per token.",
            ),
        ),
    ),
    NumberGroup(
        "latents",
        "How often and how strongly latents fire",
        (
            NumberRow(
                "Density of the densest",
                "densest_density",
                "percent",
                beside("latents", "number", densest_over_l0="over L0"),
                "Mean density of the d_model densest latents. Near 40 % at k = 512 in the paper, "
                "where codes are dense solutions; a few per cent where they are sparse.",
            ),
            NumberRow(
                "Their share of all activations",
                "densest_share",
                "percent",
                "100 %: the others are never used",
                "Of all activations, those of the d_model densest latents.",
            ),
            NumberRow(
                "Opposite pairs",
                "n_opposite_pairs",
                "count",
                beside("latents", "count", n_opposite_among_densest="among the ten densest"),
                "Pairs with a decoder cosine below -0.9. They undo each other, a failure of "
                "optimisation.",
            ),
        ),
    ),
    NumberGroup(
        "subspaces",
        "Groups of latents with directions of their own",
        (
            NumberRow(
                "Separation",
                "separation",
                "number",
                _noise,
                "How much the two sides of the best cut read directions of their own. 0 if both "
                "read alike; choosing the cut makes it more than 0 even for noise.",
            ),
            NumberRow(
                "Latents on the first side",
                "latents_share",
                "percent",
                "25 % in the paper",
                "Share of the latents that fire.",
            ),
            NumberRow(
                "Directions of the first side",
                "dims_share",
                "percent",
                "25 % in the paper",
                "Share of the principal directions of the encoder that this side reads more of.",
            ),
        ),
    ),
)


def facts(source: RunSource) -> dict[str, Any]:
    """Return their numbers, figures and tables, as far as they have been run."""
    asked = [group for group in GROUPS if source.result(group.eval) is not None]
    return {
        "groups": tables.table(source, tuple(asked)),
        "pictures": code_figures.pictures(source),
        "recurring": recurring(source),
        "sides": sides(source),
        "settings": tables.settings(source, tuple(asked)),
        "missing": [group for group in GROUPS if group not in asked],
        "command": source.command("eval", *(group.eval for group in GROUPS if group not in asked)),
    }


def recurring(source: RunSource) -> list[dict[str, Any]]:
    """Return the latents that each rule comes nearest to, those it has found first."""
    found, cards = (source.result("latents") or {}).get("recurring") or {}, latents.shown(source)
    return [
        {
            "rule": words,
            "latent": entry["latent"],
            "has_card": entry["latent"] in cards,
            "score": f"{entry['score']:+.2f}",
            "density": percent(entry["density"]),
            "found": bool(entry.get("found")),
        }
        for rule, words in RULES.items()
        for entry in (found.get(rule) or [])[:3]
        if is_number(entry.get("latent"))
        and is_number(entry.get("score"))
        and is_number(entry.get("density"))
    ]


def sides(source: RunSource) -> list[dict[str, str]]:
    """Return the medians of what latents on both sides are like."""
    found = (source.result("subspaces") or {}).get("sides") or {}

    def middle(side: dict[str, Any], key: str) -> str:
        values = side.get(key)
        if not isinstance(values, list) or len(values) != 5 or not is_number(values[2]):
            return "–"
        return percent(values[2]) if key == "density" else brief(values[2], "number")

    return [
        {
            "name": name,
            "latents": f"{side.get('n_latents', 0):,}",
            "norm": middle(side, "encoder_norm"),
            "tokens": middle(side, "effective_tokens"),
            "density": middle(side, "density"),
        }
        for name, side in found.items()
    ]
