"""An LM is loaded as it is stored, in the precision that its device calls for, or refused in one clear line."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as T

from ksparse import cli
from ksparse.config import ActsConfig, Recipe, from_dict, to_dict
from ksparse.errors import InputError
from ksparse.lm.loading import resolve_dtype
from ksparse.lm.model import LM
from ksparse.steering import continue_text

from ..conftest import build_tokenizer
from .architectures import check_generation, same

TRUSTED = {"trust_remote_code": False}


def has(package):
    return importlib.util.find_spec(package) is not None


def with_config(folder, copy, **changes):
    shutil.copytree(folder, copy)
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copy


# ---- precision


@pytest.mark.parametrize("device, expected", [("cpu", "float32"), ("cuda", "bfloat16")])
def test_the_stored_precision_is_the_default_on_a_gpu_and_float32_on_a_cpu(
    tiny_lm, tmp_path, device, expected
):
    folder = with_config(tiny_lm("llama"), tmp_path / "m", dtype="bfloat16")
    acts = ActsConfig(lm=str(folder), site="resid_post.1")
    assert acts.lm_dtype == "auto" and resolve_dtype(acts, device, TRUSTED).lm_dtype == expected
    asked = ActsConfig(lm=str(folder), site="resid_post.1", lm_dtype="float16")
    assert resolve_dtype(asked, device, TRUSTED) == asked


def test_a_precision_that_cannot_be_computed_in_is_read_as_float32(tiny_lm, tmp_path):
    folder = with_config(tiny_lm("llama"), tmp_path / "m", dtype="float64")
    assert resolve_dtype(ActsConfig(lm=str(folder)), "cuda", TRUSTED).lm_dtype == "float32"


def test_an_lm_says_in_which_precision_it_runs(tiny_lm):
    assert LM(str(tiny_lm("llama")), "resid_post.1").options.lm_dtype == "float32"


def test_recipes_keep_the_names_they_had_before_precision_followed_the_device():
    fingerprint = Recipe().fingerprint()["acts"]
    assert fingerprint["lm_dtype"] == "float32"
    assert not {"lm_device_map", "lm_quantize"} & set(fingerprint)
    assert Recipe(ActsConfig(lm_quantize="8bit")).fingerprint()["acts"]["lm_quantize"] == "8bit"
    assert from_dict(to_dict(Recipe())) == Recipe()


# ---- folders and files


def test_a_folder_may_be_a_path(tiny_lm):
    assert LM(Path(tiny_lm("llama")), "resid_post.1").d_model == 16


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/tmp/model.safetensors"])
def test_an_index_of_weights_that_leads_out_of_its_folder_is_refused(tiny_lm, tmp_path, name):
    folder = with_config(tiny_lm("llama"), tmp_path / "m")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="names the file .* not in the folder itself"):
        LM(str(folder), "resid_post.1")


@pytest.mark.skipif(has("gguf"), reason="the package gguf is there")
def test_a_gguf_file_without_its_package_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"is a GGUF file.*pip install 'ksparse\[gguf\]'$"):
        LM(str(tmp_path / "model.gguf"), "resid_post.1")


def write_gguf(model, file, kind):
    """Write a Llama as llama.cpp's converter does, its matrices of a quantized type."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, x in model.state_dict().items():
        x = x.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp's order of rotary pairs
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            pairs = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
            x = pairs.swapaxes(1, 2).reshape(x.shape)
        is_matrix = x.ndim == 2 and kind != "F32"
        type_ = gguf.GGMLQuantizationType[kind] if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, (".weight",)),
            gguf.quants.quantize(x, type_) if is_matrix else x,
            raw_dtype=type_,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(not has("gguf"), reason="needs the package gguf")
@pytest.mark.parametrize("kind, limit", [("F32", 1e-5), ("Q8_0", 0.02)])
def test_a_gguf_file_is_read_as_the_lm_it_was_made_of(tmp_path, caplog, kind, limit):
    torch.manual_seed(0)
    config = T.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
    )
    model = T.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "folder")
    build_tokenizer(tmp_path / "folder")
    write_gguf(model, tmp_path / "model.gguf", kind)
    acts = ActsConfig(
        lm=str(tmp_path / "model.gguf"), tokenizer=str(tmp_path / "folder"), site="resid_post.1"
    )
    with caplog.at_level("INFO"):
        lm = LM(acts=acts)
    original = LM(str(tmp_path / "folder"), "resid_post.1")
    x, y = lm("the cat sat on a mat"), original("the cat sat on a mat")
    assert float((x - y).norm() / y.norm()) < limit
    told = [r.getMessage() for r in caplog.records if "dequantized to float32" in r.getMessage()]
    assert bool(told) == (kind != "F32") and all("tensors of Q8_0" in text for text in told)


# ---- quantized, and larger than one device


