"""The site is where its name says, on every architecture; the LM stops there, and goes on with what takes its place."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ksparse.config import ActsConfig, Recipe
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.lm.sites import describe_sites, resolve
from ksparse.planning import plan

KINDS = [
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "gpt_neo",
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "qwen2",
]
PARALLEL = {"gpt_neox"}
BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox_serial": "gpt_neox.layers",
}
FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "gpt_neo": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt_neox_serial": "gpt_neox.final_layer_norm",
}
ATTENTION = {
    "gpt2": "attn",
    "gpt_neo": "attn",
    "gpt_neox": "attention",
    "gpt_neox_serial": "attention",
}
SITES = [
    "resid_pre.0",
    "resid_pre.1",
    "resid_mid.1",
    "resid_post.0",
    "resid_post.1",
    "resid_post.2",
    "attn_out.1",
    "mlp_out.1",
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def lm_at(tiny_lm):
    """Return lm_at(kind, site), made once; only the site differs, so the model is shared."""
    made = {}

    def at(kind, site):
        if kind not in made:
            made[kind] = LM(str(tiny_lm(kind)), "resid_post.0")
        return made[kind].at_site(site)

    return at


def tokens(rows=2, length=9, seed=0):
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def full(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def blocks(model, kind):
    return model.get_submodule(BLOCKS.get(kind, "model.layers"))


def output_of(model, module, ids, at="out"):
    """Return what a module gives, or takes, by a hook of our own."""
    seen = []

    def take(module, args, kwargs, output):
        value = output if at == "out" else args[0] if args else kwargs["hidden_states"]
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = module.register_forward_hook(take, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return seen[0]


@every_kind
def test_resid_aliases_are_the_hidden_states_of_transformers(lm_at, kind):
    model, ids = lm_at(kind, "resid_post.0").model, tokens()
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for number in (0, 1, 2):
        assert torch.equal(lm_at(kind, f"resid_pre.{number}").acts(ids, full(ids)), hidden[number])
        if number < 2:
            assert torch.equal(
                lm_at(kind, f"resid_post.{number}").acts(ids, full(ids)), hidden[number + 1]
            )


@every_kind
def test_the_last_resid_post_is_before_the_final_norm(lm_at, kind):
    """The last of transformers' hidden_states is after it."""
    lm, ids = lm_at(kind, "resid_post.2"), tokens()
    x = lm.acts(ids, full(ids))
    norm = lm.model.get_submodule(FINAL_NORM.get(kind, "model.norm"))
    with torch.no_grad():
        hidden = lm.model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        assert not torch.allclose(x, hidden)
        torch.testing.assert_close(norm(x), hidden)
    assert torch.equal(lm_at(kind, "resid_post.-1").acts(ids, full(ids)), x)


@every_kind
def test_attn_out_and_mlp_out_are_what_is_added_to_the_stream(lm_at, kind):
    """Gemma 2 normalises a module's output before it is added; the others add it as it is."""
    model, ids = lm_at(kind, "resid_post.0").model, tokens()
    block = blocks(model, kind)[1]
    names = (
        ("post_attention_layernorm", "post_feedforward_layernorm")
        if kind == "gemma2"
        else (ATTENTION.get(kind, "self_attn"), "mlp")
    )
    for site, name in zip(("attn_out.1", "mlp_out.1"), names):
        expected = output_of(model, getattr(block, name), ids)
        assert torch.equal(lm_at(kind, site).acts(ids, full(ids)), expected)


@every_kind
def test_resid_mid_is_the_stream_between_attention_and_mlp(lm_at, kind):
    """resid_pre plus what attention adds to it; Gemma 2 normalises that first. With parallel residuals there is no such place."""
    ids = tokens()
    if kind in PARALLEL:
        with pytest.raises(
            InputError,
            match=r"site 'resid_mid\.1' is refused: attention and MLP of its block read the same activations",
        ):
            lm_at(kind, "resid_mid.1")
        return
    model = lm_at(kind, "resid_post.0").model
    block = blocks(model, kind)[1]
    added = output_of(
        model,
        block.post_attention_layernorm
        if kind == "gemma2"
        else getattr(block, ATTENTION.get(kind, "self_attn")),
        ids,
    )
    expected = lm_at(kind, "resid_pre.1").acts(ids, full(ids)) + added
    torch.testing.assert_close(lm_at(kind, "resid_mid.1").acts(ids, full(ids)), expected)


