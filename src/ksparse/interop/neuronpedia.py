"""What Neuronpedia shows: SAEDashboard's batch-K.json, and the folder that Neuronpedia's bulk
import takes.

    FOLDER/batch-K.json
        sae_dashboard
    FOLDER/MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl
        neuronpedia
    FOLDER/MODEL/LAYER-SET/{features,activations,explanations}/batch-K.jsonl.gz

Examples are those of `stats`: the strongest (marked bin_min = bin_contains = -1), and random ones
among all where a latent fires, as one bin. Logits are those of the direction alone: decoder row x
final norm's weight x unembedding. What needs activations of other latents or channels at the same
time (correlated_*) is empty.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.latent_examples import Example, LatentExamples
from ksparse.lm.model import LM
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM

BATCH = 128
_LOGITS, _BINS = 10, 50
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Publication:
    """What Neuronpedia calls things."""

    model: str = ""
    """Its name of the LM, such as gpt2-small; ours if not given."""
    set: str = "ksparse"
    """Name of the source set, without the layer: author, site and width, such as res-jb."""
    release: str = ""
    """Name of the release that sets belong to; the set's if not given."""
    creator: str = ""
    """Who made it."""
    url: str = ""
    """Where to read about it."""
    repository: str = ""
    """Repository on the Hub that holds the weights."""


def dashboard(run: RunFolder, folder: Path, publication: Publication = Publication()) -> int:
    """Write SAEDashboard's files of a run's live latents; return how many latents."""
    shown, sae, lm = _opened(run, folder)
    head = {
        "model_id": publication.model or shown.acts.lm,
        "layer": _layer(shown),
        "sae_set": publication.set,
        "sae_id_suffix": None,
    }
    count = 0
    with atomic.atomic_dir(folder, new=True) as folder:
        for number, features in enumerate(_batches(shown, sae, lm)):
            jsonio.write_json(folder / f"batch-{number}.json", head | {"features": features})
            count += len(features)
    return count


def bulk(run: RunFolder, folder: Path, publication: Publication = Publication()) -> int:
    """Write the folder that Neuronpedia imports of a run's live latents; return how many
    latents."""
    shown, sae, lm = _opened(run, folder)
    model, source = (
        publication.model or shown.acts.lm.replace("/", "-"),
        f"{_layer(shown)}-{publication.set}",
    )
    for name in (model, source):
        if Path(name).name != name or name == "..":
            raise InputError(
                f"{name!r} cannot be the name of a folder; give --model and --set plain names"
            )
    now = datetime.datetime.now(datetime.UTC).isoformat()
    common = {"creatorId": publication.creator, "createdAt": now}
    release = publication.release or publication.set
    explained = _explanations(run, shown)
    count = 0
    with atomic.atomic_dir(folder, new=True) as filled:
        home = filled / model / source
        home.mkdir(parents=True)
        _lines(
            home / "release.jsonl",
            [
                {
                    "name": release,
                    "description": release,
                    "descriptionShort": release,
                    "urls": [publication.url] if publication.url else [],
                    "creatorNameShort": publication.creator,
                    "creatorName": publication.creator,
                    **common,
                }
            ],
        )
        _lines(
            home / "model.jsonl",
            [
                {
                    "id": model,
                    "instruct": model.endswith("-it"),
                    "displayNameShort": model,
                    "displayName": model,
                    "updatedAt": now,
                    **common,
                }
            ],
        )
        _lines(
            home / "sourceset.jsonl",
            [
                {
                    "modelId": model,
                    "name": publication.set,
                    "creatorName": publication.creator,
                    "releaseName": release,
                    "description": f"{shown.acts.site}, {shown.n:,} latents",
                    "visibility": "PUBLIC",
                    **common,
                }
            ],
        )
        _lines(
            home / "source.jsonl",
            [
                {
                    "modelId": model,
                    "setName": publication.set,
                    "visibility": "PUBLIC",
                    "dataset": shown.acts.text,
                    "id": source,
                    "num_prompts": len(shown.arrays["contexts"]),
                    "num_tokens_in_prompt": shown.acts.context,
                    "hfRepoId": publication.repository or None,
                    "hfFolderId": None,
                    "creatorId": publication.creator,
                }
            ],
        )
        for number, features in enumerate(_batches(shown, sae, lm)):
            names = {"modelId": model, "layer": source}
            rows = {
                "features": [
                    _feature_row(each, shown.acts.site, names | common) for each in features
                ],
                "activations": [
                    _activation_row(each, place, names, common, one)
                    for each in features
                    for place, one in enumerate(each["activations"])
                ],
                "explanations": [
                    _explanation_row(
                        each["feature_index"],
                        explained[each["feature_index"]],
                        names,
                        publication.creator,
                    )
                    for each in features
                    if each["feature_index"] in explained
                ],
            }
            for kind, lines in rows.items():
                (home / kind).mkdir(exist_ok=True)
                _lines(home / kind / f"batch-{number}.jsonl.gz", lines)
            count += len(features)
    return count


