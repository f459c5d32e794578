"""The JSON of OpenAI's viewer: atoms/LATENT.json of every latent that fired, and
LATENT-ablated.json of those that were ablated where they are strongest.

Values are in units of the size of a component of the SAE's input (of layer_norm: as they are), so
that the viewer's bars of width 0.2 fit.
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

_BAR = 0.2


def export(run: RunFolder, folder: Path) -> int:
    """Write a run's latents; return how many."""
    foreign.new_folder(folder)
    shown = LatentExamples(run)
    latents = shown.live()
    with atomic.atomic_dir(folder, new=True) as folder:
        (folder / "atoms").mkdir()
        for latent in latents:
            _write(folder / "atoms" / f"{latent}.json", atom(shown, latent))
        for row, latent in enumerate(shown.ablation.get("latent", np.zeros(0)).tolist()):
            _write(folder / "atoms" / f"{latent}-ablated.json", ablated(shown, row))
    return len(latents)


def atom(shown: LatentExamples, latent: int) -> dict[str, Any]:
    """Return what the viewer shows of a latent."""
    scale = _BAR / shown.stats["act_bin"]
    first, second, third, fourth = shown.moments(latent)
    return {
        "density": float(shown.arrays["density"][latent]),
        "mean_act": first * scale,
        "mean_act_squared": second * scale**2,
        "skew": third / second**1.5 if second else None,
        "kurtosis": fourth / second**2 if second else None,
        "hist": {str(bar): count for bar, count in shown.bars(latent).items()},
        "random": [_sequence(shown, each, scale) for each in shown.examples(latent, "random")],
        "top": [_sequence(shown, each, scale) for each in shown.examples(latent, "top")],
    }


def ablated(shown: LatentExamples, row: int) -> dict[str, Any]:
    """Return what happens without a latent, of row `row` of the ablation tables: entry t - 1 of
    each list is about the prediction of token t."""
    table, scale = shown.ablation, _BAR / shown.stats["act_bin"]
    tokens = [token for token in table["context_tokens"][row].tolist() if token >= 0]
    at, latent = int(table["position"][row]), int(table["latent"][row])
    acts = [0.0] * len(tokens)
    for each in shown.examples(latent, "top"):
        start = next(
            (
                first
                for first in range(len(tokens))
                if first + each.at == at and tokens[first : first + len(each.tokens)] == each.tokens
            ),
            None,
        )
        if start is not None:
            acts[start : start + len(each.acts)] = each.acts
    acts[at] = float(table["value"][row])
    sequence = _sequence(shown, Example(-1, tokens, acts, at), scale)
    horizon = min(table["kl"].shape[1], len(tokens) - 1 - at)
    predictions = len(tokens) - 1

    def spread(values: Any, empty: Any) -> list[Any]:
        """Return a value for each prediction: `empty` for those that the ablated position cannot
        reach or that were not compared."""
        return [empty] * at + list(values[:horizon]) + [empty] * (predictions - at - horizon)

    finite = {name: np.nan_to_num(table[name][row]).tolist() for name in ("loss_difference", "kl")}
    sequence |= {
        "ablate_loss_diff": spread(finite["loss_difference"], 0.0),
        "kl": spread(finite["kl"], 0.0),
    }
    for way in ("up", "down"):
        strings = [shown.strings(each) for each in table[f"{way}_tokens"][row].tolist()]
        logits = table[f"{way}_values"][row].astype(float).tolist()
        sequence |= {
            f"top_{way}vote_tokens_logits": spread(strings, []),
            f"top_{way}votes_logits": spread(logits, []),
            f"top_{way}vote_tokens_probs": [[]] * predictions,
            f"top_{way}votes_probs": [[]] * predictions,
        }
    return {
        **{
            key: value for key, value in atom(shown, latent).items() if key not in ("random", "top")
        },
        "random": [],
        "top": [sequence],
    }


def _sequence(shown: LatentExamples, example: Example, scale: float) -> dict[str, Any]:
    acts = [round(act * scale, 6) for act in example.acts]
    return {
        "density": float(np.mean(np.array(acts) > 0)),
        "doc_id": example.context,
        "idx": example.at,
        "acts": acts,
        "act": acts[example.at],
        "tokens": shown.strings(example.tokens),
        "token_ints": example.tokens,
    }


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, allow_nan=False, ensure_ascii=False), encoding="utf-8")
