"""Studies: experiments that train several SAEs on one activation stream to answer one question.

    baselines   which activation is best: error and the LM's additional loss against L0
    sites       where in the LM: layers, locations and positions in the context
    gaussian    what is learnt beyond mean and covariance: error against n, beside Gaussian data
    paper       which claims of the paper hold, on one LM: a page with a figure for each
    recipe      what each part of the recipe contributes: dead latents and error along training
    sanity      whether a run is better than an artefact: beside controls on its own stream

`run(name, options)` fills a folder with runs/MEMBER (ordinary run folders) and study.json (options,
each member's numbers, figures as data, findings), which the report draws. An interrupted study
resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ksparse.config.evaluation import StudyConfig
from ksparse.errors import unknown
from ksparse.progress import Progress, no_progress, observed
from ksparse.studies import ablations, baselines, gaussian, paper, sanity, sites
from ksparse.studies.study import Study

STUDIES: dict[str, Callable[[Study], dict[str, Any]]] = {
    "baselines": baselines.run,
    "sites": sites.run,
    "gaussian": gaussian.run,
    "paper": paper.run,
    "recipe": ablations.run,
    "sanity": sanity.run,
}


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Raise InputError unless a name is that of a study or one of the `others`."""
    known = [*STUDIES, *others]
    if name not in known:
        raise unknown("there is no study", name, known)


def run(
    name: str,
    options: StudyConfig = StudyConfig(),
    *,
    observe: Progress = no_progress,
) -> Path:
    """Run a study.

    Args:
        name: One of `STUDIES`.
        options: What to train and evaluate.
        observe: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The study's folder.

    Raises:
        InputError: The name is unknown, or an option cannot be used.
        Interrupted: On Ctrl-C or SIGTERM, after everything is saved.
    """
    check_name(name)
    study = Study(name, options)
    with observed(observe):
        study.finish(STUDIES[name](study))
    return study.path
