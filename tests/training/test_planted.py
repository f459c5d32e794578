"""Training on planted features: by one call, resumed with the same bits, whatever their unit."""

import os

import pytest
import torch

import ksparse
from ksparse.config import JumpReLUConfig, Planted, Recipe, SAEConfig, from_dict
from ksparse.data.planted import PlantedFeatures
from ksparse.errors import InputError
from ksparse.sae.model import SAE, Shape
from ksparse.training.source import ActivationSource
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.trainer import start, train_step

FEATURES = Planted(features=24, d_model=12, probability=0.1)
OPTIONS = {"n_latents": 24, "k": 3, "batch": 128, "normalize": "none", "progress": False}


def test_a_run_on_planted_features_goes_on_with_the_same_bits(tmp_path):
    def stop(row):
        if row["step"] == 3:
            os.kill(os.getpid(), 2)

    whole = ksparse.train(data=FEATURES, out=tmp_path / "a", tokens=1024, **OPTIONS)
    with pytest.raises(ksparse.KsparseError, match="everything is saved"):
        ksparse.train(
            data=FEATURES, out=tmp_path / "b", tokens=1024, observe=stop, log_every=1, **OPTIONS
        )
    resumed = ksparse.train(data=FEATURES, out=tmp_path / "b", tokens=1024, **OPTIONS)
    first, second = ksparse.load(whole).state_dict(), ksparse.load(resumed).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert ksparse.load(resumed).metadata["acts"]["text"] == FEATURES.to_text()


def test_a_recipe_that_names_planted_features_is_the_same_run(tmp_path):
    by_call = ksparse.train(data=FEATURES, out=tmp_path / "a", tokens=256, **OPTIONS)
    by_name = ksparse.train(text=FEATURES.to_text(), out=tmp_path / "b", tokens=256, **OPTIONS)
    assert by_call.recipe() == by_name.recipe() and by_name.recipe().acts.lm == ""
    first, second = ksparse.load(by_call).state_dict(), ksparse.load(by_name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_on_planted_features_lowers_the_held_out_error(tmp_path):
    run = ksparse.train(
        data=FEATURES, out=tmp_path / "run", tokens=6_000, curve={"held_out": 256}, **OPTIONS
    )
    losses = [row["loss"] for row in run.curve()]
    assert losses[-1] < 0.5 * losses[0]


def test_planted_features_and_shards_at_once_are_refused():
    with pytest.raises(InputError, match="both say where activations come from"):
        ksparse.train(data=FEATURES, shards="acts", **OPTIONS)


def trained(kind, normalize, size):
    """Return an SAE after ten steps on features of a size."""
    acts = {
        "lm": "",
        "normalize": normalize,
        "text": Planted(features=24, d_model=12, probability=0.1, sizes=(size, size)).to_text(),
    }
    recipe = from_dict(
        {
            "acts": acts,
            "sae": {"n_latents": 24, "k": 3, "activation": {"kind": kind}},
            "tokens": 1280,
            "batch": 128,
            "run": {"device": "cpu", "kernels": "torch"},
        }
    )
    source = ActivationSource(recipe, torch.device("cpu"))
    state, step = start(recipe, source)
    for batch, number in zip(source.stream.batches(), range(1, 11)):
        state.step = number
        train_step(step, step.sae.normalize(batch.x).x, state, recipe)
    return step.sae


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jump_relu"])
def test_training_is_the_same_whatever_the_unit_of_inputs_left_as_they_are(kind):
    small, large = trained(kind, "none", 0.125), trained(kind, "none", 8.0)
    for key in ("W_enc", "W_dec"):
        assert torch.allclose(getattr(small, key), getattr(large, key), atol=1e-3)
    for key in ("b_enc", "b_pre"):
        assert torch.allclose(64 * getattr(small, key), getattr(large, key), atol=1e-2)
    assert large.input_rms == pytest.approx(64 * small.input_rms, rel=1e-5)
    scaled = trained(kind, "dataset", 8.0)
    assert torch.allclose(scaled.W_dec, large.W_dec, atol=1e-3)


@pytest.mark.parametrize("found", [None, 0.0, -1.0, float("nan"), "0.5", [1.0]])
def test_a_scale_of_inputs_that_cannot_be_is_not_believed(found):
    assert SAE(Shape(4, 6, 1, "none"), {"input_rms": found}).input_rms == 1.0
    assert SAE(Shape(4, 6, 1, "none"), {"input_rms": 0.5}).input_norm == 1.0


def jump_relu(release):
    recipe = Recipe(sae=SAEConfig(n_latents=6, k=1, activation=JumpReLUConfig(release=release)))
    sae = SAE(Shape(4, 6, 1, "none", 1.0, "jump_relu"))
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(0)), sae.normalize_decoder_()
        sae.W_enc.copy_(sae.W_dec), sae.activation.threshold.fill_(10.0)
    return sae, AutogradStep(sae, recipe)


@pytest.mark.parametrize("release, kept", [(0.25, 0.75), (0.0, 1.0)])
def test_the_threshold_of_a_dead_latent_falls_and_no_other(release, kept):
    sae, step = jump_relu(release)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    step.backward(x, baseline=1.0, dead=torch.tensor([1, 4]), k_aux=2)
    step.step(1)
    assert sae.activation.threshold.tolist() == pytest.approx(
        [10 * kept if latent in (1, 4) else 10 for latent in range(6)]
    )


def test_planted_features_are_new_rows_in_each_batch():
    truth = PlantedFeatures(FEATURES)
    assert not torch.equal(truth.draw(8, 0, 1)[0], truth.draw(8, 0, 2)[0])
    assert torch.equal(truth.draw(8, 0, 1)[0], PlantedFeatures(FEATURES).draw(8, 0, 1)[0])
