"""SAELens: cfg.json and sae_weights.safetensors; version 6 and later, and the flat cfg.json of
before.

    pre_acts = (norm(x) - apply_b_dec_to_input b_dec) W_enc + b_enc        recon = unnorm(acts W_dec
        + b_dec)

| ours | file | |
|---|---|---|
| W_enc[n, d] | W_enc[d, n] | transposed |
| b_enc[n] | b_enc[n], or b_gate[n] of gated | - W_enc b_dec if the input is not centred |
| W_dec[n, d] | W_dec[n, d] | |
| b_pre[d] | b_dec[d] | |
| threshold[n] | threshold[n] of jumprelu; topk_threshold of batchtopk and matryoshka_batchtopk in training | |
| r_mag[n], b_mag[n] | r_mag[n], b_mag[n] of gated | |

What we write centres the input, so every number is carried as it is.
"""  # noqa: E501 (a table)

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.sae.model import SAE, Shape
from ksparse.storage import jsonio

CONFIG, WEIGHTS, SCALER, SPARSITY = (
    "cfg.json",
    "sae_weights.safetensors",
    "activation_scaler.json",
    "sparsity.safetensors",
)
ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jump_relu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
WRITTEN = {"relu": "standard", "topk": "topk", "jump_relu": "jumprelu", "gated": "gated"}
NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
HOLDS = {ours: tuple(NORMALIZATIONS.values()) for ours in WRITTEN}
_log = logging.getLogger("ksparse")
# whose format this is: without one the file would be taken for the flat format of before 6
_VERSION = "6.54.12"


def find(path: Path) -> Path | None:
    """Return the folder of an SAE in this format, if the path is one."""
    return path if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else None


def read(folder: Path) -> SAE:
    """Read a folder."""
    settings = foreign.json_file(folder / CONFIG)
    if "metadata" not in settings.table:
        settings = _from_flat(settings)
    elif not isinstance(settings.table["metadata"], dict):
        raise InputError(f"{settings.file}: 'metadata' is not a table of settings")
    weights = foreign.safetensors_file(folder / WEIGHTS)
    architecture = settings.among("architecture", ACTIVATIONS, "standard")
    activation = ACTIVATIONS[architecture]
    settings.refuse(
        activation_fn="topk" if activation == "topk" else "relu", finetuning_scaling_factor=False
    )
    if settings.among("reshape_activations", ("none", "hook_z"), "none") == "hook_z":
        _log.warning(
            "%s: of hook_z, so x is the heads' outputs one after another, [..., heads x width of "
            "a head]",
            folder,
        )
    normalize, factor = _normalization(folder, settings)
    W_enc, b_pre = weights.take("W_enc", "d", "n").t().contiguous(), weights.take("b_dec", "d")
    tensors = {
        "W_enc": W_enc,
        "b_enc": weights.take("b_gate" if activation == "gated" else "b_enc", "n"),
        "W_dec": weights.take("W_dec", "n", "d"),
        "b_pre": b_pre,
    }
    if activation == "gated":
        tensors |= {"r_mag": weights.take("r_mag", "n"), "b_mag": weights.take("b_mag", "n")}
    elif activation == "jump_relu":
        tensors["threshold"] = (
            weights.take("log_threshold", "n").exp()
            if "log_threshold" in weights
            else weights.take("threshold", "n")
        )
    elif activation == "batch_topk":
        tensors["threshold"] = torch.tensor([weights.number("topk_threshold")])
    foreign.no_scaling(weights)
    weights.finish()
    _check_size(settings, weights)
    if not settings.want("apply_b_dec_to_input", bool, True):
        foreign.centre_(tensors)
    if settings.want("rescale_acts_by_decoder_norm", bool, False) and not foreign.unit_rows(
        tensors["W_dec"]
    ):
        foreign.weigh_by_decoder_(tensors)
    k = (
        settings.want("k", int)
        if activation == "topk"
        else max(1, int(settings.want("k", float, 1.0)))
    )
    shape = Shape(weights.lengths["d"], weights.lengths["n"], k, normalize, factor, activation)
    return foreign.built(weights.file, shape, tensors, _metadata(settings))


