"""Matryoshka: the loss is its definition, prefixes are drawn by the law, and files record them."""

import dataclasses

import numpy as np
import pytest
import torch

from ksparse import config as R
from ksparse.errors import InputError
from ksparse.sae.losses import (
    LossInputs,
    draw_prefixes,
    losses,
    prefix_reconstructions,
    recorded_prefixes,
)
from ksparse.sae.model import SAE, Shape

B, D, N, K = 24, 6, 40, 5
ACTIVATIONS = {"topk": R.TopKConfig(), "batch_topk": R.BatchTopKConfig(), "relu": R.ReLUConfig()}
NONE = torch.zeros(0, dtype=torch.long)


def some(activation, seed=0):
    torch.manual_seed(seed)
    sae = SAE(Shape(D, N, K, "unit_norm", 1.0, activation.kind)).double()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_().mul_(0.3)
        sae.normalize_decoder_()
    return sae, torch.nn.functional.normalize(torch.randn(B, D, dtype=torch.float64), dim=1)


def dense_code(sae, x, kind):
    """Write the code of a training batch with autograd and matrices."""
    a = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    if kind == "topk":
        return torch.relu(a * (a >= a.sort(1, descending=True).values[:, K - 1 : K]))
    if kind == "batch_topk":
        return torch.relu(a * (a >= a.flatten().sort(descending=True).values[B * K - 1]))
    return torch.relu(a)


def definition(sae, x, kind, sizes, baseline, reduction):
    """Return the errors from the first m latents for each size m, and all, put together."""
    z = dense_code(sae, x, kind)
    errors = []
    for size in (*sizes, N):
        recon = z[:, :size] @ sae.W_dec[:size] + sae.b_pre
        errors.append((recon - x).square().mean() / baseline)
    return errors, sum(errors) if reduction == "sum" else sum(errors) / len(errors)


def options_of(activation, **matryoshka):
    return R.SAEConfig(n_latents=N, k=K, activation=activation, **matryoshka)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("sizes", [(1,), (3, 10, 25), (39,)], ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_loss_and_its_gradient_are_those_of_the_definition(kind, sizes, reduction):
    activation = ACTIVATIONS[kind]
    sae, x = some(activation)
    plain = options_of(activation)
    options = options_of(activation, prefixes=sizes, prefix_loss=reduction)
    dead = torch.tensor([2, 9, 30])
    found = losses(sae, x, LossInputs(options, 0.1, dead, 3))
    errors, expected = definition(sae, x, kind, sizes, 0.1, reduction)
    without = losses(sae, x, LossInputs(plain, 0.1, dead, 3))
    expected = expected + without.total - without.nmse  # AuxK and penalties, as ever
    torch.testing.assert_close(found.total, expected)
    for size, error in zip(sizes, errors):
        torch.testing.assert_close(found.terms[f"nmse_{size}"], error)
    torch.testing.assert_close(found.nmse, errors[-1])
    weights = list(sae.parameters())
    for (name, _), ours, theirs in zip(
        sae.named_parameters(),
        torch.autograd.grad(found.total, weights),
        torch.autograd.grad(expected, weights),
    ):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_drawn_prefixes_are_one_term_of_the_same_loss(reduction):
    sae, x = some(R.TopKConfig())
    options = options_of(R.TopKConfig(), prefix_draws=4, prefix_loss=reduction, auxk_coef=0.0)
    found = losses(sae, x, LossInputs(options, 0.1, NONE, 3, seed=11))
    sizes = draw_prefixes(N, 4, 11)
    errors, expected = definition(sae, x, "topk", sizes, 0.1, reduction)
    torch.testing.assert_close(found.total, expected)
    assert set(found.terms) == {"nmse", "nmse_prefixes"}
    torch.testing.assert_close(found.terms["nmse_prefixes"], sum(errors[:-1]) / 4)


def test_a_code_that_is_not_listed_has_the_same_prefixes():
    """ReLU's codes are dense where many latents are active."""
    sae, x = some(R.ReLUConfig())
    z = dense_code(sae, x, "relu")
    code = sae.activation(sae, x).code
    assert code.indices.shape == (B, N)
    for size, recon in zip((4, 17), prefix_reconstructions(sae, code, (4, 17))):
        torch.testing.assert_close(recon, z[:, :size] @ sae.W_dec[:size] + sae.b_pre)


def test_draws_are_a_function_of_the_seed_rising_distinct_and_follow_the_law():
    assert draw_prefixes(512, 9, 3) == draw_prefixes(512, 9, 3) != draw_prefixes(512, 9, 4)
    many = [draw_prefixes(100, 1, seed)[0] for seed in range(3000)]
    for m in (4, 25, 64):
        expected = (m / 100) ** 0.5 / 0.99**0.5
        assert np.mean(np.array(many) <= m) == pytest.approx(expected, abs=0.03)
    assert draw_prefixes(10, 9, 0) == tuple(range(1, 10))


@pytest.mark.parametrize(
    "sae, said",
    [
        ({"prefixes": (10, 10)}, "rising numbers of latents from 1 to 39"),
        ({"prefixes": (0, 10)}, "rising numbers"),
        ({"prefixes": (10, 40)}, "below sae.n_latents"),
        ({"prefixes": (10,), "prefix_draws": 3}, "both given"),
        ({"prefix_draws": 40}, "it must be from 0 to 39"),
        ({"prefix_draws": -1}, "it must be from 0 to 39"),
    ],
    ids=str,
)
def test_prefixes_that_cannot_be_right_are_refused(sae, said):
    with pytest.raises(InputError, match=said):
        R.Recipe(sae=R.SAEConfig(n_latents=N, k=K, **sae))


@pytest.mark.parametrize("keys", [{"prefixes": (3, 20)}, {"prefix_draws": 3}], ids=str)
def test_prefixes_survive_toml(keys, tmp_path):
    recipe = R.Recipe(sae=R.SAEConfig(n_latents=N, k=K, prefix_loss="mean", **keys))
    (tmp_path / "recipe.toml").write_text(R.to_toml(recipe), encoding="utf-8")
    assert R.load_recipe(tmp_path / "recipe.toml") == recipe == R.from_dict(R.to_dict(recipe))


def test_drawn_prefixes_are_judged_at_fixed_sizes():
    drawn = R.SAEConfig(n_latents=N, k=K, prefix_draws=3)
    assert drawn.nested_sizes == (2, 5, 10, 20) and R.SAEConfig().nested_sizes == ()
    assert dataclasses.replace(drawn, prefix_draws=0, prefixes=(7,)).nested_sizes == (7,)


@pytest.mark.parametrize(
    "recorded", [None, "10", [1.5], [True], [0, -3, 40, 900], {"a": 1}], ids=str
)
def test_metadata_that_is_no_list_of_sizes_is_no_matryoshka(recorded):
    assert recorded_prefixes(SAE(Shape(D, N, K), {"prefixes": recorded})) == ()
    assert recorded_prefixes(SAE(Shape(D, N, K), {"prefixes": [8, 3, 3]})) == (3, 8)