METHODS = {
    "bitsandbytes": {"load_in_8bit": True},
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "fp8": {"weight_block_size": [8, 8]},
    "mxfp4": {},
}
NEEDS = {"bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "awq": "gptqmodel"}


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_folder_whose_package_is_missing_is_one_line_that_names_one(
    tiny_lm, tmp_path, method
):
    if has(NEEDS.get(method, "accelerate")):
        pytest.skip("the package is there")
    quantization = {"quant_method": method, **METHODS[method]}
    folder = with_config(tiny_lm("llama"), tmp_path / "m", quantization_config=quantization)
    with pytest.raises(InputError, match="cannot be loaded as a causal LM: [^\n]*install") as error:
        LM(str(folder), "resid_post.1")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(has("accelerate"), reason="the package accelerate is there")
@pytest.mark.parametrize("options", [{"lm_device_map": "auto"}, {"lm_quantize": "4bit"}])
def test_spreading_or_quantizing_without_the_packages_is_one_line(tiny_lm, options):
    acts = ActsConfig(lm=str(tiny_lm("llama")), site="resid_post.1", **options)
    with pytest.raises(InputError, match=r"needs the package accelerate.*'ksparse\[large\]'$"):
        LM(acts=acts)


@pytest.mark.skipif(not has("accelerate"), reason="needs the package accelerate")
def test_an_lm_spread_over_devices_gives_the_same(tiny_lm):
    folder = str(tiny_lm("llama"))
    spread = LM(acts=ActsConfig(lm=folder, site="resid_post.1", lm_device_map="auto"))
    same(spread("the cat"), LM(folder, "resid_post.1")("the cat"), "another LM")


@pytest.mark.skipif(not has("bitsandbytes"), reason="needs the package bitsandbytes")
@pytest.mark.parametrize("bits, limit", [("8bit", 0.1), ("4bit", 0.4)])
def test_an_lm_is_quantized_on_request_and_read_again_as_it_was_saved(
    tiny_lm, tmp_path, caplog, bits, limit
):
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_key_value_heads": 2}
    folder = tiny_lm("llama", **wide)
    with caplog.at_level("INFO"):
        lm = LM(acts=ActsConfig(lm=str(folder), site="resid_post.1", lm_quantize=bits))
    assert "runs quantized" in caplog.text
    x, y = lm("the cat sat"), LM(str(folder), "resid_post.1")("the cat sat")
    assert 0 < float((x - y).norm() / y.norm()) < limit
    lm.model.save_pretrained(tmp_path / "q")
    build_tokenizer(tmp_path / "q")
    same(LM(str(tmp_path / "q"), "resid_post.1")("the cat sat"), x, "another LM")
    with pytest.raises(InputError, match="stored quantized"):
        LM(acts=ActsConfig(lm=str(tmp_path / "q"), site="resid_post.1", lm_quantize=bits))


# ---- positions and generation


def test_positions_behind_that_of_padding_count_for_the_longest_context(tmp_path):
    config = T.RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        is_decoder=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    T.RobertaForCausalLM(config).save_pretrained(tmp_path)
    build_tokenizer(tmp_path)
    lm = LM(acts=ActsConfig(lm=str(tmp_path), site="resid_post.0", context=16))
    assert lm.context == 18
    with pytest.raises(InputError, match="19 tokens long, but .* takes at most 18"):
        lm.acts(torch.full((1, 19), 5), torch.ones(1, 19, dtype=torch.bool))
    with pytest.raises(InputError, match="takes 18"):
        continue_text(lm, "the cat sat on a mat", tokens=15)
    assert check_generation(lm) in ("exact",) or "takes 18" in check_generation(lm)


@pytest.mark.parametrize(
    "kind, changes",
    [("gemma2", {}), ("mistral", {"sliding_window": 4}), ("gpt_neo", {})],
)
def test_steered_generation_behind_a_full_window_equals_whole_passes(tiny_lm, kind, changes):
    assert check_generation(LM(str(tiny_lm(kind, **changes)), "resid_post.1")) == "exact"


@pytest.mark.parametrize("temperature", [1e-300, float("inf"), float("nan"), -1.0])
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(tiny_lm, temperature):
    lm = LM(str(tiny_lm("gpt2")), "resid_post.1")
    with pytest.raises(InputError, match="temperature is .*must be 0"):
        continue_text(lm, "the", temperature=temperature)


# ---- an LM that nothing was tuned for


@pytest.fixture
def qwen(tmp_path):
    """A tiny Qwen2 as it is published: tied embeddings, bfloat16, no BOS, ids beyond the tokenizer's."""
    config = T.Qwen2Config(
        vocab_size=151_936,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    T.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "qwen")
    build_tokenizer(tmp_path / "qwen", bos=None)
    return tmp_path / "qwen"


def test_a_qwen2_is_trained_on_judged_and_steered_by_the_same_commands(
    qwen, tmp_path, text_file, capsys
):
    run = tmp_path / "run"
    cli.main(
        ["train", "--acts.lm", str(qwen), "--acts.site", "resid_post.1"]
        + ["--acts.text", str(text_file), "--acts.context", "16", "--acts.mix", "512"]
        + ["--acts.lm-batch", "4", "--sae.n-latents", "64", "--sae.k", "4"]
        + ["--tokens", "2048", "--batch", "256", "--run.device", "cpu", "--out", str(run)]
    )
    recipe = (run / "recipe.toml").read_text()
    assert 'lm_dtype = "float32"' in recipe
    cli.main(["eval", str(run), "downstream", "stats", "--tokens", "500", "--lm-batch", "4"])
    result = json.loads((run / "evals" / "downstream.json").read_text())
    assert result
    capsys.readouterr()
    cli.main(["steer", str(run), "--latent", "3", "--value", "2", "--prompt", "the cat"])
    assert "the cat" in capsys.readouterr().out
