"""dictionary_learning: ae.pt (a state dict of torch.save) and config.json beside it.

    AutoEncoderTopK, BatchTopKSAE      acts = f(encoder.weight (x - b_dec) + encoder.bias)
                                       recon = decoder.weight acts + b_dec

| ours | TopK, BatchTopK | AutoEncoder | AutoEncoderNew | GatedAutoEncoder | JumpReluAutoEncoder, Matryoshka |
|---|---|---|---|---|---|
| W_enc[n, d] | encoder.weight[n, d] | the same | the same | the same | W_enc[d, n], transposed |
| b_enc[n] | encoder.bias | encoder.bias | encoder.bias - W_enc b_pre | gate_bias | b_enc; JumpRelu: - W_enc b_pre |
| W_dec[n, d] | decoder.weight[d, n], transposed | the same | the same | the same | W_dec[n, d] |
| b_pre[d] | b_dec | bias | decoder.bias | decoder_bias | b_dec |
| threshold | threshold, a number (-1: none yet) | | | | threshold[n]; Matryoshka: a number |
| r_mag, b_mag | | | | r_mag, mag_bias | |
| k | k | | | | Matryoshka: k |

AutoEncoder is loaded by that library with decoder rows brought to norm 1 and latents multiplied by
what they had, so it is here too. What is written for ReLU is an AutoEncoder where rows have norm 1,
else an AutoEncoderNew. Matryoshka's groups only matter in training; it is read and not written. The
constant of `dataset` goes into biases and thresholds, latents are then in the activations' unit,
and decoder rows keep their norm. A backup from the midst of a run holds {ae, norm_factor, …}: the
SAE of activations that are divided by that factor.
"""  # noqa: E501 (a table)

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
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic, jsonio

CONFIG, WEIGHTS = "config.json", "ae.pt"
HOLDS = {
    activation: ("none",) for activation in ("topk", "batch_topk", "relu", "jump_relu", "gated")
}
UNIT_ROWS = True
"""Those who load its files want decoder rows of norm 1, so a constant of the data set goes into the
latents' unit.
"""
_LINEAR = {"encoder.weight": "nd", "encoder.bias": "n", "decoder.weight": "dn"}
_MATRICES = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d"}
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}


def find(path: Path) -> Path | None:
    """Return the file of an SAE in this format, if the path is one or its folder holds one."""
    file = path / WEIGHTS if path.is_dir() else path
    return (
        file
        if atomic.exists(file)
        and not file.is_dir()
        and (file.name == WEIGHTS or (file.suffix == ".pt" and (_config(file) is not None)))
        else None
    )


