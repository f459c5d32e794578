"""Is this autoencoder better than an artefact? The strongest published criticism of SAEs, asked of
one run by training controls on the run's own stream.

    controls.py    the controls and how they are trained, cohort by cohort
    measure.py     the evaluations, differences with their errors, and what can be told apart
    latents.py     what is measured of the run's own latents, and the questions about them
    question.py    what a question is
    questions.py   all of them, the controls' first

Answers are stored after every stage, with the questions that have their numbers by then. The same
command resumes: trained SAEs and results are kept, and more controls can be added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ksparse.evals.probing import tasks
from ksparse.studies.sanity import controls, latents, measure, questions
from ksparse.studies.sanity.controls import Cohort
from ksparse.studies.sanity.measure import SanityEvidence
from ksparse.studies.study import Study

STAGES: tuple[Callable[[SanityEvidence, Cohort], None], ...] = (
    measure.measure_quality,
    latents.measure_projection,
    latents.measure_norms,
    measure.measure_tokens,
    measure.measure_n2g,
    measure.measure_ablation,
    latents.measure_stability,
    latents.measure_absorption,
    latents.measure_splitting,
    measure.measure_probes,
)
"""The stages after a cohort's training; the page is written after each."""


def run(study: Study) -> dict[str, Any]:
    """Train the controls, measure them and answer; return the fields of study.json.

    Raises:
        InputError: The study names no finished run, an unknown control, or an option that would
            make the controls unlike the run.
    """
    evidence = SanityEvidence(study, controls.asked_run(study))
    tasks.check_options(measure.eval_options(study).resolved())
    for cohort in controls.cohorts(evidence.subject):
        controls.train(study, evidence.subject, cohort)
        for stage in STAGES:
            stage(evidence, cohort)
            study.finish(questions.summarize(evidence))
    results = questions.summarize(evidence)
    questions.keep_with_run(evidence, results)
    return results