def _opened(run: RunFolder, folder: Path) -> tuple[LatentExamples, SAE, LM]:
    foreign.new_folder(folder)
    shown = LatentExamples(run)
    return shown, serialization.load(run.path), LM(acts=shown.acts)


def _layer(shown: LatentExamples) -> int:
    layer = hook_names.layer_of(shown.acts.site)
    if layer is None:
        raise InputError(
            f"site {shown.acts.site!r} does not say of which layer it is, which Neuronpedia wants "
            "in a source's name"
        )
    return layer


# ---- one latent ----------------------------------------------------------------------------------


@torch.no_grad()
def _batches(shown: LatentExamples, sae: SAE, lm: LM) -> Iterator[list[dict[str, Any]]]:
    """Yield the live latents in SAEDashboard's terms, some at a time."""
    unembed, live = unembedding(lm.model), shown.live()
    for first in range(0, len(live), BATCH):
        latents = live[first : first + BATCH]
        rows = sae.W_dec[latents]
        logits = rows @ unembed.T
        yield [
            _feature(shown, latent, row, logit) for latent, row, logit in zip(latents, rows, logits)
        ]


def unembedding(model: CausalLM) -> Tensor:
    """Return the matrix [v, d] that maps a direction of the residual stream to logits, through the
    final norm's weight; centred where that norm centres."""
    weight = model.get_output_embeddings().weight.detach().float()
    norms = (
        (module, scale.detach().float())
        for name, module in model.base_model.named_children()
        if name in _NORMS and isinstance(scale := getattr(module, "weight", None), Tensor)
    )
    if (first := next(norms, None)) is None:
        return weight
    norm, scale = first
    weight = weight * (
        1 + scale if type(norm).__name__.startswith("Gemma") else scale
    )  # Gemma's norms keep what they add to 1
    return weight - weight.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else weight


def _feature(shown: LatentExamples, latent: int, row: Tensor, logits: Tensor) -> dict[str, Any]:
    top, bottom = logits.topk(min(_LOGITS, len(logits))), (-logits).topk(min(_LOGITS, len(logits)))
    strongest = row.abs().topk(min(3, len(row))).indices
    heights, edges = np.histogram(logits.numpy(), bins=_BINS)
    bars, width = shown.bars(latent), shown.stats["act_bin"]
    values = row[strongest]
    return {
        "feature_index": latent,
        "neuron_alignment_indices": strongest.tolist(),
        "neuron_alignment_values": _rounded(values),
        "neuron_alignment_l1": _rounded(values.abs() / row.abs().sum()),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": shown.strings(bottom.indices.tolist()),
        "neg_values": _rounded(-bottom.values),
        "pos_str": shown.strings(top.indices.tolist()),
        "pos_values": _rounded(top.values),
        "frac_nonzero": float(shown.arrays["density"][latent]),
        "freq_hist_data_bar_values": [round((bar - 0.5) * width, 6) for bar in bars],
        "freq_hist_data_bar_heights": list(bars.values()),
        "logits_hist_data_bar_values": _rounded(torch.from_numpy((edges[1:] + edges[:-1]) / 2)),
        "logits_hist_data_bar_heights": heights.tolist(),
        "n_prompts_total": len(shown.arrays["contexts"]),
        "n_tokens_in_prompt": shown.acts.context,
        "dataset": shown.acts.text,
        "decoder_weights_dist": [],
        "vector": _rounded(row),
        "activations": _examples(shown, latent),
    }


