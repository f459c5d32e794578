"""Claims on latents: probes, explanations, ablations, shrinkage, progressive codes, dense latents,
subspaces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ksparse.studies.paper import members
from ksparse.studies.paper.margins import PaperClaim, difference, mean, unknown
from ksparse.studies.paper.measure import Evidence
from ksparse.studies.study import Estimate, Figure, StudyCurve, format_estimate

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
    return mean(
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
        difference(topk["recall"], relu["recall"]),
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
    margin = difference(relu, topk)
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
        unknown() if topk is None or multi is None else difference(topk["nmse"], multi["nmse"]),
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
