"""Logits computed a few positions at a time are those of a whole pass, on heads of every kind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ksparse import limits
from ksparse.lm import agreement
from ksparse.lm.head import Logits, run_base

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
HEADS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gpt_neox": {"rotary_pct": 1.0},
}


@pytest.fixture(params=HEADS)
def model(request):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**{**SMALL, **HEADS[request.param]})
    return AutoModelForCausalLM.from_config(config).eval()


def test_logits_in_slices_are_those_of_a_whole_pass(model, monkeypatch):
    tokens = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        logits = Logits(model, run_base(model, input_ids=tokens, use_cache=False), 97)
        logits._rows = 2
        torch.testing.assert_close(logits.full(), expected)
        rows = logits.at(mask)
        parts = [rows[part] for part in rows.slices()]
    torch.testing.assert_close(torch.cat(parts), expected[mask].float())
    assert max(len(part) for part in parts) == 2 and len(rows) == int(mask.sum())


def test_the_slices_of_a_large_vocabulary_fit_into_the_budget(model):
    rows = Logits(model, torch.zeros(1, 1, 1), 262_144)._rows
    assert 100 < rows and rows * 262_144 * 4 * limits.LOGITS_COPIES <= limits.LOGITS_BYTES


def test_a_head_that_cannot_run_alone_is_noticed_and_whole_logits_are_kept(tiny_lm, monkeypatch):
    from ksparse.lm import head
    from ksparse.lm.model import LM

    def wrong(model, kind, hidden):
        return run_head(model, kind, hidden.roll(1, -1))

    run_head = head.run_head
    monkeypatch.setattr(head, "run_head", wrong)
    lm = LM(str(tiny_lm()), site="resid_post.0")
    assert not lm.head_runs_alone
    tokens = agreement.probe_tokens(lm)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    with torch.inference_mode():
        expected = lm.forward(tokens, attention).logits
    torch.testing.assert_close(lm.run_with_cache(tokens, attention).logits, expected)
