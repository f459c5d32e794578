"""dictionary_learning: ae.pt (a state dict by torch.save) and config.json beside it.

    AutoEncoderTopK, BatchTopKSAE      acts = f(encoder.weight (x - b_dec) + encoder.bias)
                                       recon = decoder.weight acts + b_dec

| ksparse | AutoEncoderTopK, BatchTopKSAE | JumpReluAutoEncoder, MatryoshkaBatchTopKSAE |
|---|---|---|
| W_enc[n, d] | encoder.weight[n, d] | W_enc[d, n], transposed |
| b_enc[n] | encoder.bias | b_enc; + W_enc b_dec for JumpRelu, which does not center x |
| W_dec[n, d] | decoder.weight[d, n], transposed | W_dec[n, d] |
| b_pre[d] | b_dec | b_dec |
| threshold | threshold, a number (-1: none yet) | threshold[n]; Matryoshka: a number |
| k | k | Matryoshka: k |

| ksparse | AutoEncoder | AutoEncoderNew | GatedAutoEncoder |
|---|---|---|---|
| W_enc, W_dec | encoder.weight, decoder.weight, as above | the same | the same |
| b_enc[n] | encoder.bias | encoder.bias + W_enc decoder.bias | gate_bias |
| b_pre[d] | bias | decoder.bias | decoder_bias |
| r_mag, b_mag | | | r_mag, mag_bias |

* The library loads an AutoEncoder by scaling decoder rows to norm 1 and latents by the norms that
  the rows had; so does `read`. A ReLU SAE is written as an AutoEncoder if its rows have norm 1,
  else as an AutoEncoderNew.
* A BatchTopK SAE with `metadata.prefixes` is a Matryoshka, whose group_sizes are the differences of
  its prefixes.
* The scale of `dataset` is folded into biases and thresholds: latents are then in units of the
  activations, and decoder rows keep their norm.
* A backup from the middle of a run holds {ae, norm_factor, …}: an SAE of activations divided by
  that factor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.sae.losses import recorded_prefixes, with_prefixes
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic, jsonio

CONFIG, WEIGHTS = "config.json", "ae.pt"
SUPPORTED = {
    activation: ("none",) for activation in ("topk", "batch_topk", "relu", "jump_relu", "gated")
}
UNIT_NORM_DECODER = True
"""Users of the library's files need decoder rows of norm 1, so the data set's scale is folded into
the latents instead of the rows."""
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}


_ShapeAndTensors = tuple[dict[str, Any], dict[str, Tensor]]


def find(path: Path) -> Path | None:
    """Return the file of an SAE in this format: `path` itself, or ae.pt in it; else None."""
    file = path / WEIGHTS if path.is_dir() else path
    if not atomic.exists(file) or file.is_dir():
        return None
    matches = file.name == WEIGHTS or (file.suffix == ".pt" and _trainer_config(file) is not None)
    return file if matches else None


def read(file: Path) -> SAE:
    """Read ae.pt, or checkpoints/ae_STEP.pt, with the config.json of its trainer."""
    table, settings = foreign.load_torch_dict(file), _trainer_config(file)
    is_backup = "ae" in table
    weights = foreign.check_tensors(file, table["ae"] if is_backup else table)
    trainer = settings.get_section("trainer") if settings else None
    dict_class = _dict_class(weights, trainer)
    shape, tensors = _READ[dict_class](weights, trainer)
    nested = dict_class == "MatryoshkaBatchTopKSAE" and "group_sizes" in weights
    groups = weights.counts("group_sizes", "groups").cumsum(0).tolist() if nested else None
    weights.finish(("threshold",) if dict_class == "AutoEncoderTopK" else ())
    normalization: dict[str, Any] = {"normalize": "none"}
    if is_backup and table.get("norm_factor") is not None:
        factor = foreign.check_tensors(file, {"norm_factor": table["norm_factor"]}).number(
            "norm_factor"
        )
        if factor <= 0:
            raise InputError(f"{file}: norm_factor is {factor}, expected a number above 0")
        normalization = {"normalize": "dataset", "factor": 1 / factor}
    sae = foreign.build_sae(
        file,
        Shape(weights.lengths["d"], weights.lengths["n"], **shape, **normalization),
        tensors,
        _metadata(settings, trainer),
    )
    return with_prefixes(sae, groups)


def write(sae: SAE, folder: Path) -> None:
    """Write ae.pt and config.json."""
    dict_class, tensors = _class_and_tensors(sae)
    if sae.shape.activation in ("topk", "batch_topk"):
        threshold = (
            sae.threshold.detach().reshape(())
            if sae.shape.activation == "batch_topk"
            else torch.tensor(-1.0)
        )
        tensors |= {"k": torch.tensor(sae.shape.k, dtype=torch.int32), "threshold": threshold}
    foreign.write_torch(tensors, folder / WEIGHTS)
    acts = sae.metadata.get("acts") or sae.metadata.get("origin", {})
    site = acts.get("site", "")
    trainer = {
        "trainer_class": _TRAINERS[dict_class],
        "dict_class": dict_class,
        "activation_dim": sae.shape.d_model,
        "dict_size": sae.shape.n_latents,
        "device": "cpu",
        "layer": hook_names.layer_of(site),
        "lm_name": acts.get("lm", ""),
        "submodule_name": site,
        "wandb_name": "",
    }
    trainer |= {"k": sae.shape.k} if sae.shape.activation in ("topk", "batch_topk") else {}
    if "group_sizes" in tensors:
        trainer["group_sizes"] = tensors["group_sizes"].tolist()
    buffer = {
        "d_submodule": sae.shape.d_model,
        "io": "in" if site.endswith(":in") or site.startswith("resid_pre") else "out",
        "ctx_len": acts.get("context"),
        "device": "cpu",
    }
    original = hook_names.original_settings(sae, "dictionary_learning")
    jsonio.write_json(
        folder / CONFIG,
        original
        | {
            "trainer": hook_names.get_table(original, "trainer") | trainer,
            "buffer": hook_names.get_table(original, "buffer") | buffer,
        },
    )


# ---- one reader per class: weights, trainer's settings -> shape options, tensors -----------------


def _topk(
    weights: CheckedTensors, trainer: Settings | None, activation: str = "topk"
) -> _ShapeAndTensors:
    tensors = _linear(weights, "b_dec")
    k = weights.integer("k", trainer.get_typed("k", int, None) if trainer else None)
    if activation == "batch_topk":
        tensors["threshold"] = torch.tensor([weights.number("threshold")])
    return {"k": k, "activation": activation}, tensors


def _batch_topk(weights: CheckedTensors, trainer: Settings | None) -> _ShapeAndTensors:
    return _topk(weights, trainer, "batch_topk")


def _matryoshka(weights: CheckedTensors, trainer: Settings | None) -> _ShapeAndTensors:
    return {"k": weights.integer("k"), "activation": "batch_topk"}, _matrices(weights) | {
        "threshold": torch.tensor([weights.number("threshold")])
    }


def _standard(weights: CheckedTensors, trainer: Settings | None) -> _ShapeAndTensors:
    tensors = _linear(weights, "bias")
    if not _passes_unit_norm_check(tensors["W_dec"]):
        foreign.fold_decoder_norms_(tensors)
    return {"k": 1, "activation": "relu"}, tensors


def _standard_april_update(weights: CheckedTensors, trainer: Settings | None) -> _ShapeAndTensors:
    tensors = _linear(weights, "decoder.bias")
    foreign.center_encoder_(tensors)
    return {"k": 1, "activation": "relu"}, tensors


def _gated(weights: CheckedTensors, trainer: Settings | None) -> _ShapeAndTensors:
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("gate_bias", "n"),
        "W_dec": weights.take("decoder.weight", *"dn").t(),
        "b_pre": weights.take("decoder_bias", "d"),
        "r_mag": weights.take("r_mag", "n"),
        "b_mag": weights.take("mag_bias", "n"),
    }
    return {"k": 1, "activation": "gated"}, tensors


def _jump_relu(weights: CheckedTensors, trainer: Settings | None) -> _ShapeAndTensors:
    tensors = _matrices(weights) | {"threshold": weights.take("threshold", "n")}
    foreign.center_encoder_(tensors)
    return {"k": 1, "activation": "jump_relu"}, tensors


_READ: dict[str, Callable[[CheckedTensors, Settings | None], _ShapeAndTensors]] = {
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_april_update,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
}


def _class_and_tensors(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """Return the dict_class that holds an SAE, and its tensors under the library's names."""
    weights = sae.state_dict()
    linear = {
        "encoder.weight": weights["W_enc"],
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].t(),
    }
    activation = sae.shape.activation
    if activation == "batch_topk" and (prefixes := recorded_prefixes(sae)):
        sizes = torch.tensor([0, *prefixes, sae.shape.n_latents]).diff()
        return "MatryoshkaBatchTopKSAE", {
            "W_enc": weights["W_enc"].t(),
            "b_enc": weights["b_enc"],
            "W_dec": weights["W_dec"],
            "b_dec": weights["b_pre"],
            "group_sizes": sizes,
        }
    if activation in ("topk", "batch_topk"):
        return ("AutoEncoderTopK" if activation == "topk" else "BatchTopKSAE"), linear | {
            "b_dec": weights["b_pre"]
        }
    if activation == "gated":
        return "GatedAutoEncoder", {
            "encoder.weight": weights["W_enc"],
            "decoder.weight": weights["W_dec"].t(),
            "decoder_bias": weights["b_pre"],
            "gate_bias": weights["b_enc"],
            "r_mag": weights["r_mag"],
            "mag_bias": weights["b_mag"],
        }
    if activation == "jump_relu":
        return "JumpReluAutoEncoder", {
            "W_enc": weights["W_enc"].t(),
            "W_dec": weights["W_dec"],
            "b_dec": weights["b_pre"],
            "threshold": weights["threshold"],
            **foreign.uncentered_biases(sae),
        }
    if _passes_unit_norm_check(weights["W_dec"]):
        return "AutoEncoder", linear | {"bias": weights["b_pre"]}
    return "AutoEncoderNew", linear | {
        "encoder.bias": foreign.uncentered_biases(sae)["b_enc"],
        "decoder.bias": weights["b_pre"],
    }


