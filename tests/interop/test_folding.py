"""An SAE whose normalisation a format lacks is written as the nearest one, with the measured difference."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import ksparse
from ksparse import cli, interop
from ksparse.errors import InputError
from ksparse.interop import compatibility, folding
from ksparse.lm.model import LM

CENTRED = ("unit_norm", "layer_norm")


def same_size(x):
    """Return rows whose mean is 1 and whose deviation is 2, on which folding loses nothing."""
    centred = x - x.mean(1, keepdim=True)
    return 2 * centred / centred.std(1, keepdim=True) + 1


@pytest.mark.parametrize("activation", ["topk", "jump_relu", "gated", "batch_topk", "relu"])
@pytest.mark.parametrize("normalize", [*CENTRED, "constant_norm"])
@pytest.mark.parametrize("target", ["dataset", "constant_norm"])
def test_the_nearest_sae_is_the_same_one_where_every_activation_has_the_same_mean_and_scale(
    activation, normalize, target, make_sae, x
):
    sae, raw = make_sae(activation, normalize), same_size(x)
    folded = folding.nearest(sae, target, raw)
    assert folded.shape.normalize == target
    torch.testing.assert_close(folded(raw), sae(raw), atol=2e-4, rtol=2e-4)
    measured = folding.measure(sae, folded, raw)
    assert measured["equal_supports"] > 0.98 and measured["shared_latents"] > 0.99


@pytest.mark.parametrize("normalize", CENTRED)
def test_what_is_lost_is_how_scales_and_means_vary(normalize, make_sae, x):
    sae, raw = make_sae("topk", normalize), same_size(x)
    spread = torch.linspace(0.2, 3, len(x))[:, None]
    measured = folding.measure(sae, folding.nearest(sae, "dataset", spread * raw), spread * raw)
    assert measured["equal_supports"] < 0.98
    assert measured["nmse"]["after"] != pytest.approx(measured["nmse"]["before"], rel=1e-3)


@torch.no_grad()
def test_the_measure_is_its_definition(make_sae, x):
    sae, other = make_sae("topk"), make_sae("topk", "layer_norm")
    before, after = (each.encode(x).dense(20) > 0 for each in (sae, other))
    total = (x - x.mean(0)).double().square().sum()
    measured = folding.measure(sae, other, x)
    assert measured["nmse"] == {
        "before": pytest.approx(float((sae(x) - x).double().square().sum() / total)),
        "after": pytest.approx(float((other(x) - x).double().square().sum() / total)),
    }
    assert measured["equal_supports"] == float((before == after).all(1).double().mean())
    assert measured["shared_latents"] == pytest.approx(
        float((before & after).sum() / (before | after).sum())
    )
    assert measured["tokens"] == len(x)


def test_latents_of_rows_that_are_compared_one_by_one_are_the_same(make_sae, x, monkeypatch):
    sae, other = make_sae("topk"), make_sae("topk", "layer_norm")
    whole = folding.measure(sae, other, x)
    monkeypatch.setattr(folding, "_DENSE_VALUES", 1)
    parts = folding.measure(sae, other, x)
    assert parts["nmse"]["after"] == pytest.approx(whole["nmse"]["after"])
    assert parts["equal_supports"] == whole["equal_supports"]


@pytest.fixture(scope="module")
def lm(tiny_lm, text_file):
    from ksparse.config import ActsConfig

    return LM(
        acts=ActsConfig(
            lm=str(tiny_lm("gpt2")),
            site="resid_post.1",
            text=str(text_file),
            context=16,
            lm_batch=8,
        )
    )


@pytest.mark.parametrize(
    "form, activation, normalize, target",
    [
        ("sae_lens", "topk", "unit_norm", "layer_norm"),
        ("sae_lens", "topk", "layer_norm", "layer_norm"),
        ("openai", "topk", "unit_norm", "layer_norm"),
        ("sparsify", "topk", "unit_norm", "dataset"),
        ("dictionary_learning", "jump_relu", "layer_norm", "dataset"),
        ("gemma_scope", "batch_topk", "unit_norm", "dataset"),
        ("llamascopium", "topk", "unit_norm", "constant_norm"),
        ("sparsify", "topk", "dataset", "dataset"),
    ],
)
def test_the_written_copy_is_what_was_measured(
    form, activation, normalize, target, make_sae, lm, tmp_path
):
    sae = make_sae(activation, normalize, d=16, n=40)
    folded = folding.fold_into(sae, form, interop.FORMATS[form], lm, tokens=200)
    interop.write(folded, tmp_path / "sae", form)
    copy = ksparse.load(tmp_path / "sae")
    fold = copy.metadata["fold"]
    assert (fold["from"], fold["to"], fold["tokens"]) == (normalize, target, 200)
    from ksparse.interop.text_activations import read_activations

    measured = folding.measure(sae, copy, read_activations(lm, "held-out", 200))
    assert fold["nmse"]["after"] == pytest.approx(measured["nmse"]["after"], rel=1e-3)
    assert fold["equal_supports"] == pytest.approx(measured["equal_supports"], abs=0.02)
    if target == normalize:
        assert fold["nmse"]["after"] == pytest.approx(fold["nmse"]["before"], rel=1e-5)


def test_what_a_format_lacks_beside_the_normalisation_is_still_an_error(make_sae, lm):
    for form, sae, named in (
        ("sparsify", make_sae("gated", "unit_norm", d=16), "activation, gated"),
        ("openai", make_sae("topk", "constant_norm", d=16), "normalisation, constant_norm"),
    ):
        with pytest.raises(InputError, match=f"{form} cannot hold this SAE's {named}"):
            folding.fold_into(sae, form, interop.FORMATS[form], lm, tokens=50)
    with pytest.raises(
        InputError, match="takes 6 numbers, the activations of .* at resid_post.1 have 16"
    ):
        folding.fold_into(make_sae("topk"), "sparsify", interop.FORMATS["sparsify"], lm)


def saved(make_sae, lm, folder, **acts):
    sae = make_sae("topk", "unit_norm", d=16, n=40)
    sae.metadata["acts"] = dataclasses.asdict(lm.options) | acts
    ksparse.save(sae, folder)
    return str(folder)


def test_the_command_prints_what_was_measured(make_sae, lm, tmp_path, capsys):
    source = saved(make_sae, lm, tmp_path / "a")
    for number, flag in enumerate((["--fold"], ["--fold", "True"])):
        out = tmp_path / f"copy{number}"
        cli.main(["convert", source, str(out), "--to", "sparsify", *flag])
        fold = ksparse.load(out).metadata["fold"]
        printed = capsys.readouterr().out
        assert "normalisation unit_norm as dataset" in printed
        assert f"{fold['nmse']['before']:.4f} before, {fold['nmse']['after']:.4f} after" in printed
        assert f"{fold['equal_supports']:.1%} of activations" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--to", "sparsify", "--fold", "--normalization", "outside"], "give one of them"),
        (["--to", "ksparse", "--fold"], "ksparse does not"),
        (["--to", "atoms", "--fold"], "atoms does not"),
        (["--to", "sparsify", "--text", "x"], "--text is only used with --fold"),
        (["--to", "nothing", "--fold"], "there is no format 'nothing'"),
        (["--to", "sparsify", "--fold"], "does not name its lm, .* give --lm"),
    ],
)
def test_what_cannot_be_folded_is_an_error(flags, message, make_sae, lm, tmp_path, capsys):
    sae = make_sae("topk", "unit_norm")
    sae.metadata = {}
    ksparse.save(sae, tmp_path / "a")
    with pytest.raises(SystemExit):
        cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *flags])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "b").exists()


def test_the_error_about_a_normalisation_offers_to_fold(make_sae):
    with pytest.raises(InputError, match=r"Use --fold \(the nearest SAE"):
        compatibility.adapt(make_sae("topk", "unit_norm"), "sparsify", {"topk": ("none",)})
