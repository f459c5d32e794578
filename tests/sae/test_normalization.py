"""Normalisation there and back, for every kind."""

import math

import pytest
import torch

from ksparse.sae.normalization import KINDS, dataset_factor, input_rms, normalize


def raw(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 5


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (12,), (0, 12)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_restore_gives_back_the_raw_activations(kind, shape):
    x = raw(*shape)
    inputs = normalize(x, kind, 0.25)
    assert inputs.x.shape == x.shape
    eps = (
        1e-5 if kind == "layer_norm" else 0.0
    )  # of a deviation; up to 3.4 deviations from the mean with d = 12
    torch.testing.assert_close(inputs.restore(inputs.x), x, rtol=1e-5, atol=1e-5 + 3.4 * eps)
    torch.testing.assert_close((x - inputs.mean) / (inputs.scale + eps), inputs.x)


def test_unit_norm_gives_norm_1_and_mean_0():
    x = normalize(raw(50, 12), "unit_norm").x
    torch.testing.assert_close(x.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(x.mean(1), torch.zeros(50), atol=1e-6, rtol=0)


def test_layer_norm_divides_by_the_unbiased_deviation_so_that_the_norm_is_the_root_of_d_minus_1():
    values = raw(50, 12)
    inputs = normalize(values, "layer_norm")
    torch.testing.assert_close(inputs.scale, values.std(dim=1, keepdim=True))
    torch.testing.assert_close(inputs.x, (values - inputs.mean) / (inputs.scale + 1e-5))
    torch.testing.assert_close(
        inputs.x.norm(dim=1), torch.full((50,), math.sqrt(11)), rtol=1e-4, atol=0
    )


def test_constant_norm_gives_norm_root_d_and_subtracts_nothing():
    values = raw(50, 12)
    x = normalize(values, "constant_norm").x
    torch.testing.assert_close(x.norm(dim=1), torch.full((50,), math.sqrt(12)))
    torch.testing.assert_close(x / x[:, :1], values / values[:, :1])


def test_dataset_factor_makes_the_mean_squared_norm_d_model():
    values = raw(500, 12)
    x = normalize(values, "dataset", dataset_factor(values)).x
    assert x.square().sum(1).mean().item() == pytest.approx(12, rel=1e-5)
    torch.testing.assert_close(
        x / x[0, 0], values / values[0, 0]
    )  # one constant, nothing subtracted


def test_none_is_the_identity():
    assert torch.equal(normalize(raw(5, 12), "none", 7.0).x, raw(5, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_constant_vectors_stay_finite(kind):
    for value in (torch.zeros(3, 8), torch.full((3, 8), 2.0), torch.full((3, 8), 1e-30)):
        inputs = normalize(value, kind)
        assert torch.isfinite(inputs.x).all() and torch.isfinite(inputs.restore(inputs.x)).all()
        torch.testing.assert_close(inputs.restore(inputs.x), value)


def test_zeros_have_a_factor():
    assert dataset_factor(torch.zeros(4, 8)) == 1.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_input_rms_is_the_size_of_a_component(kind):
    values = raw(500, 64)
    x = normalize(values, kind, dataset_factor(values)).x
    assert x.square().mean().sqrt().item() == pytest.approx(input_rms(kind, 64), rel=0.02)
