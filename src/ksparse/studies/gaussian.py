"""What is learnt beyond mean and covariance? Gao et al. 2024, appendix G.

The same pipeline runs on Gaussian data of the activations' mean and covariance, whose error hardly
falls with n.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ksparse.config import CurveConfig, Recipe
from ksparse.data.generated import HELD_OUT as HELD_OUT_ROWS
from ksparse.data.generated import GeneratedStream
from ksparse.studies.study import Figure, Fitted, Study, StudyCurve, format_estimate, power_law
from ksparse.training.source import ActivationSource

TOKENS, LATENTS, K, SIZES = 600_000, 8192, 16, 6
HELD_OUT = 16_384  # rows


def run(study: Study) -> dict[str, Any]:
    """Train SAEs of several n on activations and on Gaussian data; return the fields of study.json.

    A power law of n is fitted to the errors on each kind of data.
    """
    losses: dict[str, dict[int, list[float]]] = {}
    members: dict[str, Any] = {}
    for data in ("real", "gaussian"):
        for member, recipe in _train(study, data).items():
            last = study.run_folder(member).curve()[-1]
            losses.setdefault(data, {}).setdefault(recipe.sae.n_latents, []).append(last["loss"])
            members[member] = {
                "n_latents": recipe.sae.n_latents,
                "nmse": {"value": last["loss"], "se": None},
                "l0": {"value": last["l0"], "se": None},
                "dead_fraction": {"value": last["dead"], "se": None},
            }
    points = {
        data: (
            [n for n, values in by_size.items() for _ in values],
            [loss for values in by_size.values() for loss in values],
        )
        for data, by_size in losses.items()
    }
    fits = {data: power_law(n, values) for data, (n, values) in points.items()}
    return {
        "question": "How fast does the error fall with n, beside data with the same mean and "
        "covariance and nothing else to learn?",
        "members": members,
        "fits": fits,
        "figures": [
            Figure(
                "gaussian",
                "Error against latents",
                "Held-out error of the same recipe on LM activations and on Gaussian data of their "
                "mean and covariance; lines are a n^b.",
                "latents n",
                "normalised MSE",
                [
                    *(StudyCurve(data, n, values) for data, (n, values) in points.items()),
                    *(_fitted_curve(data, fits[data], list(losses[data])) for data in losses),
                ],
                "xy",
            )
        ],
        "findings": [
            f"The error falls as n^{format_estimate(fits['real']['exponent'], 3)} on activations "
            f"and as n^{format_estimate(fits['gaussian']['exponent'], 3)} on Gaussian data; the "
            "paper, with 768 dimensions and at convergence, has about -0.26 and -0.04."
        ],
    }


def _train(study: Study, data: str) -> dict[str, Recipe]:
    """Train the members on one kind of data; return their recipes."""

    def open_gaussian(recipe: Recipe, device: torch.device) -> GaussianSource:
        return GaussianSource(recipe, dataclasses.replace(recipe, acts=study.acts), device)

    members = recipes(study, data)
    study.train(
        members,
        what=f"training on {data} data",
        open_source=ActivationSource if data == "real" else open_gaussian,
    )
    return members


def _fitted_curve(data: str, fit: dict[str, Fitted], sizes: list[int]) -> StudyCurve:
    exponent, factor = fit["exponent"]["value"], fit["factor"]["value"]
    values = [factor * n**exponent for n in sizes]
    return StudyCurve(f"{data}: n^{exponent:.3f}", sizes, values, reference=True)


def recipes(study: Study, data: str) -> dict[str, Recipe]:
    """Return the members' recipes by name, of rising n.

    Args:
        study: The study.
        data: "real" or "gaussian"; the recipes' `acts.text` says which data are Gaussian.
    """
    options, members = study.options, {}
    largest = options.n_latents or LATENTS
    for n in sorted({max(options.k or K, largest >> i) for i in range(SIZES)}):
        for seed in range(options.seeds):
            recipe = study.recipe(
                tokens=TOKENS,
                n=n,
                k=options.k or K,
                seed=seed,
                curve=CurveConfig(held_out=HELD_OUT, octaves=4, per_octave=1),
            )
            acts = (
                study.acts
                if data == "real"
                else dataclasses.replace(study.acts, text=f"gaussian:{study.acts.text}", shards="")
            )
            members[f"{data} n{n}" + (f" seed{seed}" if options.seeds > 1 else "")] = (
                dataclasses.replace(recipe, acts=acts)
            )
    return members


class GaussianSource(ActivationSource):
    """Gaussian rows in place of activations, with the mean and covariance of those of `real`."""

    def __init__(self, recipe: Recipe, real: Recipe, device: torch.device):
        super().__init__(real, device)
        x = self.calibration.x.cpu().double()
        del self.calibration  # of the activations; training calibrates on the Gaussian rows instead
        self.gaussian = GaussianStream(x, batch=recipe.batch, seed=recipe.data_seed, device=device)
        self.recipe, self.stream = recipe, self.gaussian

    @property
    def held_out(self) -> Tensor:
        """Held-out Gaussian rows [s, d]."""
        return self.gaussian.rows(self.recipe.curve.held_out, HELD_OUT_ROWS)


class GaussianStream(GeneratedStream):
    """Rows of N(mean, covariance) of x[s, d]."""

    NAME = "Gaussian data"

    def __init__(self, x: Tensor, *, batch: int, seed: int, device: torch.device):
        super().__init__(x.shape[1], batch=batch, seed=seed, device=device)
        self.mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / (len(x) - 1))
        # The covariance of normalised activations does not have full rank.
        self.root = vectors * values.clamp_min(0).sqrt()

    def rows(self, count: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number + 3)
        noise = torch.randn(count, self.d_model, dtype=torch.float64, generator=generator)
        return (noise @ self.root.T + self.mean).float().to(self.device)
