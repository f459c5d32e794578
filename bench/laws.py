"""Are the intervals of `ksparse fit` what they say? Coverage on points of known laws, and what is found on the published points.

    python bench/laws.py [--trials 100] [--noise 0.01] [--draws 500] [--only nk,n9,...]

Each trial makes points from known coefficients with multiplicative noise and fits them. A line for each way to make a 95 % interval: in how many
trials it holds each true coefficient, and its median width. `profile` is what law.json has as low and high.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from ksparse.scaling.laws import law as laws
from ksparse.scaling.laws import published, solver
from ksparse.scaling.laws.forms import forms
from ksparse.scaling.laws.solver import LawFit

ALONG_K256 = {
    "alpha": float(np.exp(-0.50 + 0.26 * np.log(256))),
    "beta": -0.017 - 0.042 * float(np.log(256)),
    "e": float(np.exp(-1.32 - 0.085 * np.log(256))),
}
"""L(N) of equation 3 at k = 256."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    chosen = [name for name in asked.only.split(",") if name] or list(GRIDS)
    for name in chosen:
        coverage(name, asked.trials, asked.noise, asked.draws)
    if not asked.only:
        for name, points in (
            ("45 published GPT-4 points", published.gpt4()),
            ("25 published GPT-2 points", published.gpt2()),
        ):
            law = laws.fit(points, "nk")
            print(f"\n{name}", *law.summary(), sep="\n  ")
            for each in law.candidates:
                print(
                    f"  {each.form.name:<20}{len(each.form.coefficients):>3} coefficients   log-RMS {each.log_rms:.4f}   AICc {each.aicc:8.1f}"
                )


def grid() -> dict[str, np.ndarray]:
    """Return the n and k of the 45 GPT-4 points."""
    return {name: column for name, column in published.gpt4().items() if name != "loss"}


def power(at: np.ndarray, c: dict[str, float]) -> np.ndarray:
    return c["alpha"] * at ** c["beta"] + c["e"]


def along_n(
    count: int, c: dict[str, float]
) -> tuple[str, dict[str, np.ndarray], dict[str, float], np.ndarray]:
    n = np.geomspace(2**11, 2**19, count)
    return "n", {"n": n}, c, power(n, c)


def along_c(count: int) -> tuple[str, dict[str, np.ndarray], dict[str, float], np.ndarray]:
    c = np.geomspace(3.6e-11, 4e-4, count)
    return "c", {"c": c}, published.L_OF_C, power(c, published.L_OF_C)


GRIDS: dict[str, Callable[[], tuple[str, dict[str, np.ndarray], dict[str, float], np.ndarray]]] = {
    "nk": lambda: ("nk", grid(), published.EQ3, published.eq3(published.EQ3, **grid())),
    "n9": lambda: along_n(9, ALONG_K256),
    "n6": lambda: along_n(6, ALONG_K256),
    "gaussian9": lambda: along_n(9, published.GAUSSIAN),
    "c30": lambda: along_c(30),
    "c9": lambda: along_c(9),
}
"""Law, points without the loss, true coefficients, true losses."""


def coverage(name: str, trials: int, noise: float, draws: int) -> None:
    """Print how often each kind of interval holds each true coefficient."""
    law, points, truth, losses = GRIDS[name]()
    form = forms(law, points)[0]
    terms = form.terms(points)
    true = np.array(
        [
            np.log(truth[each.name])
            if each.exponential and truth[each.name]
            else -np.inf
            if each.exponential
            else truth[each.name]
            for each in form.coefficients
        ]
    )
    held: dict[str, list[np.ndarray]] = {}
    wide: dict[str, list[np.ndarray]] = {}
    for trial in range(trials):
        random = np.random.default_rng(trial)
        found = solver.fit(
            terms, np.log(losses * (1 + noise * random.standard_normal(len(losses))))
        )
        for kind, ends in kinds(found, draws, trial).items():
            held.setdefault(kind, []).append((ends[:, 0] <= true) & (true <= ends[:, 1]))
            wide.setdefault(kind, []).append(ends[:, 1] - ends[:, 0])
    print(
        f"\n{name}: {trials} trials, noise {noise:g}\n{'':<12}"
        + "".join(f"{each.name:>16}" for each in form.coefficients)
    )
    for kind in held:
        share, width = np.mean(held[kind], 0), np.median(wide[kind], 0)
        print(
            f"{kind:<12}"
            + "".join(f"{100 * part:>7.0f} % {size:>6.3g}" for part, size in zip(share, width)),
            flush=True,
        )


def kinds(found: LawFit, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return the ends[p, 2] of each kind of 95 % interval."""
    spread = solver.quantile(found, 0.95) * np.sqrt(np.diag(solver.covariance(found)))
    made = {
        "profile": np.array(solver.intervals(found)),
        "Student's t": np.stack([found.theta - spread, found.theta + spread], 1),
    }
    for kind in ("pairs", "residuals", "wild") if draws else ():
        made[kind] = np.quantile(
            solver.resampled(found, draws, seed, kind=kind), [0.025, 0.975], axis=0
        ).T
    return made


if __name__ == "__main__":
    main()
