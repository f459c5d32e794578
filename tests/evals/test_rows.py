"""SAEs of activations that anybody made are judged on rows that were held out; what needs text says so."""

import numpy as np
import pytest
import torch

import ksparse
from ksparse import cli
from ksparse.data.tensors import Tensors, write_index
from ksparse.errors import InputError

OPTIONS = {"n_latents": 48, "k": 4, "tokens": 4096, "batch": 256}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    x = torch.randn(6000, 8, generator=torch.Generator().manual_seed(0)) + 1
    np.savez(folder / "x.npz", x=x.numpy(), documents=np.arange(6000) // 20)
    write_index(folder)
    return ksparse.train(shards=folder, out=folder / "run", **OPTIONS)


def test_reconstruction_is_that_of_the_held_out_rows(run):
    sae = ksparse.load(run)
    table = Tensors(run.recipe().acts.shards, "held-out")
    trained = set(Tensors(table.folder).chosen.tolist())
    assert not trained & set(table.chosen.tolist())
    raw = table.read(np.arange(table.rows))
    inputs = sae.normalize(raw)
    error = inputs.x.double() - sae.decode_normalized(sae.encode(raw)).double()
    result = ksparse.evaluate(run, names="stats", tokens=10**6, progress=False)["stats"]
    spread = (inputs.x.double() - inputs.x.double().mean(0)).square().sum()
    assert result["nmse"]["value"] == pytest.approx(float(error.square().sum() / spread), rel=1e-5)
    assert result["n_tokens"] == table.rows
    assert result["n_documents"] == len(set(table.documents(np.arange(table.rows)).tolist()))
    assert 0 < result["nmse"]["se"] < result["nmse"]["value"]
    assert "top_context" not in result.arrays


def test_fewer_rows_are_spread_over_all_documents(run):
    few = ksparse.evaluate(run, names="stats", tokens=100, progress=False)["stats"]
    assert few["n_tokens"] == 100 and few["n_documents"] > 20


def test_what_needs_no_text_works_and_claims_nothing_about_tokens(run):
    names = ["latents", "subspaces", "norms", "decoder_projection"]
    results = ksparse.evaluate(run, names=names, progress=False)
    assert results["latents"]["effective_tokens"] is None
    assert not any(results["latents"]["recurring"].values())
    assert results["subspaces"]["sides"]["first"]["effective_tokens"] is None
    assert 0 < results["decoder_projection"]["projection"]["value"]


def test_the_command_takes_the_default_evaluations_that_it_can_and_writes_the_report(
    run, capsys, caplog
):
    cli.main(["eval", str(run.path)])
    assert "downstream, probes, n2g, explained_loss, ablation are left out" in caplog.text
    cli.main(["eval", str(run.path)])
    assert "kept     stats" in capsys.readouterr().err
    assert "top_context" not in caplog.text
    assert "explained variance" in run.report_file.read_text().lower()


@pytest.mark.parametrize(
    "name",
    ["downstream", "probes", "n2g", "explained_loss", "ablation", "positions", "refinement",
     "progressive", "token_driven", "absorption"],
)  # fmt: skip
def test_an_evaluation_that_needs_text_says_so(run, name):
    with pytest.raises(InputError, match=f"^{name} needs an LM and text.*--lm NAME --site SITE"):
        ksparse.evaluate(run, names=name, progress=False)


def test_what_asks_for_an_lm_is_told_that_none_is_known(run):
    with pytest.raises(InputError, match="name no LM; give one"):
        ksparse.load(run).lm()


def test_a_text_without_an_lm_and_sae_of_two_kinds_are_refused(run):
    with pytest.raises(InputError, match="trained on activations alone; name their LM"):
        ksparse.evaluate(run, names="stats", text="pylm", progress=False)
    other = ksparse.load(run)
    other.metadata["policy"] = {"split": "train"}
    with pytest.raises(InputError, match="others on activations without"):
        ksparse.compare({"a": run, "b": other}, names="stats", progress=False)
    other.metadata["policy"] = {"split": "train", "tensors": "0" * 16}
    with pytest.raises(InputError, match="trained on different activations"):
        ksparse.compare({"a": run, "b": other}, names="stats", progress=False)
    with pytest.raises(InputError, match="was indexed again with other files"):
        ksparse.evaluate(other, names="stats", progress=False)


def test_two_saes_of_the_same_rows_are_compared_in_pairs(run):
    found = ksparse.compare({"a": run, "b": ksparse.load(run)}, names="stats", progress=False)
    assert found.differences["b"]["nmse"]["value"] == 0


def test_with_its_lm_named_an_sae_is_judged_on_text(run, tmp_path, small_recipe):
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    acts = small_recipe().acts
    own = ksparse.train(data=x, out=tmp_path / "run", **OPTIONS)
    lm = ksparse.LM(acts.lm, site=acts.site)
    with pytest.raises(InputError, match="give the text to judge it on"):
        ksparse.evaluate(own, lm, "downstream", progress=False)
    result = ksparse.evaluate(own, lm, "downstream", text=acts.text, tokens=200, progress=False)
    assert result["downstream"]["ce_clean"]["value"] > 0
    flags = {"--lm": acts.lm, "--site": acts.site, "--text": acts.text, "--out": tmp_path / "its"}
    words = [str(word) for flag in flags.items() for word in flag]
    cli.main(["eval", str(own.path), "downstream", *words, "--tokens", "200"])
    assert (tmp_path / "its" / "evals" / "downstream.json").is_file()
