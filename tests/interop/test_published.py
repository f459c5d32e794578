"""Published SAEs: each layout gives the numbers of its makers' formula, by its path and by its name; what is no SAE is named."""

from __future__ import annotations

import collections
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ksparse
from ksparse import cli, interop
from ksparse.errors import CorruptError, InputError
from ksparse.interop import catalog, recognition
from ksparse.interop.foreign import write_safetensors

D, N, K = 6, 20, 4


@pytest.fixture
def w():
    """Weights with the shapes of SAELens, W_enc [d, n] and W_dec [n, d]; decoder rows have norms other than 1."""
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return {
        "W_enc": rand(D, N),
        "b_enc": rand(N) * 0.3,
        "W_dec": rand(N, D),
        "b_dec": rand(D),
        "threshold": rand(N).abs(),
    }


def formula(w, x, act, *, centered=False, scale=1.0):
    """latents and recon: (x scale - [b_dec]) W_enc + b_enc -> act -> (acts W_dec + b_dec) / scale, in float64."""
    w = {key: value.double() for key, value in w.items()}
    x = x.double() * scale - (w["b_dec"] if centered else 0)
    latents = act(x @ w["W_enc"] + w["b_enc"])
    return latents, (latents @ w["W_dec"] + w["b_dec"]) / scale


def jump_relu(threshold):
    return lambda a: a * (a > threshold.double())


def top_k(a, k=K):
    values, indices = a.topk(k)
    return torch.zeros_like(a).scatter(-1, indices, values.relu())


def assert_computes(sae, expected, x):
    with torch.no_grad():
        latents, recon = sae.encode(x).dense(sae.shape.n_latents), sae(x)
    assert (expected[0] > 0).any() and (expected[0] == 0).any()
    for ours, theirs in zip((latents, recon), expected):
        torch.testing.assert_close(
            ours.double(), theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0
        )


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Return a function that gives the folder of a repository in the Hub's cache on this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def folder(repository):
        home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text("0" * 40)
        snapshot = home / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        return snapshot

    return folder


def linear(w, enc="encoder", dec="decoder"):
    return {
        f"{enc}.weight": w["W_enc"].T.contiguous(),
        f"{enc}.bias": w["b_enc"],
        f"{dec}.weight": w["W_dec"].T.contiguous(),
        f"{dec}.bias": w["b_dec"],
    }


def write_json(file, table):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table))


# ---- Gemma Scope ----------------------------------------------------------------------------------


def gemma_2_config(hook, **changes):
    """The keys and values of a published config.json."""
    return {
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "width": N,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
    } | changes


