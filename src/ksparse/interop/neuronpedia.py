"""Files for Neuronpedia: SAEDashboard's batch-K.json, and the folder for Neuronpedia's bulk import.

`--to sae_dashboard`:

* FOLDER/batch-K.json

`--to neuronpedia`:

* FOLDER/MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl
* FOLDER/MODEL/LAYER-SET/{features,activations,explanations}/batch-K.jsonl.gz
* FOLDER/MODEL/LAYER-SET/explanation_scores/batch-K.jsonl.gz, explanation_score_model.jsonl.gz, with
  scores of `explain` (`neuronpedia_explanations`)

Examples are those of `stats`: the strongest (with bin_min = bin_contains = -1), and random ones
of every size in four equal intervals from 0 to the latent's largest value; bin_contains is the
share of all tokens whose value lies in the interval. Values are in the SAE's units. `vector` is
what a value of 1 adds to the raw activations on average, so that steering by a strength in those
units has the size that the latent has in the LM. Logits are those of the decoder row alone: row x
weight of the final norm x unembedding, minus their mean over the vocabulary, which changes no
probability. They are empty where the site is not in the residual stream. Fields that need several
latents or channels at once (correlated_*) are empty.

The importer writes a line into the table of its file (release: SourceRelease, features: Neuron).
Users are named by ids of its database there: `creatorId`, `authorId`.
"""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse import interop
from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.latent_examples import Example, LatentExamples
from ksparse.interop.neuronpedia_explanations import (
    ExplanationSource,
    judge_row,
    read_explanations,
    row_id,
)
from ksparse.interop.text_activations import read_activations
from ksparse.lm.direct_logits import DirectHead, read_head
from ksparse.lm.model import LM
from ksparse.lm.sites import blocks_of
from ksparse.sae.model import SAE
from ksparse.sae.normalization import PER_ACTIVATION
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder

BATCH = 128
DEFAULT_CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""Id of the user to whom Neuronpedia's own exports belong; every Neuronpedia database has it."""
_N_LOGITS, _N_BINS, _N_INTERVALS = 10, 50, 4
_SCALE_TOKENS = 4096
"""Held-out activations whose mean scale is that of `vector`."""


@dataclass(frozen=True)
class Publication:
    """The names under which a run is published on Neuronpedia."""

    model: str = ""
    """Neuronpedia's name of the LM, such as gpt2-small; empty: that of the run's recipe."""
    set: str = "ksparse"
    """Name of the source set, without the layer: author, site and width, such as res-jb."""
    release: str = ""
    """Name of the release that the set belongs to; empty: the set's name."""
    creator: str = ""
    """Name of the author, as shown."""
    creator_id: str = DEFAULT_CREATOR_ID
    """Id of the Neuronpedia user to whom the rows belong."""
    url: str = ""
    """Address of a page about the release."""
    repository: str = ""
    """Hub repository that holds the weights."""


def export_dashboard(run: RunFolder, folder: Path, publication: Publication = Publication()) -> int:
    """Write SAEDashboard's files of a run's live latents.

    Args:
        run: a run with results of `stats`.
        folder: a new or empty folder.
        publication: the names to publish under.

    Returns:
        The number of latents written.
    """
    source, sae, lm = _open(run, folder)
    head = {
        "model_id": publication.model or source.acts.lm,
        "layer": _layer(source),
        "sae_set": publication.set,
        "sae_id_suffix": None,
    }
    count = 0
    with atomic.atomic_dir(folder, new=True) as folder:
        for number, features in enumerate(_batches(source, sae, lm, _find_head(lm))):
            jsonio.write_json(folder / f"batch-{number}.json", head | {"features": features})
            count += len(features)
    return count


