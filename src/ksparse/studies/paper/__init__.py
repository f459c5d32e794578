"""The claims of Gao et al. 2024, asked of one LM: TopK against ReLU, dead latents, laws, downstream
loss, probes, explanations, ablations, shrinkage, dense latents, subspaces, progressive codes.

    members.py   the SAEs and how they are trained, in stages on one set of activations
    measure.py   the evaluations, and access to their numbers
    quality.py   the claims on error and loss
    latents.py   the claims on latents
    claims.py    all of them: what the paper saw, what is seen here, figures, margins

The page is written after every stage, with the claims that have their numbers by then. The same
command resumes: trained SAEs and results are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ksparse.studies.paper import claims, measure, members
from ksparse.studies.paper.measure import Evidence
from ksparse.studies.study import Study

STAGES: tuple[Callable[[Evidence], None], ...] = (
    measure.measure_quality,
    measure.measure_probes,
    measure.measure_n2g,
    measure.measure_ablation,
    measure.measure_refinement,
    measure.measure_latents,
    measure.measure_progressive,
)
"""The stages after training, each of which a part of the page needs."""


def run(study: Study) -> dict[str, Any]:
    """Train, evaluate and judge; return the fields of study.json.

    The fields are written after each stage as well.
    """
    members.write_activations(study)
    sizes = members.Sizes(
        study.options.n_latents or study.base.sae.n_latents,
        study.options.k or study.base.sae.k,
        members.width(study),
        study.options.seeds,
    )
    sizes.check()
    members.train_topk(study, sizes)
    evidence = Evidence(study, sizes, members.train_relu(study, sizes))
    members.train_dead(study, sizes)
    members.train_gaussian(study, sizes)
    for number, stage in enumerate(STAGES):
        if number:
            study.finish(claims.summarize(evidence))
        stage(evidence)
    return claims.summarize(evidence)
