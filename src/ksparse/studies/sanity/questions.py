"""One sentence per question: is the SAE better than each control, and what else is known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ksparse.evals import runner
from ksparse.evals.statistics import Result
from ksparse.studies.sanity import controls, latents
from ksparse.studies.sanity.controls import RUN, WORDS
from ksparse.studies.sanity.measure import MEASURES, MeasureComparison, SanityEvidence
from ksparse.studies.sanity.question import Question, QuestionTable, estimate
from ksparse.studies.study import format_estimate

READINGS = {
    "frozen_decoder": "Where the run cannot be told from it, the measure does not show that the "
    "decoder has learnt directions.",
    "held_decoder": "Its rows are still near random ones: what it does as well needs no features "
    "far from chance.",
    "frozen_encoder": "Its latents are chosen by random directions: what it does as well needs no "
    "learnt detector.",
    "redrawn": "That LM has learnt nothing: a measure with the same value there says nothing about "
    "what the LM computes. Delta CE is left out, since that LM predicts nothing.",
    "redrawn_keep_embedding": "That LM knows its tokens and nothing else: a measure with the same "
    "value there says no more than that latents follow tokens.",
    "shuffled": "Those contexts have the same words and say nothing: a measure with the same value "
    "there does not show that latents read context.",
}


def against_control(evidence: SanityEvidence, control: str) -> Question | None:
    """Answer whether the run is better than a control."""
    found = evidence.compare(control)
    if not found:
        return None
    words = WORDS[control]
    return Question(
        control.replace("_", "-"),
        f"Is it better than {words}?",
        summarize_comparisons(found, words),
        READINGS[control],
        QuestionTable(
            [
                "measure",
                "this SAE",
                "control",
                "difference",
                "smallest that can be told",
                "verdict",
            ],
            [_row(comparison) for comparison in found],
        ),
    )


def summarize_comparisons(found: list[MeasureComparison], words: str) -> str:
    """Return a sentence on the measures by which an SAE can be told from a control.

    Args:
        found: The comparisons.
        words: What the control is called, such as "a frozen decoder".
    """
    by = {
        verdict: [one.measure.words for one in found if one.verdict == verdict]
        for verdict in ("cannot be told", "better", "worse", "other", "not measured")
    }
    known = len(found) - len(by["not measured"])
    alike = by["cannot be told"]
    parts = [
        f"on {len(alike)} of {known} measures this SAE cannot be told from {words}"
        + (f" ({', '.join(alike)})" if alike else "")
    ]
    for verdict, says in (("better", "it is better"), ("worse", "it is worse")):
        if by[verdict]:
            parts.append(f"{says} by {', '.join(by[verdict])}")
    if by["other"]:
        parts.append(f"it differs in {', '.join(by['other'])}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _row(comparison: MeasureComparison) -> list[str]:
    detectable = comparison.detectable
    return [
        comparison.measure.words,
        format_estimate(estimate(comparison.run)),
        format_estimate(estimate(comparison.control)),
        format_estimate(estimate(comparison.difference)),
        "unknown" if detectable is None else f"{detectable:.4f}",
        comparison.verdict,
    ]


QUESTIONS: tuple[Callable[[SanityEvidence], Question | None], ...] = (
    latents.ask_stability,
    latents.ask_tokens,
    latents.ask_k,
    latents.ask_norms,
    latents.ask_alignment,
    latents.ask_absorption,
    latents.ask_splitting,
)
"""The questions beside those of the controls, in the order of the page."""


def summarize(evidence: SanityEvidence) -> dict[str, Any]:
    """Return the fields of study.json, with the questions whose numbers are there."""
    subject, study = evidence.subject, evidence.study
    controls = [against_control(evidence, name) for name in READINGS]
    asked = [*controls, *(ask(evidence) for ask in QUESTIONS)]
    found = [question for question in asked if question is not None]
    recipe = subject.recipe
    return {
        "question": f"Is the autoencoder of the run {subject.run.name} better than an artefact?",
        "setup": {
            "tokens": recipe.tokens,
            "latents": recipe.sae.n_latents,
            "k": recipe.sae.k,
            "seeds": 1 + len(subject.seeds),
            "eval_tokens": study.options.eval_tokens,
        },
        "questions": [
            {
                **{key: getattr(one, key) for key in ("name", "question", "answer", "reading")},
                "table": None
                if one.table is None
                else {"columns": one.table.columns, "rows": one.table.rows},
                "figures": [figure.name for figure in one.figures],
            }
            for one in found
        ],
        "members": {member: _numbers(evidence, member) for member in evidence.results},
        "figures": [figure for question in found for figure in question.figures],
        "findings": [f"{question.question} {question.answer}" for question in found],
    }


def keep_with_run(evidence: SanityEvidence, results: dict[str, Any]) -> None:
    """Write the questions and answers among the run's own results, where its report finds them."""
    run = evidence.subject.run
    acts = controls.acts_of(evidence.study, evidence.subject, RUN)
    result = Result(
        {
            "name": "sanity",
            "lm": acts.lm,
            "site": acts.site,
            "controls": list(evidence.subject.controls),
            "page": run.relative_source(evidence.study.path / "report.html"),
            "questions": [
                {key: one[key] for key in ("name", "question", "answer")}
                for one in results["questions"]
            ],
        }
    )
    runner.write_results(run, {"sanity": result})


def _numbers(evidence: SanityEvidence, member: str) -> dict[str, Any]:
    """Return a member's numbers for the table of all SAEs."""
    stats = evidence.results[member].get("stats", {})
    shown = {key: stats[key] for key in ("l0", "dead_fraction") if key in stats}
    measured = {m.name: evidence.number(member, m) for m in MEASURES}
    return shown | {
        name: number for name, number in measured.items() if number["value"] is not None
    }
