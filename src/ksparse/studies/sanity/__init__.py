"""Is this autoencoder better than an artefact? The strongest published criticism of SAEs, asked of
one run by training controls on the run's own stream.

    controls.py    the controls and how they are trained, cohort by cohort
    measure.py     the evaluations, differences with their errors, and what can be told apart
    questions.py   one sentence per question, with its figures and tables

The page is written after every stage with the questions that have their numbers by then. The same
command resumes: trained SAEs and results are kept, and more controls can be added.
"""

from __future__ import annotations

from typing import Any

from ksparse.studies.sanity import controls, measure, questions
from ksparse.studies.sanity.measure import Evidence
from ksparse.studies.study import Study


def run(study: Study) -> dict[str, Any]:
    """Train the controls, measure them and answer; return the fields of study.json.

    Raises:
        InputError: The study names no finished run, an unknown control, or an option that would
            make the controls unlike the run.
    """
    evidence = Evidence(study, controls.subject_of(study))
    for cohort in controls.cohorts(evidence.subject):
        controls.train(study, evidence.subject, cohort)
        for stage in measure.STAGES:
            stage(evidence, cohort)
            study.finish(questions.summarize(evidence))
    return questions.summarize(evidence)