def export_bulk(run: RunFolder, folder: Path, publication: Publication = Publication()) -> int:
    """Write the folder that Neuronpedia's bulk import takes, with a run's live latents.

    Args:
        run: a run with results of `stats`, and of `explain` and `n2g` for explanations.
        folder: a new or empty folder.
        publication: the names to publish under.

    Returns:
        The number of latents written.
    """
    source, sae, lm = _open(run, folder)
    head = _find_head(lm)
    hook = hook_names.to_hook(head.site if head else source.acts.site)
    model = publication.model or source.acts.lm.replace("/", "-")
    source_id = f"{_layer(source)}-{publication.set}"
    for name in (model, source_id):
        if Path(name).name != name or name == "..":
            raise InputError(
                f"{name!r} cannot be the name of a folder; give --model and --set plain names"
            )
    created = datetime.datetime.now(datetime.UTC).isoformat()
    names = {"modelId": model, "layer": source_id}
    common = {"creatorId": publication.creator_id, "createdAt": created}
    explanations = read_explanations(run, source)
    judge = judge_row(run, publication.creator, created)
    count = 0
    with atomic.atomic_dir(folder, new=True) as root:
        target = root / model / source_id
        target.mkdir(parents=True)
        for table, row in _release_rows(source, lm, publication, names, common).items():
            _write_rows(target / f"{table}.jsonl", [row])
        if judge is not None:
            _write_rows(target / "explanation_score_model.jsonl.gz", [judge])
        for number, features in enumerate(_batches(source, sae, lm, head)):
            tables = _latent_rows(features, hook, names, common, explanations)
            for table, rows in tables.items():
                if not rows and table == "explanation_scores":
                    continue
                (target / table).mkdir(exist_ok=True)
                _write_rows(target / table / f"batch-{number}.jsonl.gz", rows)
            count += len(features)
    return count


def _open(run: RunFolder, folder: Path) -> tuple[LatentExamples, SAE, LM]:
    foreign.check_new_folder(folder)
    source = LatentExamples(run)
    return source, interop.load(run.path, device="cpu"), LM(acts=source.acts, device="cpu")


def _find_head(lm: LM) -> DirectHead | None:
    """Return what makes direct logits; None where a decoder row has none."""
    try:
        return read_head(lm)
    except InputError:  # a note of `stats` has the reason
        return None


def _layer(source: LatentExamples) -> int:
    layer = hook_names.layer_of(source.acts.site)
    if layer is None:
        raise InputError(
            f"site {source.acts.site!r} does not say which layer it belongs to; Neuronpedia needs "
            "the layer in a source's name"
        )
    return layer


# ---- one latent ----------------------------------------------------------------------------------


