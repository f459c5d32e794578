"""Direct logits are the product of row, final norm's weight and unembedding, written out by hand."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ksparse import progress
from ksparse.errors import InputError
from ksparse.lm import direct_logits

from .test_head import SMALL

D, V = 16, 97
KINDS = {
    "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 3.0},
}


def build(kind: str, tied: bool, site: str = "resid_post.1"):
    """Return a random model as an LM at a site, its final norm with weights far from 1."""
    torch.manual_seed(0)
    options = {**SMALL, **KINDS[kind], "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).eval()
    norm = model.base_model.ln_f if kind == "gpt2" else model.base_model.norm
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        for parameter in norm.parameters():
            parameter.normal_()
    lm = types.SimpleNamespace(
        model=model,
        vocab=V,
        d_model=D,
        options=types.SimpleNamespace(site=site, lm=kind),
        forward=lambda tokens, attention: model(input_ids=tokens, use_cache=False),
    )
    return lm, norm


def by_hand(kind: str, lm, norm, rows):
    weight = norm.weight.double() + (1 if kind.startswith("gemma") else 0)
    rows = rows.double()
    if kind == "gpt2":
        rows = rows - rows.mean(1, keepdim=True)
    logits = (rows * weight) @ lm.model.get_output_embeddings().weight.double().T
    if kind == "granite":
        logits = logits / 3
    return (logits - logits.mean(1, keepdim=True)).detach()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_direct_logits_are_the_product_by_hand(kind, tied, monkeypatch):
    monkeypatch.setattr(direct_logits, "_ROWS", 3)
    monkeypatch.setattr(direct_logits, "_TOKENS", 20)
    lm, norm = build(kind, tied)
    rows = torch.randn(7, D)
    expected = by_hand(kind, lm, norm, rows)
    head = direct_logits.read_head(lm)
    assert (head.capped, head.blocks_after) == (kind == "gemma2", 0)
    torch.testing.assert_close(head.logits(rows).double(), expected, rtol=1e-4, atol=1e-4)
    ends = head.ends(rows, 4)
    up, down = expected.topk(4), (-expected).topk(4)
    assert torch.equal(ends.up_token.long(), up.indices)
    assert torch.equal(ends.down_token.long(), down.indices)
    torch.testing.assert_close(ends.up_value.double(), up.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends.down_value.double(), -down.values, rtol=1e-4, atol=1e-4)
    spread = expected.std(1, correction=0)
    torch.testing.assert_close(ends.spread.double(), spread, rtol=1e-4, atol=1e-4)
    bins = (expected / spread[:, None] * 2).floor().clamp(-16, 15) + 16
    for row, counted in zip(bins.long(), ends.histogram):
        exact = torch.bincount(row, minlength=direct_logits.BINS)
        assert counted.sum() == V and (counted - exact).abs().sum() <= 2  # a logit on an edge


def test_the_blocks_behind_the_site_are_counted():
    for site, after in (("resid_pre.0", 2), ("mlp_out.0", 1), ("resid_mid.1", 0)):
        assert direct_logits.read_head(build("llama", True, site)[0]).blocks_after == after


def test_progress_is_told_before_the_work_and_after_each_block(monkeypatch):
    monkeypatch.setattr(direct_logits, "_ROWS", 2)
    monkeypatch.setattr(direct_logits, "_TOKENS", 16)
    head = direct_logits.read_head(build("llama", True)[0])
    d, blocks = head.unembedding.shape[1], -(-len(head.unembedding) // 16)
    told = []
    with progress.observed(lambda what, done, total: told.append((what, done, total))):
        head.ends(head.unembedding[:5])
    assert {(what, total) for what, _, total in told} == {("direct logits", (5 + d) * blocks)}
    steps = [b[1] - a[1] for a, b in zip(told, told[1:])]
    assert told[0][1] == 0 and steps == [d] * blocks + [2, 2, 1] * blocks


def test_a_row_of_zeros_has_logits_of_zero():
    ends = direct_logits.read_head(build("llama", True)[0]).ends(torch.zeros(1, D), 2)
    assert ends.up_value.tolist() == [[0, 0]] and ends.histogram[0, 16] == V


def test_a_vocabulary_smaller_than_the_list_is_listed_once():
    ends = direct_logits.read_head(build("llama", True)[0]).ends(torch.randn(1, D), 200)
    assert sorted(ends.up_token[0].tolist()) == list(range(V))


@pytest.mark.parametrize(
    ("module", "alias"),
    [
        ("model.layers.0", "resid_post.0"),
        ("layers.1:in", "resid_pre.1"),
        ("model.layers.0.mlp", "mlp_out.0"),
        ("model.layers.1.self_attn", "attn_out.1"),
    ],
)
def test_a_module_in_the_residual_stream_has_the_head_of_its_alias(module, alias):
    named, expected = (direct_logits.read_head(build("llama", True, s)[0]) for s in (module, alias))
    assert named.site == expected.site == alias
    assert named.describe() == expected.describe()


def test_a_module_whose_output_is_normalised_before_it_is_added_is_another_place():
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp' is another place"):
        direct_logits.read_head(build("gemma2", True, "model.layers.0.mlp")[0])


def test_a_site_outside_the_residual_stream_is_refused():
    lm, _ = build("llama", True, "model.layers.0.self_attn.q_proj")
    with pytest.raises(InputError, match="need a site in the residual stream.*is another place"):
        direct_logits.read_head(lm)


def test_a_final_norm_of_another_form_is_refused(monkeypatch):
    lm, norm = build("llama", True)
    monkeypatch.setattr(type(norm), "forward", lambda self, x: torch.tanh(x / 1e3))
    with pytest.raises(InputError, match="neither an RMSNorm nor a LayerNorm"):
        direct_logits.read_head(lm)


def test_an_lm_without_an_unembedding_is_refused(monkeypatch):
    lm, _ = build("llama", True)
    monkeypatch.setattr(type(lm.model), "get_output_embeddings", lambda self: None)
    with pytest.raises(InputError, match="no unembedding"):
        direct_logits.read_head(lm)
