"""The claims: what the paper saw, what is seen here, a figure, and a margin.

A margin is above zero where the claim holds; the page calls it decided at two standard errors. A
margin without a standard error decides nothing. Figures of the paper are those of GPT-2 small or
GPT-4 at convergence, as named; those here are of one LM after the tokens that the page states, so
signs and ratios compare, not values.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.scaling.laws import law as laws
from ksparse.studies.paper import members
from ksparse.studies.paper.measure import Evidence
from ksparse.studies.study import (
    Estimate,
    Figure,
    StudyCurve,
    format_estimate,
    interpolate,
    power_law,
)


@dataclass(frozen=True)
class PaperClaim:
    """A claim of the paper, and what is seen of it here.

    Attributes:
        name: A short name.
        claim: The claim, a sentence.
        paper: What the paper saw, with its numbers and where they are.
        here: What is seen here.
        margin: Above zero where the claim holds, with its standard error.
        figures: Drawn beside it.
    """

    name: str
    claim: str
    paper: str
    here: str
    margin: Estimate
    figures: list[Figure] = field(default_factory=list)


def summarize(evidence: Evidence) -> dict[str, Any]:
    """Return the fields of study.json, with the claims whose numbers are there."""
    judged = [claim for judge in CLAIMS if (claim := judge(evidence)) is not None]
    sizes, base = evidence.sizes, evidence.study.base
    tokens = evidence.study.options.tokens or base.tokens
    return {
        "question": "Which claims of Scaling and evaluating sparse autoencoders (Gao et al. 2024) "
        f"hold for SAEs of up to {sizes.n:,} latents, trained on {tokens:,} tokens?",
        "setup": {
            "tokens": tokens,
            "steps": tokens // base.batch,
            "batch": base.batch,
            "latents": sizes.latents,
            "k": sizes.sparsities,
            "compared": sizes.compared,
            "seeds": sizes.seeds,
            "eval_tokens": evidence.study.options.eval_tokens,
        },
        "claims": [
            {
                **{key: getattr(claim, key) for key in ("name", "claim", "paper", "here")},
                "margin": claim.margin,
                "figures": [figure.name for figure in claim.figures],
            }
            for claim in judged
        ],
        "members": {member: _row(evidence, member) for member in evidence.trained()},
        "figures": [figure for claim in judged for figure in claim.figures],
        "findings": [f"{claim.claim} {claim.here}" for claim in judged],
    }


def _row(evidence: Evidence, member: str) -> dict[str, Any]:
    """Return a member's numbers for the table."""
    columns = {
        "stats": ("l0", "nmse", "dead_fraction_training"),
        "downstream": ("ce_delta", "kl", "recovered"),
        "probes": ("probe_loss",),
        "n2g": ("recall", "precision"),
        "ablation": ("ablation_sparsity",),
    }
    results = evidence.results[member]
    return {
        key: results[name][key] for name, keys in columns.items() if name in results for key in keys
    }


# ---- TopK against ReLU --------------------------------------------------------------------------


def relu_error(evidence: Evidence) -> PaperClaim | None:
    """Judge the error of TopK and ReLU at equal L0 (section 2.4)."""
    return _frontier(
        evidence,
        "topk-error",
        "TopK reconstructs better than ReLU at equal L0.",
        "GPT-4, n = 32,768: TopK 0.402 at L0 = 128, ReLU about 0.45 (figure 2).",
        ("stats", "nmse"),
        "normalised MSE",
    )


def relu_loss(evidence: Evidence) -> PaperClaim | None:
    """Judge the downstream loss of TopK and ReLU at equal L0 (section 5.2)."""
    return _frontier(
        evidence,
        "topk-loss",
        "TopK costs the LM less than ReLU at equal L0.",
        "GPT-2 small, n = 131,072: delta CE 0.073 nats at L0 = 32 against about 0.18 (figure 5).",
        ("downstream", "ce_delta"),
        "delta CE, nats per token",
    )