@torch.no_grad()
def _batches(
    source: LatentExamples, sae: SAE, lm: LM, head: DirectHead | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the live latents as SAEDashboard's features, in batches."""
    live = source.live_latents()
    scale = _raw_scale(sae, lm)
    for first in range(0, len(live), BATCH):
        latents = live[first : first + BATCH]
        rows = sae.W_dec[latents]
        logits = head.logits(rows).cpu() if head else rows.new_empty(len(rows), 0)
        yield [
            _feature(source, latent, row, logit) | {"vector": _rounded(scale * row)}
            for latent, row, logit in zip(latents, rows, logits)
        ]


def _raw_scale(sae: SAE, lm: LM) -> float:
    """Return the mean, over held-out activations, of what the SAE's normalisation divides by."""
    if sae.shape.normalize not in PER_ACTIVATION:
        return 1 / sae.shape.factor if sae.shape.normalize == "dataset" else 1.0
    raw = read_activations(lm, "held-out", _SCALE_TOKENS)
    return float(sae.normalize(raw).scale.double().mean())


def _feature(source: LatentExamples, latent: int, row: Tensor, logits: Tensor) -> dict[str, Any]:
    top, bottom = (
        logits.topk(min(_N_LOGITS, len(logits))),
        (-logits).topk(min(_N_LOGITS, len(logits))),
    )
    strongest = row.topk(min(3, len(row))).indices
    heights, edges = np.histogram(logits.numpy(), bins=_N_BINS if len(logits) else [0.0])
    bars, width = source.histogram(latent), source.stats["act_bin"]
    values = row[strongest]
    return {
        "feature_index": latent,
        "neuron_alignment_indices": strongest.tolist(),
        "neuron_alignment_values": _rounded(values),
        "neuron_alignment_l1": _rounded(values / row.abs().sum()),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": source.token_strings(bottom.indices.tolist()),
        "neg_values": _rounded(-bottom.values),
        "pos_str": source.token_strings(top.indices.tolist()),
        "pos_values": _rounded(top.values),
        "frac_nonzero": float(source.arrays["density"][latent]),
        "freq_hist_data_bar_values": [round((bar - 0.5) * width, 6) for bar in bars],
        "freq_hist_data_bar_heights": list(bars.values()),
        "logits_hist_data_bar_values": _rounded(torch.from_numpy((edges[1:] + edges[:-1]) / 2)),
        "logits_hist_data_bar_heights": heights.tolist(),
        "n_prompts_total": len(source.arrays["contexts"]),
        "n_tokens_in_prompt": source.acts.context,
        "dataset": source.acts.text,
        "decoder_weights_dist": [],
        "activations": _examples(source, latent),
    }


def _examples(source: LatentExamples, latent: int) -> list[dict[str, Any]]:
    """Return the strongest and the random examples as SAEDashboard's activations."""
    largest = float(source.arrays["max_act"][latent])
    counts = source.arrays["histogram"][latent].astype(np.int64)
    density = float(source.arrays["density"][latent])
    edges = np.linspace(0, largest, _N_INTERVALS + 1)
    shares = counts.reshape(_N_INTERVALS, -1).sum(1) / max(1, counts.sum()) * density
    intervals = [
        (round(float(edges[i]), 6), round(float(edges[i + 1]), 6), float(shares[i]))
        for i in range(_N_INTERVALS)
    ]
    top = (-1.0, intervals[-1][1], -1.0)
    examples = [_example(source, example, top) for example in source.examples(latent, "top")]
    # Without bands, in results with fewer examples than bands, random ones of all sizes.
    sampling = "band" if source.has_examples(latent, "band") else "random"
    for example in source.examples(latent, sampling):
        number = min(int(example.acts[example.at] / largest * _N_INTERVALS), _N_INTERVALS - 1)
        examples.append(_example(source, example, intervals[number]))
    return examples


def _example(
    source: LatentExamples, example: Example, bin_: tuple[float, float, float]
) -> dict[str, Any]:
    low, high, share = bin_
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": source.token_strings(example.tokens),
        "values": [round(act, 4) for act in example.acts],
        "qualifying_token_index": example.at,
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


# ---- rows of the database ------------------------------------------------------------------------


def _release_rows(
    source: LatentExamples,
    lm: LM,
    publication: Publication,
    names: dict[str, str],
    common: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Return the rows that describe the release, the model, the source set and the source."""
    owner, slash, _ = source.acts.lm.rpartition("/")
    model, creator = names["modelId"], publication.creator
    release = publication.release or publication.set
    return {
        "release": {
            "name": release,
            "description": release,
            "descriptionShort": release,
            "urls": [publication.url] if publication.url else [],
            "creatorNameShort": creator,
            "creatorName": creator,
            "visibility": "PUBLIC",
            **common,
        },
        "model": {
            "id": model,
            "instruct": model.endswith("-it"),
            "displayNameShort": model,
            "displayName": model,
            "dimension": lm.d_model,
            "layers": len(blocks_of(lm.model)),
            "neuronsPerLayer": 0,
            "owner": owner if slash and "/" not in owner else creator,
            "visibility": "PUBLIC",
            "updatedAt": common["createdAt"],
            **common,
        },
        "sourceset": {
            "modelId": model,
            "name": publication.set,
            "creatorName": creator,
            "releaseName": release,
            "description": f"{source.acts.site}, {source.n_latents:,} latents",
            "visibility": "PUBLIC",
            **common,
        },
        "source": {
            "modelId": model,
            "setName": publication.set,
            "visibility": "PUBLIC",
            "dataset": source.acts.text,
            "id": names["layer"],
            "num_prompts": len(source.arrays["contexts"]),
            "num_tokens_in_prompt": source.acts.context,
            "hfRepoId": publication.repository or None,
            "hfFolderId": None,
            **common,
        },
    }


def _latent_rows(
    features: list[dict[str, Any]],
    hook: str,
    names: dict[str, str],
    common: dict[str, str],
    explanations: list[ExplanationSource],
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a batch of latents, by table."""
    return {
        "features": [_feature_row(feature, hook, names | common) for feature in features],
        "activations": [
            _activation_row(feature, index, names, common, example)
            for feature in features
            for index, example in enumerate(feature["activations"])
        ],
        "explanations": [
            found.row(feature["feature_index"], names, common)
            for feature in features
            for found in explanations
            if feature["feature_index"] in found.texts
        ],
        "explanation_scores": [
            row
            for feature in features
            for found in explanations
            for row in found.score_rows(feature["feature_index"], names, common)
        ],
    }


def _feature_row(feature: dict[str, Any], hook: str, common: dict[str, Any]) -> dict[str, Any]:
    largest = max((max(example["values"]) for example in feature["activations"]), default=0.0)
    other_tables = (
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
        "hookName": hook,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **{key: value for key, value in feature.items() if key not in other_tables},
    }


def _activation_row(
    feature: dict[str, Any],
    number: int,
    names: dict[str, str],
    common: dict[str, Any],
    example: dict[str, Any],
) -> dict[str, Any]:
    values = example["values"]
    index = str(feature["feature_index"])
    return {
        **names,
        **common,
        "id": row_id(*names.values(), index, str(number)),
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


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    if file.suffix == ".gz":
        with gzip.GzipFile(file, "wb", mtime=0) as stream:
            stream.write(text.encode())
    else:
        file.write_text(text, encoding="utf-8")
