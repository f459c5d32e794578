"""What is learnt beyond mean and covariance? Gao et al. 2024, appendix G: the same pipeline on
Gaussian data, whose error hardly falls with n."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ksparse.config import CurveConfig as CurveOptions
from ksparse.config import Recipe
from ksparse.data.base import ActivationBatch, Cursor
from ksparse.studies.study import Figure, Study, StudyCurve, power_law, said
from ksparse.training.source import ActivationSource

TOKENS, LATENTS, K, SIZES = 600_000, 8192, 16, 6
HELD_OUT = 16_384


def study(study: Study) -> dict[str, Any]:
    """Train SAEs of several n on the activations and on Gaussian data like them; fit the errors."""
    losses: dict[str, dict[int, list[float]]] = {}
    members: dict[str, Any] = {}
    for kind in ("real", "gaussian"):
        some = recipes(study, kind)
        study.train(
            some,
            what=f"training on {kind} data",
            **(
                {}
                if kind == "real"
                else {
                    "open_feed": lambda recipe, device: GaussianFeed(
                        recipe, dataclasses.replace(recipe, acts=study.acts), device
                    )
                }
            ),
        )
        for member, recipe in some.items():
            last = study.run(member).curve()[-1]
            losses.setdefault(kind, {}).setdefault(recipe.sae.n_latents, []).append(last["loss"])
            members[member] = {
                "n_latents": recipe.sae.n_latents,
                "nmse": {"value": last["loss"], "se": None},
                "l0": {"value": last["l0"], "se": None},
                "dead_fraction": {"value": last["dead"], "se": None},
            }
    fits = {
        kind: power_law(
            [n for n, found in sizes.items() for _ in found],
            [loss for found in sizes.values() for loss in found],
        )
        for kind, sizes in losses.items()
    }
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
                    *(
                        StudyCurve(
                            kind,
                            [n for n, found in sizes.items() for _ in found],
                            [loss for found in sizes.values() for loss in found],
                        )
                        for kind, sizes in losses.items()
                    ),
                    *(
                        StudyCurve(
                            f"{kind}: n^{fits[kind]['exponent']['value']:.3f}",
                            list(sizes),
                            [
                                fits[kind]["factor"]["value"] * n ** fits[kind]["exponent"]["value"]
                                for n in sizes
                            ],
                            reference=True,
                        )
                        for kind, sizes in losses.items()
                    ),
                ],
                "xy",
            )
        ],
        "findings": [
            f"The error falls as n^{said(fits['real']['exponent'], 3)} on activations and as "
            f"n^{said(fits['gaussian']['exponent'], 3)} on Gaussian data; the paper, "
            "of 768 dimensions and at convergence, has about -0.26 and -0.04."
        ],
    }


def recipes(study: Study, kind: str) -> dict[str, Recipe]:
    """Return members of rising n; those on Gaussian data say so where the text is named."""
    options, found = study.options, {}
    largest = options.n_latents or LATENTS
    for n in sorted({max(options.k or K, largest >> i) for i in range(SIZES)}):
        for seed in range(options.seeds):
            recipe = study.recipe(
                tokens=TOKENS,
                n=n,
                k=options.k or K,
                seed=seed,
                curve=CurveOptions(held_out=HELD_OUT, octaves=4, per_octave=1),
            )
            acts = (
                study.acts
                if kind == "real"
                else dataclasses.replace(study.acts, text=f"gaussian:{study.acts.text}", shards="")
            )
            found[f"{kind} n{n}" + (f" seed{seed}" if options.seeds > 1 else "")] = (
                dataclasses.replace(recipe, acts=acts)
            )
    return found


class GaussianFeed(ActivationSource):
    """Gaussian rows with mean and covariance of the normalised activations that `real` names, in
    the place of these."""

    def __init__(self, recipe: Recipe, real: Recipe, device: torch.device):
        super().__init__(real, device)
        x = self.look.x.cpu().double()
        del self.look  # that was of the activations; the members start from their own
        self.gaussian = GaussianStream(x, batch=recipe.batch, seed=recipe.data_seed, device=device)
        self.recipe, self.stream = recipe, self.gaussian

    @property
    def held_out(self) -> Tensor:
        return self.gaussian.rows(self.recipe.curve.held_out, -2)


class GaussianStream:
    """Batches of N(mean, covariance) of x[s, d]: batch s is a function of (seed, s)."""

    def __init__(self, x: Tensor, *, batch: int, seed: int, device: torch.device):
        self.batch, self.seed, self.device, self.d_model = batch, seed, device, x.shape[1]
        self.halt = threading.Event()
        self.mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / (len(x) - 1))
        self.root = (
            vectors * values.clamp_min(0).sqrt()
        )  # a covariance of normalised activations has no full rank

    def rows(self, count: int, number: int) -> Tensor:
        """Return `count` rows, of a number that names them."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number + 3)
        return (
            (
                torch.randn(count, self.d_model, dtype=torch.float64, generator=generator)
                @ self.root.T
                + self.mean
            )
            .float()
            .to(self.device)
        )

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        step = cursor["step"] if cursor else 0
        while True:
            step += 1
            yield ActivationBatch(
                self.rows(self.batch, step),
                torch.zeros(self.batch, dtype=torch.long),
                {"step": step},
            )

    def sample(self, rows: int) -> Tensor:
        return self.rows(rows, -1)

    def document_names(self, documents: Tensor) -> list[str]:
        return ["Gaussian data"]

    def same_context_fraction(self) -> float | None:
        return None
