"""Small SAEs in the layouts of published releases, and what SAELens' own loaders make of them.

python formats_published.py FOLDER

FOLDER/hub is laid out as the Hub's cache, so that both libraries load by a release's name. For each name FOLDER/expected/N.npz has x, latents, recon;
FOLDER/names.json the names. Tensors are random, d 6; the layouts follow the registry's loaders, those of dictionary_learning are its classes' own state.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

if (
    importlib.util.find_spec("nnsight") is None
):  # dictionary_learning imports it, and its classes of SAEs do not need it
    sys.modules["nnsight"] = mock.MagicMock()
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading import pretrained_saes_directory as directory
from sae_lens.registry import get_sae_class
from safetensors.torch import save_file

D, N, K, ROWS = 6, 40, 5, 300
REVISION = "0" * 40


def weights(n: int = N) -> dict[str, torch.Tensor]:
    """W_enc [d, n], W_dec [n, d] with rows of norm 1, biases, thresholds."""
    W_dec = torch.randn(n, D)
    return {
        "W_enc": torch.randn(D, n),
        "b_enc": torch.randn(n) * 0.3,
        "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
        "b_dec": torch.randn(D),
        "threshold": torch.rand(n),
    }


def gemma_scope_2(folder: Path, path: str, config: dict | None) -> None:
    save_file(
        {key.lower(): value for key, value in weights().items()},
        made(folder / path) / "params.safetensors",
    )
    if config is not None:
        common = {
            "width": N,
            "model_name": "google/gemma-3-270m-pt",
            "architecture": "jump_relu",
            "l0": 60,
            "affine_connection": False,
            "type": "sae",
        }
        (folder / path / "config.json").write_text(json.dumps(common | config))


def gemma_scope(folder: Path, path: str, lower: bool = False) -> None:
    arrays = {
        ("w" + key[1:] if lower and key[0] == "W" else key): value.numpy()
        for key, value in weights().items()
    }
    np.savez(made(folder / path) / "params.npz", **arrays)


def qwen_scope(folder: Path, path: str) -> None:
    w = weights(32768)
    torch.save(
        {
            "W_enc": w["W_enc"].T.contiguous(),
            "W_dec": w["W_dec"].T.contiguous(),
            "b_enc": w["b_enc"],
            "b_dec": w["b_dec"],
        },
        made(folder) / path,
    )


def linear(folder: Path, path: str, names: tuple[str, str]) -> None:
    w, (enc, dec) = weights(), names
    state = {
        f"{enc}.weight": w["W_enc"].T.contiguous(),
        f"{enc}.bias": w["b_enc"],
        f"{dec}.weight": w["W_dec"].T.contiguous(),
        f"{dec}.bias": w["b_dec"],
    }
    torch.save(state, made(folder) / path)


def hook_z(folder: Path, path: str) -> None:
    w = weights()
    w.pop("threshold")
    torch.save(w, made(folder) / path)
    (folder / path.replace(".pt", "_cfg.json")).write_text(
        json.dumps(
            {"act_size": D, "dict_size": N, "act_name": "blocks.0.attn.hook_z", "seq_len": 128}
        )
    )


def llama_scope(folder: Path, path: str) -> None:
    w = weights()
    state = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder.bias": w["b_dec"],
    }
    save_file(state, made(folder / path / "checkpoints") / "final.safetensors")
    norm = {"in": 1.7, "out": 1.7}
    config = {
        "d_model": D,
        "d_sae": N,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "act_fn": "jumprelu",
    }
    config |= {
        "jump_relu_threshold": 0.35546875,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": norm,
        "top_k": 50,
    }
    config |= {
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
    }
    (folder / path / "hyperparams.json").write_text(json.dumps(config))


def llama_scope_r1(folder: Path, path: str) -> None:
    w = weights(4 * D)
    state = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder.bias": w["b_dec"],
    }
    save_file(
        state | {"log_jumprelu_threshold": w["threshold"].log()},
        made(folder / path) / "sae_weights.safetensors",
    )
    hook = "blocks.0.hook_resid_post"
    config = {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D,
        "expansion_factor": 4,
        "act_fn": "jumprelu",
    }
    config |= {
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "top_k": 50,
    }
    (folder / path / "config.json").write_text(json.dumps(config))


def sae_lens(folder: Path, path: str, architecture: str, config: dict) -> None:
    w = weights()
    if architecture != "jumprelu":
        w.pop("threshold")
    save_file(w, made(folder / path) / "sae_weights.safetensors")
    common = {
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "model_name": "gpt2-small",
        "hook_name": "blocks.0.hook_mlp_out",
        "architecture": architecture,
    }
    (folder / path / "cfg.json").write_text(json.dumps(common | config))


def dictionary_learning(folder: Path, path: str, sae: torch.nn.Module) -> None:
    with torch.no_grad():
        for key, value in sae.state_dict().items():
            if key not in ("k", "threshold", "group_sizes"):
                value.copy_(torch.randn(value.shape))
        if hasattr(sae, "W_dec"):
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if hasattr(sae, "decoder"):
            sae.decoder.weight /= sae.decoder.weight.norm(dim=0)
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.rand(sae.threshold.shape))
    torch.save(sae.state_dict(), made(folder / path) / "ae.pt")
    trainer = {
        "dict_class": type(sae).__name__,
        "activation_dim": D,
        "dict_size": N,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "k": K,
    }
    trainer["submodule_name"] = "resid_post_layer_3"
    (folder / path / "config.json").write_text(
        json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}})
    )


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


OUTPUT = {"hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output"}
Z = {
    "hf_hook_point_in": "model.layers.9.self_attn.o_proj.input",
    "hf_hook_point_out": "model.layers.9.self_attn.o_proj.input",
}
MADE = {
    "gemma-scope-2-270m-pt-res/layer_9_width_16k_l0_medium": (gemma_scope_2, OUTPUT),
    "gemma-scope-2-270m-pt-att/layer_9_width_16k_l0_medium": (gemma_scope_2, Z),
    "gemma-scope-2-270m-pt-mlp-all/layer_9_width_16k_l0_big": (gemma_scope_2, None),
    "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71": (gemma_scope,),
    "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": (gemma_scope,),
    "gemma-scope-2b-pt-att-canonical/layer_0/width_16k/canonical": (gemma_scope, True),
    "gemma-scope-9b-it-res-canonical/layer_9/width_16k/canonical": (gemma_scope,),
    "qwen-scope-3-1.7b-base-w32k-l50/layer5": (qwen_scope,),
    "goodfire-llama-3.1-8b-instruct/layer_19": (linear, ("encoder_linear", "decoder_linear")),
    "goodfire-llama-3.3-70b-instruct/layer_50": (linear, ("encoder_linear", "decoder_linear")),
    "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post": (
        linear,
        ("encoder", "decoder"),
    ),
    "gpt2-small-hook-z-kk/blocks.0.hook_z": (hook_z,),
    "llama_scope_lxr_8x/l15r_8x": (llama_scope,),
    "llama_scope_r1_distill/l0r_800m_slimpajama": (llama_scope_r1,),
    "gpt2-small-mlp-tm/blocks.0.hook_mlp_out": (
        sae_lens,
        "standard",
        {"normalize_activations": "expected_average_only_in"},
    ),
    "gpt2-small-resid-post-v5-32k/blocks.0.hook_resid_post": (
        sae_lens,
        "standard",
        {
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
            "normalize_activations": "layer_norm",
        },
    ),
    "mistral-7b-res-wg/blocks.8.hook_resid_pre": (sae_lens, "standard", {}),
    "gemma-2-2b-res-matryoshka-dc/blocks.5.hook_resid_post": (
        sae_lens,
        "jumprelu",
        {"apply_b_dec_to_input": True},
    ),
    "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.3.hook_resid_post__trainer_0": (
        dictionary_learning,
        dictionary.GatedAutoEncoder(D, N),
    ),
    "sae_bench_pythia70m_sweep_standard_ctx128_0712/blocks.3.hook_resid_post__trainer_10": (
        dictionary_learning,
        dictionary.AutoEncoder(D, N),
    ),
    "sae_bench_pythia70m_sweep_topk_ctx128_0730/blocks.3.hook_resid_post__trainer_0": (
        dictionary_learning,
        AutoEncoderTopK(D, N, K),
    ),
    "gpt-oss-20b-andyrdt/resid_post_layer_3_trainer_0": (
        dictionary_learning,
        BatchTopKSAE(D, N, K),
    ),
    "saebench_gemma-2-2b_width-2pow14_date-0107/blocks.12.hook_resid_post__trainer_0": (
        dictionary_learning,
        MatryoshkaBatchTopKSAE(D, N, K, [10, 30]),
    ),
    "saebench_gemma-2-2b_width-2pow12_date-0108/blocks.12.hook_resid_post__trainer_0": (
        dictionary_learning,
        dictionary.JumpReluAutoEncoder(D, N),
    ),
}


@torch.no_grad()
def main() -> None:
    folder = Path(sys.argv[1])
    hub = folder / "hub"
    torch.manual_seed(0)
    for name, (write, *rest) in MADE.items():
        repository, path = place(name)
        home = hub / f"models--{repository.replace('/', '--')}"
        write(home / "snapshots" / REVISION, path, *rest)
        (made(home / "refs") / "main").write_text(REVISION)
    x = 2 * torch.randn(ROWS, D) + 0.5
    made(folder / "expected")
    for number, name in enumerate(MADE):
        sae = load(name, hub)
        latents = sae.encode(x)
        np.savez(
            folder / "expected" / f"{number}.npz",
            x=x.numpy(),
            latents=latents.numpy(),
            recon=sae.decode(latents).numpy(),
        )
    (folder / "names.json").write_text(json.dumps(list(MADE)))


def place(name: str) -> tuple[str, str]:
    release, _, sae = name.partition("/")
    return directory.get_repo_id_and_folder_name(release, sae)


def load(name: str, hub: Path):
    """Do what SAE.from_pretrained does, with the sizes of these files in the place of the real ones."""
    release, _, sae_id = name.partition("/")
    repository, path = place(name)
    function = loaders.get_conversion_loader_name(release)
    root = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / REVISION

    def download(repo_id: str, filename: str, subfolder: str = "", **options) -> str:
        file = root / subfolder / filename
        if not file.exists():
            raise loaders.EntryNotFoundError(str(file))
        return str(file)

    n = {"qwen_scope": 32768, "llama_scope_r1_distill": 4 * D}.get(function, N)
    sizes = {"d_in": D, "d_sae": n, "dtype": "float32"}
    overrides = {
        k: v
        for k, v in directory.get_config_overrides(release, sae_id).items()
        if k != "neuronpedia_id"
    }
    shapes = {"w_enc": [D, N], "w_dec": [N, D]}
    with (
        mock.patch.object(loaders, "hf_hub_download", download),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes),
    ):
        config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[function](
            repository, path, "cpu", False, overrides | sizes
        )
    config = loaders.handle_config_defaulting(config)
    config |= {"normalize_activations": config.get("normalize_activations") or "none"}
    config.pop("reshape_activations", None)  # x is flat here
    classes = get_sae_class(config["architecture"])
    sae = classes[0](classes[1].from_dict(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    factor = directory.get_norm_scaling_factor(release, sae_id)
    if config["normalize_activations"] == "expected_average_only_in":
        # Llama Scope's is that of the real activations' norm; here it is the file's.
        sae.fold_activation_norm_scaling_factor(
            math.sqrt(D) / 1.7 if function == "llama_scope" else factor
        )
    return sae


if __name__ == "__main__":
    main()
