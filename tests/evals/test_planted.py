"""What an SAE found of planted features: a perfect dictionary, a duplicated latent, random rows."""

import math

import pytest
import torch

from ksparse.config import Planted
from ksparse.data.planted import PlantedFeatures
from ksparse.errors import InputError
from ksparse.evals.planted import measure
from ksparse.sae.model import SAE, Shape

ROWS = 2_000


def dictionary(rows, threshold=0.5):
    """Return an SAE whose latents read and write the directions `rows`, above a threshold."""
    n, d = rows.shape
    sae = SAE(Shape(d, n, 2, "none", 1.0, "jump_relu"))
    with torch.no_grad():
        sae.W_dec.copy_(rows), sae.W_enc.copy_(rows)
        sae.activation.threshold.fill_(threshold)
    return sae


def orthogonal(**options):
    """Return planted features of which the directions are a basis."""
    truth = PlantedFeatures(Planted(features=12, d_model=12, probability=0.2, **options))
    truth.directions = torch.linalg.qr(truth.directions)[0]
    return truth


def test_a_perfect_dictionary_has_mcc_1_and_f1_1():
    truth = orthogonal()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = measure(dictionary(truth.directions[order]), truth, ROWS)
    for name in ("mcc", "found", "precision", "recall", "f1", "uniqueness"):
        assert found[name]["value"] == pytest.approx(1.0, abs=1e-6), name
    assert found["dead"]["value"] == found["duplicated"]["value"] == 0
    assert found["nmse"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["l0"] == found["true_l0"]
    assert found["l0"]["value"] == pytest.approx(12 * 0.2, rel=0.1)


def test_precision_and_recall_are_those_of_the_firing():
    truth = orthogonal(sizes=(1.0, 1.0), spread=(0.3, 0.0))
    z = torch.cat([truth.draw(ROWS, "evaluation", 0)[1]])
    late = measure(dictionary(truth.directions, threshold=1.0), truth, ROWS)
    shares = (z > 1.0).sum(0) / (z > 0).sum(0)
    assert late["precision"]["value"] == 1
    assert late["recall"]["value"] == pytest.approx(float(shares.mean()))
    f1 = 2 * shares / (1 + shares)
    assert late["f1"]["value"] == pytest.approx(float(f1.mean()))
    assert late["f1"]["se"] == pytest.approx(float(f1.std() / math.sqrt(12)))


def test_a_duplicated_latent_is_counted_and_a_silent_one_is_dead():
    truth = orthogonal()
    sae = dictionary(truth.directions[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 11]])
    with torch.no_grad():
        sae.W_enc[0] = 0
    found = measure(sae, truth, ROWS)
    assert found["duplicated"]["value"] == found["dead"]["value"] == pytest.approx(1 / 12)
    assert found["uniqueness"]["value"] == found["found"]["value"] == pytest.approx(11 / 12)
    assert found["mcc"]["value"] == pytest.approx(11 / 12, abs=1e-5)
    assert found["f1"]["value"] == pytest.approx(10 / 12, abs=1e-5)


def test_a_latent_that_points_the_other_way_finds_nothing():
    truth = orthogonal()
    assert measure(dictionary(-truth.directions), truth, ROWS)["found"]["value"] == 0


def test_a_random_decoder_finds_what_chance_gives():
    # The largest of n cosines in d dimensions is near sqrt(1 - n^(-2/(d-1))); the assignment has
    # a little less, and independent directions have a mean of 0.
    truth = PlantedFeatures(Planted(features=200, d_model=50, probability=0.05))
    rows = torch.randn(200, 50, generator=torch.Generator().manual_seed(5))
    found = measure(dictionary(torch.nn.functional.normalize(rows, dim=1)), truth, ROWS)
    largest = math.sqrt(1 - 200 ** (-2 / 49))
    assert 0.75 * largest < found["mcc"]["value"] < largest
    assert found["found"]["value"] == found["duplicated"]["value"] == 0
    # A latent is some feature's nearest at random: 1 - (1 - 1/n)^n of the features are one's.
    assert found["uniqueness"]["value"] == pytest.approx(1 - math.exp(-1), abs=0.1)


def test_fewer_latents_than_features_are_compared_with_as_many():
    truth = orthogonal()
    found = measure(dictionary(truth.directions[:5]), truth, ROWS)
    assert found["mcc"]["value"] == pytest.approx(1, abs=1e-6) and found["f1"]["value"] == 1
    assert found["found"]["value"] == pytest.approx(5 / 12)


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(InputError, match="width 6, the planted features have width 12"):
        measure(SAE(Shape(6, 8, 2)), orthogonal())
