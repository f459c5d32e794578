"""What all studies do: train members on one stream, judge them, and write down what was found.

    Study(name, options).train({member: recipe})    a run each, trained together
         .judge({member: …})                        evaluations, kept beside each member
         .finish(found)                             study.json

Figures are data (`Figure`), drawn by the report; findings are sentences with numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from ksparse.config import ActivationConfig, Recipe
from ksparse.config import SAEConfig as SAEOptions
from ksparse.config.evaluation import EvalConfig, StudyConfig
from ksparse.errors import CorruptError, InputError
from ksparse.evals import runner
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder, open_run
from ksparse.training.source import ActivationSource
from ksparse.training.train import train_many

log = logging.getLogger("ksparse")

FORMAT = 1
TOGETHER = 8  # SAEs that are judged in one pass: what has been judged is not lost
Observe = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
Estimate = dict[str, float | None]


class Fitted(TypedDict):
    """An estimate whose value is always known."""

    value: float
    se: float | None


@dataclass(frozen=True)
class StudyCurve:
    """Points of one thing: x, y and the standard errors of y, or none."""

    label: str
    x: list[float | None]
    y: list[float | None]
    se: list[float | None] | None = None
    reference: bool = False
    """Whether it is only there to compare with."""


@dataclass(frozen=True)
class Figure:
    """A figure as data."""

    name: str
    title: str
    caption: str
    x: str
    y: str
    curves: list[StudyCurve]
    log: str = ""
    """Which axes are logarithmic: "", x, y or xy."""


class Study:
    """One study on disk, and the recipe that its members start from."""

    def __init__(self, name: str, options: StudyConfig, observe: Observe):
        self.name, self.options, self.observe = name, options, observe
        self.path = Path(options.out or f"studies/{name}")
        self.began = time.monotonic()
        base = open_run(options.run).recipe() if options.run else Recipe()
        self.acts = dataclasses.replace(
            base.acts,
            lm=options.lm or base.acts.lm,
            site=options.site or base.acts.site,
            text=options.text or base.acts.text,
            shards="" if options.lm or options.site or options.text else base.acts.shards,
        )
        self.base = dataclasses.replace(
            base,
            acts=self.acts,
            batch=options.batch,
            order=0,
            threads=options.threads,
            run=dataclasses.replace(base.run, device=options.device, keep=1),
        )

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
        """Return a member's recipe: the base's acts and optimiser, and of `sae` only what is given;
        the options' own sizes win.

        changes: keys of the section `sae`; whole sections; and `tokens`, `batch`.
        """
        own = {
            key: changes.pop(key) for key in list(changes) if key in SAEOptions.__dataclass_fields__
        }
        if activation:
            own["activation"] = activation
        sae = SAEOptions(n_latents=n, k=k, **own)
        return dataclasses.replace(
            self.base, sae=sae, tokens=self.options.tokens or tokens, seed=seed, **changes
        )

    def run(self, member: str) -> RunFolder:
        """Return a member's folder, named so that a shell takes it as one word."""
        return RunFolder(atomic.inside(self.path, "runs", re.sub(r"[^\w.-]+", "_", member)))

    # ---- training

    def train(
        self,
        members: dict[str, Recipe],
        *,
        what: str = "training",
        open_feed: Callable[[Recipe, torch.device], ActivationSource] = ActivationSource,
    ) -> None:
        """Train members on one stream; those that are finished stay as they are."""
        names = {self.run(member).path: member for member in members}
        total, done = (
            sum(recipe.steps * recipe.batch for recipe in members.values()),
            dict.fromkeys(members, 0),
        )

        def observe(run: RunFolder, row: dict[str, Any]) -> None:
            done[names[run.path]] = row["tokens"]
            self.observe(what, sum(done.values()), total)

        train_many(
            list(members.values()),
            [self.run(member).path for member in members],
            observe=observe,
            open_feed=open_feed,
        )

    # ---- judging

    def judge(
        self,
        members: Sequence[str],
        names: Sequence[str] = ("stats", "downstream"),
        *,
        change: Callable[[str, SAE], SAE] = lambda member, sae: sae,
        source: Callable[[str], str] = lambda member: member,
    ) -> dict[str, dict[str, Any]]:
        """Return {member: {evaluation: result}}; what has been judged with the same options is read
        back.

        source: the member whose SAE is judged under a name; change: what is made of it before.
        """
        options = EvalConfig(
            tokens=self.options.eval_tokens, examples=0, device=self.options.device
        )
        found: dict[str, dict[str, Any]] = {
            member: {name: self._judged(member, name, options) for name in names}
            for member in members
        }
        missing = [member for member in members if not all(found[member].values())]
        for first in range(0, len(missing), TOGETHER):
            some = missing[first : first + TOGETHER]
            saes = {
                member: change(member, serialization.load(self.run(source(member)).path))
                for member in some
            }
            results = runner.evaluate_many(
                saes,
                None,
                names,
                options,
                observe=functools.partial(
                    self._judging, f"judging {first + 1} to {first + len(some)} of {len(missing)}"
                ),
            )
            for member in some:
                runner.write(self.run(member), results[member])
                found[member] = {name: dict(results[member][name]) for name in names}
        return found

    def _judging(self, which: str, what: str, done: int, total: int) -> None:
        self.observe(which, done, total)

    def _judged(self, member: str, name: str, options: EvalConfig) -> dict[str, Any] | None:
        try:
            result = self.run(member).eval(name)
        except CorruptError as error:
            log.warning("%s: %s is judged again", error, member)
            result = None
        same = result is not None and result["options"] == options.resolved().for_eval(name)
        return result if same else None

    # ---- the answer

    def finish(self, found: dict[str, Any]) -> None:
        """Write study.json."""
        about = {
            "format": FORMAT,
            "name": self.name,
            "options": dataclasses.asdict(self.options),
            "lm": self.acts.lm,
            "site": self.acts.site,
            "text": self.acts.text,
        }
        figures = [dataclasses.asdict(figure) for figure in found.pop("figures")]
        jsonio.write_json(
            self.path / "study.json",
            {
                **about,
                **found,
                "figures": figures,
                "seconds": round(time.monotonic() - self.began, 1),
            },
            sealed=True,
        )


