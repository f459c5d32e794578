"""What all studies share: train members on one stream, evaluate them, write the results.

    study = Study(name, options)
    study.train({member: recipe})     one run for each, trained together
    study.evaluate([member, ...])     evaluations, kept in each member's run folder
    study.finish(results)             study.json

Figures are data (`Figure`), drawn by the report. Findings are sentences with numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from ksparse import progress
from ksparse.config import ActivationConfig, ActsConfig, Recipe, SAEConfig, load_recipe
from ksparse.config.evaluation import EvalConfig, StudyConfig
from ksparse.errors import CorruptError, InputError
from ksparse.evals import runner
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder, open_run
from ksparse.training.source import ActivationSource
from ksparse.training.train import environment, train_many

FORMAT = 1
BATCH_SIZE = 1024
"""Activations per step, unless the options or a recipe say otherwise."""
BATCH = 8
"""SAEs evaluated in one pass; results are saved after each pass."""
Estimate = dict[str, float | None]
"""A value with its standard error, {"value", "se"}; None where unknown."""


class Fitted(TypedDict):
    """An estimate whose value is always known."""

    value: float
    se: float | None


@dataclass(frozen=True)
class StudyCurve:
    """A labelled curve of a figure: x, y and the standard errors of y, if known.

    `reference` marks a curve that is only there for comparison.
    """

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    se: Sequence[float | None] | None = None
    reference: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure as data; `log` names the logarithmic axes: "", "x", "y" or "xy"."""

    name: str
    title: str
    caption: str
    x: str
    y: str
    curves: list[StudyCurve]
    log: str = ""


def _read_base(options: StudyConfig) -> Recipe:
    if options.run and options.recipe:
        raise InputError("a study starts from a run or from a recipe: give --run or --recipe")
    if options.recipe:
        return load_recipe(options.recipe)
    return open_run(options.run).recipe() if options.run else Recipe()


