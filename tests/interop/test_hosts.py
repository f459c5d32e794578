"""Models of other libraries take an SAE by their own names of a site. bench/interop.py does the same with the libraries."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ksparse.errors import InputError
from ksparse.steering import attach


@pytest.fixture
def model(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm("llama")).eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sae(make_sae):
    return make_sae("topk", "layer_norm", d=16, n=40, k=4)


class Envoy:
    """As nnsight's objects are: no module, but one inside."""

    def __init__(self, module):
        self._module = module


class Hooked(torch.nn.Module):
    """As TransformerLens' models are: hook points are modules that return what they get, and
    `hook_dict` has them by all their names."""

    def __init__(self):
        super().__init__()
        block = torch.nn.Module()
        block.hook_out, block.hook_attn_out = torch.nn.Identity(), torch.nn.Identity()
        self.blocks = torch.nn.ModuleList([block])

    @property
    def hook_dict(self):
        block = self.blocks[0]
        return {
            "blocks.0.hook_out": block.hook_out,
            "blocks.0.hook_resid_post": block.hook_out,
            "blocks.0.hook_attn_out": block.hook_attn_out,
        }

    def forward(self, x):
        return self.blocks[0].hook_out(self.blocks[0].hook_attn_out(x) + 1)


@pytest.mark.parametrize(
    "site",
    [
        "model.layers.1.output",
        "model.layers[1].output",
        "model.layers.1",
        "model.model.layers.1",
        "model.model.layers.1.output",
        "resid_post.1",
    ],
)
def test_an_object_of_nnsight_is_used_by_its_own_names(site, model, sae, tokens):
    with attach(model, sae, "resid_post.1", error="drop", positions="all") as expected:
        spliced = model(tokens).logits
    with attach(Envoy(model), sae, site, error="drop", positions="all") as tap:
        assert torch.equal(model(tokens).logits, spliced)
    assert torch.equal(tap.x, expected.x)


def test_the_input_of_nnsight_is_the_input_of_the_module(model, sae, tokens):
    with (
        attach(Envoy(model), sae, "model.layers.1.input", positions="all") as tap,
        attach(model, sae, "model.layers.1:in", positions="all") as expected,
    ):
        model(tokens)
    assert torch.equal(tap.x, expected.x)


@pytest.mark.parametrize("site", ["blocks.0.hook_out", "blocks.0.hook_resid_post", "resid_post.0"])
def test_a_hook_point_is_found_by_each_of_its_names(site, sae):
    model, x = Hooked(), torch.randn(2, 5, 16)
    with attach(model, sae, site, error="drop", positions="all") as tap:
        assert torch.equal(model(x), sae(x + 1))
    assert torch.equal(tap.x, x + 1)


def test_no_other_site_is_warned_of_where_the_names_mean_the_same(sae, caplog):
    model, x = Hooked(), torch.randn(2, 5, 16)
    for trained in ("resid_post.0", "blocks.0.hook_out"):
        sae.metadata["acts"] = {"lm": "an/lm", "site": trained}
        with attach(model, sae, "blocks.0.hook_resid_post", positions="all"):
            model(x)
    assert "but was trained at" not in caplog.text
    sae.metadata["acts"] = {"lm": "an/lm", "site": "blocks.0.hook_attn_out"}
    with attach(model, sae, "blocks.0.hook_resid_post", positions="all"):
        model(x)
    assert "attached at blocks.0.hook_resid_post, but was trained at" in caplog.text


def test_a_site_whose_hook_point_may_be_another_place_is_asked_for_by_its_name(sae):
    with (
        pytest.raises(
            InputError,
            match="'attn_out.0' is what is added to the residual stream; blocks.0.hook_attn_out of "
            "this Hooked may be another place.* Give 'blocks.0.hook_attn_out'",
        ),
        attach(Hooked(), sae, "attn_out.0"),
    ):
        pass


def test_weights_that_are_not_loaded_yet_are_an_error(sae):
    with (
        pytest.raises(
            InputError, match="weights of this Envoy are not loaded yet.*with dispatch=True"
        ),
        attach(Envoy(torch.nn.Linear(2, 2, device="meta")), sae, "resid_post.0"),
    ):
        pass


@pytest.mark.parametrize("model", [object(), Envoy(None)])
def test_what_is_no_model_is_an_error(model, sae):
    with (
        pytest.raises(InputError, match="is attached to a torch module, got"),
        attach(model, sae, "resid_post.0"),
    ):
        pass
