"""SAELens: cfg.json and sae_weights.safetensors, of version 6 and later; reads the flat cfg.json of
earlier versions.

    pre_acts = (norm(x) - apply_b_dec_to_input b_dec) W_enc + b_enc
    recon    = unnorm(acts W_dec + b_dec)

| ksparse | SAELens | |
|---|---|---|
| W_enc[n, d] | W_enc[d, n] | transposed |
| b_enc[n] | b_enc[n]; b_gate[n] of gated | + W_enc b_dec where SAELens does not center the input |
| W_dec[n, d] | W_dec[n, d] | |
| b_pre[d] | b_dec[d] | |
| threshold[n] | threshold[n] | jumprelu |
| threshold[1] | topk_threshold | batchtopk and matryoshka_batchtopk, in training |
| r_mag[n], b_mag[n] | r_mag[n], b_mag[n] | gated |
| metadata.prefixes | matryoshka_widths | in training a setting; else in the training details |

Files are written with apply_b_dec_to_input = true, so that every number is kept as it is. Only the
latents of a TopK SAE whose decoder rows all have the same norm are multiplied by that norm, and the
rows divided by it: then rescale_acts_by_decoder_norm = true, SAELens' default, changes nothing, and
without it SAELens cannot fold the norms, which its dashboards need.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.compatibility import copy_with
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.interop.recognition import refusal
from ksparse.sae.losses import recorded_prefixes, with_prefixes
from ksparse.sae.model import SAE, Shape
from ksparse.storage import jsonio

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jump_relu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
"""SAELens' architecture -> ksparse's activation, for reading."""
_OTHER_KINDS = {
    "transcoder": "transcoder",
    "skip_transcoder": "skip transcoder",
    "jumprelu_transcoder": "transcoder",
    "jumprelu_skip_transcoder": "skip transcoder",
    "temporal": "temporal SAE",
    "matching_pursuit": "matching-pursuit SAE",
    "abstopk": "AbsTopK SAE",
}
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jump_relu": "jumprelu", "gated": "gated"}
"""ksparse's activation -> SAELens' architecture, for writing."""
NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
"""SAELens' normalize_activations -> ksparse's normalisation."""
SUPPORTED = {activation: tuple(NORMALIZATIONS.values()) for activation in ARCHITECTURES}
_log = logging.getLogger("ksparse")
# The version whose format is written: without one SAELens takes a file for the flat format.
_VERSION = "6.54.12"


def find(path: Path) -> Path | None:
    """Return `path` if it is the folder of an SAE in this format, else None."""
    return path if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else None


def read(
    folder: Path, *, factor: float | None = None, overrides: dict[str, Any] | None = None
) -> SAE:
    """Read an SAE from a folder.

    Args:
        folder: what `find` returned.
        factor: what x is multiplied by for expected_average_only_in, where the folder does not say.
        overrides: settings in place of those in cfg.json, as SAELens' registry has them.
    """
    settings = foreign.read_settings(folder / CONFIG)
    settings = Settings(settings.file, settings.table | (overrides or {}))
    if "metadata" not in settings.table:
        settings = _from_flat(settings)
    elif not isinstance(settings.table["metadata"], dict):
        raise InputError(f"{settings.file}: 'metadata' is not a table of settings")
    weights = foreign.safetensors_file(folder / WEIGHTS)
    activation = _activation(settings)
    settings.require(
        activation_fn="topk" if activation == "topk" else "relu", finetuning_scaling_factor=False
    )
    if settings.get_choice("reshape_activations", ("none", "hook_z"), "none") == "hook_z":
        _log.warning(
            "%s was trained on hook_z: x is the concatenation of the heads' outputs, "
            "[..., heads x head width]",
            folder,
        )
    _warn_of_centered_weights(folder, settings)
    normalize, factor = _normalization(folder, settings, factor)
    tensors = _take_tensors(weights, activation)
    foreign.check_no_scaling(weights)
    weights.finish()
    _check_size(settings, weights)
    if not settings.get_typed("apply_b_dec_to_input", bool, True):
        foreign.center_encoder_(tensors)
    rescaled = settings.get_typed("rescale_acts_by_decoder_norm", bool, False)
    if rescaled and not foreign.has_unit_rows(tensors["W_dec"]):
        foreign.fold_decoder_norms_(tensors)
    k = (
        settings.get_typed("k", int)
        if activation == "topk"
        else max(1, int(settings.get_typed("k", float, 1.0)))
    )
    shape = Shape(weights.lengths["d"], weights.lengths["n"], k, normalize, factor, activation)
    sae = foreign.build_sae(weights.file, shape, tensors, _metadata(settings))
    details = settings.get_section("metadata").get_section("training_architecture_details")
    return with_prefixes(sae, settings.get("matryoshka_widths", details.get("matryoshka_widths")))


def _activation(settings: Settings) -> str:
    """Return ksparse's activation; refuse what is no autoencoder by its name."""
    architecture = settings.get("architecture", "standard")
    if isinstance(architecture, str) and architecture in _OTHER_KINDS:
        where = f"{settings.file}: architecture is {architecture!r}; it"
        raise refusal(where, _OTHER_KINDS[architecture])
    return ACTIVATIONS[settings.get_choice("architecture", ACTIVATIONS, "standard")]


