"""How long do the probes take? 61 tasks x 1,000 rows x 32,768 latents, beside a loop of scikit-learn fits in the same run.

    python bench/probes.py [--latents 32768] [--tasks 61] [--rows 1000] [--d-model 768] [--sample 300]

Half of the rows are for training, as in `ksparse eval RUN probes`; the time is that of pre-activations and fits. scikit-learn
(pip install scikit-learn) fits a random sample of the same problems with its Newton solver, one at a time.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from ksparse.evals.probing import probes
from ksparse.evals.probing.tasks import TaskRows
from ksparse.sae.model import SAE, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("latents", 32_768),
        ("tasks", 61),
        ("rows", 1_000),
        ("d-model", 768),
        ("sample", 300),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    sae = made(asked.d_model, asked.latents)
    ours, theirs, largest = 0.0, [], 0.0
    for number in range(asked.tasks):
        train = rows(number, asked.rows, asked.d_model).half(True)
        bank = probes._LatentBank(sae, "pre_acts", "last")
        began = time.perf_counter()
        fit = bank.fit(train, 1e-3)
        ours += time.perf_counter() - began
        if number % 10 == 0:
            for latent in torch.randint(
                asked.latents, (asked.sample // (1 + (asked.tasks - 1) // 10),)
            ).tolist():
                seconds, weight = scikit(bank.values(train, latent), train.label)
                theirs.append(seconds)
                largest = max(
                    largest,
                    abs(
                        weight
                        - fit.weight[latent].item()
                        * bank.values(train, latent).std(correction=0).item()
                    ),
                )
    each = sum(theirs) / len(theirs)
    print(
        json.dumps(
            {
                "fits": asked.latents * asked.tasks,
                "rows": asked.rows // 2,
                "seconds": round(ours, 1),
                "microseconds_per_fit": round(1e6 * ours / asked.latents / asked.tasks, 2),
                "scikit_learn_microseconds_per_fit": round(1e6 * each, 1),
                "ratio": round(each * asked.latents * asked.tasks / ours, 1),
                "largest_difference_of_weights": largest,
                "threads": torch.get_num_threads(),
            }
        )
    )


@torch.no_grad()
def made(d: int, n: int) -> SAE:
    sae = SAE(Shape(d, n, 32))
    sae.W_enc.normal_().div_(d**0.5)
    return sae


def rows(seed: int, count: int, d: int) -> TaskRows:
    """Return a task with some of a label in every dimension."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    x = torch.randn(count, d, generator=generator) + 0.3 * label[:, None] * torch.randn(
        d, generator=generator
    )
    return TaskRows(
        f"task {seed}",
        x,
        torch.arange(count),
        label,
        torch.arange(count),
        torch.arange(count) % 4 < 2,
    )


def scikit(z: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return (seconds, weight) of one fit on the input scaled to variance 1."""
    from sklearn.linear_model import LogisticRegression

    scaled = ((z - z.mean()) / z.std(correction=0)).numpy()[:, None]
    began = time.perf_counter()
    model = LogisticRegression(C=1 / (1e-3 * len(y)), solver="newton-cholesky", tol=1e-8).fit(
        scaled, y.numpy()
    )
    return time.perf_counter() - began, float(model.coef_[0, 0])


if __name__ == "__main__":
    with torch.inference_mode():
        main()