def _examples(shown: LatentExamples, latent: int) -> list[dict[str, Any]]:
    largest = float(shown.arrays["max_act"][latent])
    top = [_example(shown, each, (-1.0, -1.0, largest)) for each in shown.examples(latent, "top")]
    return top + [
        _example(shown, each, (0.0, 1.0, largest)) for each in shown.examples(latent, "random")
    ]


def _example(
    shown: LatentExamples, example: Example, group: tuple[float, float, float]
) -> dict[str, Any]:
    low, share, high = group
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": shown.strings(example.tokens),
        "values": [round(act, 4) for act in example.acts],
        "qualifying_token_index": example.at,
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


# ---- rows of the database ------------------------------------------------------------------------


def _feature_row(feature: dict[str, Any], site: str, common: dict[str, Any]) -> dict[str, Any]:
    largest = max((max(each["values"]) for each in feature["activations"]), default=0.0)
    elsewhere = (
        "feature_index",
        "activations",
        "vector",
        "n_prompts_total",
        "n_tokens_in_prompt",
        "dataset",
    )
    return {
        **common,
        "index": str(feature["feature_index"]),
        "sourceSetName": common["layer"].partition("-")[2],
        "maxActApprox": largest,
        "hasVector": True,
        "vector": feature["vector"],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": largest,
        "hookName": hook_names.to_hook(site),
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **{key: value for key, value in feature.items() if key not in elsewhere},
    }


def _activation_row(
    feature: dict[str, Any],
    place: int,
    names: dict[str, str],
    common: dict[str, Any],
    example: dict[str, Any],
) -> dict[str, Any]:
    values = example["values"]
    index = str(feature["feature_index"])
    return {
        **names,
        **common,
        "id": _identity(*names.values(), index, str(place)),
        "index": index,
        "tokens": example["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": int(np.argmax(values)),
        "minValue": min(values),
        "dataSource": None,
        "dataIndex": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": example["bin_min"],
        "binMax": example["bin_max"],
        "binContains": example["bin_contains"],
        "qualifyingTokenIndex": example["qualifying_token_index"],
    }


def _explanation_row(
    latent: int, description: str, names: dict[str, str], author: str
) -> dict[str, Any]:
    return {
        **names,
        "id": _identity(*names.values(), str(latent), "n2g"),
        "index": str(latent),
        "description": description,
        "authorId": author,
        "typeName": "n2g",
        "explanationModelName": None,
        "scores": [],
    }


def _explanations(run: RunFolder, shown: LatentExamples) -> dict[int, str]:
    """Return the three best supported N2G patterns of each latent in words; '*' is any token."""
    if run.eval("n2g") is None:
        return {}
    arrays = shown.read("n2g")[1]
    found: dict[int, list[tuple[int, str]]] = {}
    for number, latent in enumerate(arrays["pattern_latent"].tolist()):
        tokens = arrays["pattern_tokens"][
            slice(*arrays["pattern_start"][number : number + 2].tolist())
        ].tolist()
        words = "".join("*" if token < 0 else shown.strings([token])[0] for token in tokens)
        found.setdefault(latent, []).append((-int(arrays["pattern_support"][number]), words))
    return {
        latent: " | ".join(words for _, words in sorted(patterns)[:3])
        for latent, patterns in found.items()
    }


def _identity(*parts: str) -> str:
    return "c" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    if file.suffix == ".gz":
        with gzip.GzipFile(file, "wb", mtime=0) as stream:
            stream.write(text.encode())
    else:
        file.write_text(text, encoding="utf-8")
