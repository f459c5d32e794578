"""Claims on error and loss: TopK against ReLU, dead latents, laws, downstream loss, the Gaussian
control."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ksparse.errors import InputError
from ksparse.scaling.laws import law as laws
from ksparse.studies.paper import members
from ksparse.studies.paper.margins import PaperClaim, difference, mean, slope, unknown
from ksparse.studies.paper.measure import Evidence
from ksparse.studies.study import Estimate, Figure, StudyCurve, format_estimate, interpolate

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
        return unknown(), (
            f"ReLU did not reach L0 = {k}; nearest is {l0:.1f}, with "
            f"{format_estimate(evidence.number(evidence.relu, *key))} against TopK's "
            f"{format_estimate(evidence.number(evidence.middle, *key))}."
        )
    margin = mean([other - own for own, other in zip(ours, theirs)])
    return margin, (
        f"At L0 = {k}, n = {n:,}: TopK {format_estimate(mean(ours))}, ReLU "
        f"{format_estimate(mean(theirs))}, difference {format_estimate(margin)} over "
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
        difference(last["no AuxK, untied"], last["AuxK and tied"]),
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
        return PaperClaim(*_LAW, f"No law could be fitted: {error}", unknown(), [figure])
    fine = np.geomspace(sizes.latents[0], sizes.latents[-1], 20)
    for k in sizes.sparsities:
        fitted = laws.evaluate(law.to_dict(), {"n": fine, "k": np.full(len(fine), float(k))})
        figure.curves.append(
            StudyCurve(f"law, k = {k}", fine.tolist(), fitted.tolist(), reference=True)
        )
    slopes = ", ".join(
        f"{format_estimate(slope(sizes.latents, curve), 3)} (k = {k})"
        for k, curve in zip(sizes.sparsities, curves)
    )
    margin, sentence = _gain_of_floor(law)
    here = (
        f"{law.form.equation}: {_coefficients(law)}; residuals of {law.log_rms:.4f} in log, "
        + (f"{law.leave_one_out:.4f} left out; " if law.leave_one_out is not None else "")
        + f"power of n without a floor: {slopes}. {sentence}"
    )
    return PaperClaim(*_LAW, here, margin, [figure])


def _gain_of_floor(law: laws.Law) -> tuple[Estimate, str]:
    """Return how much lower AICc is with the irreducible term, as a margin, and a sentence on it.

    Two units of AICc are the usual limit for a difference that means something, so one counts as
    the standard error.
    """
    aicc = {candidate.form.name: candidate.aicc for candidate in law.candidates}
    with_floor, without = aicc.get("eq3"), aicc.get("eq3_no_floor")
    if with_floor is None or without is None:
        return unknown(), "There are too few points to compare forms."
    gain = without - with_floor
    word = "lower" if gain > 0 else "higher"
    sentence = f"AICc is {abs(gain):.1f} {word} with the irreducible term."
    return {"value": gain, "se": 1.0}, sentence


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
        (figure.name, curve.label): slope(sizes.latents, curve)
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
    slopes = [slope(latents, curve) for curve in curves]
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
        difference(slopes[1], slopes[0]),
        [figure],
    )
