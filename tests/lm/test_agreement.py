"""An LM whose passes do not agree is refused, or read only, or run the long way: never believed."""

import logging
import types

import pytest
import torch
import transformers as T

from ksparse.errors import InputError
from ksparse.lm import agreement
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape
from ksparse.steering import attach


def tokens():
    return torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def full(ids):
    return torch.ones_like(ids, dtype=torch.bool)


@pytest.fixture
def saved(tmp_path, tiny_lm):
    """Return saved(model): the folder of a model, with the tokenizer of the tiny LMs."""

    def save(model):
        model.save_pretrained(tmp_path / "lm")
        T.AutoTokenizer.from_pretrained(tiny_lm("gpt2")).save_pretrained(tmp_path / "lm")
        return str(tmp_path / "lm")

    return save


def test_an_encoder_is_no_causal_lm(saved):
    torch.manual_seed(0)
    folder = saved(
        T.BertLMHeadModel(
            T.BertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                vocab_size=300,
            )
        )
    )
    with pytest.raises(
        InputError,
        match="is not a causal LM: its activations of a token change with the token after it",
    ):
        LM(folder, "resid_post.0")


def test_keys_and_values_that_later_blocks_share_are_not_left_out(tiny_lm, caplog):
    """As in Gemma 3n: block 2 reads what a part of block 0 has kept, which a block that is left out does not keep."""
    lm = LM(str(tiny_lm("llama")), "resid_post.1")
    first, last = lm.model.model.layers[0], lm.model.model.layers[2]
    kept = []
    first.mlp.register_forward_hook(lambda module, args, output: kept.append(output))
    last.register_forward_hook(lambda module, args, output: output + kept.pop())
    with caplog.at_level(logging.WARNING, logger="ksparse"):
        again = lm.at_site("resid_post.1")
    assert (
        "skipping the blocks before the site changes what comes after it (" in caplog.text
        and "they are run again" in caplog.text
    )
    ids = tokens()
    cached = again.run_with_cache(ids, full(ids))
    assert torch.equal(again.run_patched(cached, lambda x: x), cached.logits)
    assert again.skippable == [] and again.read_only_reason == ""


def test_a_site_whose_changes_do_not_arrive_can_be_read_but_not_changed(tiny_lm):
    lm = LM(str(tiny_lm("llama")), "resid_post.1")
    aside = torch.nn.Linear(16, 8)
    lm.model.model.layers[1].aside = aside
    lm.model.model.layers[1].register_forward_hook(
        lambda module, args, output: (aside(output), None)[1]
    )
    reading = lm.at_site("model.layers.1.aside")
    ids = tokens()
    assert reading.acts(ids, full(ids)).shape == (2, 9, 8)
    for call in (
        lambda: reading.run_patched(reading.run_with_cache(ids, full(ids)), torch.zeros_like),
        lambda: reading.branch_from(ids, full(ids), 2, 3),
    ):
        with pytest.raises(
            InputError,
            match="can be read but not changed: a change there does not reach the logits; choose another",
        ):
            call()


def test_a_module_that_runs_twice_in_a_pass_is_refused(tiny_lm):
    lm = LM(str(tiny_lm("llama")), "resid_post.1")
    block = lm.model.model.layers[1]
    forward = block.forward
    block.mlp.register_forward_hook(lambda module, args, output: None)
    block.forward = types.MethodType(
        lambda self, x, *args, **kwargs: forward(forward(x, *args, **kwargs), *args, **kwargs),
        block,
    )
    with pytest.raises(
        InputError, match=r"site 'model.layers.1.mlp' of .* runs 2 times in one pass"
    ):
        lm.at_site("model.layers.1.mlp")


@pytest.mark.parametrize(
    "name, config",
    [
        (
            "mixtral",
            T.MixtralConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=300,
                num_local_experts=4,
            ),
        ),
    ],
)
def test_a_place_without_contexts_and_tokens_is_refused_as_a_site_and_under_an_sae(
    saved, name, config
):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config)
    where = {"mixtral": "model.layers.1.mlp.gate"}[name]
    folder = saved(model)
    with pytest.raises(
        InputError, match=f"site '{where}' of .* gives a tensor of shape .*, not activations"
    ):
        LM(folder, where)
    with (
        attach(model, SAE(Shape(16, 20, 2, "none")), where, positions="all"),
        pytest.raises(InputError, match=f"site '{where}' gives a tensor"),
    ):
        model(tokens())


def test_activations_that_are_not_finite_are_left_to_whoever_uses_them(tiny_lm):
    lm = LM(str(tiny_lm("llama")), "resid_post.1")
    lm.model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    assert lm.at_site("resid_post.1").read_only_reason == ""


def test_the_rows_that_are_compared_differ_in_their_last_token_alone(tiny_lm):
    lm = LM(str(tiny_lm("gpt2")), "resid_post.1")
    ids = agreement.probe_tokens(lm)
    assert (
        ids.shape == (2, 8) and torch.equal(ids[0, :-1], ids[1, :-1]) and ids[0, -1] != ids[1, -1]
    )
