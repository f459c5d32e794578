"""A fine-tune is an ordinary run that begins from another; it says so, resumes, and leaves its parent alone."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

import ksparse
from ksparse.data.contexts import Corpus
from ksparse.data.shards import write
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.planning.tuning import finetune_recipe
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import train


@pytest.fixture
def parent(small_recipe, tmp_path):
    changes = {"optim.warmup": 3, "sae.k_start": 8}
    return train(small_recipe(changes), tmp_path / "base")


def sums(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_fine_tune_is_a_run_that_says_what_it_began_from(parent, tmp_path):
    before = sums(parent.path)
    tuned = ksparse.finetune(parent, tokens=5 * 64, progress=False)
    assert sums(parent.path) == before
    assert tuned.path == tmp_path / "base-kl"
    recipe = ksparse.open_run(tuned.path).recipe()
    assert recipe.sae.start == str(parent.path) and recipe.sae.lm_loss == "kl"
    assert (
        recipe.steps == 5
        and recipe.acts.mix == min(256, 5 * 64)
        and recipe.sae.dead_after == parent.recipe().dead_after
    )
    assert ksparse.load(tuned).metadata["start"]["from"] == str(parent.path)
    rows = tuned.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["lr"] == parent.recipe().lr / 4 and rows[-1]["lr"] == pytest.approx(
        recipe.lr / 5
    )
    found = ksparse.compare([parent, tuned], names="downstream", tokens=300, progress=False)
    assert found.differences[str(tuned.path)]["ce_delta"]["paired"]


def test_the_control_has_everything_but_the_lm(parent):
    kl, plain = (finetune_recipe(parent, loss, 640) for loss in ("kl", "none"))
    assert kl.differences()["sae"].pop("lm_loss") == "kl"
    changed = {key for key in kl.fingerprint()["sae"] if key not in plain.fingerprint()["sae"]}
    assert changed == {"lm_loss"}
    assert {**kl.fingerprint(), "sae": 0} == {**plain.fingerprint(), "sae": 0}
    run = ksparse.finetune(parent, "none", tokens=640, progress=False)
    assert run.path.name == "base-plain" and "kl" not in run.metrics()[0]


def test_it_lowers_the_kl_on_held_out_text_more_than_the_same_tokens_without(
    small_recipe, tmp_path
):
    base = train(small_recipe({"tokens": 64 * 64}), tmp_path / "base")
    runs = {
        loss: ksparse.finetune(base, loss, tokens=64 * 64, progress=False, lm_share=0.9, lr=3e-3)
        for loss in ("kl", "none")
    }
    found = ksparse.compare(
        {"plain": runs["none"], "kl": runs["kl"]}, names="downstream", tokens=3000, progress=False
    )
    difference = found.differences["kl"]["kl"]
    assert difference["value"] < -3 * difference["se"]


def test_keys_of_the_recipe_may_be_others(parent, tmp_path):
    run = ksparse.finetune(
        str(parent.path), "ce", tokens=128, out=tmp_path / "mine", lr=1e-4, lm_share=0.9
    )
    recipe = run.recipe()
    assert recipe.acts.mix == 128, "no more is computed than is used"
    assert (recipe.sae.lm_loss, recipe.sae.lm_share, recipe.lr) == ("ce", 0.9, 1e-4)
    assert "ce_delta" in run.metrics()[0] and run.path == tmp_path / "mine"


def test_a_twentieth_of_the_tokens_is_the_default(parent, monkeypatch):
    assert finetune_recipe(parent).tokens == 64
    assert finetune_recipe(parent, tokens=1000).tokens == 1000
    longer = dataclasses.replace(parent.recipe(), tokens=100_000)
    monkeypatch.setattr(RunFolder, "recipe", lambda run: longer)
    assert finetune_recipe(parent).tokens == 5_000


def test_a_run_on_shards_is_tuned_on_the_text_that_they_are_of(small_recipe, small_acts, tmp_path):
    lm = LM(acts=small_acts())
    corpus = Corpus(lm.options, lm.tokenizer, "train")
    folder = write(lm, corpus, tmp_path / "shards", rows=600)
    run = train(small_recipe({"acts.shards": str(folder)}), tmp_path / "run")
    tuned = ksparse.finetune(run, tokens=128, progress=False)
    assert tuned.recipe().acts.shards == "" and len(tuned.metrics()) == 2


def test_a_run_on_activations_alone_is_refused(tmp_path):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    run = ksparse.train(data=np.asarray(x), out=tmp_path / "own", n_latents=16, k=2, tokens=512,
                        batch=128, progress=False)  # fmt: skip
    with pytest.raises(InputError, match="trained on activations alone; a fine-tune runs an LM"):
        ksparse.finetune(run)


def test_what_is_no_run_or_no_loss_is_refused(parent, small_recipe, tmp_path):
    with pytest.raises(InputError, match="is not a run: it has no recipe.toml"):
        ksparse.finetune(tmp_path / "nothing")
    with pytest.raises(InputError, match="loss is 'mse'; it must be one of kl, ce, none"):
        ksparse.finetune(parent, "mse")
    for file in (parent.path / "checkpoints").iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(InputError, match="has no checkpoint to begin from; `ksparse resume"):
        ksparse.finetune(parent)


def test_the_command_writes_a_run_beside_its_parent_and_says_how_to_compare(parent, verb):
    code, out, _ = verb("finetune", parent.path, "--tokens", 128)
    assert code == 0 and f"ksparse compare {parent.path} {parent.path}-kl" in out
    assert RunFolder(parent.path.with_name("base-kl")).recipe().sae.lm_loss == "kl"
    code, _, _ = verb(
        "finetune", parent.path, "--loss", "ce", "--tokens", 128, "--sae.lm-share", 0.8, "--out",
        parent.path.with_name("other"),
    )  # fmt: skip
    options = RunFolder(parent.path.with_name("other")).recipe().sae
    assert code == 0 and (options.lm_loss, options.lm_share) == ("ce", 0.8)
    code, _, said = verb("finetune", parent.path, "--tokens", 192)
    assert code == 2 and "base-kl was begun with another recipe" in said and "128 -> 192" in said
    code, _, said = verb("finetune")
    assert code == 2 and "needs the folder of a run" in said


def test_the_key_of_the_recipe_is_as_good_as_the_flag(parent, verb):
    code, _, _ = verb("finetune", parent.path, "--sae.lm-loss", "none", "--tokens", 128)
    assert code == 0
    assert RunFolder(parent.path.with_name("base-plain")).recipe().sae.lm_loss == "none"
