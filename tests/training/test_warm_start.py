"""An SAE that begins from another one computes the same; it may grow, and k may change on the way."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

import ksparse
from ksparse.config import SAEConfig, from_dict
from ksparse.errors import InputError
from ksparse.kernels import native
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.sae.normalization import normalize
from ksparse.sae.sharded import new_sae
from ksparse.training.source import ActivationSource
from ksparse.training.train import train
from ksparse.training.trainer import start
from ksparse.training.warm_start import begin_from_

from ..mesh_of_threads import on_mesh

CPU = torch.device("cpu")


@torch.no_grad()
def begun(recipe):
    """Return what training begins with: the SAE, its dead counters, and raw activations."""
    source = ActivationSource(recipe, CPU)
    state, step = start(recipe, source)
    return step.raw(), state.since, source.source.sample(256)


def made(kind="topk", normalization="unit_norm", *, n=24, d=16, factor=1.0, k=4):
    """Return an SAE with weights that are all different from 0 and decoder rows of norm 1."""
    sae = SAE(Shape(d, n, k, normalization, factor, kind))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in sae.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape, generator=g) * (1 if "W" in key else 0.05))
        if "threshold" in sae.state_dict():
            sae.threshold.abs_()
        sae.normalize_decoder_()
    return sae


def recipe_from(small_recipe, folder, sae, **changes):
    kind = {"sae.activation": {"kind": sae.shape.activation}}
    same = {"sae.n_latents": sae.n_latents, "sae.k": sae.k, "sae.start": str(folder)}
    return small_recipe(kind | same | {"acts.normalize": sae.shape.normalize} | changes)


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "relu", "jump_relu", "gated", "prolu"])
def test_training_begins_with_what_the_parent_computes(kind, small_recipe, tmp_path):
    parent = made(kind)
    ksparse.save(parent, tmp_path / "parent")
    sae, since, raw = begun(recipe_from(small_recipe, tmp_path / "parent", parent))
    torch.testing.assert_close(sae(raw), parent(raw))
    assert not since.any() and sae.metadata["start"]["from"] == str(tmp_path / "parent")


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jump_relu", "gated"])
def test_shards_begin_with_their_rows_of_the_parent(kind, tmp_path):
    ksparse.save(made(kind), tmp_path / "parent")
    asked = {"n_latents": 40, "k": 4, "start": str(tmp_path / "parent")}
    options = from_dict({"sae": asked | {"activation": {"kind": kind}}}).sae

    def begin(mesh):
        sae = new_sae(Shape(16, 40, 4, activation=kind), {}, mesh)
        sample = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        x = normalize(sample, "unit_norm", 1.0).x
        initialize_(sae, x, options, torch.Generator().manual_seed(0))
        begin_from_(sae, options, x)
        return sae.state_dict()

    (whole,), parts = on_mesh(1, 1, begin), on_mesh(1, 4, begin)
    for key, tensor in whole.items():
        rows = [part[key] for part in parts]
        shared = key == "b_pre" or tensor.shape == (1,)
        torch.testing.assert_close(rows[0] if shared else torch.cat(rows), tensor)


def test_a_run_begins_from_another_library_s_file_with_its_error(small_recipe, tmp_path):
    parent = made("topk", "none")
    ksparse.save(parent, tmp_path / "own")
    ksparse.convert(tmp_path / "own", tmp_path / "theirs", "sae_lens")
    recipe = recipe_from(small_recipe, tmp_path / "theirs", parent)
    sae, _, raw = begun(recipe)
    theirs = (parent(raw) - raw).square().sum().item()
    assert (sae(raw) - raw).square().sum().item() == pytest.approx(theirs, rel=1e-4)
    assert sae.metadata["start"]["format"] == "sae_lens"


@pytest.mark.parametrize(
    ("old", "factor", "new"),
    [
        ("none", 1.0, "dataset"),
        ("dataset", 0.3, "dataset"),
        ("dataset", 0.3, "none"),
        ("layer_norm", 1.0, "unit_norm"),
        ("unit_norm", 1.0, "layer_norm"),
    ],
)
@pytest.mark.parametrize("kind", ["topk", "jump_relu", "gated"])
def test_normalizations_that_differ_by_a_factor_are_converted(
    old, factor, new, kind, small_recipe, tmp_path
):
    parent = made(kind, old, factor=factor)
    ksparse.save(parent, tmp_path / "parent")
    recipe = recipe_from(small_recipe, tmp_path / "parent", parent, **{"acts.normalize": new})
    sae, _, raw = begun(recipe)
    assert sae.shape.normalize == new
    torch.testing.assert_close(sae(raw), parent(raw), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["topk", "relu", "jump_relu"])
def test_a_larger_sae_begins_with_what_the_parent_computes(kind, small_recipe, tmp_path):
    parent = made(kind)
    ksparse.save(parent, tmp_path / "parent")
    recipe = recipe_from(small_recipe, tmp_path / "parent", parent, **{"sae.n_latents": 48})
    sae, since, raw = begun(recipe)
    x = normalize(raw, "unit_norm").x

    def error(some):
        return (some.decode_normalized(some.encode_normalized(x)) - x).square().sum().item()

    assert error(sae) == pytest.approx(error(parent), rel=0.02)
    torch.testing.assert_close(sae.W_dec[:24], parent.W_dec)
    norms = sae.W_dec[24:].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(24))
    assert (since[:24] == 0).all()
    revived_at_once = kind != "relu"
    assert (since[24:] == (recipe.dead_after if revived_at_once else 0)).all()


def test_decoder_rows_get_norm_1_where_that_changes_nothing(small_recipe, tmp_path):
    for kind in ("relu", "jump_relu"):
        parent = made(kind)
        parent.W_dec.data.mul_(torch.linspace(0.5, 2, 24)[:, None])
        ksparse.save(parent, tmp_path / kind)
        sae, _, raw = begun(recipe_from(small_recipe, tmp_path / kind, parent))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
        torch.testing.assert_close(sae(raw), parent(raw))


def test_a_parent_that_does_not_fit_is_refused_with_the_key_to_change(small_recipe, tmp_path):
    parent = made()
    ksparse.save(parent, tmp_path / "parent")
    scaled = made()
    scaled.W_dec.data.mul_(2)
    ksparse.save(scaled, tmp_path / "scaled")
    ksparse.save(made(d=8), tmp_path / "narrow")
    for folder, changes, words in (
        ("parent", {"acts.normalize": "none"}, "give acts.normalize = 'unit_norm'"),
        ("parent", {"sae.n_latents": 16}, "has 24 latents, sae.n_latents is 16"),
        ("parent", {"sae.b_enc": False}, "give sae.b_enc = true"),
        ("scaled", {}, "give sae.unit_norm = false"),
        ("narrow", {}, "takes activations of width 8, those of this recipe have 16"),
        ("nothing", {}, "nothing"),
    ):
        recipe = recipe_from(small_recipe, tmp_path / folder, parent, **changes)
        with pytest.raises(InputError, match=words):
            begun(recipe)


def test_another_activation_takes_the_weights_and_says_so(small_recipe, tmp_path, caplog):
    parent = made("batch_topk")
    ksparse.save(parent, tmp_path / "parent")
    recipe = recipe_from(
        small_recipe, tmp_path / "parent", parent, **{"sae.activation": {"kind": "jump_relu"}}
    )
    sae, _, _ = begun(recipe)
    torch.testing.assert_close(sae.W_enc, parent.W_enc)
    assert "the tensors of the activation begin anew" in caplog.text


def test_going_on_from_a_run_goes_on_falling(small_recipe, tmp_path):
    first = train(small_recipe({"tokens": 100 * 64}), tmp_path / "first")
    changes = {"sae.start": str(tmp_path / "first"), "tokens": 12 * 64, "order": 5}
    second = train(small_recipe(changes), tmp_path / "second")
    fresh = train(small_recipe({"tokens": 12 * 64, "order": 5}), tmp_path / "fresh")
    assert second.metrics()[0]["nmse"] < 1.1 * first.metrics()[-1]["nmse"]
    assert second.metrics()[-1]["nmse"] < 0.9 * fresh.metrics()[-1]["nmse"]


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_k_goes_from_its_start_to_its_end(kernels, small_recipe, tmp_path):

    if kernels == "native" and native.load() is None:
        pytest.skip("no C++ compiler here")
    recipe = small_recipe({"sae.k_start": 16, "tokens": 40 * 64, "run.kernels": kernels})
    run = train(recipe, tmp_path / "run")
    l0 = [row["l0"] for row in run.metrics()]
    assert l0[0] > 12 and l0[-1] <= 4 and ksparse.load(run).k == 4
    assert all(after <= before + 1 for before, after in zip(l0, l0[1:]))


def test_a_run_resumed_while_k_falls_has_the_bits_of_one_that_was_not_stopped(
    small_recipe, tmp_path
):
    recipe = small_recipe({"sae.k_start": 16, "tokens": 40 * 64})
    whole = train(recipe, tmp_path / "whole")
    stopped = train(
        dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, keep=100)),
        tmp_path / "stopped",
    )
    for folder in stopped.checkpoints()[3:]:
        shutil.rmtree(folder)
    again = train(recipe, stopped.path)
    for key, tensor in ksparse.load(whole).state_dict().items():
        assert torch.equal(tensor, ksparse.load(again).state_dict()[key])


def test_jump_relu_begins_with_three_times_k_unless_told_otherwise(small_recipe, tmp_path):
    jump = {"kind": "jump_relu"}
    options = SAEConfig(n_latents=512, k=8, activation=jump)
    assert [options.k_at(step, 100) for step in (1, 50, 100)] == [24, 8, 8]
    assert SAEConfig(n_latents=512, k=8, k_start=8, activation=jump).k_at(1, 100) == 8
    assert SAEConfig(n_latents=512, k=8, start="runs/a", activation=jump).k_at(1, 100) == 8
    assert SAEConfig(n_latents=10, k=8, activation=jump).k_at(1, 100) == 10
    assert SAEConfig(n_latents=512, k=8).k_at(1, 100) == 8
    run = train(small_recipe({"sae.activation": jump, "tokens": 40 * 64}), tmp_path / "run")
    assert run.metrics()[0]["l0"] > 8 and ksparse.load(run).k == 4


@pytest.mark.parametrize("changes", [{"k_start": 600}, {"k_start": -1}, {"k_anneal": 0.0}])
def test_a_schedule_of_k_that_cannot_be_is_refused(changes):
    with pytest.raises(InputError, match=f"sae.{next(iter(changes))} is"):
        SAEConfig(n_latents=512, **changes)


def test_recipes_without_a_start_keep_their_names():
    old = from_dict({}).fingerprint()
    assert not {"start", "k_start", "k_anneal"} & old["sae"].keys()
    assert from_dict({"sae": {"start": "runs/a"}}).fingerprint() != old
