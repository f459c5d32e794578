"""Reference numbers of Gao et al. 2024: points read off the figures and printed coefficients.

Nothing in the package depends on them. The tests fit the laws to these points, and `bench/laws.py`
compares the fits with the printed coefficients, so this file is the record of the paper's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

EQ3 = {"alpha": -0.50, "b_k": 0.26, "b_n": -0.017, "g": -0.042, "zeta": -1.32, "eta": -0.085}
L_OF_C = {"alpha": 0.056, "beta": -0.084, "e": 0.09}

GAUSSIAN = {"alpha": 1.03, "beta": -0.04, "e": 0.0}
"""Printed coefficients: `EQ3` of equation 3 (GPT-4), `L_OF_C` with C as a share of GPT-4's training
compute (figure 1), `GAUSSIAN` of L(N) on Gaussian data (figure 31)."""

_GPT4 = {
    32: ".6265 .5874 .5473 .5084 .4760 .4418 .4188 .3933 .3780",
    64: ".6025 .5592 .5153 .4736 .4362 .4020 .3751 .3500 .3314",
    128: ".5795 .5318 .4840 .4401 .4014 .3672 .3380 .3147 .2964",
    256: ".5547 .5014 .4496 .4043 .3658 .3334 .3051 .2814 .2613",
    512: ".5276 .4650 .4069 .3613 .3251 .2962 .2709 .2510 .2389",
}
_GPT2 = {
    8: ".369 .282 .220 .172 .139",
    16: ".303 .226 .172 .132 .103",
    32: ".250 .184 .139 .106 .082",
    64: ".200 .146 .110 .083 .064",
    128: ".145 .107 .081 .062 .048",
}


def _points(table: dict[int, str], step: int) -> dict[str, np.ndarray]:
    rows = [
        (2 ** (11 + step * i), k, float(loss))
        for k, row in table.items()
        for i, loss in enumerate(row.split())
    ]
    return dict(zip(("n", "k", "loss"), np.array(rows, float).T))


def gpt4() -> dict[str, np.ndarray]:
    """Return n, k and loss of the 45 GPT-4 autoencoders."""
    return _points(_GPT4, 1)


def gpt2() -> dict[str, np.ndarray]:
    """Return n, k and loss of the 25 GPT-2 autoencoders."""
    return _points(_GPT2, 2)


def eq3(c: Mapping[str, float], n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return L(n, k) of equation 3 with coefficients c."""
    return np.exp(
        c["alpha"] + c["b_k"] * np.log(k) + c["b_n"] * np.log(n) + c["g"] * np.log(k) * np.log(n)
    ) + np.exp(c["zeta"] + c["eta"] * np.log(k))