def _frontier(
    evidence: Evidence, name: str, claim: str, paper: str, key: tuple[str, str], y: str
) -> PaperClaim | None:
    if not evidence.has("stats", evidence.middle, evidence.relu):
        return None
    topk = _against_l0(evidence, "TopK", evidence.by_k, key)
    relu = _against_l0(evidence, "ReLU", evidence.trained(f"relu n{evidence.sizes.compared} "), key)
    margin, here = _at_equal_l0(evidence, key)
    caption = (
        f"n = {evidence.sizes.compared:,}; held-out text; bars are a standard error over documents."
    )
    figure = Figure(name, claim.rstrip("."), caption, "L0", y, [topk, relu], "xy")
    return PaperClaim(name, claim, paper, here, margin, [figure])


def _against_l0(
    evidence: Evidence, label: str, names: Sequence[str], key: tuple[str, str]
) -> StudyCurve:
    names = sorted(names, key=lambda member: evidence.value(member, "stats", "l0"))
    x = [evidence.value(member, "stats", "l0") for member in names]
    return evidence.curve(label, x, names, *key)


def _at_equal_l0(evidence: Evidence, key: tuple[str, str]) -> tuple[Estimate, str]:
    """Return ReLU less TopK, seed by seed, with ReLU read between its two weights at TopK's L0."""
    n, k = evidence.sizes.compared, evidence.sizes.k
    ours, theirs = [], []
    for seed in range(evidence.sizes.seeds):
        topk = members.topk(n, k, seed)
        names = [members.relu(n, weight, seed) for weight in evidence.weights]
        at = interpolate(
            _against_l0(evidence, "ReLU", names, key), evidence.value(topk, "stats", "l0")
        )
        if at is not None:
            ours.append(evidence.value(topk, *key))
            theirs.append(at[0])
    if not ours:
        l0 = evidence.value(evidence.relu, "stats", "l0")
        return _unknown(), (
            f"ReLU did not reach L0 = {k}; nearest is {l0:.1f}, with "
            f"{format_estimate(evidence.number(evidence.relu, *key))} against TopK's "
            f"{format_estimate(evidence.number(evidence.middle, *key))}."
        )
    margin = _mean([other - own for own, other in zip(ours, theirs)])
    return margin, (
        f"At L0 = {k}, n = {n:,}: TopK {format_estimate(_mean(ours))}, ReLU "
        f"{format_estimate(_mean(theirs))}, difference {format_estimate(margin)} over "
        f"{len(ours)} seeds."
    )


# ---- dead latents -------------------------------------------------------------------------------


def dead_latents(evidence: Evidence) -> PaperClaim | None:
    """Judge AuxK and tied initialisation (figure 15)."""
    names = {"AuxK and tied": evidence.largest} | {
        part: members.without(part, evidence.sizes) for part in members.DEAD
    }
    if not evidence.has("stats", *names.values()):
        return None
    logged = {label: evidence.study.run_folder(name).metrics() for label, name in names.items()}
    last = {
        label: evidence.number(name, "stats", "dead_fraction_training")
        for label, name in names.items()
    }
    figure = Figure(
        "dead-latents",
        "Dead latents with and without AuxK and tied initialisation",
        f"n = {evidence.sizes.n:,}, k = {evidence.sizes.k}; share of latents that have not fired "
        f"for {evidence.study.run_folder(evidence.largest).recipe().dead_after:,} tokens.",
        "tokens",
        "dead latents",
        [
            StudyCurve(label, [row["tokens"] for row in rows], [row["dead"] for row in rows])
            for label, rows in logged.items()
        ],
    )
    parts = [
        f"{label} {last[label]['value']:.1%} (at most {max(row['dead'] for row in rows):.1%}, "
        f"error {format_estimate(evidence.number(names[label], 'stats', 'nmse'))})"
        for label, rows in logged.items()
    ]
    return PaperClaim(
        "dead-latents",
        "AuxK and tied initialisation keep latents alive.",
        "GPT-2 small, n = 2 M, k = 32: up to 95 % dead with neither, about 1.5 % with both "
        "(figure 15).",
        f"Dead at the end: {'; '.join(parts)}.",
        _difference(last["no AuxK, untied"], last["AuxK and tied"]),
        [figure],
    )