def _linear(weights: CheckedTensors, bias: str) -> dict[str, Tensor]:
    return {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("encoder.bias", "n"),
        "W_dec": weights.take("decoder.weight", *"dn").t(),
        "b_pre": weights.take(bias, "d"),
    }


def _matrices(weights: CheckedTensors) -> dict[str, Tensor]:
    return {
        "W_enc": weights.take("W_enc", *"dn").t(),
        "b_enc": weights.take("b_enc", "n"),
        "W_dec": weights.take("W_dec", *"nd"),
        "b_pre": weights.take("b_dec", "d"),
    }


def _passes_unit_norm_check(W_dec: Tensor) -> bool:
    """Return whether the library considers the decoder rows normalised."""
    norms = W_dec.norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


# ---- config.json ---------------------------------------------------------------------------------


def _trainer_config(file: Path) -> Settings | None:
    """Return the config.json of the trainer that wrote a file: in its folder, or one above it (for
    files in checkpoints/)."""
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG).is_file():
            settings = foreign.read_settings(folder / CONFIG)
            return settings if isinstance(settings.table.get("trainer"), dict) else None
    return None


def _dict_class(weights: CheckedTensors, trainer: Settings | None) -> str:
    """Return the dict_class of a file: from config.json, else from a tensor that only it has."""
    if trainer:
        return trainer.get_choice("dict_class", _READ)
    for key, dict_class in (
        ("group_sizes", "MatryoshkaBatchTopKSAE"),
        ("gate_bias", "GatedAutoEncoder"),
        ("decoder.bias", "AutoEncoderNew"),
        ("bias", "AutoEncoder"),
        ("W_enc", "JumpReluAutoEncoder"),
    ):
        if key in weights:
            return dict_class
    raise InputError(
        f"{weights.file} has no {CONFIG} beside it that says whether it is an AutoEncoderTopK or a "
        f'BatchTopKSAE; write one: {{"trainer": {{"dict_class": …}}}}'
    )


def _metadata(settings: Settings | None, trainer: Settings | None) -> dict[str, Any]:
    if settings is None or trainer is None:
        return hook_names.build_metadata("dictionary_learning", {})
    name = trainer.get_text("submodule_name") or ""
    match = re.fullmatch(r"(resid_pre|resid_post|mlp_out|attn_out)_layer_(\d+)", name)
    site = f"{match[1]}.{match[2]}" if match else name
    return hook_names.build_metadata(
        "dictionary_learning",
        settings.table,
        lm=trainer.get_text("lm_name"),
        site=site or None,
        context=settings.get_section("buffer").get("ctx_len"),
    )
