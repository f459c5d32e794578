"""Refined values are the least-squares optimum on the latents that are active, and say how far a code has shrunk."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import refinement, runner
from ksparse.evals.refinement import exact, refine
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Code, Shape

OPTIONS = EvalConfig(tokens=300, per_document=60, refine_tokens=200, refine_exact=5, device="cpu")


def planted(d: int = 64, k: int = 3, rows: int = 200) -> tuple[SAE, torch.Tensor, torch.Tensor]:
    """Return an SAE of two orthonormal bases (no cosine above 1/8), inputs that are sparse in them, and their codes [rows, 2 d]."""
    generator = torch.Generator().manual_seed(0)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < d:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    sae = SAE(Shape(d, 2 * d, k, normalize="none"))
    sae.W_enc.data = torch.cat([torch.eye(d), hadamard / d**0.5])
    sae.W_dec.data = sae.W_enc.data.clone()
    latents = torch.stack([torch.randperm(2 * d, generator=generator)[:k] for _ in range(rows)])
    codes = torch.zeros(rows, 2 * d).scatter(
        1, latents, 1 + 0.2 * torch.rand(rows, k, generator=generator)
    )
    return sae, codes @ sae.W_dec.data, codes


def test_on_planted_sparse_data_the_support_is_found_and_refinement_gives_the_planted_values():
    sae, x, codes = planted()
    code = sae.encode(x)
    assert torch.equal(code.dense(128) > 0, codes > 0)
    assert (code.dense(128) - codes).abs().max() > 0.05  # what the encoder gives is not yet it
    found = refine(sae, x, code)
    assert found.converged.all()
    assert torch.allclose(Code(found.values.float(), code.indices).dense(128), codes, atol=1e-5)


@pytest.mark.parametrize(
    "d, k", [(12, 5), (12, 12), (8, 20)]
)  # the last has more latents than dimensions
def test_refined_values_are_as_good_as_an_active_set_methods(d, k):
    generator = torch.Generator().manual_seed(k)
    sae = SAE(Shape(d, 40, k, normalize="none"))
    sae.W_dec.data = (
        torch.randn(40, d, generator=generator) * torch.rand(40, 1, generator=generator) + 0.5
    )  # alike, and of unlike norms
    sae.b_pre.data = torch.randn(d, generator=generator)
    x = torch.randn(60, d, generator=generator)
    indices = torch.stack([torch.randperm(40, generator=generator)[:k] for _ in range(60)])
    values = torch.rand(60, k, generator=generator)
    values[::3, k // 2 :] = 0  # codes of unlike length, padded
    values[5] = 0
    code = Code(values, indices)
    found = refine(sae, x, code)
    assert found.converged.all()
    assert (found.values >= 0).all() and (found.values[values == 0] == 0).all()
    for row in range(60):
        best = exact(sae, x[row], Code(values[row], indices[row]))
        ours, theirs = (
            refinement._error(sae, (x[row] - sae.b_pre).double(), indices[row], each)
            for each in (found.values[row], best)
        )
        assert ours == pytest.approx(theirs, abs=1e-7 * float(x[row].square().sum()))
        raw = refinement._error(sae, (x[row] - sae.b_pre).double(), indices[row], values[row])
        assert ours <= raw + 1e-9


def test_what_has_not_converged_is_said_and_no_worse_than_it_was():
    sae, x, codes = planted()
    code = sae.encode(x)
    found = refine(sae, x, code, max_steps=1)
    assert found.steps == 1 and 0 < found.converged.sum() < len(x)
    off = [
        (Code(values.float(), code.indices).dense(128) - codes).norm(dim=1)
        for values in (found.values, code.values)
    ]
    assert (off[0] <= off[1] + 1e-6).all() and (off[0] < 0.5 * off[1]).any()


def test_codes_of_another_number_of_activations_are_refused():
    sae, x, _ = planted()
    with pytest.raises(InputError, match="refinement got 199 activations and codes of 200"):
        refine(sae, x[1:], sae.encode(x))


def halving_sae(acts, d: int, factor: float) -> SAE:
    """Return an SAE with a latent for each direction and sign, whose values are a factor too small."""
    sae = SAE(Shape(d, 2 * d, 2 * d), {"acts": dataclasses.asdict(acts)})
    sae.W_dec.data = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_enc.data = factor * sae.W_dec.data
    return sae


def test_shrunk_values_go_up_by_what_they_had_lost_and_right_ones_stay(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    shrunk, right = (
        runner.evaluate(
            halving_sae(acts, lm.d_model, factor),
            lm,
            ["refinement", "downstream", "stats"],
            OPTIONS,
        )
        for factor in (0.5, 1.0)
    )
    result = shrunk["refinement"]
    assert result["shift_mean"]["value"] == pytest.approx(
        1, abs=1e-5
    )  # twice as large: up by what it was
    assert (
        result["upward"]["value"] == 1
        and result["zeroed"]["value"] == 0
        and result["shift_median"]["value"] > 0
    )
    assert (
        result["nmse_refined"]["value"] == pytest.approx(0, abs=1e-9)
        and result["nmse_raw"]["value"] > 0.2
    )
    assert result["ce_delta_refined"]["value"] == pytest.approx(0, abs=1e-4)
    assert result["ce_gain"]["value"] == pytest.approx(
        result["ce_delta_raw"]["value"] - result["ce_delta_refined"]["value"]
    )
    assert (
        200 <= result["n_tokens"] < 300
        and result["exact_tokens"] == 5
        and result["exact_excess"] < 1e-9
    )
    assert result["converged"]["value"] == 1 and sum(result["histogram"]["counts"]) == round(
        result["l0"]["value"] * result["n_tokens"]
    )
    assert right["refinement"]["shift_mean"]["value"] == pytest.approx(0, abs=1e-5)
    whole = runner.evaluate(
        halving_sae(acts, lm.d_model, 0.5),
        lm,
        ["refinement", "downstream", "stats"],
        dataclasses.replace(OPTIONS, refine_tokens=10**6),
    )
    assert whole["refinement"]["nmse_raw"]["value"] == pytest.approx(
        whole["stats"]["nmse"]["value"]
    )
    assert whole["refinement"]["ce_delta_raw"]["value"] == pytest.approx(
        whole["downstream"]["ce_delta"]["value"]
    )


def test_the_medians_standard_error_is_that_of_redrawn_documents():
    draw = np.random.default_rng(0)
    parts = [draw.normal(draw.normal(0, 0.5), 1, 40) for _ in range(200)]
    found = refinement.median(np.concatenate(parts), np.repeat(np.arange(200), 40))
    redrawn = [
        np.median(np.concatenate([parts[i] for i in draw.integers(0, 200, 200)]))
        for _ in range(400)
    ]
    assert found["value"] == pytest.approx(np.median(np.concatenate(parts)))
    assert found["se"] == pytest.approx(np.std(redrawn), rel=0.2)
    assert refinement.median(np.zeros(0), np.zeros(0)) == {"value": None, "se": None}