# ---- scaling laws -------------------------------------------------------------------------------


def law_of_n_and_k(evidence: Evidence) -> PaperClaim | None:
    """Judge L(N, k) and its irreducible term (equation 3)."""
    sizes = evidence.sizes
    grid = {members.topk(n, k): (n, k) for n in sizes.latents for k in sizes.sparsities}
    if not evidence.has("stats", *grid):
        return None
    points = {
        "n": np.array([float(n) for n, _ in grid.values()]),
        "k": np.array([float(k) for _, k in grid.values()]),
        "loss": np.array([evidence.value(member, "stats", "nmse") for member in grid]),
    }
    curves = []
    for k in sizes.sparsities:
        names = [members.topk(n, k) for n in sizes.latents]
        curves.append(evidence.curve(f"k = {k}", sizes.latents, names, "stats", "nmse"))
    figure = Figure(
        "law-nk",
        "Error against n and k",
        "Held-out text; bars are a standard error over documents, smaller than the marks; dashed: "
        "the fitted law.",
        "latents n",
        "normalised MSE",
        curves,
        "xy",
    )
    try:
        law = laws.fit(points, "nk")
    except InputError as error:
        return PaperClaim(*_LAW, f"No law could be fitted: {error}", _unknown(), [figure])
    fine = np.geomspace(sizes.latents[0], sizes.latents[-1], 20)
    for k in sizes.sparsities:
        fitted = laws.evaluate(law.to_dict(), {"n": fine, "k": np.full(len(fine), float(k))})
        figure.curves.append(
            StudyCurve(f"law, k = {k}", fine.tolist(), fitted.tolist(), reference=True)
        )
    gain = _gain_of_floor(law)
    slopes = ", ".join(
        f"{format_estimate(_slope(sizes.latents, curve), 3)} (k = {k})"
        for k, curve in zip(sizes.sparsities, curves)
    )
    here = (
        f"{law.form.equation}: {_coefficients(law)}; residuals of {law.log_rms:.4f} in log, "
        + (f"{law.leave_one_out:.4f} left out; " if law.leave_one_out is not None else "")
        + f"power of n without a floor: {slopes}. "
        + (
            "There are too few points to compare forms."
            if gain is None
            else f"AICc is {abs(gain):.1f} {'lower' if gain > 0 else 'higher'} with the "
            "irreducible term."
        )
    )
    # Two units of AICc are the usual limit for a difference that means something.
    return PaperClaim(*_LAW, here, {"value": gain, "se": 1.0}, [figure])


def _gain_of_floor(law: laws.Law) -> float | None:
    """Return by how much the irreducible term lowers AICc; None if a form could not be fitted."""
    aicc = {candidate.form.name: candidate.aicc for candidate in law.candidates}
    with_floor, without = aicc.get("eq3"), aicc.get("eq3_no_floor")
    return None if with_floor is None or without is None else without - with_floor


_LAW = (
    "law-nk",
    "The error follows one law of n and k, with an irreducible term.",
    "GPT-4: equation 3 fits with an irreducible term; GPT-2 small has exponents of n of about "
    "-0.24 with one, -0.18 to -0.20 without (figure 11).",
)