class Study:
    """One study on disk, and the recipe that its members are derived from."""

    def __init__(self, name: str, options: StudyConfig):
        self.name, self.options = name, options
        self.path = Path(options.out or default_folder(name, options))
        self.began, self.earlier = time.monotonic(), self._seconds_before()
        base = _read_base(options)
        self.acts = dataclasses.replace(
            base.acts,
            lm=options.lm or base.acts.lm,
            site=options.site or base.acts.site,
            text=options.text or base.acts.text,
            text_config="" if options.text else base.acts.text_config,
            shards="" if options.lm or options.site or options.text else base.acts.shards,
        )
        self.base = dataclasses.replace(
            base,
            acts=self.acts,
            batch=options.batch or (base.batch if options.recipe else BATCH_SIZE),
            order=0,
            threads=options.threads,
            run=dataclasses.replace(base.run, device=options.device, keep=1),
        )

    def use_acts(self, acts: ActsConfig) -> None:
        """Train members on other activations from now on, such as shards that were just written."""
        self.acts, self.base = acts, dataclasses.replace(self.base, acts=acts)

    def recipe(
        self,
        *,
        tokens: int,
        n: int,
        k: int,
        activation: ActivationConfig | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> Recipe:
        """Return a member's recipe: the base recipe with a new section `sae`.

        Args:
            tokens: Tokens to train on, unless the study's options say otherwise.
            n: The number of latents.
            k: Active latents.
            activation: The activation; TopK by default.
            seed: The seed.
            changes: Keys of the section `sae`, and whole sections of the recipe.
        """
        sae_changes = {
            key: changes.pop(key) for key in list(changes) if key in SAEConfig.__dataclass_fields__
        }
        if activation:
            sae_changes["activation"] = activation
        sae = SAEConfig(n_latents=n, k=k, **sae_changes)
        return dataclasses.replace(
            self.base, sae=sae, tokens=self.options.tokens or tokens, seed=seed, **changes
        )

    def run_folder(self, member: str) -> RunFolder:
        """Return a member's run folder, whose name needs no quoting in a shell."""
        return RunFolder(atomic.inside(self.path, "runs", re.sub(r"[^\w.-]+", "_", member)))

    # ---- training

    def train(
        self,
        members: dict[str, Recipe],
        *,
        what: str = "",
        open_source: Callable[[Recipe, torch.device], ActivationSource] = ActivationSource,
    ) -> None:
        """Train members on one stream; finished ones stay as they are.

        Args:
            members: Recipes by name.
            what: What to call it in progress reports, if there are several trainings.
            open_source: Opens the stream.
        """
        with progress.stage(what) if what else nullcontext():
            train_many(
                list(members.values()),
                [self.run_folder(member).path for member in members],
                open_source=open_source,
            )

    # ---- evaluation

    def evaluate(
        self,
        members: Sequence[str],
        names: Sequence[str] = ("stats", "downstream"),
        *,
        options: EvalConfig | None = None,
        change: Callable[[str, SAE], SAE] = lambda member, sae: sae,
        source: Callable[[str], str] = lambda member: member,
    ) -> dict[str, dict[str, Any]]:
        """Evaluate members; results with the same options are read back instead.

        Args:
            members: The names that results are stored under.
            names: The evaluations.
            options: Of the evaluations; by default as many tokens as the study's options say.
            change: Changes a member's SAE before it is evaluated.
            source: Gives the member whose trained SAE is evaluated under a name.

        Returns:
            {member: {evaluation: result}}.
        """
        options = options or EvalConfig(
            tokens=self.options.eval_tokens, examples=0, device=self.options.device
        )
        results: dict[str, dict[str, Any]] = {
            member: self._read_kept(member, names, options, source(member)) for member in members
        }
        missing = [member for member in members if not all(results[member].values())]
        for first in range(0, len(missing), BATCH):
            batch = missing[first : first + BATCH]
            saes = {
                member: change(member, serialization.load(self.run_folder(source(member)).path))
                for member in batch
            }
            with progress.stage(
                f"evaluating {first + 1} to {first + len(batch)} of {len(missing)}"
            ):
                evaluated = runner.evaluate_many(saes, None, names, options)
            for member in batch:
                runner.write_results(self.run_folder(member), evaluated[member])
                results[member] = {name: dict(evaluated[member][name]) for name in names}
        return results

    def _read_kept(
        self, member: str, names: Sequence[str], options: EvalConfig, source: str
    ) -> dict[str, Any]:
        """Return the stored results of a member that are those of the SAE of `source`; None for
        each that is not."""
        checkpoint = self.run_folder(source).newest_intact()[0]
        if checkpoint is None:
            return dict.fromkeys(names)
        metadata = serialization.read_shape(checkpoint)[1]
        folder = self.run_folder(member)
        return {name: runner.read_kept(folder, name, options, metadata) for name in names}

    # ---- results

    def _seconds_before(self) -> float:
        """Return the seconds of earlier calls, of which this one is the continuation."""
        try:
            return float(jsonio.read_json(self.path / "study.json").get("seconds", 0.0))
        except (OSError, CorruptError, InputError, TypeError, ValueError, AttributeError):
            return 0.0

    def finish(self, results: dict[str, Any]) -> None:
        """Write study.json: the study's options and its results, with `figures` as data."""
        header = {
            "format": FORMAT,
            "name": self.name,
            "command": command(self.name, self.options),
            "options": dataclasses.asdict(self.options),
            "lm": self.acts.lm,
            "site": self.acts.site,
            "text": self.acts.text,
            "environment": {
                key: value for key, value in environment().items() if key != "arguments"
            },
        }
        figures = [dataclasses.asdict(figure) for figure in results.pop("figures")]
        jsonio.write_json(
            self.path / "study.json",
            {
                **header,
                **results,
                "figures": figures,
                "seconds": round(self.earlier + time.monotonic() - self.began, 1),
            },
            sealed=True,
        )


def default_folder(name: str, options: StudyConfig) -> str:
    """Return where a study is kept unless `out` says otherwise: one of a run's controls beside the
    run's own results."""
    return f"{options.run}/sanity" if name == "sanity" and options.run else f"studies/{name}"


def command(name: str, options: StudyConfig) -> str:
    """Return the command that runs a study.

    Example:
        >>> from ksparse.config.evaluation import StudyConfig
        >>> command("paper", StudyConfig(recipe="r.toml", seeds=3))
        'ksparse study paper r.toml --seeds 3'
        >>> command("sanity", StudyConfig(run="runs/demo", controls=("seeds", "sweep_n")))
        'ksparse sanity runs/demo --controls seeds sweep_n'
    """
    verb = ["sanity", options.run] if name == "sanity" else ["study", name]
    words = ["ksparse", *verb, *([options.recipe] if options.recipe else [])]
    left_out = {"recipe", "run"} if name == "sanity" else {"recipe"}
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name not in left_out and value != option.default:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--{option.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


# ---- numbers -------------------------------------------------------------------------------------


def at_k(sae: SAE, k: int) -> SAE:
    """Return a TopK SAE of another k with the same weights."""
    if k > sae.shape.n_latents:
        raise InputError(
            f"k = {k} is more than the {sae.shape.n_latents} latents; give a smaller --k or more "
            "--n-latents"
        )
    changed = SAE(dataclasses.replace(sae.shape, k=k, activation="topk"), sae.metadata)
    weights = sae.state_dict()
    changed.load_state_dict({key: weights[key] for key in changed.state_dict()})
    return changed


def curve_against_l0(
    results: dict[str, dict[str, Any]], y: str, evaluation: str, members: Sequence[str]
) -> StudyCurve:
    """Return the members' `y` of an evaluation against L0, by rising L0, without a label."""
    rows = sorted(
        (
            results[member]["stats"]["l0"]["value"],
            results[member][evaluation][y]["value"],
            results[member][evaluation][y]["se"],
        )
        for member in members
    )
    x, values, errors = ([row[i] for row in rows] for i in range(3))
    return StudyCurve("", x, values, errors)


def interpolate(curve: StudyCurve, x: float) -> tuple[float, float] | None:
    """Return y and its standard error at x, linear in logs; None outside the curve's range."""
    rows = [
        (px, py, se or 0.0)
        for px, py, se in zip(curve.x, curve.y, curve.se or [0.0] * len(curve.x))
        if px and py and px > 0 and py > 0
    ]
    for (x0, y0, s0), (x1, y1, s1) in itertools.pairwise(rows):
        if x0 <= x <= x1:
            share = (math.log(x / x0) / math.log(x1 / x0)) if x1 > x0 else 0.0
            y = math.exp((1 - share) * math.log(y0) + share * math.log(y1))
            return y, y * math.hypot((1 - share) * s0 / y0, share * s1 / y1)
    return None


def power_law(n: Sequence[float], loss: Sequence[float]) -> dict[str, Fitted]:
    """Fit loss = a n^b by least squares of logs.

    Returns:
        `exponent` b and `factor` a, with standard errors from 3 points on.
    """
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (n, loss))
    spread = (x - x.mean()).square().sum()
    slope = ((x - x.mean()) * y).sum() / spread
    residual = y - y.mean() - slope * (x - x.mean())
    variance = residual.square().sum() / (len(x) - 2) if len(x) > 2 else None
    factor = (y.mean() - slope * x.mean()).exp().item()
    return {
        "exponent": {
            "value": slope.item(),
            "se": None if variance is None else (variance / spread).sqrt().item(),
        },
        "factor": {
            "value": factor,
            "se": None
            if variance is None
            else factor * (variance * (1 / len(x) + x.mean() ** 2 / spread)).sqrt().item(),
        },
    }


def format_estimate(estimate: Estimate | Fitted, digits: int = 4) -> str:
    """Format a value with its standard error, if known."""
    value, se = estimate["value"], estimate["se"]
    if value is None:
        return "unknown"
    return f"{value:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")