def read(file: Path) -> SAE:
    """Read ae.pt, or checkpoints/ae_STEP.pt, with the config.json of its trainer."""
    found, settings = foreign.torch_file(file), _config(file)
    backup = "ae" in found
    weights = foreign.tensors_of(file, found["ae"] if backup else found)
    trainer = settings.under("trainer") if settings else None
    kind = _kind(weights, trainer)
    shape, tensors = _READ[kind](weights, trainer)
    weights.finish(
        ("group_sizes", "threshold")
        if kind in ("AutoEncoderTopK", "MatryoshkaBatchTopKSAE")
        else ()
    )
    normalize: dict[str, Any] = {"normalize": "none"}
    if backup and found.get("norm_factor") is not None:
        factor = foreign.tensors_of(file, {"norm_factor": found["norm_factor"]}).number(
            "norm_factor"
        )
        if factor <= 0:
            raise InputError(f"{file}: norm_factor is {factor}, expected a number above 0")
        normalize = {"normalize": "dataset", "factor": 1 / factor}
    return foreign.built(
        file,
        Shape(weights.lengths["d"], weights.lengths["n"], **shape, **normalize),
        tensors,
        _metadata(settings, trainer),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write the two files of an SAE that this format can hold."""
    kind, tensors = _theirs(sae)
    numbers = {
        "topk": {"k": torch.tensor(sae.shape.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    }
    if sae.shape.activation == "batch_topk":
        numbers["batch_topk"] = {
            "k": numbers["topk"]["k"],
            "threshold": sae.threshold.detach().reshape(()),
        }
    foreign.write_torch(tensors | numbers.get(sae.shape.activation, {}), folder / WEIGHTS)
    acts = sae.metadata.get("acts") or sae.metadata.get("origin", {})
    site = acts.get("site", "")
    trainer = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": sae.shape.d_model,
        "dict_size": sae.shape.n_latents,
        "device": "cpu",
        "layer": hook_names.layer_of(site),
        "lm_name": acts.get("lm", ""),
        "submodule_name": site,
        "wandb_name": "",
    }
    trainer |= {"k": sae.shape.k} if sae.shape.activation in ("topk", "batch_topk") else {}
    buffer = {
        "d_submodule": sae.shape.d_model,
        "io": "in" if site.endswith(":in") or site.startswith("resid_pre") else "out",
        "ctx_len": acts.get("context"),
        "device": "cpu",
    }
    carried = hook_names.carried(sae, "dictionary_learning")
    jsonio.write_json(
        folder / CONFIG,
        carried
        | {
            "trainer": hook_names.table(carried, "trainer") | trainer,
            "buffer": hook_names.table(carried, "buffer") | buffer,
        },
    )


# ---- one of each kind ----------------------------------------------------------------------------


def _topk(
    weights: CheckedTensors, trainer: Settings | None, activation: str = "topk"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = _linear(weights, "b_dec")
    k = weights.whole("k", trainer.want("k", int, None) if trainer else None)
    if activation == "batch_topk":
        tensors["threshold"] = torch.tensor([weights.number("threshold")])
    return {"k": k, "activation": activation}, tensors


def _batch_topk(
    weights: CheckedTensors, trainer: Settings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return _topk(weights, trainer, "batch_topk")


def _matryoshka(
    weights: CheckedTensors, trainer: Settings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"k": weights.whole("k"), "activation": "batch_topk"}, _matrices(weights) | {
        "threshold": torch.tensor([weights.number("threshold")])
    }


def _standard(
    weights: CheckedTensors, trainer: Settings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = _linear(weights, "bias")
    if not _unit_rows(tensors["W_dec"]):
        foreign.weigh_by_decoder_(tensors)
    return {"k": 1, "activation": "relu"}, tensors


def _standard_new(
    weights: CheckedTensors, trainer: Settings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = _linear(weights, "decoder.bias")
    foreign.centre_(tensors)
    return {"k": 1, "activation": "relu"}, tensors


def _gated(
    weights: CheckedTensors, trainer: Settings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("gate_bias", "n"),
        "W_dec": weights.take("decoder.weight", *"dn").t(),
        "b_pre": weights.take("decoder_bias", "d"),
        "r_mag": weights.take("r_mag", "n"),
        "b_mag": weights.take("mag_bias", "n"),
    }
    return {"k": 1, "activation": "gated"}, tensors


def _jump_relu(
    weights: CheckedTensors, trainer: Settings | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = _matrices(weights) | {"threshold": weights.take("threshold", "n")}
    foreign.centre_(tensors)
    return {"k": 1, "activation": "jump_relu"}, tensors


_READ: dict[
    str, Callable[[CheckedTensors, Settings | None], tuple[dict[str, Any], dict[str, Tensor]]]
] = {
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
}


def _theirs(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """Return the class that holds an SAE, and its tensors."""
    own = sae.state_dict()
    linear = {
        "encoder.weight": own["W_enc"],
        "encoder.bias": own["b_enc"],
        "decoder.weight": own["W_dec"].t(),
    }
    activation = sae.shape.activation
    if activation in ("topk", "batch_topk"):
        return ("AutoEncoderTopK" if activation == "topk" else "BatchTopKSAE"), linear | {
            "b_dec": own["b_pre"]
        }
    if activation == "gated":
        return "GatedAutoEncoder", {
            "encoder.weight": own["W_enc"],
            "decoder.weight": own["W_dec"].t(),
            "decoder_bias": own["b_pre"],
            "gate_bias": own["b_enc"],
            "r_mag": own["r_mag"],
            "mag_bias": own["b_mag"],
        }
    if activation == "jump_relu":
        return "JumpReluAutoEncoder", {
            "W_enc": own["W_enc"].t(),
            "W_dec": own["W_dec"],
            "b_dec": own["b_pre"],
            "threshold": own["threshold"],
            **foreign.uncentred(sae),
        }
    if _unit_rows(own["W_dec"]):
        return "AutoEncoder", linear | {"bias": own["b_pre"]}
    return "AutoEncoderNew", linear | {
        "encoder.bias": foreign.uncentred(sae)["b_enc"],
        "decoder.bias": own["b_pre"],
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


def _unit_rows(W_dec: Tensor) -> bool:
    """Return whether that library takes the decoder's rows for normalised."""
    norms = W_dec.norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


# ---- what is beside the weights ------------------------------------------------------------------


def _config(file: Path) -> Settings | None:
    """Return the config.json of the trainer that wrote a file: beside it, or a folder above
    checkpoints/."""
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG).is_file():
            settings = foreign.json_file(folder / CONFIG)
            return settings if isinstance(settings.table.get("trainer"), dict) else None
    return None


def _kind(weights: CheckedTensors, trainer: Settings | None) -> str:
    if trainer:
        return trainer.among("dict_class", _READ)
    for mark, kind in (
        ("group_sizes", "MatryoshkaBatchTopKSAE"),
        ("gate_bias", "GatedAutoEncoder"),
        ("decoder.bias", "AutoEncoderNew"),
        ("bias", "AutoEncoder"),
        ("W_enc", "JumpReluAutoEncoder"),
    ):
        if mark in weights:
            return kind
    raise InputError(
        f"{weights.file} has no {CONFIG} beside it that says whether it is an AutoEncoderTopK or a "
        "BatchTopKSAE; "
        f'write one: {{"trainer": {{"dict_class": …}}}}'
    )


def _metadata(settings: Settings | None, trainer: Settings | None) -> dict[str, Any]:
    if settings is None or trainer is None:
        return hook_names.metadata("dictionary_learning", {})
    name = trainer.text("submodule_name") or ""
    numbered = re.fullmatch(r"(resid_pre|resid_post|mlp_out|attn_out)_layer_(\d+)", name)
    site = f"{numbered[1]}.{numbered[2]}" if numbered else name
    return hook_names.metadata(
        "dictionary_learning",
        settings.table,
        lm=trainer.text("lm_name"),
        site=site or None,
        context=settings.under("buffer").get("ctx_len"),
    )