def _coefficients(law: laws.Law) -> str:
    """Write the coefficients of a law with their 95 % intervals."""

    def end(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return ", ".join(
        f"{name} {c.value:.3g} [{end(c.low)}, {end(c.high)}]"
        for name, c in law.coefficients.items()
    )


def downstream_by_size(evidence: Evidence) -> PaperClaim | None:
    """Judge delta CE and KL against n (section 4.1)."""
    sizes = evidence.sizes
    if not evidence.has("downstream", *evidence.by_size):
        return None
    figures = [
        Figure(
            f"downstream-{key.replace('_', '-')}",
            title,
            "Held-out text; bars are a standard error over documents.",
            "latents n",
            y,
            [
                evidence.curve(
                    f"k = {k}",
                    sizes.latents,
                    [members.topk(n, k) for n in sizes.latents],
                    "downstream",
                    key,
                )
                for k in sizes.sparsities
            ],
            "xy",
        )
        for key, title, y in (
            ("ce_delta", "The LM's additional loss against n", "delta CE, nats per token"),
            ("kl", "Divergence of the LM's predictions against n", "KL, nats per token"),
        )
    ]
    slopes = {
        (figure.name, curve.label): _slope(sizes.latents, curve)
        for figure in figures
        for curve in figure.curves
    }
    middle = slopes[figures[0].name, f"k = {sizes.k}"]
    here = "; ".join(
        f"{figure.y.partition(',')[0]}, power of n: "
        + ", ".join(
            f"{format_estimate(slopes[figure.name, curve.label], 3)} ({curve.label})"
            for curve in figure.curves
        )
        for figure in figures
    )
    first, last = (
        format_estimate(evidence.number(member, "downstream", "ce_delta"))
        for member in (evidence.by_size[0], evidence.by_size[-1])
    )
    return PaperClaim(
        "downstream",
        "More latents cost the LM less.",
        "GPT-2 small, k = 128: delta CE 0.103 nats at n = 2,048 to 0.030 at 131,072 (figure 5).",
        f"k = {sizes.k}: delta CE {first} at n = {sizes.latents[0]:,}, {last} at {sizes.n:,}. "
        f"{here}.",
        {"value": None if middle["value"] is None else -middle["value"], "se": middle["se"]},
        figures,
    )


def _slope(x: Sequence[float], curve: StudyCurve) -> Estimate:
    """Return the exponent of a power law through a curve; unknown if it has values at or below
    0."""
    values = [value for value in curve.y if value is not None and value > 0]
    if len(values) < len(x) or len(values) < 2:
        return _unknown()
    exponent = power_law(x, values)["exponent"]
    return {"value": exponent["value"], "se": exponent["se"]}


# ---- probes, explanations, ablations ------------------------------------------------------------


def probes_against_relu(evidence: Evidence) -> PaperClaim | None:
    """Judge the probe loss of TopK and ReLU (section 4.2)."""
    if not evidence.has("probes", evidence.middle, evidence.relu):
        return None
    margin = _paired_tasks(evidence, evidence.relu, evidence.middle)
    ours, theirs = (
        evidence.number(member, "probes", "probe_loss")
        for member in (evidence.middle, evidence.relu)
    )
    channels = evidence.number(evidence.middle, "probes", "channel_loss")
    random = evidence.number(evidence.middle, "probes", "random_sae_loss")
    tasks = evidence.results[evidence.middle]["probes"]["n_tasks"]
    return PaperClaim(
        "probes-activation",
        "Single latents of TopK match known features better than those of ReLU.",
        "GPT-2 small, n = 32,768: ReLU 0.510 at L0 = 7 and about 0.500 at 250; TopK 0.503 at k = 8 "
        "and 0.497 at 256 (figures 6, 23).",
        f"{tasks} tasks: TopK {format_estimate(ours)}, ReLU {format_estimate(theirs)}; channels of "
        f"the LM {format_estimate(channels)}, a random SAE {format_estimate(random)}. Difference "
        f"by task {format_estimate(margin)}.",
        margin,
        [_by_task(evidence)],
    )


def _by_task(evidence: Evidence) -> Figure:
    """Draw ReLU's loss less TopK's, task by task in rising order."""
    topk, relu = (
        evidence.results[member]["probes"]["tasks"] for member in (evidence.middle, evidence.relu)
    )
    rows = sorted(
        (
            relu[task]["loss"]["value"] - topk[task]["loss"]["value"],
            math.hypot(relu[task]["loss"]["se"] or 0.0, topk[task]["loss"]["se"] or 0.0),
        )
        for task in topk
        if task in relu
    )
    x, y, se = list(range(1, len(rows) + 1)), [row[0] for row in rows], [row[1] for row in rows]
    return Figure(
        "probes-activation",
        "Probe loss by task, ReLU less TopK",
        "Above 0: TopK's best latent is the better probe. Bars are a standard error over rows.",
        "task, by rising difference",
        "difference of losses, nats",
        [StudyCurve("ReLU - TopK", x, y, se), StudyCurve("equal", x, [0.0] * len(x), None, True)],
    )


def probes_by_size(evidence: Evidence) -> PaperClaim | None:
    """Judge the probe loss against n (section 4.2)."""
    names = evidence.by_size
    if not evidence.has("probes", *names):
        return None
    curve = evidence.curve("TopK", evidence.sizes.latents, names, "probes", "probe_loss")
    channels = evidence.value(names[0], "probes", "channel_loss")
    figure = Figure(
        "probes",
        "Probe loss against n",
        "Mean over tasks of the best latent's loss; bars are a standard error over rows.",
        "latents n",
        "probe loss, nats",
        [
            curve,
            StudyCurve("channels", evidence.sizes.latents, [channels] * len(names), reference=True),
        ],
        "x",
    )
    margin = _paired_tasks(evidence, names[0], names[-1])
    return PaperClaim(
        "probes-size",
        "More latents match known features better.",
        "GPT-2 small, k = 32: 0.502 at n = 2,048, 0.492 at 524,288; channels of GPT-4 0.600 "
        "(figures 6, 32).",
        f"k = {evidence.sizes.k}: "
        + ", ".join(
            f"{format_estimate(evidence.number(name, 'probes', 'probe_loss'))} (n = {n:,})"
            for n, name in zip(evidence.sizes.latents, names)
        )
        + f". Smallest less largest, by task: {format_estimate(margin)}.",
        margin,
        [figure],
    )


def _paired_tasks(evidence: Evidence, one: str, other: str) -> Estimate:
    """Return the mean over tasks of the difference of two probe losses, with its standard error
    over tasks."""
    first, second = (evidence.results[member]["probes"]["tasks"] for member in (one, other))
    return _mean(
        [
            first[task]["loss"]["value"] - second[task]["loss"]["value"]
            for task in first
            if task in second
        ]
    )


def explanations(evidence: Evidence) -> PaperClaim | None:
    """Judge recall and precision of N2G (section 4.3)."""
    if not evidence.has("n2g", evidence.middle, evidence.relu):
        return None
    topk, relu = (
        {key: evidence.number(member, "n2g", key) for key in ("recall", "precision", "f1")}
        for member in (evidence.middle, evidence.relu)
    )
    control = evidence.number(evidence.middle, "n2g", "shuffled_f1")
    numbers = "; ".join(
        f"{key} {format_estimate(topk[key])} against {format_estimate(relu[key])}" for key in topk
    )
    return PaperClaim(
        "n2g",
        "TopK's latents are easier to explain: N2G recalls more of their activations.",
        "TopK has over 1.5 times ReLU's recall and over 0.9 times its precision (section 4.3).",
        f"TopK against ReLU over {evidence.results[evidence.middle]['n2g']['n_latents']} latents: "
        f"{numbers}. F1 of explanations dealt to other latents: {format_estimate(control)}.",
        _difference(topk["recall"], relu["recall"]),
        [_distribution(evidence, {"TopK": evidence.middle, "ReLU": evidence.relu})],
    )


def _distribution(evidence: Evidence, names: dict[str, str]) -> Figure:
    """Draw the share of latents whose recall by N2G is at least x."""
    curves = []
    for label, member in names.items():
        recall = np.sort(evidence.arrays(member, "n2g")["recall"].numpy())
        share = 1 - np.arange(len(recall)) / len(recall)
        curves.append(StudyCurve(label, recall.tolist(), share.tolist()))
    return Figure(
        "n2g",
        "Recall of explanations",
        "Share of latents of which N2G's patterns recall at least this share of the activations.",
        "recall",
        "share of latents",
        curves,
    )


def ablations(evidence: Evidence) -> PaperClaim | None:
    """Judge ablation sparsity against k, beside channels (section 4.5)."""
    names = evidence.by_k
    if not evidence.has("ablation", *names):
        return None
    ks = evidence.sizes.all_k
    figure = Figure(
        "ablation",
        "Sparsity of ablation effects against k",
        "Share of effective logits, lower is sparser; bars are a standard error over documents.",
        "k",
        "ablation sparsity",
        [
            evidence.curve("latents", ks, names, "ablation", "ablation_sparsity"),
            evidence.curve("channels", ks, names, "ablation", "channel_sparsity"),
        ],
        "x",
    )
    latents = {
        k: evidence.number(name, "ablation", "ablation_sparsity") for k, name in zip(ks, names)
    }
    middle = evidence.middle
    return PaperClaim(
        "ablation",
        "A latent's effect on the LM is sparser than a channel's.",
        "GPT-2 small: 12 to 14 % for latents at every k, 60 % for channels (section 4.5).",
        ", ".join(f"{format_estimate(number)} (k = {k})" for k, number in latents.items())
        + f"; channels {format_estimate(evidence.number(middle, 'ablation', 'channel_sparsity'))}."
        " At the position itself "
        f"{format_estimate(evidence.number(middle, 'ablation', 'sparsity_here'))} against "
        f"{format_estimate(evidence.number(middle, 'ablation', 'channel_sparsity_here'))}.",
        evidence.number(middle, "ablation", "difference"),
        [figure],
    )


# ---- what the activation does to the code -------------------------------------------------------


def shrinkage(evidence: Evidence) -> PaperClaim | None:
    """Judge the shift of values by refinement (section 5.1)."""
    names = {"TopK": evidence.middle, "ReLU": evidence.relu}
    if not evidence.has("refinement", *names.values()):
        return None
    results = {label: evidence.results[name]["refinement"] for label, name in names.items()}
    figure = Figure(
        "shrinkage",
        "How refinement changes active values",
        "Share of active values by (refined - raw) over the mean active value; a code that does "
        "not shrink is centred on 0.",
        "change of a value",
        "share of values",
        [_shares(label, result["histogram"]) for label, result in results.items()],
    )
    here = "; ".join(
        f"{label}: values change by {format_estimate(result['shift_mean'])} of their sum, error "
        f"{format_estimate(result['nmse_raw'])} to {format_estimate(result['nmse_refined'])}, "
        f"delta CE {format_estimate(result['ce_delta_raw'])} to "
        f"{format_estimate(result['ce_delta_refined'])}"
        for label, result in results.items()
    )
    topk, relu = (results[label]["shift_mean"] for label in names)
    margin = _difference(relu, topk)
    return PaperClaim(
        "shrinkage",
        "ReLU with L1 shrinks its values; TopK does not.",
        "Refined values of ReLU are larger than its own, those of TopK are not biased, and "
        "refinement gains less (section 5.1, figure 9).",
        f"{here}.",
        margin,
        [figure],
    )


def _shares(label: str, histogram: dict[str, list[float]]) -> StudyCurve:
    edges, counts = histogram["edges"], histogram["counts"]
    total = sum(counts) or 1
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    return StudyCurve(label, middles, [count / total for count in counts])


def progressive(evidence: Evidence) -> PaperClaim | None:
    """Judge codes at other k than the trained one (section 5.3)."""
    names = {"TopK": evidence.middle, "Multi-TopK": members.multi(evidence.sizes)}
    if not evidence.has("progressive", *names.values()):
        return None
    results = {label: evidence.results[name]["progressive"] for label, name in names.items()}
    figure = Figure(
        "progressive",
        "Error at other k than the trained one",
        f"n = {evidence.sizes.compared:,}, trained with k = {evidence.sizes.k}; a threshold in "
        "place of k as dashed lines.",
        "L0",
        "normalised MSE",
        [_points(label, result["topk"]) for label, result in results.items()]
        + [
            _points(f"{label}, threshold", result["threshold"], reference=True)
            for label, result in results.items()
        ],
        "xy",
    )
    wide = {
        label: next((p for p in result["topk"] if p["k"] == 4 * evidence.sizes.k), None)
        for label, result in results.items()
    }
    here = "; ".join(
        f"{label}: {format_estimate(results[label]['nmse'])} at k"
        + ("" if point is None else f", {format_estimate(point['nmse'])} at 4k")
        for label, point in wide.items()
    )
    topk, multi = wide.values()
    return PaperClaim(
        "progressive",
        "A TopK code is not good at larger k; Multi-TopK keeps it good.",
        "GPT-2 small, k = 32: at about 4k TopK 0.229, above its 0.109 at k; Multi-TopK 0.087 "
        "(figure 10).",
        f"{here}.",
        _unknown() if topk is None or multi is None else _difference(topk["nmse"], multi["nmse"]),
        [figure],
    )


def _points(label: str, points: list[dict[str, Any]], *, reference: bool = False) -> StudyCurve:
    points = sorted(points, key=lambda point: point["l0"]["value"] or 0.0)
    return StudyCurve(
        label,
        [point["l0"]["value"] for point in points],
        [point["nmse"]["value"] for point in points],
        [point["nmse"]["se"] for point in points],
        reference=reference,
    )


# ---- latents ------------------------------------------------------------------------------------


def dense_latents(evidence: Evidence) -> PaperClaim | None:
    """Judge dense latents at large k, and latents that follow the position (E.5, E.6)."""
    names, ks = evidence.by_k, evidence.sizes.all_k
    if not evidence.has("latents", *names):
        return None
    results = [evidence.results[name]["latents"] for name in names]
    figure = Figure(
        "dense-latents",
        "Density of the d_model densest latents against k",
        f"n = {evidence.sizes.compared:,}; dashed: if all latents were equally dense.",
        "k",
        "mean density",
        [
            StudyCurve("densest", ks, [result["densest_density"] for result in results]),
            StudyCurve("k / n", ks, [k / evidence.sizes.compared for k in ks], reference=True),
        ],
        "xy",
    )
    share = [result["densest_share"] for result in results]
    rules = list(results[0]["recurring"])
    recurring = ", ".join(
        f"{rule} {sum(latent['found'] for latent in results[-1]['recurring'][rule])}"
        for rule in rules
    )
    return PaperClaim(
        "dense-latents",
        "At large k, some latents fire on much of the text.",
        "GPT-2 small: the d_model densest latents fire on 1 to 3 % of tokens at k = 32, on 37 % "
        "at k = 512; some follow the position (E.5, E.6).",
        "Mean density of the d_model densest (and their share of all activations): "
        + ", ".join(
            f"{result['densest_density']:.3f} ({part:.0%}) at k = {k}"
            for k, result, part in zip(ks, results, share)
        )
        + f". At k = {ks[-1]}, found among the five highest of each rule: {recurring}.",
        {"value": results[-1]["densest_density"] - results[0]["densest_density"], "se": None},
        [figure, _by_position(evidence)]
        if evidence.has("positions", evidence.middle)
        else [figure],
    )


def _by_position(evidence: Evidence) -> Figure:
    result = evidence.results[evidence.middle]["positions"]
    error = result["error"]
    return Figure(
        "positions",
        "Error by position in the context",
        "Squared error over that of predicting the mean of all positions; bars are a standard "
        "error over documents.",
        "position",
        "error",
        [
            StudyCurve(
                evidence.middle,
                result["positions"],
                [number["value"] for number in error],
                [number["se"] for number in error],
            )
        ],
    )


def subspaces(evidence: Evidence) -> PaperClaim | None:
    """Judge the two groups of latents that use separate directions (E.7)."""
    if not evidence.has("subspaces", evidence.largest):
        return None
    result = evidence.results[evidence.largest]["subspaces"]
    along = result["along_order"]
    figure = Figure(
        "subspaces",
        "Directions that latents read, along their order",
        "Share of a latent's encoder row on the first side's directions, means over stretches of "
        "the order.",
        "place in the order",
        "share on the first side's directions",
        [StudyCurve(evidence.largest, [(i + 0.5) / len(along) for i in range(len(along))], along)],
    )
    first, second = result["sides"].values()
    return PaperClaim(
        "subspaces",
        "Latents fall into two groups that use separate subspaces.",
        "GPT-2 small, n = 32,768: about 25 % of latents read about 25 % of dimensions; the others "
        "read the rest (E.7).",
        f"{result['latents_share']:.0%} of latents on {result['dims_share']:.0%} of directions, "
        f"with {result['own_share'][0] or 0:.0%} and {result['own_share'][1] or 0:.0%} of each "
        f"side's reading on its own directions; separation {result['separation']:.3f} against "
        f"{result['separation_of_noise']:.3f} of random rows; median encoder norm "
        f"{_median(first['encoder_norm'])} and {_median(second['encoder_norm'])}.",
        {"value": result["separation"] - result["separation_of_noise"], "se": None},
        [figure],
    )


def _median(quartiles: Sequence[float] | None) -> str:
    return "unknown" if not quartiles else f"{quartiles[2]:.2f}"


def gaussian(evidence: Evidence) -> PaperClaim | None:
    """Judge the Gaussian control (appendix G)."""
    sizes = evidence.sizes
    latents = sizes.latents[:-1]
    real = [members.topk(n, sizes.k) for n in latents]
    if not evidence.has("stats", *real):
        return None
    folders = [evidence.study.run_folder(members.gaussian(n, sizes.k)) for n in latents]
    noise = [folder.curve()[-1]["loss"] for folder in folders]
    curves = [
        evidence.curve("activations", latents, real, "stats", "nmse"),
        StudyCurve("Gaussian data", latents, noise),
    ]
    slopes = [_slope(latents, curve) for curve in curves]
    figure = Figure(
        "gaussian",
        "Error on activations and on Gaussian data",
        f"k = {sizes.k}; Gaussian data of the activations' mean and covariance; held-out rows.",
        "latents n",
        "normalised MSE",
        curves,
        "xy",
    )
    return PaperClaim(
        "gaussian",
        "What SAEs learn is more than mean and covariance: on Gaussian data the error hardly falls "
        "with n.",
        "Exponents of n: about -0.26 on GPT-2 small, -0.04 on Gaussian data (appendix G).",
        f"Exponents {format_estimate(slopes[0], 3)} and {format_estimate(slopes[1], 3)}; error "
        + ", ".join(
            f"{evidence.value(name, 'stats', 'nmse'):.3f} and {loss:.3f} (n = {n:,})"
            for n, name, loss in zip(latents, real, noise)
        )
        + ".",
        _difference(slopes[1], slopes[0]),
        [figure],
    )


CLAIMS: tuple[Callable[[Evidence], PaperClaim | None], ...] = (
    relu_error,
    relu_loss,
    dead_latents,
    law_of_n_and_k,
    downstream_by_size,
    probes_against_relu,
    probes_by_size,
    explanations,
    ablations,
    shrinkage,
    dense_latents,
    subspaces,
    gaussian,
    progressive,
)
"""The claims in the order of the page."""


# ---- numbers ------------------------------------------------------------------------------------


def _unknown() -> Estimate:
    return {"value": None, "se": None}


def _mean(values: Sequence[float]) -> Estimate:
    """Return a mean with its standard error; none of fewer than two values."""
    if not values:
        return _unknown()
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": statistics.fmean(values), "se": se}


def _difference(one: Estimate, other: Estimate) -> Estimate:
    """Return one - other; its standard error takes them as independent."""
    if one["value"] is None or other["value"] is None:
        return _unknown()
    known = one["se"] is not None and other["se"] is not None
    return {
        "value": one["value"] - other["value"],
        "se": math.hypot(one["se"] or 0.0, other["se"] or 0.0) if known else None,
    }