# ---- numbers -------------------------------------------------------------------------------------


def at_k(sae: SAE, k: int) -> SAE:
    """Return the same weights with TopK of another k."""
    if k > sae.shape.n_latents:
        raise InputError(
            f"k = {k} is more than the {sae.shape.n_latents} latents; give a smaller --k or more "
            "--n-latents"
        )
    made = SAE(dataclasses.replace(sae.shape, k=k, activation="topk"), sae.metadata)
    made.load_state_dict({key: sae.state_dict()[key] for key in made.state_dict()})
    return made


def points(
    results: dict[str, dict[str, Any]], y: str, of: str, members: Sequence[str]
) -> StudyCurve:
    """Return members' values of `y` of one evaluation against their L0, by rising L0;
    unlabelled."""
    rows = sorted(
        (
            results[member]["stats"]["l0"]["value"],
            results[member][of][y]["value"],
            results[member][of][y]["se"],
        )
        for member in members
    )
    x, values, errors = ([row[i] for row in rows] for i in range(3))
    return StudyCurve("", x, values, errors)


def between(curve: StudyCurve, x: float) -> tuple[float, float] | None:
    """Return (y, its standard error) at x by a straight line between logarithms of neighbouring
    points; None outside of the points."""
    rows = [
        (a, b, c or 0.0)
        for a, b, c in zip(curve.x, curve.y, curve.se or [0.0] * len(curve.x))
        if a and b and a > 0 and b > 0
    ]
    for (x0, y0, s0), (x1, y1, s1) in itertools.pairwise(rows):
        if x0 <= x <= x1:
            share = (math.log(x / x0) / math.log(x1 / x0)) if x1 > x0 else 0.0
            y = math.exp((1 - share) * math.log(y0) + share * math.log(y1))
            return y, y * math.hypot((1 - share) * s0 / y0, share * s1 / y1)
    return None


def power_law(n: Sequence[float], loss: Sequence[float]) -> dict[str, Fitted]:
    """Return the exponent b and factor a of loss = a n^b by least squares of logarithms, with
    standard errors where there are 3 points or more."""
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (n, loss))
    spread = (x - x.mean()).square().sum()
    slope = ((x - x.mean()) * y).sum() / spread
    left = y - y.mean() - slope * (x - x.mean())
    variance = left.square().sum() / (len(x) - 2) if len(x) > 2 else None
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


def said(estimate: Estimate | Fitted, digits: int = 4) -> str:
    """Write a value with its standard error."""
    value, se = estimate["value"], estimate["se"]
    return (
        "unknown"
        if value is None
        else f"{value:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")
    )
