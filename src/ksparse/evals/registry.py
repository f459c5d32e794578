"""TODO ksparse.evals.registry."""

from __future__ import annotations

from collections.abc import Sequence

from ksparse.errors import unknown
from ksparse.evals.ablation import Ablation
from ksparse.evals.base import Metric
from ksparse.evals.downstream import Downstream
from ksparse.evals.explanations.explained_loss import ExplainedLoss
from ksparse.evals.explanations.n2g import N2G
from ksparse.evals.latents.properties import Latents
from ksparse.evals.latents.subspaces import Subspaces
from ksparse.evals.positions import Positions
from ksparse.evals.probing.probes import Probes
from ksparse.evals.progressive import Progressive
from ksparse.evals.refinement import Refinement
from ksparse.evals.stats import Stats

DEFAULT: dict[str, type[Metric]] = {
    "downstream": Downstream,
    "stats": Stats,
    "probes": Probes,
    "n2g": N2G,
    "explained_loss": ExplainedLoss,
    "ablation": Ablation,
}
EVALS: dict[str, type[Metric]] = {
    **DEFAULT,
    "positions": Positions,
    "refinement": Refinement,
    "progressive": Progressive,
    "latents": Latents,
    "subspaces": Subspaces,
}


def check_names(names: Sequence[str]) -> None:
    """Raise InputError for an evaluation that does not exist."""
    for name in names:
        if name not in EVALS:
            raise unknown("there is no evaluation", name, EVALS)
