"""The JSON files of OpenAI's viewer: atoms/LATENT.json for every latent that fired, and
LATENT-ablated.json for the latents that `ablation` ablated at their strongest activation.

Values are in units of the root mean square of a component of the SAE's input, so that they fit the
viewer's bars of width 0.2. (With layer_norm that unit is 1.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.interop import foreign
from ksparse.interop.latent_examples import Example, LatentExamples
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder

_BAR_WIDTH = 0.2


def export(run: RunFolder, folder: Path) -> int:
    """Write the files of a run's live latents into a new folder; return the number of latents.

    Raises:
        InputError: the run has no results of `stats`, or the folder is not empty.
    """
    foreign.check_new_folder(folder)
    source = LatentExamples(run)
    latents = source.live_latents()
    with atomic.atomic_dir(folder, new=True) as folder:
        (folder / "atoms").mkdir()
        for latent in latents:
            _write_json(folder / "atoms" / f"{latent}.json", latent_record(source, latent))
        for row, latent in enumerate(source.ablation.get("latent", np.zeros(0)).tolist()):
            _write_json(folder / "atoms" / f"{latent}-ablated.json", ablation_record(source, row))
    return len(latents)


def latent_record(source: LatentExamples, latent: int) -> dict[str, Any]:
    """Return what the viewer shows of a latent: statistics, histogram and examples."""
    scale = _scale(source)
    return {
        **_statistics(source, latent),
        "random": [
            _sequence(source, example, scale) for example in source.examples(latent, "random")
        ],
        "top": [_sequence(source, example, scale) for example in source.examples(latent, "top")],
    }


def _statistics(source: LatentExamples, latent: int) -> dict[str, Any]:
    scale = _scale(source)
    first, second, third, fourth = source.moments(latent)
    return {
        "density": float(source.arrays["density"][latent]),
        "mean_act": first * scale,
        "mean_act_squared": second * scale**2,
        "skew": third / second**1.5 if second else None,
        "kurtosis": fourth / second**2 if second else None,
        "hist": {str(bar): count for bar, count in source.histogram(latent).items()},
    }


def ablation_record(source: LatentExamples, row: int) -> dict[str, Any]:
    """Return what the viewer shows of a latent's ablation.

    Args:
        source: the run's latents.
        row: row of the arrays of `ablation`.

    Returns:
        The latent's statistics and one sequence, whose lists have one entry per prediction: entry
        t - 1 is about the prediction of token t.
    """
    table = source.ablation
    tokens = [token for token in table["context_tokens"][row].tolist() if token >= 0]
    at, latent = int(table["position"][row]), int(table["latent"][row])
    acts = _acts_in_context(source, latent, tokens, at)
    acts[at] = float(table["value"][row])
    sequence = _sequence(source, Example(-1, tokens, acts, at), _scale(source))
    predictions = len(tokens) - 1
    horizon = min(table["kl"].shape[1], predictions - at)

    def pad(values: Any, filler: Any) -> list[Any]:
        """Return one value per prediction, with `filler` where none was compared."""
        return [filler] * at + list(values[:horizon]) + [filler] * (predictions - at - horizon)

    finite = {name: np.nan_to_num(table[name][row]).tolist() for name in ("loss_difference", "kl")}
    sequence |= {
        "ablate_loss_diff": pad(finite["loss_difference"], 0.0),
        "kl": pad(finite["kl"], 0.0),
    }
    for direction in ("up", "down"):
        strings = [source.token_strings(ids) for ids in table[f"{direction}_tokens"][row].tolist()]
        logits = table[f"{direction}_values"][row].astype(float).tolist()
        sequence |= {
            f"top_{direction}vote_tokens_logits": pad(strings, []),
            f"top_{direction}votes_logits": pad(logits, []),
            f"top_{direction}vote_tokens_probs": [[]] * predictions,
            f"top_{direction}votes_probs": [[]] * predictions,
        }
    return {**_statistics(source, latent), "random": [], "top": [sequence]}


def _acts_in_context(
    source: LatentExamples, latent: int, tokens: list[int], at: int
) -> list[float]:
    """Return a latent's values on a context, from the top examples around `at`; else 0."""
    acts = [0.0] * len(tokens)
    for example in source.examples(latent, "top"):
        first = at - example.at
        if first >= 0 and tokens[first : first + len(example.tokens)] == example.tokens:
            acts[first : first + len(example.acts)] = example.acts
    return acts


def _scale(source: LatentExamples) -> float:
    """Return the factor from the latents' values to the viewer's."""
    return _BAR_WIDTH / source.stats["act_bin"]


def _sequence(source: LatentExamples, example: Example, scale: float) -> dict[str, Any]:
    acts = [round(act * scale, 6) for act in example.acts]
    return {
        "density": float(np.mean(np.array(acts) > 0)),
        "doc_id": example.context,
        "idx": example.at,
        "acts": acts,
        "act": acts[example.at],
        "tokens": source.token_strings(example.tokens),
        "token_ints": example.tokens,
    }


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, allow_nan=False, ensure_ascii=False), encoding="utf-8")