@every_kind
def test_the_parts_sum_up_to_the_whole(lm_at, kind):
    ids = tokens()
    pre, attention, mlp, post = (
        lm_at(kind, f"{name}.1").acts(ids, full(ids))
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    torch.testing.assert_close(pre + attention + mlp, post)
    if kind not in PARALLEL:
        torch.testing.assert_close(lm_at(kind, "resid_mid.1").acts(ids, full(ids)) + mlp, post)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PARALLEL])
def test_a_change_of_resid_mid_reaches_the_mlp_and_the_skip_around_it(lm_at, kind):
    lm, ids = lm_at(kind, "resid_mid.1"), tokens()
    block = blocks(lm.model, kind)[1]
    shift = torch.randn(16, generator=torch.Generator().manual_seed(3))
    reader = {"gpt2": "ln_2", "gpt_neo": "ln_2", "gemma2": "pre_feedforward_layernorm"}.get(
        kind, "post_attention_layernorm"
    )
    mlp = [getattr(block, reader), block.mlp] + (
        [block.post_feedforward_layernorm] if kind == "gemma2" else []
    )
    mid = lm.acts(ids, full(ids))
    for change in (lambda x: x + shift, torch.zeros_like):
        seen = []
        handle = block.register_forward_hook(
            lambda module, args, output: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        lm.run_patched(lm.run_with_cache(ids, full(ids)), change)
        handle.remove()
        with torch.no_grad():
            torch.testing.assert_close(seen[-1], change(mid) + nn.Sequential(*mlp)(change(mid)))


def test_a_module_may_be_named_and_its_input_taken(tiny_lm):
    model, ids = AutoModelForCausalLM.from_pretrained(tiny_lm("gpt2")).eval(), tokens()
    module = model.transformer.h[1].mlp.c_fc
    for site, at in (
        ("transformer.h.1.mlp.c_fc", "out"),
        ("transformer.h.1.mlp.c_fc:out", "out"),
        ("transformer.h.1.mlp.c_fc:in", "in"),
    ):
        lm = LM(str(tiny_lm("gpt2")), site)
        assert torch.equal(lm.acts(ids, full(ids)), output_of(model, module, ids, at))
        assert lm.d_model == (64 if at == "out" else 16)
    llama = LM(str(tiny_lm("llama")), "model.layers.1.mlp.down_proj:in")  # the neurons
    assert llama.d_model == 32
    assert torch.equal(
        llama.acts(ids, full(ids)),
        output_of(llama.model, llama.model.model.layers[1].mlp.down_proj, ids, "in"),
    )


def test_a_module_that_takes_its_input_by_name_can_be_read_and_changed(tiny_lm):
    ids = tokens()
    lm = LM(str(tiny_lm("llama")), "model.layers.1.self_attn:in")
    expected = output_of(lm.model, lm.model.model.layers[1].self_attn, ids, "in")
    assert torch.equal(lm.acts(ids, full(ids)), expected)
    cached = lm.run_with_cache(ids, full(ids))
    assert not torch.allclose(lm.run_patched(cached, torch.zeros_like), cached.logits)


@pytest.mark.parametrize(
    "site",
    [
        "resid_post.3",
        "resid_post.-4",
        "resid_pos.1",
        "resid_post",
        "transformer.h.7",
        "transformer.h.1:up",
        "",
        "1",
    ],
)
def test_an_unknown_site_lists_those_there_are(lm_at, site):
    with pytest.raises(InputError) as caught:
        lm_at("gpt2", site)
    message = str(caught.value)
    assert f"site {site!r} does not exist; there are" in message
    for part in (
        "resid_post.0 … resid_post.2",
        "resid_mid.0 … resid_mid.2",
        "mlp_out.0",
        "transformer.h.I.mlp.c_fc",
        "NAME:in its input",
    ):
        assert part in message


@pytest.mark.parametrize("site", ["transformer", "transformer.h", "lm_head", "transformer.wte:in"])
def test_a_site_that_gives_no_activations_is_refused(tiny_lm, site):
    """The whole model gives no tensor, a list of modules is never called, an embedding takes ids."""
    if site == "lm_head":
        assert LM(str(tiny_lm("gpt2")), site).d_model == 300
        return
    with pytest.raises(InputError, match=f"site '{site}'"):
        LM(str(tiny_lm("gpt2")), site)


def test_rotary_tables_are_no_site(tiny_lm):
    with pytest.raises(InputError, match="site 'model.rotary_emb'"):
        LM(str(tiny_lm("llama")), "model.rotary_emb")


def test_sites_of_a_model_without_blocks_are_its_modules():
    model = nn.Sequential(nn.Linear(2, 2))
    assert "0" in describe_sites(model) or "I" in describe_sites(model)
    assert resolve(model, "0")[:2] == (model[0], "out")
    with pytest.raises(InputError, match="does not exist"):
        resolve(model, "resid_post.0")


# ---- running


@every_kind
def test_what_comes_after_the_site_is_not_computed(tiny_lm, kind):
    lm, ids = LM(str(tiny_lm(kind)), "resid_post.1"), tokens()
    calls = []
    for number, block in enumerate(blocks(lm.model, kind)):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    lm.acts(ids, full(ids))
    assert 2 not in calls and 0 in calls
    lm.run_with_cache(ids, full(ids))
    assert 2 in calls


@pytest.mark.parametrize(
    "kind, site",
    [(kind, site) for kind in KINDS for site in SITES if not (kind in PARALLEL and "mid" in site)],
)
def test_replay_with_the_activations_as_they_are_gives_the_clean_logits(lm_at, kind, site):
    lm, ids = lm_at(kind, site), tokens()
    cached = lm.run_with_cache(ids, full(ids))
    with torch.no_grad():
        clean = lm.model(ids, use_cache=False).logits
    torch.testing.assert_close(cached.logits, clean)
    assert torch.equal(cached.x, lm.acts(ids, full(ids)))
    assert torch.equal(lm.run_patched(cached, lambda x: x), cached.logits)


@pytest.mark.parametrize(
    "kind, site", [(kind, site) for kind in KINDS for site in SITES if "mid" not in site]
)
def test_replay_with_zeros_equals_a_hook_that_gives_zeros(lm_at, kind, site):
    lm, ids = lm_at(kind, site), tokens()
    cached = lm.run_with_cache(ids, full(ids))
    changed = lm.run_patched(cached, torch.zeros_like)
    assert not torch.allclose(changed, cached.logits)

    def zero_out(module, args, output):
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    def zero_in(module, args):
        return (torch.zeros_like(args[0]), *args[1:])

    assert lm.site.scale == 1 and not lm.site.others
    handle = (
        lm.module.register_forward_hook(zero_out)
        if lm.at == "out"
        else lm.module.register_forward_pre_hook(zero_in)
    )
    with torch.no_grad():
        expected = lm.model(ids, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(changed, expected)
    assert torch.equal(lm.run_with_cache(ids, full(ids)).logits, cached.logits), (
        "the LM was left changed"
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neo"])
def test_blocks_before_the_site_are_not_run_again(tiny_lm, kind):
    lm, ids = LM(str(tiny_lm(kind)), "resid_post.1"), tokens()
    cached = lm.run_with_cache(ids, full(ids))
    calls = []
    for number, block in enumerate(blocks(lm.model, kind)):
        block.get_submodule("mlp").register_forward_hook(
            lambda *_, number=number: calls.append(number)
        )
    lm.run_patched(cached, lambda x: x)
    assert calls == [2]
    with pytest.raises(ZeroDivisionError):
        lm.run_patched(cached, lambda x: 1 / 0)
    calls.clear()
    lm.run_with_cache(ids, full(ids))
    assert calls == [0, 1, 2], "after an error the LM must be whole again"


def test_the_edit_sees_float32_whatever_the_lm_computes_in(tiny_lm):
    ids = tokens()
    lm = LM(acts=ActsConfig(lm=str(tiny_lm("llama")), site="resid_post.1", lm_dtype="bfloat16"))
    seen = []
    cached = lm.run_with_cache(ids, full(ids))
    out = lm.run_patched(cached, lambda x: seen.append(x.dtype) or x)
    assert seen == [torch.float32] and torch.equal(out, cached.logits)
    assert lm.acts(ids, full(ids)).dtype == cached.x.dtype == torch.float32
    assert next(lm.model.parameters()).dtype == torch.bfloat16


@every_kind
def test_padding_does_not_change_the_activations_of_the_text(lm_at, kind):
    lm, ids = lm_at(kind, "resid_post.2"), tokens(1, 9)
    padded = torch.cat([ids, torch.full((1, 4), 1)], 1)
    attention = torch.arange(13)[None] < 9
    torch.testing.assert_close(lm.acts(padded, attention)[:, :9], lm.acts(ids, full(ids)))


def test_rows_of_a_batch_do_not_touch_each_other(tiny_lm):
    lm, ids = LM(str(tiny_lm("llama")), "resid_post.2"), tokens(5)
    alone = torch.cat([lm.acts(row[None], full(row[None])) for row in ids])
    torch.testing.assert_close(lm.acts(ids, full(ids)), alone)


def test_a_text_gives_one_row_for_each_of_its_tokens(tiny_lm):
    lm = LM(str(tiny_lm("gpt2")), "resid_post.1")
    x = lm("the cat sat on old hills")
    ids = lm.tokenize("the cat sat on old hills")
    assert ids[0, 0] == 0 and len(x) == ids.shape[1] - 1 == len(
        lm.tokens("the cat sat on old hills")
    )
    assert "".join(lm.tokens("the cat sat")) == "the cat sat"
    assert torch.equal(x, lm.acts(ids, full(ids))[0, 1:])
    bare = LM(acts=ActsConfig(lm=str(tiny_lm("gpt2")), site="resid_post.1", bos="none"))
    assert len(bare("the cat sat on old hills")) == len(x) and not torch.allclose(
        bare("the cat sat on old hills"), x
    )
    without = LM(str(tiny_lm("gpt2", tokenizer={"bos": None})), "resid_post.1")
    assert torch.equal(without("the cat sat on old hills"), bare("the cat sat on old hills"))


def test_a_text_without_tokens_is_refused(tiny_lm):
    with pytest.raises(InputError, match="the text '' has no token"):
        LM(str(tiny_lm("gpt2")), "resid_post.1")("")


def test_activations_can_be_encoded_and_trained_on(tiny_lm):
    """As the package's own example does; a tensor of inference mode may not be saved for a backward pass."""
    from ksparse.sae.model import SAE, Shape

    for normalize in ("none", "unit_norm"):
        sae = SAE(Shape(16, 32, 4, normalize))
        with torch.no_grad():
            sae.W_enc.normal_()
        x = LM(str(tiny_lm("gpt2")), "resid_post.1")("the cat sat")
        (sae(x) - x).square().sum().backward()
        assert sae.W_dec.grad.abs().sum() > 0


def test_the_lm_takes_no_gradient_and_no_dropout(tiny_lm):
    lm = LM(str(tiny_lm("gpt2")), "resid_post.1")
    assert (
        not any(parameter.requires_grad for parameter in lm.model.parameters())
        and not lm.model.training
    )


# ---- loading


def copied(folder, to, *leave_out):
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*leave_out))
    return str(to)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for name in (str(tmp_path / "no"), "./no/such", "a/b/c"):
        with pytest.raises(
            InputError, match=f"model folder {name} does not exist; give a folder with config.json"
        ):
            LM(name)


def test_a_folder_without_config_is_named(tiny_lm, tmp_path):
    with pytest.raises(InputError, match="has no config.json; it is not a Hugging Face model"):
        LM(copied(tiny_lm("gpt2"), tmp_path / "m", "config.json"))


def test_a_folder_without_tokenizer_is_named_and_another_may_be_given(tiny_lm, tmp_path):
    folder = copied(tiny_lm("gpt2"), tmp_path / "m", "tokenizer*", "special*")
    with pytest.raises(InputError, match="has no tokenizer; name one with --acts.tokenizer"):
        LM(folder, "resid_post.1")
    assert (
        LM(acts=ActsConfig(lm=folder, tokenizer=str(tiny_lm("gpt2")), site="resid_post.1")).d_model
        == 16
    )


def test_a_folder_without_weights_is_named(tiny_lm, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as a causal LM"):
        LM(copied(tiny_lm("gpt2"), tmp_path / "m", "*.safetensors"), "resid_post.1")


def test_truncated_weights_are_named(tiny_lm, tmp_path):
    folder = copied(tiny_lm("gpt2"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(InputError, match="cannot be loaded as a causal LM"):
        LM(folder, "resid_post.1")


def test_a_config_that_is_not_json_or_of_no_known_kind_is_named(tiny_lm, tmp_path):
    for number, content in enumerate(("{", '{"model_type": "unheard-of"}')):
        folder = copied(tiny_lm("gpt2"), tmp_path / str(number))
        (tmp_path / str(number) / "config.json").write_text(content)
        with pytest.raises(InputError, match="cannot be loaded as a causal LM"):
            LM(folder, "resid_post.1")


def test_a_damaged_tokenizer_is_named(tiny_lm, tmp_path):
    folder = copied(tiny_lm("gpt2"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(
        InputError, match="tokenizer .* cannot be loaded: .*name another with --acts.tokenizer"
    ):
        LM(folder, "resid_post.1")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tiny_lm):
    small = tiny_lm("gpt2", vocab_size=200)
    with pytest.raises(
        InputError,
        match="gives ids up to 299, the model has 200 embeddings; give the model's own with --acts.tokenizer",
    ):
        LM(str(small), "resid_post.1")


def test_a_name_that_is_not_on_this_machine_is_refused_without_network():
    with pytest.raises(InputError, match="model 'nobody/nothing' cannot be loaded as a causal LM"):
        LM("nobody/nothing")


def test_an_unknown_built_in_model_is_named():
    with pytest.raises(
        InputError, match=r"built-in model '9m' does not exist; there are 0\.3m, 1\.9m, 7\.6m"
    ):
        LM("pylm/9m")


def test_real_stories_model_reads_stories_best(shared_data):
    lm = LM(str(shared_data / "models" / "stories260k"), "resid_post.2")
    assert lm.d_model == 64
    ids = lm.tokenize(
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park."
    )
    logits = lm.run_with_cache(ids, full(ids)).logits
    loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss < 2.0
    assert (
        json.loads((shared_data / "models" / "stories260k" / "config.json").read_text())[
            "vocab_size"
        ]
        == lm.vocab
    )


# ---- weights that are not those of the file


def renamed(folder, to, change):
    """Return a copy of a model whose file holds other tensors."""
    copied(folder, to)
    file = to / "model.safetensors"
    weights = change(load_file(file))
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        file,
        metadata={"format": "pt"},
    )
    return str(to)


def without(*endings):
    return lambda weights: {
        name: value for name, value in weights.items() if not name.endswith(endings)
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
            r"Tensors missing: .* and \d+ more; unknown to the model: _orig_mod\.\S+, .* and \d+ more\. Save the model again",
        ),
        (
            without("layers.1.mlp.down_proj.weight"),
            r"Tensors missing: model\.layers\.1\.mlp\.down_proj\.weight\. Save",
        ),
        (without("lm_head.weight"), r"Tensors missing: lm_head\.weight\. Save"),
        (
            lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)},
            r"Tensors unknown to the model: model\.layers\.0\.self_attn\.q_proj\.bias\. Save",
        ),
        (
            lambda weights: weights | {"model.layers.3.mlp.down_proj.weight": torch.zeros(16, 32)},
            r"Tensors unknown to the model: model\.layers\.3\.mlp\.down_proj\.weight\. Save",
        ),
        (
            lambda weights: weights | {"model.norm.weight": torch.zeros(8)},
            r"Tensors of another shape: model\.norm\.weight\. Save",
        ),
    ],
    ids=["orig_mod", "one", "head", "bias", "layer", "shape"],
)
def test_an_lm_whose_weights_do_not_fit_its_file_is_refused_by_their_names(
    tiny_lm, tmp_path, change, message
):
    folder = renamed(tiny_lm("llama", tie_word_embeddings=False), tmp_path / "m", change)
    with pytest.raises(InputError, match=message):
        LM(folder, "resid_post.1")


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize(
    "dtype, name", [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64")]
)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_weights_that_are_no_real_numbers_are_refused(tiny_lm, tmp_path, dtype, name, prefix):
    def change(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
        return {key.replace("model.", prefix, 1): value for key, value in weights.items()}

    folder = renamed(tiny_lm("llama"), tmp_path / "m", change)
    message = rf"{prefix}norm\.weight in model\.safetensors is of {name}, not of real numbers"
    with pytest.raises(InputError, match=message):
        LM(folder, "resid_post.1")


def test_weights_of_another_precision_are_read(tiny_lm, tmp_path):
    folder = renamed(
        tiny_lm("llama"),
        tmp_path / "m",
        lambda weights: {key: value.double() for key, value in weights.items()},
    )
    expected = LM(str(tiny_lm("llama")), "resid_post.1")("the cat")
    assert torch.equal(LM(folder, "resid_post.1")("the cat"), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_not_left_out_in_silence(tiny_lm, tmp_path, whole):
    folder = tmp_path / "m"
    copied(tiny_lm("llama"), folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (folder / "config.json").unlink()
    with pytest.raises(InputError, match="holds an adapter .* merge it into its LM"):
        LM(str(folder), "resid_post.1")


def test_parts_that_a_causal_lm_does_not_have_are_left_out_with_a_word(tiny_lm, tmp_path, caplog):
    folder = renamed(
        tiny_lm("llama"),
        tmp_path / "m",
        lambda weights: weights | {"vision_tower.patch.weight": torch.zeros(2, 2)},
    )
    with caplog.at_level("WARNING", logger="ksparse"):
        assert LM(folder, "resid_post.1").d_model == 16
    assert "which are left out: vision_tower.patch.weight" in caplog.text


def test_a_tied_head_is_not_missing(tiny_lm, tmp_path):
    folder = renamed(
        tiny_lm("llama", tie_word_embeddings=True), tmp_path / "m", without("lm_head.weight")
    )
    assert LM(folder, "resid_post.1").d_model == 16


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
    ],
    ids=lambda method: method["quant_method"],
)
def test_a_quantised_lm_whose_package_is_missing_is_one_line(tiny_lm, tmp_path, method):
    folder = copied(tiny_lm("llama"), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": method}))
    with pytest.raises(InputError, match="cannot be loaded as a causal LM: [^\n]+$"):
        LM(folder, "resid_post.1")


@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_the_model_runs_only_if_this_call_says_so(tiny_lm, tmp_path, allowed):
    folder = copied(tiny_lm("llama"), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text())
            | {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"},
            }
        )
    )
    (tmp_path / "m" / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\nclass OwnLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    if allowed:
        assert (
            LM(folder, "resid_post.1", trust_remote_code=True).d_model == 16
            and (tmp_path / "ran").exists()
        )
    else:
        with pytest.raises(InputError, match="cannot be loaded .*give --trust-remote-code True"):
            LM(folder, "resid_post.1")
        assert not (tmp_path / "ran").exists()


# ---- lengths and beginnings


def test_a_context_longer_than_the_lm_takes_is_refused_before_any_work(tiny_lm):
    """GPT-2's table of positions ends there; others would compute positions they were never trained on."""
    for kind in ("gpt2", "llama"):
        with pytest.raises(
            InputError,
            match=r"acts.context is 129 tokens long, but .* takes at most 128; give a shorter --acts.context",
        ):
            LM(acts=ActsConfig(lm=str(tiny_lm(kind)), site="resid_post.1", context=129))
        lm = LM(acts=ActsConfig(lm=str(tiny_lm(kind)), site="resid_post.1", context=128))
        for call in (
            lambda: lm("the cat " * 100),
            lambda: lm.acts(*(torch.ones(1, 129, dtype=torch.long),) * 2),
        ):
            with pytest.raises(
                InputError,
                match="(a context|the text) is .* tokens long, but .* takes at most 128; give a shorter one",
            ):
                call()


def test_a_text_longer_than_acts_context_has_a_word_once(tiny_lm, caplog):
    lm = LM(acts=ActsConfig(lm=str(tiny_lm("llama")), site="resid_post.1", context=8))
    with caplog.at_level("WARNING", logger="ksparse"):
        assert len(lm("the cat sat")) < 8 and not caplog.records
        lm("the cat sat on a mat and saw two black dogs")
        lm("the cat sat on a mat and saw two black dogs")
    assert len(caplog.records) == 1 and "is longer than acts.context, 8" in caplog.text


def test_a_text_that_begins_with_bos_gets_no_second_one(tiny_lm):
    lm = LM(str(tiny_lm("gpt2")), "resid_post.1")
    text = "the cat sat on old hills"
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    rendered = lm.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert rendered != text and torch.equal(lm.tokenize(rendered), lm.tokenize(text))
    assert torch.equal(lm(rendered), lm(text)) and lm.tokens(rendered) == lm.tokens(text)


@pytest.mark.parametrize("text", [["the", "cat"], 3, None])
def test_a_text_is_a_str(tiny_lm, text):
    with pytest.raises(InputError, match="a text is a str, got"):
        LM(str(tiny_lm("gpt2")), "resid_post.1")(text)


def test_half_a_character_in_a_prompt_is_read_as_ufffd_and_told(tiny_lm, caplog):
    lm = LM(str(tiny_lm("gpt2")), "resid_post.1")
    assert torch.equal(lm("a \ud83d b"), lm("a \ufffd b")) and torch.equal(
        lm("\ud83d\ude00"), lm("\U0001f600")
    )
    assert [record.getMessage() for record in caplog.records if "half" in record.getMessage()] == [
        "the text holds half a character (a lone surrogate), which is read as U+FFFD"
    ] * 2


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"num_hidden_layers": 10**7}, r"says 10,000,000 layers, more than the 10,000"),
        ({"vocab_size": 2**30}, r"describes [\d,]{14,} parameters, its weights are [\d,]+ bytes"),
        ({"intermediate_size": 2**36}, r"describes [\d,]+ parameters, its weights are"),
        ({"hidden_size": 2**40}, r"none can be made of its config|describes [\d,]+ parameters"),
        ({"hidden_act": "odd"}, r"none can be made of its config: KeyError 'odd'"),
        ({"num_attention_heads": -2}, r"none can be made of its config"),
    ),
)
def test_a_config_that_its_weights_cannot_be_of_is_refused_before_memory_is_taken(
    tiny_lm, tmp_path, monkeypatch, changes, message
):
    shutil.copytree(tiny_lm("llama"), tmp_path / "lm")
    file = tmp_path / "lm" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # it would take the memory
    with pytest.raises(InputError, match=message):
        LM(str(tmp_path / "lm"), "resid_post.1")
    with contextlib.suppress(InputError):  # a plan of what is too large for here is no error
        plan.read_lm_spec(Recipe(acts=ActsConfig(lm=str(tmp_path / "lm"), site="resid_post.1")))
