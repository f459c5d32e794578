"""The objects of the Python interface: made from keywords, they say what they are, and agree."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import ksparse
from ksparse import lookup
from ksparse.config import Recipe, recipe_of, to_toml
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.sae.model import SAE, Code, Shape


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "run"
    trained = ksparse.train(
        lm="pylm/0.3m", site="resid_post.1", n_latents=256, k=4, tokens=2048, batch=512, mix=1024,
        out=folder,
    )  # fmt: skip
    options = EvalConfig(tokens=1000, device="cpu")
    runner.write_results(
        trained, ksparse.evaluate(ksparse.load(folder), names=["stats"], options=options)
    )
    return trained


def test_a_recipe_is_read_from_whatever_describes_it(tmp_path):
    recipe = Recipe(sae={"k": 64})
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    sources = [recipe, {"sae": {"k": 64}}, tmp_path / "r.toml", str(tmp_path / "r.toml")]
    assert all(recipe_of(source) == recipe for source in sources)
    assert recipe_of(recipe, k=8, sae={"n_latents": 99}).sae.k == 8
    assert eval(repr(recipe_of(k=8, activation="relu"))) == recipe_of(k=8, activation="relu")


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"n_latent": 8}, "a recipe has no key 'n_latent'; did you mean 'n_latents'"),
        ({"keep": 1}, "'keep' is a key of acts and run; say which"),
        ({"sae": 3}, "sae is a section of a recipe; give a dictionary"),
        ({"tokens": "200k"}, "'tokens' is '200k', of type str"),
    ],
)
def test_a_wrong_keyword_is_one_sentence(keywords, message):
    with pytest.raises(InputError, match=message):
        ksparse.train(**keywords)
    with pytest.raises(InputError, match="a recipe is a Recipe, a TOML file"):
        ksparse.train(3)


def test_every_method_that_is_looked_up_exists():
    for module, name in lookup.FUNCTIONS.values():
        assert callable(getattr(importlib.import_module(module), name))


def test_a_loaded_sae_takes_no_gradient_but_passes_one_to_the_activations(run):
    sae = ksparse.load(run)
    x = torch.randn(3, sae.d_model)
    assert not sae(x).requires_grad and not sae.encode(x).values.requires_grad
    assert sae(x.requires_grad_()).requires_grad
    assert (sae.n_latents, sae.k, sae.device.type) == (256, 4, sae.W_enc.device.type)
    assert sae.cfg["trained_on"]["lm"] == "pylm/0.3m" and "pylm/0.3m at resid_post.1" in repr(sae)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))


def test_a_sae_of_unknown_origin_has_no_lm():
    with pytest.raises(InputError, match="does not say which LM it was trained on"):
        SAE(Shape(8, 16, 2)).lm()


def test_the_site_of_an_sae_that_does_not_say_it_is_not_guessed():
    sae = SAE(Shape(64, 16, 2), {"origin": {"format": "sparsify", "lm": "pylm/0.3m"}})
    with pytest.raises(InputError, match="does not say which LM it was trained on"):
        sae.lm()
    with pytest.raises(InputError, match="does not say at which site .* ksparse.LM.'pylm/0.3m', s"):
        ksparse.evaluate(sae, "pylm/0.3m", "stats")
    sae.metadata["origin"]["site"] = "resid_post.2"
    assert sae.lm().options.site == "resid_post.2"


def test_texts_are_cut_into_contexts_as_in_training_and_do_not_mix(run):
    sae = ksparse.load(run)
    lm = sae.lm()
    short, long = "import os", "x = [1, 2]\n" * 30
    code = lm.encode([long, short], sae)
    ids = lm.tokenize(long)[0, 1:]
    room = lm.options.context - 1
    assert len(ids) > room and code.documents.tolist() == [0] * len(ids) + [1] * len(
        lm.tokens(short)
    )
    alone = sae.encode(lm(short))
    last = code.at(code.documents == 1)
    torch.testing.assert_close(last.dense(), alone.dense(), atol=1e-5, rtol=1e-4)
    assert last.tokens == lm.tokens(short)
    second = torch.cat([torch.tensor([lm.bos], device=ids.device), ids[room : 2 * room]])[None]
    x = lm.acts(second, torch.ones_like(second, dtype=torch.bool))[0, 1:]
    found = code.at(slice(room, room + x.shape[0]))
    torch.testing.assert_close(found.dense(), sae.encode(x).dense(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae.decode(found), sae(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "no text to encode"),
        ([3], "got int"),
        (3, "got int"),
        (["a", ""], "text 1 has no token"),
    ],
)
def test_what_is_no_text_is_one_sentence(run, texts, message):
    sae = ksparse.load(run)
    with pytest.raises(InputError, match=message):
        sae.lm().encode(texts, sae)


def test_a_latent_reads_the_results_or_a_text(run):
    sae = ksparse.load(run)
    text = "import os\nimport sys\n"
    code = sae.lm().encode(text, sae)
    peak = code.top(1)[0]
    here = sae.latent(peak.latent, text=text)
    assert here.max == pytest.approx(peak.value) and here.examples(1)[0].value == here.max
    assert here.density == pytest.approx(float((code.of_latent(peak.latent) > 0).float().mean()))
    latent = sae.latent(peak.latent)
    assert latent.max > 0 and latent.examples(2)[0].value == pytest.approx(latent.max, rel=1e-2)
    assert latent.tokens(2) and "density" in repr(latent)
    with pytest.raises(InputError, match="there is no result of `stats`"):
        SAE(sae.shape).latent(3).density  # noqa: B018


def test_a_latents_tokens_are_by_the_sum_of_its_activations(run):
    sae = ksparse.load(run)
    text = "import os\nimport sys\n"
    latent = sae.latent(sae.lm().encode(text, sae).top(1)[0].latent, text=text)
    acts, tokens = latent.code.of_latent(latent.number), latent.code.tokens
    mass = {t: sum(float(a) for a, u in zip(acts, tokens) if u == t) for t in {*tokens}}
    for token, share in latent.tokens():
        assert share == pytest.approx(mass[token] / float(acts.sum()), rel=1e-5)


def test_a_latents_logits_are_those_of_stats_or_computed_again(run):
    sae = ksparse.load(run)
    kept, again = sae.latent(3).logits(4), sae.latent(3).logits(4, lm=sae.lm())
    for name in ("raises", "lowers"):
        assert [token for token, _ in kept[name]] == [token for token, _ in again[name]]
        values = [[value for _, value in rows[name]] for rows in (kept, again)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert len(sae.latent(3).logits(30)["raises"]) == 30
    shown = sae.latent(3)._repr_html_()
    assert all(f"{value:+.2f}" in shown for rows in kept.values() for _, value in rows)


def test_steering_is_in_multiples_of_the_largest_value(run, caplog):
    sae = ksparse.load(run)
    lm = sae.lm()
    latent = lm.encode("import os", sae).top(1)[0].latent
    ids, largest = lm.tokenize("import os"), sae.latent(latent).max
    with ksparse.steer(lm.model, sae, {latent: 2.0}), torch.no_grad():
        multiples = lm.model(ids).logits
    with ksparse.steer(lm.model, sae, {latent: 2 * largest}, unit="value"), torch.no_grad():
        assert torch.equal(lm.model(ids).logits, multiples)
    assert not caplog.records
    with ksparse.steer(lm.model, sae, {latent: 3.5}):
        pass
    assert "3.5 times its largest value" in caplog.text
    with pytest.raises(InputError, match="run `ksparse eval .* stats`"):
        ksparse.steer(lm.model, SAE(sae.shape), {1: 1.0}, site="resid_post.1").__enter__()


def test_frames_have_a_row_for_each_active_latent(run, monkeypatch):
    sae = ksparse.load(run)
    code = sae.lm().encode("import os", sae)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        code.to_frame()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    frame = code.to_frame()
    assert list(frame) == ["row", "latent", "value", "document", "token"]
    assert len(frame["value"]) == int((code.values > 0).sum())
    with pytest.raises(InputError, match="give code.dense"):
        Code(code.values, code.indices).dense()


def test_pictures_of_objects_escape_what_they_show(run):
    sae = ksparse.load(run)
    lm = sae.lm()
    code = lm.encode("<b>x</b>", sae)
    assert "<b>" not in code._repr_html_() and "hsl(" in code._repr_html_()
    for shown in (sae, lm, run, Recipe(acts={"text": "<b>"}), sae.latent(code.top(1)[0].latent)):
        assert "<table>" in shown._repr_html_() and "<b>" not in shown._repr_html_()
    assert "resid_post.1" in repr(lm) and "results='stats'" in repr(run)
    assert repr(code).startswith("TextCode(")
