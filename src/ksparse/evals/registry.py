"""The evaluations by name.

To add an evaluation, write one file with a `Metric` and add one line to `EVALS`:

1. Subclass `ksparse.evals.base.Metric` in a new file of this package. Accumulate in `update`, with
   a `DocumentSums` for everything that gets a standard error, and return a `Result` from
   `finalize`. `ksparse.evals.positions` is the shortest complete example; its test,
   tests/evals/test_positions.py, is the one to copy: it compares the numbers with their definition
   on a tiny LM.
2. Add the class to `EVALS` below, and its name to `EVALUATIONS` in ksparse.config.evaluation. It
   can then be named in `ksparse.evaluate(sae, names=[…])` and in `ksparse eval RUN NAME`, and its
   result is saved as `evals/NAME.json`.

Only where it needs more: an option is a field of `EvalConfig` in ksparse.config.evaluation; sums
that two metrics share are a metric of their own that both fetch with `context.part`, as
`ksparse.evals.latents.moments.Moments` is; `passes = 2` reads the text a second time, after
`compute`; `comparison_keys` copies keys to the results of other SAEs for a common figure; a section
of the report is one file in ksparse.report. The fields of the result are documented in
docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from ksparse.config.evaluation import check_evaluations
from ksparse.evals import own_loss
from ksparse.evals.ablation import Ablation
from ksparse.evals.base import Metric
from ksparse.evals.decoder_projection import DecoderProjection
from ksparse.evals.downstream import Downstream
from ksparse.evals.explanations.explained_loss import ExplainedLoss
from ksparse.evals.explanations.n2g import N2G
from ksparse.evals.latents.absorption import Absorption
from ksparse.evals.latents.properties import Latents
from ksparse.evals.latents.subspaces import Subspaces
from ksparse.evals.latents.token_driven import TokenDriven
from ksparse.evals.norms import Norms
from ksparse.evals.own_loss import OwnLoss
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
"""The evaluations that run when none is named."""
EVALS: dict[str, type[Metric]] = {
    **DEFAULT,
    "positions": Positions,
    "refinement": Refinement,
    "progressive": Progressive,
    "latents": Latents,
    "subspaces": Subspaces,
    "token_driven": TokenDriven,
    "norms": Norms,
    "decoder_projection": DecoderProjection,
    "absorption": Absorption,
}
"""All evaluations."""


def metric_of(name: str) -> type[Metric]:
    """Return the class of an evaluation; also of the one that only a function asks for."""
    return OwnLoss if name == own_loss.NAME else EVALS[name]


def check_names(names: Sequence[str]) -> None:
    """Check that evaluations of these names exist.

    Raises:
        InputError: naming the first that does not exist, with a suggestion.
    """
    check_evaluations([name for name in names if name not in EVALS])