def gemma_scope_2(folder, w, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key.lower(): value for key, value in w.items()}, folder / "params.safetensors")
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize(
    "release, folder, hook, site",
    [
        ("res", "resid_post", "model.layers.9.output", "resid_post.9"),
        (
            "att",
            "attn_out",
            "model.layers.9.self_attn.o_proj.input",
            "model.layers.9.self_attn.o_proj:in",
        ),
        ("mlp", "mlp_out", "model.layers.9.post_feedforward_layernorm.output", "mlp_out.9"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_gemma_scope_2_is_read_by_name(release, folder, hook, site, with_config, w, x, mirror):
    config = gemma_2_config(hook) if with_config else None
    root = mirror("google/gemma-scope-2-270m-pt")
    gemma_scope_2(root / folder / "layer_9_width_16k_l0_medium", w, config)
    sae = ksparse.load(f"gemma-scope-2-270m-pt-{release}/layer_9_width_16k_l0_medium")
    assert_computes(sae, formula(w, x, jump_relu(w["threshold"])), x)
    origin = sae.metadata["origin"]
    assert (origin["lm"], origin["site"], origin["context"], origin["bos"]) == (
        "google/gemma-3-270m",
        site,
        1024,
        "auto",
    )
    assert origin["name"].startswith("gemma-scope-2-270m-pt-")
    assert origin["settings"] == (config or {})


@pytest.mark.parametrize(
    "repository, path, site, lm, by",
    [
        ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", "resid_post.20", "gemma-2-2b", 1),
        ("gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_88", "resid_post.9", "gemma-2-9b-it", 1),
        ("gemma-scope-9b-pt-mlp", "layer_3/width_16k/average_l0_8", "mlp_out.3", "gemma-2-9b", 1),
        ("gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104", "model.layers.0.self_attn.o_proj:in", "gemma-2-2b", 1),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "resid_pre.0", "gemma-2-2b", D**0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope_is_read_in_all_its_kinds(repository, path, site, lm, by, lower, w, x, mirror):
    """Through links, as the Hub's cache has them: the name of what they point to says nothing."""
    root = mirror(f"google/{repository}")
    (root / path).mkdir(parents=True)
    blob = root.parent.parent / "blob.npz"
    np.savez(blob, **{(key.lower() if lower else key): value.numpy() for key, value in w.items()})
    (root / path / "params.npz").symlink_to(blob)
    sae = ksparse.load(root / path)
    w |= {"W_enc": w["W_enc"] / by, "W_dec": w["W_dec"] * by}  # embeddings come times sqrt(d)
    assert_computes(sae, formula(w, x, jump_relu(w["threshold"])), x)
    assert sae.metadata["origin"]["site"] == site
    assert sae.metadata["origin"]["lm"] == f"google/{lm}"


# ---- plain torch files ----------------------------------------------------------------------------


def qwen(file, w, **changes):
    table = {
        "W_enc": w["W_enc"].T.contiguous(),
        "W_dec": w["W_dec"].T.contiguous(),
        "b_enc": w["b_enc"],
        "b_dec": w["b_dec"],
    } | changes
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in table.items() if value is not None}, file)
    return file


@pytest.mark.parametrize("by", ["name", "config"])
def test_qwen_scope_takes_k_from_the_repository_or_from_config_json(by, x, mirror, tmp_path):
    g = torch.Generator().manual_seed(5)
    n = 1024 * 32 if by == "name" else 30
    w = {"W_enc": torch.randn(D, n, generator=g), "W_dec": torch.randn(n, D, generator=g)}
    w |= {"b_enc": torch.randn(n, generator=g), "b_dec": torch.randn(D, generator=g)}
    if by == "name":
        qwen(mirror("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50") / "layer5.sae.pt", w)
        sae = ksparse.load("qwen-scope-3-1.7b-base-w32k-l50/layer5")
        assert sae.metadata["origin"]["lm"] == "Qwen/Qwen3-1.7B-Base"
    else:
        write_json(tmp_path / "config.json", {"k": 7, "hook_point": "resid_post"})
        sae = ksparse.load(qwen(tmp_path / "layer5.sae.pt", w))
        assert sae.metadata["origin"]["settings"] == {"k": 7, "hook_point": "resid_post"}
    k = 50 if by == "name" else 7
    assert sae.shape.k == k and sae.metadata["origin"]["site"] == "resid_post.5"
    assert_computes(sae, formula(w, x[:10], lambda a: top_k(a, k)), x[:10])


@pytest.mark.parametrize(
    "name, repository, file, layers",
    [
        ("goodfire-llama-3.1-8b-instruct/layer_19", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", ("encoder_linear", "decoder_linear")),
        ("goodfire-llama-3.3-70b-instruct/layer_50", "Goodfire/Llama-3.3-70B-Instruct-SAE-l50", "Llama-3.3-70B-Instruct-SAE-l50.pt", ("encoder_linear", "decoder_linear")),
        ("deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post", "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", ("encoder", "decoder")),
    ],
)  # fmt: skip
def test_relu_autoencoders_named_after_their_lm_are_read(
    name, repository, file, layers, w, x, mirror
):
    torch.save(linear(w, *layers), mirror(repository) / file)
    sae = ksparse.load(name)
    assert_computes(sae, formula(w, x, torch.relu), x)
    lm, _, layer = file.rpartition(".")[0].rpartition("-SAE-l")
    assert sae.metadata["origin"]["site"] == f"resid_post.{layer}"
    assert sae.metadata["origin"]["lm"].endswith(f"/{lm}")
    assert sae.metadata["origin"]["lm"] == catalog.find(name).lm


def test_attention_saes_of_2024_are_read_with_the_settings_beside_them(w, x, mirror):
    entry = catalog.find("gpt2-small-hook-z-kk/blocks.0.hook_z")
    root = mirror(entry.repository)
    torch.save({key: value for key, value in w.items() if key != "threshold"}, root / entry.path)
    config = {"act_size": D, "dict_size": N, "act_name": "blocks.0.attn.hook_z", "seq_len": 128}
    write_json(root / entry.path.replace(".pt", "_cfg.json"), config)
    sae = ksparse.load(entry.name)
    assert_computes(sae, formula(w, x, torch.relu, centered=True), x)
    assert sae.metadata["origin"]["site"] == "transformer.h.0.attn.c_proj:in"
    write_json(root / entry.path.replace(".pt", "_cfg.json"), config | {"dict_size": 21})
    with pytest.raises(InputError, match="dict_size is 21, the tensors of .* have 20"):
        ksparse.load(entry.name)


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_files_as_the_code_of_openai_writes_them_are_read(activation, w, x, tmp_path):
    """state_dict() is an OrderedDict with an attribute, and holds another; TopK's own state is in it twice."""
    state = collections.OrderedDict(
        {
            "pre_bias": w["b_dec"],
            "latent_bias": w["b_enc"],
            "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
            "latents_activation_frequency": torch.ones(N),
            "latents_mean_square": torch.zeros(N),
            "encoder.weight": w["W_enc"].T.contiguous(),
            "decoder.weight": w["W_dec"].T.contiguous(),
        }
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    inner = collections.OrderedDict({"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {})
    inner._metadata = collections.OrderedDict({"": {"version": 1}})
    state |= {f"activation.{key}": value for key, value in inner.items()}
    state |= {"activation": activation, "activation_state_dict": inner}
    torch.save(state, tmp_path / "8.pt")
    assert type(torch.load(tmp_path / "8.pt", weights_only=True)["activation_state_dict"]) is (
        collections.OrderedDict
    )
    sae = ksparse.load(tmp_path / "8.pt")
    if activation == "ReLU":
        assert_computes(sae, formula(w, x, torch.relu, centered=True), x)
        return
    mean = x.double().mean(1, keepdim=True)
    deviation = (x.double() - mean).std(1, keepdim=True) + 1e-5
    latents, recon = formula(w, (x - mean) / deviation, top_k, centered=True)
    assert_computes(sae, (latents, recon * deviation + mean), x)


# ---- Llama Scope ----------------------------------------------------------------------------------


def llama_scope_config(**changes):
    return {
        "d_model": D,
        "d_sae": N,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.35546875,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 10.8125, "out": 10.8125},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "top_k": K,
    } | changes


def llama_scope(folder, w, **changes):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(linear(w), folder / "checkpoints" / "final.safetensors")
    write_json(folder / "hyperparams.json", llama_scope_config(**changes))
    return folder


def as_its_library_loads_it(w, x, config):
    """Latents in raw units and reconstruction, in the order of the library's loader: the scale goes into biases,
    then decoder norms into the encoder, then values are compared with the threshold."""
    w = {key: value.double() for key, value in w.items()}
    s = math.sqrt(D) / config["dataset_average_activation_norm"]["in"]
    s = s if config["norm_activation"] == "dataset-wise" else 1.0
    b_enc, b_dec = w["b_enc"] / s, w["b_dec"] / s
    norms = w["W_dec"].norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(N)
    W_enc, b_enc, W_dec = w["W_enc"] * norms, b_enc * norms, w["W_dec"] / norms[:, None]
    x = x.double() - (b_dec if config["apply_decoder_bias_to_pre_encoder"] else 0)
    a = x @ W_enc + b_enc
    if config["act_fn"] == "topk" and config["jump_relu_threshold"] == 0:
        latents = top_k(a)
    elif config["act_fn"] == "relu":
        latents = a.relu()
    else:
        latents = a * (a > config["jump_relu_threshold"])
    return latents * s, latents @ W_dec + b_dec


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"sparsity_include_decoder_norm": False},
        {"norm_activation": "inference"},
        {"act_fn": "topk"},
        {"act_fn": "topk", "jump_relu_threshold": 0.0},
        {"act_fn": "relu"},
    ],
    ids=str,
)
def test_llama_scope_computes_what_its_library_makes_of_the_file(changes, w, x, mirror):
    root = mirror("fnlp/Llama3_1-8B-Base-LXR-8x")
    llama_scope(root / "Llama3_1-8B-Base-L15R-8x", w, **changes)
    sae = ksparse.load("llama_scope_lxr_8x/l15r_8x")
    assert_computes(sae, as_its_library_loads_it(w, x, llama_scope_config(**changes)), x)
    origin = sae.metadata["origin"]
    assert (origin["lm"], origin["site"]) == ("meta-llama/Llama-3.1-8B", "resid_post.15")


@pytest.mark.parametrize("by", ["catalog", "file"])
def test_llama_scope_r1_is_read_with_the_scale_of_the_file_or_of_the_catalog(by, w, x, mirror):
    entry = catalog.find("llama_scope_r1_distill/l0r_800m_slimpajama")
    folder = mirror(entry.repository) / entry.path
    hook = "blocks.0.hook_resid_post"
    state = linear(w) | {"log_jumprelu_threshold": w["threshold"].log()}
    if by == "file":
        state[f"dataset_average_activation_norm.{hook}"] = torch.tensor(0.5)
    config = {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D}
    write_json(folder / "config.json", config | {"act_fn": "jumprelu", "expansion_factor": 4})
    write_safetensors(state, folder / "sae_weights.safetensors")
    sae = ksparse.load(entry.name)
    scale = entry.hints["factor"] if by == "catalog" else math.sqrt(D) / 0.5
    act = lambda a: a * (a * w["W_dec"].double().norm(dim=1) > w["threshold"])
    assert_computes(sae, formula(w, x, act, scale=scale), x)
    if by == "catalog":
        with pytest.raises(InputError, match="lacks the tensor 'dataset_average_activation_norm"):
            ksparse.load(folder)


# ---- SAELens' registry ----------------------------------------------------------------------------


def test_what_the_registry_adds_to_the_files_of_sae_lens_is_used(make_sae, mirror, caplog):
    for name, settings in (
        ("gpt2-small-mlp-tm/blocks.0.hook_mlp_out", {"normalize_activations": "expected_average_only_in"}),
        ("mistral-7b-res-wg/blocks.8.hook_resid_pre", {}),
    ):  # fmt: skip
        entry = catalog.find(name)
        folder = mirror(entry.repository) / entry.path
        interop.write(make_sae("relu"), folder, "sae_lens")
        for extra in ("manifest.json", "ksparse.json"):
            (folder / extra).unlink()
        config = json.loads((folder / "cfg.json").read_text()) | settings
        write_json(folder / "cfg.json", config)
    sae = ksparse.load("gpt2-small-mlp-tm/blocks.0.hook_mlp_out")
    assert (sae.shape.normalize, sae.shape.factor) == ("dataset", pytest.approx(1.0493173))
    assert "whose mean over d_model is 0 (center_writing_weights" in caplog.text
    sae = ksparse.load("mistral-7b-res-wg/blocks.8.hook_resid_pre")
    assert sae.shape.normalize == "constant_norm"


@pytest.mark.parametrize(
    "architecture, kind",
    [
        ("transcoder", "a transcoder"),
        ("jumprelu_skip_transcoder", "a skip transcoder"),
        ("temporal", "a temporal SAE"),
        ("matching_pursuit", "a matching-pursuit SAE"),
        ("abstopk", "an AbsTopK SAE"),
    ],
)
def test_what_sae_lens_has_that_is_no_sae_is_refused_by_name(
    architecture, kind, make_sae, tmp_path
):
    interop.write(make_sae(), tmp_path, "sae_lens")
    (tmp_path / "manifest.json").unlink()
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": architecture}
    write_json(tmp_path / "cfg.json", config)
    with pytest.raises(
        InputError,
        match=f"architecture is '{architecture}'; it is {kind}: its? .*ksparse reads autoencoders",
    ):
        ksparse.load(tmp_path)


# ---- what is wrong ---------------------------------------------------------------------------------

HOOK = "model.layers.9.output"
GEMMA, LLAMA = "google/gemma-scope-2-270m-pt/resid_post/layer_9", "Llama3_1-8B-Base-L15R-8x"
QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "gemma transcoder": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, type="transcoder")), InputError, "type is 'transcoder'; it is a transcoder: it reconstructs another activation"),
    "gemma skip": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, affine_connection=True)), InputError, "is a skip transcoder"),
    "gemma hooks": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, hf_hook_point_out="model.layers.9.mlp.output")), InputError, "hf_hook_point_in and _out differ; it is a transcoder"),
    "gemma crosscoder": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, type="crosscoder")), InputError, "it is a crosscoder: it reads and reconstructs several layers"),
    "gemma type": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, type="lorsa")), InputError, "type is 'lorsa'; ksparse reads 'sae'"),
    "gemma architecture": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, architecture="topk")), InputError, "architecture is 'topk'; ksparse reads 'jump_relu'"),
    "gemma width": (lambda f, w: gemma_scope_2(f, w, gemma_2_config(HOOK, width=21)), InputError, r"width is 21, the tensor b_enc of params.safetensors has shape \[20\]"),
    "gemma key": (lambda f, w: gemma_scope_2(f, {k: v for k, v in w.items() if k != "threshold"}, None), InputError, "params.safetensors lacks the tensor 'threshold'; it has b_dec, b_enc"),
    "gemma shape": (lambda f, w: gemma_scope_2(f, w | {"W_dec": w["W_dec"].T.contiguous()}, None), InputError, r"tensor 'w_dec' has shape \[6, 20\], expected \[n = 20, d = 6\]"),
    "gemma nan": (lambda f, w: gemma_scope_2(f, w | {"b_enc": w["b_enc"] * math.nan}, None), InputError, "tensor 'b_enc' holds NaN or infinity"),
    "gemma cut": (lambda f, w: cut(gemma_scope_2(f, w, None) / "params.safetensors"), CorruptError, "params.safetensors is truncated or damaged"),
    "gemma config": (lambda f, w: (gemma_scope_2(f, w, {}) / "config.json").write_text("{"), CorruptError, "config.json is not JSON"),
    "qwen no k": (lambda f, w: qwen(f / "layer5.sae.pt", w), InputError, "does not say how many latents are active; keep the file in a folder with the name of its repository"),
    "qwen width": (lambda f, w: qwen(f / QWEN / "layer5.sae.pt", w), InputError, "the repository's name says 32768 latents, the tensors have 20"),
    "qwen key": (lambda f, w: qwen(f / "layer5.sae.pt", w, b_dec=None), InputError, "layer5.sae.pt lacks the tensor 'b_dec'; it has W_dec, W_enc, b_enc"),
    "qwen shape": (lambda f, w: qwen(f / "layer5.sae.pt", w, W_dec=w["W_dec"]), InputError, r"tensor 'W_dec' has shape \[20, 6\], expected \[d = 6, n = 20\]"),
    "qwen cut": (lambda f, w: cut(qwen(f / "layer5.sae.pt", w)), CorruptError, "layer5.sae.pt is not a file of torch.save, or is damaged"),
    "goodfire key": (lambda f, w: torch.save({k: v for k, v in linear(w, "encoder_linear", "decoder").items()}, f / "a.pt"), InputError, "lacks the tensor 'decoder_linear.weight'; it has decoder.bias"),
    "llama transcoder": (lambda f, w: llama_scope(f, w, hook_point_out="blocks.15.hook_mlp_out"), InputError, "hook_point_in and hook_point_out differ; it is a transcoder"),
    "llama norms": (lambda f, w: llama_scope(f, w, dataset_average_activation_norm={"in": 64.0, "out": 3.4}), InputError, "the norms of input and output differ; it is a transcoder"),
    "llama norm": (lambda f, w: llama_scope(f, w, dataset_average_activation_norm={"in": 0.0}), InputError, "dataset_average_activation_norm.in is 0.0, expected a number above 0"),
    "llama no norm": (lambda f, w: llama_scope(f, w, dataset_average_activation_norm=None), InputError, "lacks the key 'in'"),
    "llama batch": (lambda f, w: llama_scope(f, w, norm_activation="batch-wise"), InputError, "norm_activation is 'batch-wise'; ksparse reads"),
    "llama glu": (lambda f, w: llama_scope(f, w, use_glu_encoder=True), InputError, "use_glu_encoder is True; ksparse has no such SAE"),
    "llama size": (lambda f, w: llama_scope(f, w, d_sae=21), InputError, "d_sae is 21, the tensors of final.safetensors have 20"),
    "llama weights": (lambda f, w: (llama_scope(f, w) / "checkpoints" / "final.safetensors").unlink(), InputError, "has hyperparams.json, but no weights: expected one of sae_weights.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage, error, message", DAMAGES.values(), ids=list(DAMAGES))
