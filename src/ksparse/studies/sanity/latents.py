"""What is measured of the run's own latents, and the sentences on it: stability over seeds,
alignment of encoder and decoder, tokens, norms, k."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
from safetensors.torch import load_file

from ksparse.errors import CorruptError, InputError
from ksparse.evals import runner
from ksparse.evals.decoder_projection import best_k
from ksparse.evals.splitting import splitting
from ksparse.evals.stability import mean, stability
from ksparse.evals.statistics import Value
from ksparse.sae import serialization
from ksparse.storage import jsonio
from ksparse.studies.sanity.controls import RUN, Cohort, folder
from ksparse.studies.sanity.measure import TOLD, SanityEvidence
from ksparse.studies.sanity.question import Question, QuestionTable, estimate
from ksparse.studies.study import Figure, StudyCurve, format_estimate

log = logging.getLogger("ksparse")
STABILITY = "stability"
BINS = 20
"""Bins of the histogram of cosines."""


# ---- stages --------------------------------------------------------------------------------------


def measure_projection(evidence: SanityEvidence, cohort: Cohort) -> None:
    """The decoder-projection proxy of every k of the sweep."""
    if cohort.own and evidence.subject.by_k:
        evidence.evaluate(list(evidence.subject.by_k.values()), ("decoder_projection",))


def measure_norms(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Slots and strongest examples by norm."""
    if cohort.own:
        evidence.evaluate([RUN], ("norms",))


