"""The controls of a run: SAEs that are trained as it was, but for one thing.

    seeds                    the run with two other seeds
    frozen_decoder           the decoder stays at its random start
    held_decoder             each decoder row stays within cosine 0.8 of its start
    frozen_encoder           the encoder stays at its random start
    redrawn                  the LM with all weights drawn anew
    redrawn_keep_embedding   the LM with all but the embeddings drawn anew
    shuffled                 the tokens of each context in another order
    sweep_k                  the run with other k
    sweep_n                  the run with fewer latents

Those that read the same activations form a cohort, which is trained on one stream, the run's own.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from ksparse.config import ActsConfig, CurveConfig, MeshConfig, Recipe
from ksparse.config.evaluation import SANITY_CONTROLS, StudyConfig
from ksparse.errors import InputError, unknown
from ksparse.sae import serialization
from ksparse.storage.run_folder import RunFolder, open_run
from ksparse.storage.stores import open_store
from ksparse.studies.study import Study

log = logging.getLogger("ksparse")
RUN = "run"
"""The name of the run among its controls."""
SEEDS = 2
"""Other seeds that are trained."""
COSINE = 0.8
"""Least cosine of a held decoder row with its start (arXiv 2602.14111)."""
K_FACTORS = (1 / 4, 1 / 2, 2, 4)
_PENALISED = ("relu", "gated", "prolu")  # a penalty decides their L0, not k
N_DIVISORS = (4, 2)
_SAE: dict[str, dict[str, Any]] = {
    "frozen_decoder": {"freeze": "decoder"},
    "held_decoder": {"decoder_cosine_min": COSINE},
    "frozen_encoder": {"freeze": "encoder"},
}
_ACTS: dict[str, dict[str, Any]] = {
    "redrawn": {"lm_weights": "redrawn"},
    "redrawn_keep_embedding": {"lm_weights": "redrawn_keep_embedding"},
    "shuffled": {"shuffle_tokens": True},
}
WORDS = {
    "seeds": "another seed",
    "frozen_decoder": "a frozen decoder",
    "held_decoder": "a decoder held near its start",
    "frozen_encoder": "a frozen encoder",
    "redrawn": "an SAE of the LM with all weights drawn anew",
    "redrawn_keep_embedding": "an SAE of the LM with all but the embeddings drawn anew",
    "shuffled": "an SAE of shuffled tokens",
}
"""What the controls are called in sentences."""


@dataclass(frozen=True)
class AskedRun:
    """The run whose SAE is asked about, and the controls that are asked for.

    Attributes:
        run: Its folder.
        recipe: Its recipe, as controls are trained with it.
        controls: Names of controls.
    """

    run: RunFolder
    recipe: Recipe
    controls: tuple[str, ...]

    def has(self, control: str) -> bool:
        """Return whether a control is asked for."""
        return control in self.controls

    @property
    def seeds(self) -> list[str]:
        """The members that are the run with another seed."""
        return [f"seed{number + 1}" for number in range(SEEDS)] if self.has("seeds") else []

    @property
    def by_k(self) -> dict[int, str]:
        """The members of the sweep of k, the run among them, by rising k; {} if there is none."""
        sae = self.recipe.sae
        if not self.has("sweep_k") or sae.activation.kind in _PENALISED:
            return {}
        widest = sae.n_latents // (8 if sae.multi_topk else 2)
        sizes = {max(1, round(factor * sae.k)) for factor in K_FACTORS} - {sae.k}
        found = {k: f"k{k}" for k in sizes if k <= widest} | {sae.k: RUN}
        return dict(sorted(found.items()))

    @property
    def by_n(self) -> dict[int, str]:
        """The members of the sweep of n, the run among them, by rising n; {} if there is none."""
        sae = self.recipe.sae
        if not self.has("sweep_n"):
            return {}
        sizes = {sae.n_latents // divisor for divisor in N_DIVISORS}
        least = max(2 * sae.k * (4 if sae.multi_topk else 1), 1 + max(sae.prefixes, default=0))
        found = {n: f"n{n}" for n in sizes if n >= least} | {sae.n_latents: RUN}
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Cohort:
    """Members that read the same activations.

    Attributes:
        name: What it is called in progress reports.
        members: Their recipes by name; the run itself, which is there already, is not among them.
        compared: The members whose measures are compared with the run's, the run first if it reads
            these activations.
    """

    name: str
    members: dict[str, Recipe]
    compared: list[str]

    @property
    def own(self) -> bool:
        """Whether these are the run's own activations."""
        return RUN in self.compared