def test_what_is_wrong_with_a_published_file_is_named(damage, error, message, w, tmp_path):
    damage(tmp_path, w)
    place = tmp_path / QWEN if (tmp_path / QWEN).exists() else tmp_path
    with pytest.raises(error, match=message) as caught:
        ksparse.load(place)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "files, message",
    [
        (("conf.yaml", "latest_ckpt.safetensors"), "is a temporal SAE: its code of a token depends on earlier tokens"),
        (("W_enc_0.safetensors", "W_dec_0.safetensors", "config.yaml"), "is a cross-layer transcoder: it reads one layer"),
        (("wandb-config.yaml", "layer_0.safetensors"), "is a transcoder: it reconstructs another activation"),
        (("params_layer_0.safetensors", "config.json"), "is a crosscoder: it reads and reconstructs several layers"),
        (("cfg.json", "readme.md"), r"found cfg.json, readme.md; close to sae_lens \(also needs sae_weights.safetensors\), sparsify \(also needs sae.safetensors\)"),
        (("config.json",), r"close to dictionary_learning \(also needs ae.pt\), gemma_scope \(2\) \(also needs params.safetensors\), llamascopium"),
        (("a.txt",), "holds no SAE: .*found a.txt. docs/interop.md lists"),
        ((), "holds no SAE: .*found nothing"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_named_or_its_files_are_and_what_is_close(
    files, message, tmp_path
):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        ksparse.load(tmp_path)


def test_transcoders_of_gemma_scope_are_told_by_their_repository(w, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_0" / "width_16k" / "average_l0_76"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{key: value.numpy() for key, value in w.items()})
    with pytest.raises(InputError, match="params.npz is a transcoder"):
        ksparse.load(folder)


def test_a_folder_of_several_files_names_them(w, tmp_path):
    for layer in range(3):
        qwen(tmp_path / f"layer{layer}.sae.pt", w)
    with pytest.raises(
        InputError, match="its files layer0.sae.pt, layer1.sae.pt, layer2.sae.pt do: name one"
    ):
        ksparse.load(tmp_path)


def test_every_way_in_which_a_dictionary_is_no_sae_has_a_reason():
    for kind in recognition.OTHER_KINDS:
        assert f"{kind}: it" in str(recognition.refusal("x", kind))


# ---- names -----------------------------------------------------------------------------------------


def test_the_catalog_names_what_the_registry_has():
    releases = catalog.releases()
    assert len(releases) == 170
    names = {f"{name}/{sae}" for name, release in releases.items() for sae, _ in release.entries()}
    assert len(names) == sum(1 for release in releases.values() for _ in release.entries()) == 13857
    read = [release for release in releases.values() if release.kind == "sae"]
    assert all(release.format in interop.READERS for release in read)
    assert sum(1 for release in read for _ in release.entries()) == 10018
    others = {release.kind for release in releases.values()} - {"sae"}
    assert others == {"transcoder", "cross-layer transcoder", "temporal SAE"}


@pytest.mark.parametrize(
    "name, repository, path",
    [
        ("gemma-scope-2-27b-it-res-all/layer_61_width_262k_l0_small", "google/gemma-scope-2-27b-it", "resid_post_all/layer_61_width_262k_l0_small"),
        ("gemma-scope-9b-pt-res-canonical/layer_0/width_16k/canonical", "google/gemma-scope-9b-pt-res", "layer_0/width_16k/average_l0_129"),
        ("llama_scope_lxm_32x/l31m_32x", "fnlp/Llama3_1-8B-Base-LXM-32x", "Llama3_1-8B-Base-L31M-32x"),
        ("gpt2-small-mlp-tm/blocks.0.hook_mlp_out", "tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"),
        ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0_step_308", "canrager/saebench_gemma-2-2b_width-2pow12_date-1109", "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_12_checkpoints/trainer_0_step_308"),
    ],
)  # fmt: skip
def test_a_name_is_a_place_in_a_repository(name, repository, path):
    entry = catalog.find(name)
    assert (entry.repository, entry.path) == (repository, path)


def test_names_that_are_wrong_are_answered_with_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(
        InputError,
        match="has no SAE 'layer_9_width_16k_l0_mediun'; did you mean 'layer_9_width_16k_l0_medium'",
    ):
        ksparse.load("gemma-scope-2-270m-pt-res/layer_9_width_16k_l0_mediun")
    with pytest.raises(
        InputError, match="holds transcoders .*each reconstructs another activation"
    ):
        ksparse.load("gemma-scope-2-270m-pt-transcoders-all/layer_0_width_16k_l0_big")
    assert catalog.find("somebody/small") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "goodfire-llama-3.1-8b-instruct" / "layer_19").mkdir(parents=True)
    assert catalog.find("goodfire-llama-3.1-8b-instruct/layer_19") is None  # a path comes first


def test_a_published_sae_is_converted_by_its_name_and_keeps_it(w, x, mirror, tmp_path):
    root = mirror("google/gemma-scope-2-270m-pt")
    gemma_scope_2(root / "resid_post" / "layer_9_width_16k_l0_medium", w, gemma_2_config(HOOK))
    name = "gemma-scope-2-270m-pt-res/layer_9_width_16k_l0_medium"
    for form in ("ksparse", "sae_lens", "gemma_scope"):
        again = interop.convert(name, tmp_path / form, form)
        assert again.metadata["origin"]["name"] == name
        assert_computes(again, formula(w, x, jump_relu(w["threshold"])), x)


def test_only_the_files_of_one_sae_are_downloaded(w, monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        gemma_scope_2(tmp_path / "resid_post" / "layer_9_width_16k_l0_medium", w, None)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ksparse.load("gemma-scope-2-270m-pt-res/layer_9_width_16k_l0_medium", revision="abc")
    assert asked["repository"] == "google/gemma-scope-2-270m-pt" and asked["revision"] == "abc"
    folder = "resid_post/layer_9_width_16k_l0_medium"
    assert set(asked["allow_patterns"]) == {
        f"{folder}/{name}" for name in ("config.json", "params.safetensors", "params.npz")
    }


@pytest.mark.parametrize(
    "files, refused",
    [
        (["resid_post/a/params.safetensors", "resid_post/b/params.safetensors"], "resid_post/a, resid_post/b"),
        ([f"layer{n}.sae.pt" for n in range(6)], "layer3.sae.pt and 2 more"),
        (["sae.safetensors", "sae.json", "sae_lens/sae_weights.safetensors"], None),
        (["hyperparams.json", "checkpoints/final.safetensors"], None),
        (["8.pt"], None),
    ],
)  # fmt: skip
def test_a_repository_of_many_saes_is_not_downloaded_whole(files, refused, monkeypatch):
    import huggingface_hub

    class Api:
        def list_repo_files(self, repository, revision=None):
            return files

    def snapshot_download(*_, **__):
        raise OSError("the download began")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = (
        f"somebody/many holds many SAEs: .*{refused}; name one" if refused else "the download began"
    )
    with pytest.raises(InputError, match=message):
        ksparse.load("somebody/many")


@pytest.mark.parametrize(
    "values, text",
    [
        (["0", "1", "2"], "0..2"),
        (["0", "1", "5", "6", "7", "a"], "0,1,5..7,a"),
        (["00", "01", "02"], "00,01,02"),
        (["9"], "9"),
    ],
)
def test_ranges_are_written_and_read_again(values, text):
    assert catalog.write_range(values) == text and catalog.read_range(text) == values


def test_patterns_expand_to_products_and_templates_follow_them():
    row = ["l{0..2}_{a,b}", "L{0}/{1}/{0=5,7,9}"]
    release = catalog.Release("r", "o/r", "lm", "sae", [row, ["x"]])
    expected = {
        f"l{n}_{c}": f"L{n}/{c}/{v}"
        for (n, v), c in itertools.product(zip(range(3), (5, 7, 9)), "ab")
    }
    assert dict(release.entries()) == expected | {"x": "x"}


# ---- ksparse list ----------------------------------------------------------------------------------


def test_list_shows_the_releases_that_a_word_describes(capsys):
    cli.main(["list", "GEMMA-3-270M"])
    out = capsys.readouterr().out
    assert "gemma-scope-2-270m-pt-res " in out and "transcoder, not read" in out
    assert "goodfire" not in out and "cc-by-4.0" in out
    cli.main(["list"])
    assert len(capsys.readouterr().out.splitlines()) == 172


def test_list_shows_one_release_whole_and_its_names(capsys):
    cli.main(["list", "qwen-scope-3-1.7b-base-w32k-l50"])
    out = capsys.readouterr().out
    for line in ("LM         Qwen/Qwen3-1.7B-Base", "layers     0..27", "  qwen-scope-3-1.7b-base-w32k-l50/layer{0..27}", "such as    qwen-scope-3-1.7b-base-w32k-l50/layer0"):  # fmt: skip
        assert line in out.splitlines()
    cli.main(["list", "goodfire", "--names", "True"])
    assert capsys.readouterr().out.split() == [
        "goodfire-llama-3.1-8b-instruct/layer_19",
        "goodfire-llama-3.3-70b-instruct/layer_50",
    ]


def test_list_refuses_a_word_that_describes_nothing(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["list", "goodfir-llama"])
    assert end.value.code == 2
    assert "no published SAE is described by 'goodfir-llama'" in capsys.readouterr().err
