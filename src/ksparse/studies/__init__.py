"""Experiments that train several SAEs on one stream to answer one question.

    baselines   which activation is best: L0 against error and the LM's additional loss
    sites       where in the LM: layers and locations, and positions of the context
    gaussian    what is learnt of the data beyond mean and covariance: the error against n, beside
                Gaussian data
    recipe      what each part of the recipe is good for: dead latents along training, and the error

`run(name, options)` leaves a folder: runs/MEMBER (ordinary runs), study.json (what was asked, each
member's numbers, figures as data, findings). The report draws it. A study that was interrupted goes
on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ksparse.config.evaluation import StudyConfig
from ksparse.errors import unknown
from ksparse.studies import ablations, baselines, gaussian, sites
from ksparse.studies.study import Observe, Study

STUDIES: dict[str, Callable[[Study], dict[str, Any]]] = {
    "baselines": baselines.study,
    "sites": sites.study,
    "gaussian": gaussian.study,
    "recipe": ablations.study,
}


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Raise InputError if there is no study of this name, nor any of the `others`."""
    known = [*STUDIES, *others]
    if name not in known:
        raise unknown("there is no study", name, known)


def run(
    name: str,
    options: StudyConfig = StudyConfig(),
    *,
    observe: Observe = lambda what, done, total: None,
) -> Path:
    """Do a study; return the folder that holds it.

    observe: called with what is being done, and how much of how much is done. Raises Interrupted,
    once all is saved, on Ctrl-C and SIGTERM.
    """
    check_name(name)
    study = Study(name, options, observe)
    study.finish(STUDIES[name](study))
    return study.path