def write(sae: SAE, folder: Path) -> None:
    """Write the two files of an SAE that this format can hold."""
    shape = sae.shape
    tensors = {"W_enc": sae.W_enc.t(), "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    tensors["b_gate" if shape.activation == "gated" else "b_enc"] = sae.b_enc
    tensors |= sae.activation.state_dict()
    foreign.write_safetensors(tensors, folder / WEIGHTS)
    normalize = {ours: theirs for theirs, ours in NORMALIZATIONS.items()}[shape.normalize]
    config: dict[str, Any] = {
        "architecture": WRITTEN[shape.activation],
        "d_in": shape.d_model,
        "d_sae": shape.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": normalize,
        "reshape_activations": "none",
    }
    if shape.activation == "topk":
        config |= {
            "k": shape.k,
            "rescale_acts_by_decoder_norm": foreign.unit_rows(sae.W_dec.detach()),
        }  # their own default, and the same then
    carried = hook_names.carried(sae, "sae_lens")
    config |= {key: carried[key] for key in ("reshape_activations",) if key in carried}
    jsonio.write_json(
        folder / CONFIG,
        config
        | {"metadata": hook_names.table(carried, "metadata") | _their_metadata(sae, carried)},
    )


def _check_size(settings: Settings, weights: CheckedTensors) -> None:
    for key, letter in (("d_in", "d"), ("d_sae", "n")):
        said = settings.want(key, int, weights.lengths[letter])
        if said != weights.lengths[letter]:
            raise InputError(
                f"{settings.file}: {key} is {said}, the tensors of {weights.file.name} have "
                f"{weights.lengths[letter]}"
            )


def _normalization(folder: Path, settings: Settings) -> tuple[str, float]:
    """Return our normalisation and its constant."""
    kind = settings.get("normalize_activations", "none")
    if kind == "expected_average_only_in":
        if (folder / SCALER).is_file():
            return "dataset", foreign.json_file(folder / SCALER).want("scaling_factor", float)
        raise InputError(
            f"{settings.file}: the input is to be multiplied by a constant (normalize_activations "
            "is 'expected_average_only_in') that is not "
            f"in the file, nor is there {SCALER}; fold it into the weights where it is known "
            "(fold_activation_norm_scaling_factor)"
        )
    return NORMALIZATIONS[settings.among("normalize_activations", NORMALIZATIONS, "none")], 1.0


def _from_flat(settings: Settings) -> Settings:
    """Return the settings of a cfg.json of before version 6 under the names of later."""
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    table = {renamed.get(key, key): value for key, value in settings.table.items()}
    if table.get("activation_fn") == "topk":
        table |= {"architecture": "topk", "k": settings.under("activation_fn_kwargs").get("k")}
    if isinstance(table.get("normalize_activations"), bool):
        table["normalize_activations"] = (
            "expected_average_only_in" if table["normalize_activations"] else "none"
        )
    return Settings(settings.file, table | {"metadata": table})


def _metadata(settings: Settings) -> dict[str, Any]:
    theirs = settings.under("metadata")
    name, hook = theirs.text("model_name"), theirs.text("hook_name")
    text = theirs.text("dataset_path") if theirs.get("is_dataset_tokenized") is not True else None
    return hook_names.metadata(
        "sae_lens",
        settings.table,
        lm=name and hook_names.from_model(name),
        site=hook and hook_names.from_hook(hook),
        context=theirs.get("context_size"),
        bos=theirs.get("prepend_bos"),
        text=text,
    )


def _their_metadata(sae: SAE, carried: dict[str, Any]) -> dict[str, Any]:
    """Return what SAELens wants to know of where an SAE belongs; what it said itself, in `carried`,
    stays.
    """
    acts = sae.metadata.get("acts") or sae.metadata.get("origin", {})
    site = acts.get("site", "")
    hook = hook_names.to_hook(site)
    known = {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": acts.get("lm"),
        "hook_name": hook or None,
        "hook_layer": hook_names.layer_of(site),
        "hook_head_index": None,
        "context_size": acts.get("context"),
        "dataset_path": acts.get("text"),
        "prepend_bos": acts.get("bos", "auto") == "auto",
        "model_class_name": "HookedTransformer"
        if hook.startswith("blocks.")
        else "AutoModelForCausalLM",  # whose names hook_name is of
        "exclude_special_tokens": hook_names.trained_without_special_tokens(sae),
    }
    theirs = hook_names.table(carried, "metadata")
    own = (
        ("sae_lens_version", "hook_name")
        if theirs.get("hook_name") != hook
        else ("sae_lens_version",)
    )
    return {
        key: theirs[key] if key in theirs and key not in own else value
        for key, value in known.items()
    }