def _warn_of_centered_weights(folder: Path, settings: Settings) -> None:
    for table in (settings, settings.get_section("metadata")):
        options = table.get("model_from_pretrained_kwargs")
        if isinstance(options, dict) and options.get("center_writing_weights") is True:
            _log.warning(
                "%s was trained on activations whose mean over d_model is 0 "
                "(center_writing_weights of TransformerLens); on others results are worse",
                folder,
            )
            return


def _take_tensors(weights: CheckedTensors, activation: str) -> dict[str, Tensor]:
    """Return the tensors under ksparse's names, as the file has them but for W_enc."""
    tensors = {
        "W_enc": weights.take("W_enc", "d", "n").t().contiguous(),
        "b_pre": weights.take("b_dec", "d"),
        "b_enc": weights.take("b_gate" if activation == "gated" else "b_enc", "n"),
        "W_dec": weights.take("W_dec", "n", "d"),
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
    return tensors


def write(sae: SAE, folder: Path) -> None:
    """Write cfg.json and sae_weights.safetensors."""
    sae = _with_unit_rows(sae)
    shape = sae.shape
    tensors = {"W_enc": sae.W_enc.t(), "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    tensors["b_gate" if shape.activation == "gated" else "b_enc"] = sae.b_enc
    tensors |= sae.activation.state_dict()
    foreign.write_safetensors(tensors, folder / WEIGHTS)
    normalize = {ours: theirs for theirs, ours in NORMALIZATIONS.items()}[shape.normalize]
    config: dict[str, Any] = {
        "architecture": ARCHITECTURES[shape.activation],
        "d_in": shape.d_model,
        "d_sae": shape.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": normalize,
        "reshape_activations": "none",
    }
    if shape.activation == "topk":
        # True is SAELens' default for TopK; with rows of norm 1 it changes nothing.
        config |= {
            "k": shape.k,
            "rescale_acts_by_decoder_norm": foreign.has_unit_rows(sae.W_dec.detach()),
        }
    original = hook_names.original_settings(sae, "sae_lens")
    config |= {key: original[key] for key in ("reshape_activations",) if key in original}
    metadata = hook_names.get_table(original, "metadata") | _lens_metadata(sae, original)
    if (prefixes := recorded_prefixes(sae)) and shape.activation == "jump_relu":
        metadata |= {
            "training_architecture": "matryoshka_batchtopk",
            "training_architecture_details": {"matryoshka_widths": [*prefixes, shape.n_latents]},
        }
    jsonio.write_json(folder / CONFIG, config | {"metadata": metadata})


def _with_unit_rows(sae: SAE) -> SAE:
    """Return a TopK SAE with decoder rows of norm 1 and latents in those units, where all rows have
    the same norm; any other SAE as it is."""
    norms = sae.W_dec.detach().norm(dim=1)
    norm = norms.double().mean().item()
    is_same = bool(((norms - norm).abs() <= 1e-6 * norm).all()) and norm > 0
    if sae.shape.activation != "topk" or not is_same or foreign.has_unit_rows(sae.W_dec.detach()):
        return sae
    unit = copy_with(sae)
    with torch.no_grad():
        unit.W_enc.mul_(norm)
        unit.b_enc.mul_(norm)
        unit.W_dec.div_(norms[:, None])
    _log.info(
        "latents are multiplied by the norm of the decoder's rows, %.6g, so that SAELens can fold "
        "the norms",
        norm,
    )
    return unit


def _check_size(settings: Settings, weights: CheckedTensors) -> None:
    for key, letter in (("d_in", "d"), ("d_sae", "n")):
        size = settings.get_typed(key, int, weights.lengths[letter])
        if size != weights.lengths[letter]:
            raise InputError(
                f"{settings.file}: {key} is {size}, the tensors of {weights.file.name} have "
                f"{weights.lengths[letter]}"
            )


def _normalization(folder: Path, settings: Settings, factor: float | None) -> tuple[str, float]:
    """Return ksparse's normalisation and its constant, `factor` where no file has it."""
    if settings.get("normalize_activations", "none") == "expected_average_only_in":
        if (folder / SCALER).is_file():
            return "dataset", foreign.read_settings(folder / SCALER).get_typed(
                "scaling_factor", float
            )
        if factor is not None:
            return "dataset", factor
        raise InputError(
            f"{settings.file}: the input must be multiplied by a constant (normalize_activations "
            f"is 'expected_average_only_in') that is not in the file, nor is there {SCALER}; fold "
            "it into the weights where it is known (fold_activation_norm_scaling_factor)"
        )
    return NORMALIZATIONS[settings.get_choice("normalize_activations", NORMALIZATIONS, "none")], 1.0


def _from_flat(settings: Settings) -> Settings:
    """Return the settings of a cfg.json from before version 6 under the names of version 6."""
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    table = {renamed.get(key, key): value for key, value in settings.table.items()}
    if table.get("activation_fn") == "topk":
        table |= {
            "architecture": "topk",
            "k": settings.get_section("activation_fn_kwargs").get("k"),
        }
    if isinstance(table.get("normalize_activations"), bool):
        table["normalize_activations"] = (
            "expected_average_only_in" if table["normalize_activations"] else "none"
        )
    return Settings(settings.file, table | {"metadata": table})


def _metadata(settings: Settings) -> dict[str, Any]:
    metadata = settings.get_section("metadata")
    name, hook = metadata.get_text("model_name"), metadata.get_text("hook_name")
    is_text = metadata.get("is_dataset_tokenized") is not True
    return hook_names.build_metadata(
        "sae_lens",
        settings.table,
        lm=name and hook_names.hub_model_name(name),
        site=hook and hook_names.from_hook(hook),
        context=metadata.get("context_size"),
        bos=metadata.get("prepend_bos"),
        text=metadata.get_text("dataset_path") if is_text else None,
    )


def _lens_metadata(sae: SAE, original: dict[str, Any]) -> dict[str, Any]:
    """Return what SAELens stores about where an SAE belongs.

    Values in `original`, the settings of the SAELens file that the SAE came from, are kept, except
    for the version and a `hook_name` that no longer fits.
    """
    acts = sae.metadata.get("acts") or sae.metadata.get("origin", {})
    site = acts.get("site", "")
    hook = hook_names.to_hook(site)
    metadata = {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": acts.get("lm"),
        "hook_name": hook or None,
        "hook_layer": hook_names.layer_of(site),
        "hook_head_index": None,
        "context_size": acts.get("context"),
        "dataset_path": acts.get("text"),
        "prepend_bos": acts.get("bos", "auto") == "auto",
        # the class of models in which hook_name exists
        "model_class_name": "HookedTransformer"
        if hook.startswith("blocks.")
        else "AutoModelForCausalLM",
        "exclude_special_tokens": hook_names.trained_without_special_tokens(sae),
    }
    kept = hook_names.get_table(original, "metadata")
    replaced = {"sae_lens_version"} | ({"hook_name"} if kept.get("hook_name") != hook else set())
    return {
        key: kept[key] if key in kept and key not in replaced else value
        for key, value in metadata.items()
    }
