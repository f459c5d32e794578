"""Planted features are as asked: how often they fire, with whom, how strongly, in which direction."""

import pytest
import torch

from ksparse.config import Planted, SAEConfig
from ksparse.data.planted import PlantedFeatures, PlantedStream
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape

TREES = {"features": 84, "roots": 4, "children": 4, "depth": 2, "probability": 0.5, "least": 0.01}


def draw(rows=20_000, **options):
    truth = PlantedFeatures(Planted(**options))
    return truth, *truth.draw(rows, "test")


def test_activations_are_the_sum_of_the_features_that_fire():
    truth, x, z = draw(50, features=8, d_model=5, bias=2.0, spread=(0.2, 0.1))
    assert torch.allclose(x, z @ truth.directions + truth.bias)
    assert torch.allclose(truth.directions.norm(dim=1), torch.ones(8))
    assert truth.bias.norm() == pytest.approx(2.0)


@pytest.mark.parametrize("rank", [0, 4])
def test_features_fire_as_often_as_a_power_law_says(rank):
    truth, _, z = draw(features=40, probability=0.4, least=0.02, exponent=1.0, rank=rank)
    law = 1 / torch.arange(1, 41)
    expected = 0.02 + 0.38 * (law - law[-1]) / (1 - law[-1])
    assert torch.allclose(truth.frequency, expected)
    assert torch.allclose((z > 0).float().mean(0), expected, atol=0.012)


def test_all_features_fire_as_often_by_default_and_independently():
    _, _, z = draw(features=40, probability=0.1)
    fires = (z > 0).float()
    assert torch.allclose(fires.mean(0), torch.full((40,), 0.1), atol=0.012)
    correlations = torch.corrcoef(fires.T) - torch.eye(40)
    assert correlations.square().mean().sqrt() < 1.2 / 20_000**0.5


def test_correlated_features_fire_together():
    _, _, z = draw(features=40, probability=0.2, rank=2, correlation=0.6)
    correlations = torch.corrcoef((z > 0).float().T) - torch.eye(40)
    assert correlations.square().mean().sqrt() > 10 / 20_000**0.5


def test_a_child_fires_only_with_its_parent_and_as_often_as_asked():
    truth, _, z = draw(**TREES)
    fires = z > 0
    for child in range(4, 84):
        parent = child // 4 - 1
        assert not (fires[:, child] & ~fires[:, parent]).any()
    assert torch.allclose(fires.float().mean(0), truth.frequency, atol=0.015)


def test_without_compensation_a_child_fires_less_often_than_asked():
    truth, _, z = draw(**TREES, compensate=False)
    expected = truth.frequency[20] * truth.frequency[4] * truth.frequency[0]
    assert (z[:, 20] > 0).float().mean() == pytest.approx(float(expected), rel=0.25)


@pytest.mark.parametrize("exclusive, parents", [(1.0, 20), (0.5, 10), (0.0, 0)])
def test_children_that_exclude_one_another_fire_one_at_a_time(exclusive, parents):
    _, _, z = draw(**TREES | {"least": 0.1}, exclusive=exclusive)
    siblings = (z[:, 4:] > 0).view(len(z), 20, 4).sum(2)
    assert int((siblings.amax(0) == 1).sum()) == parents


def test_a_scaled_child_has_the_relative_size_of_its_parent():
    _, _, z = draw(**TREES, scaled=True, sizes=(3.0, 2.0))
    fires = z[:, 4] > 0
    plain = draw(**TREES, sizes=(3.0, 2.0), spread=(0.5, 0.0), scaled=True)
    parent, child = plain[2][:, 0], plain[2][:, 4]
    both = child > 0
    assert fires.any() and torch.corrcoef(torch.stack([parent[both], child[both]]))[0, 1] > 0.5
    assert z[:, 4][fires].std() < 1e-5


def test_values_have_their_mean_and_deviation():
    _, _, z = draw(features=11, probability=0.5, sizes=(5.0, 4.0), spread=(0.5, 0.0))
    values = [column[column > 0] for column in z.T]
    assert [float(v.mean()) for v in values] == pytest.approx(
        torch.linspace(5, 4, 11).tolist(), abs=0.03
    )
    assert [float(v.std()) for v in values] == pytest.approx([0.5] * 11, abs=0.02)


def test_directions_that_are_driven_apart_have_smaller_cosines():
    def spread(apart):
        rows = PlantedFeatures(Planted(features=48, d_model=24, apart=apart)).directions
        return (rows @ rows.T - torch.eye(48)).square().mean()

    least = 1 / 48 * (48 / 24 - 1)  # of a tight frame
    assert least - 1e-6 < spread(200) < 0.6 * spread(0)


def test_no_start_value_of_an_sae_is_a_feature():
    for seed in range(8):
        truth = PlantedFeatures(Planted(features=64, d_model=32, seed=seed))
        sae = SAE(Shape(32, 64, 4, "none"))
        generator = torch.Generator().manual_seed(seed)
        initialize_(sae, truth.draw(256, "test")[0], SAEConfig(n_latents=64, k=4), generator)
        cosines = sae.W_dec.detach() @ truth.directions.T
        # The largest of 64 x 64 cosines of random directions; a shared draw has 1.
        assert cosines.max() < 0.85
        rows = torch.nn.functional.normalize(
            PlantedStream(truth, batch=64, seed=seed, device=torch.device("cpu")).rows(64, 1), dim=1
        )
        drawn = torch.nn.functional.normalize(
            torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)), dim=1
        )
        assert (rows @ drawn.T).max() < 0.85


def test_a_stream_goes_on_from_its_cursor_with_the_same_rows():
    def stream(seed=1):
        truth = PlantedFeatures(Planted(features=16, d_model=8))
        return PlantedStream(truth, batch=4, seed=seed, device=torch.device("cpu"))

    batches = stream().batches()
    first, second = next(batches), next(batches)
    assert torch.equal(next(stream().batches(first.cursor)).x, second.x)
    assert not torch.equal(next(stream(2).batches()).x, first.x)
    assert not torch.equal(first.x, second.x)