def asked_run(study: Study) -> AskedRun:
    """Return the run that a study asks about.

    Raises:
        InputError: There is none, it is not finished, or options would make its controls unlike it.
    """
    options = study.options
    if not options.run:
        raise InputError(
            "sanity asks about a run: `ksparse sanity RUN`, or `ksparse study sanity --run RUN`"
        )
    fixed = ("recipe", "lm", "site", "text", "tokens", "n_latents", "k", "batch")
    given = [name for name in fixed if getattr(options, name) != getattr(StudyConfig, name)]
    if given:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{words} would train the controls otherwise than the run {options.run}; they have its "
            "own recipe: leave it out"
        )
    run = open_run(options.run)
    recipe = run.recipe()
    if recipe.sae.start:
        raise InputError(
            f"{run.path} began from another SAE (sae.start = {recipe.sae.start}): runs with other "
            "seeds would begin from the same weights, and say nothing of what a seed decides; ask "
            "about the run that it began from"
        )
    steps = _steps_taken(run, recipe)
    acts = recipe.acts
    if acts.shards and not open_store(acts.shards).names():
        log.warning(
            "the shards %s of the run are gone: its controls read the activations from the LM, in "
            "another order",
            acts.shards,
        )
        acts = dataclasses.replace(acts, shards="")
    recipe = dataclasses.replace(
        recipe,
        acts=acts,
        tokens=steps * recipe.batch if recipe.curve.converged else recipe.tokens,
        curve=CurveConfig(),
        mesh=MeshConfig(),
        order=recipe.data_seed,
        threads=options.threads or recipe.threads,
        run=dataclasses.replace(recipe.run, device=options.device, keep=1, loggers=()),
    )
    study.use_acts(acts)
    return AskedRun(run, recipe, _chosen(options.controls))


def _steps_taken(run: RunFolder, recipe: Recipe) -> int:
    """Return how many steps a finished run took; raise InputError for an unfinished one."""
    checkpoint = run.newest_intact()[0]
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    converged = bool(recipe.curve.converged) and step > 0
    if step < recipe.steps and not converged:
        raise InputError(
            f"{run.path} is at step {step:,} of {recipe.steps:,}; its controls would be trained on "
            f"more than it. Finish it first: ksparse resume {run.path}"
        )
    return step


def _chosen(controls: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of controls that are asked for; raise InputError for an unknown one."""
    for name in controls:
        if name not in (*SANITY_CONTROLS, "all"):
            raise unknown("there is no control", name, (*SANITY_CONTROLS, "all"))
    if "all" in controls:
        return tuple(SANITY_CONTROLS)
    return controls or tuple(name for name, default in SANITY_CONTROLS.items() if default)


def cohorts(subject: AskedRun) -> list[Cohort]:
    """Return the cohorts of a run, its own stream first."""
    recipe, own = subject.recipe, dict[str, Recipe]()
    for number, member in enumerate(subject.seeds, 1):
        own[member] = dataclasses.replace(recipe, seed=recipe.seed + number)
    for name, changes in _SAE.items():
        if subject.has(name):
            own[name] = _changed(recipe, **changes)
    compared = [RUN, *own]
    for k, member in subject.by_k.items():
        if member != RUN:
            own[member] = _changed(recipe, k=k)
    for n, member in subject.by_n.items():
        if member != RUN:
            own[member] = _changed(recipe, n_latents=n)
    found = [Cohort("the run's own stream", own, compared)]
    for name, changes in _ACTS.items():
        if subject.has(name):
            acts = dataclasses.replace(recipe.acts, shards="", **changes)
            changed = dataclasses.replace(recipe, acts=acts)
            found.append(Cohort(WORDS[name].removeprefix("an SAE of "), {name: changed}, [name]))
    return found


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    """Return a recipe with another section `sae`; where weights are limited, without what only
    compiled steps do."""
    sae = dataclasses.replace(recipe.sae, **changes)
    if not sae.limits_weights:
        return dataclasses.replace(recipe, sae=sae)
    return dataclasses.replace(
        recipe,
        sae=sae,
        optim=dataclasses.replace(recipe.optim, approx_topk="off", precision="float32"),
        run=dataclasses.replace(recipe.run, kernels="auto"),
    )


def train(study: Study, subject: AskedRun, cohort: Cohort) -> None:
    """Train a cohort; finished members stay as they are."""
    if cohort.members:
        study.train(cohort.members, what=f"training on {cohort.name}")


def folder(study: Study, subject: AskedRun, member: str) -> RunFolder:
    """Return the folder in which a member's SAE is."""
    return subject.run if member == RUN else study.run_folder(member)


def acts_of(study: Study, subject: AskedRun, member: str) -> ActsConfig:
    """Return the activations that a member reads."""
    checkpoint = folder(study, subject, member).newest_intact()[0]
    assert checkpoint is not None
    return serialization.acts_of(serialization.read_shape(checkpoint)[1])