def measure_absorption(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Special cases that escape general latents."""
    if cohort.own:
        evidence.evaluate([RUN], ("absorption",))


def measure_splitting(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Decoder neighbours from each n of the sweep to the next; kept in the study's folder."""
    members = evidence.subject.by_n
    if not cohort.own or len(members) < 2:
        return
    evidence.evaluate(list(members.values()), ("stats",))
    file = evidence.study.path / "splitting.json"
    of = {member: evidence.checksum(member) for member in members.values()}
    try:
        table = jsonio.read_table(file, of=dict, steps=list)
    except (OSError, InputError, CorruptError):
        table = {}
    if table.get("of") != of:
        sizes = []
        for n, member in members.items():
            sae = serialization.load(folder(evidence.study, evidence.subject, member).path)
            live = evidence.arrays(member, "stats")["density"].numpy() > 0
            sizes.append((n, sae.W_dec, live))
        steps = [
            {"from": a, "to": b, **splitting((one, live), (other, other_live), what=f"{a} to {b}")}
            for (a, one, live), (b, other, other_live) in itertools.pairwise(sizes)
        ]
        jsonio.write_json(file, {"of": of, "steps": steps}, sealed=True)
        table = jsonio.read_table(file, of=dict, steps=list)
    evidence.results[RUN]["splitting"] = table


def measure_stability(evidence: SanityEvidence, cohort: Cohort) -> None:
    """Match the run's latents with those of its other seeds.

    The result is kept among the run's own, where the viewer finds it.
    """
    seeds = evidence.subject.seeds
    if not (cohort.own and seeds):
        return
    run = evidence.subject.run
    of = {member: evidence.checksum(member) for member in (RUN, *seeds)}
    try:
        kept = run.eval(STABILITY)
        run.arrays_file(STABILITY, kept)
    except CorruptError as error:
        log.warning("%s: it is computed again", error)
        kept = None
    if kept is None or kept.get("of") != of:
        saes = {
            member: serialization.load(folder(evidence.study, evidence.subject, member).path)
            for member in (RUN, *seeds)
        }
        stats = evidence.arrays(RUN, "stats")
        result = stability(
            saes[RUN].W_dec,
            {seed: saes[seed].W_dec for seed in seeds},
            stats["density"].numpy(),
            _effects(evidence),
            cosines=stats["cosine"].numpy(),
        )
        acts = serialization.acts_of(saes[RUN].metadata)
        place = {"lm": acts.lm, "site": acts.site, "checkpoint": saes[RUN].metadata.get("step")}
        result.update({**place, "of": of})
        runner.write_results(run, {STABILITY: result})
        kept = run.eval(STABILITY)
    evidence.results.setdefault(RUN, {})[STABILITY] = kept


def _effects(evidence: SanityEvidence) -> tuple[np.ndarray, np.ndarray] | None:
    """Return latents and the KL of their ablation where they are strongest: of the run's own
    evaluation, or of the study's, whichever has more of them."""
    found = []
    for place in (evidence.subject.run, evidence.study.run_folder(RUN)):
        try:
            file = place.arrays_file("ablation")
        except CorruptError:
            continue
        if file is not None:
            arrays = load_file(file)
            kl = np.nansum(arrays["kl"].double().numpy(), axis=1)
            found.append((arrays["latent"].long().numpy(), kl))
    return max(found, key=lambda pair: len(pair[0]), default=None)


# ---- questions -----------------------------------------------------------------------------------


def ask_stability(evidence: SanityEvidence) -> Question | None:
    """Answer whether other seeds find the same latents."""
    if not evidence.has(STABILITY, RUN):
        return None
    found = evidence.results[RUN][STABILITY]
    seeds = len(found["seeds"])
    groups = [("density", found["by_density"]), ("effect, nats", found.get("by_effect", []))]
    rows = [
        [
            name,
            f"{group['from']:.3g} to {group['to']:.3g}",
            f"{group['latents']:,}",
            _percent(group["stable"]),
        ]
        for name, listed in groups
        for group in listed
    ]
    pairs = ", ".join(f"{_percent(pair)} in {name}" for name, pair in found["pairs"].items())
    return Question(
        "stability",
        "Do other seeds find the same latents?",
        f"{_percent(found['stable'])} of its live latents have a partner of decoder cosine "
        f"{found['least']} or more in all of {seeds} other seeds ({pairs}).",
        "Latents that only one seed has are not wrong, but no evidence that the LM has such a "
        "feature; they tend to be rare and of little effect. arXiv 2501.16615 saw 30 % shared "
        "among 131,072 latents on Llama 3 8B. Stable does not mean meaningful: a frozen decoder "
        "with one start would be stable too.",
        QuestionTable(["group by", "range", "latents", "stable"], rows),
        [_stability_figure(found)],
    )


def _stability_figure(found: dict[str, Any]) -> Figure:
    def curve(name: str, groups: list[dict[str, Any]]) -> StudyCurve:
        return StudyCurve(
            name,
            list(range(1, len(groups) + 1)),
            [group["stable"]["value"] for group in groups],
            [group["stable"]["se"] for group in groups],
        )

    curves = [curve("by density", found["by_density"])]
    if found.get("by_effect"):
        curves.append(curve("by effect on the LM", found["by_effect"]))
    return Figure(
        "stability",
        "Stable latents by density and by effect",
        "Live latents in groups of equal size, from the lowest; bars are a standard error over "
        "latents.",
        "group, by rising density or effect",
        "share that all seeds have",
        curves,
    )


def ask_alignment(evidence: SanityEvidence) -> Question | None:
    """Answer whether latents write what they read, and how that goes with stability and death."""
    if not evidence.has("stats", RUN):
        return None
    stats = evidence.arrays(RUN, "stats")
    cosine, live = stats["cosine"].double().numpy(), stats["density"].numpy() > 0
    groups = {"live": cosine[live], "dead": cosine[~live]}
    stable = evidence.arrays_of_run(STABILITY) if evidence.has(STABILITY, RUN) else {}
    if stable:
        everywhere = stable["found_in"].numpy() >= 1
        groups = {
            "stable": cosine[live & everywhere],
            "live, not stable": cosine[live & ~everywhere],
            "dead": cosine[~live],
        }
    words = "; ".join(
        f"{name} {format_estimate(estimate(mean(values)), 3)} ({len(values):,})"
        for name, values in groups.items()
        if len(values)
    )
    return Question(
        "alignment",
        "Do its latents write what they read?",
        f"The mean cosine of a latent's encoder and decoder rows is: {words}.",
        "With tied start values all begin at 1 and drift apart as they learn. arXiv 2605.18629 "
        "links low cosines to dead latents and to seeds that differ. No value is right: a latent "
        "that separates similar features reads another direction than it writes.",
        None,
        [_alignment_figure(groups)],
    )


def _alignment_figure(groups: dict[str, np.ndarray]) -> Figure:
    edges = np.linspace(-1, 1, BINS + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    return Figure(
        "alignment",
        "Cosine of encoder and decoder rows",
        f"Share of each group's latents in {BINS} bins.",
        "cosine",
        "share of latents",
        [
            StudyCurve(name, middles, (np.histogram(values, edges)[0] / len(values)).tolist())
            for name, values in groups.items()
            if len(values)
        ],
    )


def ask_tokens(evidence: SanityEvidence) -> Question | None:
    """Answer how many latents are token detectors."""
    if not evidence.has("token_driven", RUN):
        return None
    found = evidence.results[RUN]["token_driven"]
    return Question(
        "tokens",
        "Are its latents token detectors?",
        f"{_percent(found['token_driven'])} of {found['n_latents']:,} latents fire in half or more "
        f"of the random contexts into which one of their {found['favourites']} favourite tokens is "
        f"put; on average they fire in {_percent(found['rate'])} of them, and in "
        f"{_percent(found['control_rate'])} where another token is put.",
        "Such a latent needs no context, so a story about what it means in context is too much. "
        "arXiv 2601.05679 saw 45 to 90 % among features of reasoning. That is no fault of a latent "
        "of a token; early layers have many. Tokens are taken one at a time: a latent of a phrase "
        "counts as one of context.",
    )


def ask_norms(evidence: SanityEvidence) -> Question | None:
    """Answer whether large activations take the slots."""
    if not evidence.has("norms", RUN):
        return None
    found = evidence.results[RUN]["norms"]
    other = "cosine" if found["score"] == "inner product" else "inner product"
    of_other = found[f"strongest_in_top_{'cosine' if other == 'cosine' else 'inner'}"]
    deciles = list(range(1, 1 + len(found["l0"])))
    return Question(
        "norms",
        "Do activations of large norm take the slots?",
        f"The tenth of the tokens with the largest norm has {_percent(found['slots_of_top'])} of "
        f"the active latents, and {_percent(found['strongest_in_top'])} of the latents are "
        f"strongest there; scored by {other} instead of {found['score']} it would be "
        f"{_percent(of_other)}.",
        "10 % would be even. With TopK each token has the same number of slots by construction, so "
        "there only the strongest examples can tell. Normalisation unit_norm scores by cosine, "
        "none by inner product (arXiv 2606.15054).",
        None,
        [
            Figure(
                "norms",
                "Strongest examples by norm",
                "Share of live latents whose strongest example has a norm in each tenth of the "
                "tokens, by either score.",
                "tenth of the tokens, by rising norm",
                "share of latents",
                [
                    StudyCurve("cosine", deciles, found["strongest"]["cosine"]),
                    StudyCurve("inner product", deciles, found["strongest"]["inner"]),
                    StudyCurve("even", deciles, [0.1] * len(deciles), None, True),
                ],
            )
        ],
    )


def ask_k(evidence: SanityEvidence) -> Question | None:
    """Answer whether k is too low or too high."""
    members = evidence.subject.by_k
    if len(members) < 3 or not evidence.has("decoder_projection", *members.values()):
        return None
    found = {k: evidence.results[name]["decoder_projection"] for k, name in members.items()}
    own, values = evidence.subject.recipe.sae.k, [one["projection"] for one in found.values()]
    ks = list(found)
    best, inside = best_k(ks, [value["value"] for value in values])
    lowest = min(values, key=lambda value: value["value"])
    alike = [
        k
        for k, value in zip(ks, values)
        if value["value"] - lowest["value"]
        <= TOLD * ((value["se"] or 0) ** 2 + (lowest["se"] or 0) ** 2) ** 0.5
    ]
    verdict = _judge_k(own, ks, best, inside, alike)
    rows = [
        [
            str(k),
            format_estimate(estimate(one["projection"])),
            f"{one['mean_cosine']['value']:.4f}",
            f"{one['l0']['value']:.1f}",
        ]
        for k, one in found.items()
    ]
    figure = Figure(
        "wrong-k",
        "Decoder projection against k",
        "One stream, one n; lower is better. Bars are a standard error over groups of documents.",
        "k",
        "decoder projection",
        [StudyCurve("projection", ks, [v["value"] for v in values], [v["se"] for v in values])],
        "x",
    )
    return Question(
        "wrong-k",
        "Is k right?",
        verdict,
        "Too small a k mixes correlated features, too large a one finds degenerate ones; both "
        "raise the proxy of arXiv 2508.16560. It was checked there on toy data and against "
        "sparse probes on two LMs, and says nothing of what k costs in error.",
        QuestionTable(["k", "decoder projection", "mean |cosine| of decoder rows", "L0"], rows),
        [figure],
    )


def ask_absorption(evidence: SanityEvidence) -> Question | None:
    """Answer whether special cases escape general latents."""
    if not evidence.has("absorption", RUN):
        return None
    found = evidence.results[RUN]["absorption"]
    rows = [
        [
            case["label"],
            repr(case["token"]),
            f"{case['count']:,}",
            f"{found['labels'][case['label']]['latent']} ({100 * case['recall']:.0f} %)",
            f"{case['other']} ({100 * case['other_recall']:.0f} %)",
        ]
        for case in found["cases"]
    ]
    return Question(
        "absorption",
        "Do special cases escape its general latents?",
        f"{_percent(found['absorbed'])} of the occurrences of {found['n_cases']:,} special cases "
        "are absorbed: the latent of their label is silent and another takes them; silent it is "
        f"on {_percent(found['silent'])}. Of {found['n_labels']} labels {found['n_known']} have a "
        "latent with an F1 of half or more.",
        "A label is a first letter or, on the built-in text, a fact of Python's syntax; its "
        "special cases are single tokens. An absorbed case (arXiv 2409.14507) makes a latent that "
        "reads as general miss what it should find. Labels that no latent knows are not counted, "
        "so a poor SAE can look good here.",
        QuestionTable(["label", "token", "occurrences", "its latent", "taken by"], rows)
        if rows
        else None,
    )


def ask_splitting(evidence: SanityEvidence) -> Question | None:
    """Answer whether latents split as n grows."""
    if not evidence.has("splitting", RUN):
        return None
    steps = evidence.results[RUN]["splitting"]["steps"]
    last = steps[-1]
    return Question(
        "splitting",
        "Do its latents split with n?",
        f"From n = {last['from']:,} to {last['to']:,} {_percent(last['kept'])} of the live latents "
        f"have one neighbour, {_percent(last['split'])} several and {_percent(last['lost'])} none; "
        f"{_percent(last['new'])} of the larger SAE's latents are new.",
        "Neighbours are decoder rows of cosine 0.7 or more. Latents that split or are new show "
        "that n decides what a latent is: there is no canonical set (arXiv 2502.04878). Compare "
        "with the share that another seed of the same n has.",
        QuestionTable(
            ["from n", "to n", "one neighbour", "several", "none", "new"],
            [
                [f"{step['from']:,}", f"{step['to']:,}"]
                + [_percent(step[key]) for key in ("kept", "split", "lost", "new")]
                for step in steps
            ],
        ),
    )


def _judge_k(own: int, ks: list[int], best: float, inside: bool, alike: list[int]) -> str:
    """Return a sentence on k from where the proxy is smallest."""
    if not inside:
        end, beyond = ("smallest", "lower") if best <= ks[0] else ("largest", "higher")
        place = f"at the {end} k tried, {best:.0f}: the best may be {beyond}"
    else:
        place = f"at k = {best:.0f}"
    same = f"; within its error also at {', '.join(map(str, alike))}" if len(alike) > 1 else ""
    judged = (
        "it does not tell this k from the best"
        if own in alike
        else f"by it this SAE's k is too {'high' if own > best else 'low'}"
    )
    return f"The decoder projection is smallest {place}{same}; k is {own}: {judged}."


def _percent(value: Value) -> str:
    """Format a share with its standard error in percent."""
    if value["value"] is None:
        return "unknown"
    se = f" ± {100 * value['se']:.1f}" if value["se"] is not None else ""
    return f"{100 * value['value']:.1f}{se} %"
