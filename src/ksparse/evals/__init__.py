"""One file per question asked of an autoencoder; `evaluate` asks several in one pass over held-out text."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable, Sequence
from typing import Any

from safetensors.torch import save_file

from ksparse import files
from ksparse.acts.lm import LM, resolve_device
from ksparse.errors import InputError
from ksparse.evals.downstream import Downstream
from ksparse.evals.estimate import Result
from ksparse.evals.held_out import HeldOut
from ksparse.evals.options import EvalOptions
from ksparse.evals.stats import Stats
from ksparse.recipe import Acts
from ksparse.runs import RunFolder
from ksparse.sae.model import SAE

EVALS: dict[str, type] = {"downstream": Downstream, "stats": Stats}


def evaluate(sae: SAE, lm: LM | None = None, names: Sequence[str] = tuple(EVALS), options: EvalOptions = EvalOptions(), *,
             observe: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Result]:
    """Return {name: result} of evaluations of an SAE on held-out text (docs/formats.md has every field).

    lm: the LM with its site; the one that the SAE was trained on if not given. The SAE is moved to its device.
    observe: called with the activations seen and wanted.
    """
    check_names(names)
    lm = lm or LM(acts=_acts(sae), device=resolve_device(options.device))
    data = HeldOut(sae.to(lm.device).eval(), lm, options)
    started = time.monotonic()
    running = {name: EVALS[name](data) for name in names}
    seen_tokens, contexts, documents = 0, 0, set()
    for seen in data:
        for each in running.values():
            each.update(seen)
        seen_tokens, contexts = seen_tokens + int(seen.keep.sum()), contexts + len(seen.keep)
        documents |= set(seen.documents.tolist())
        observe(min(seen_tokens, options.tokens), options.tokens)
    if not seen_tokens:
        raise InputError(f"text {data.acts.text!r} has nothing to evaluate on in its split {options.split!r}; "
                         "give more text, or another with --text")
    common = {"options": dataclasses.asdict(options), "policy": data.corpus.policy(), "lm": data.acts.lm, "site": data.acts.site,
              "text": data.acts.text, "n_tokens": seen_tokens, "n_documents": len(documents),
              "checkpoint": sae.metadata.get("step"), "notes": []}
    if len(documents) < 10:
        common["notes"] = [f"only {len(documents)} documents: the standard errors are rough"]
    results = {}
    for name, each in running.items():
        result = each.result()
        values = {"name": name, **common, **result, "notes": [*common["notes"], *result.get("notes", [])]}
        results[name] = Result(values | {"seconds": round(time.monotonic() - started, 2)}, result.arrays, result.files)
    return results


def check_names(names: Sequence[str]) -> None:
    """Raise InputError for an evaluation that does not exist."""
    for name in names:
        if name not in EVALS:
            near = difflib.get_close_matches(name, EVALS, 1)
            raise InputError(f"there is no evaluation {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(EVALS)}"))


def write(run: RunFolder, results: dict[str, Result]) -> None:
    """Write results into a run's folder evals/."""
    for name, result in results.items():
        path = run.eval_file(name)
        with files.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if result.arrays:
                tmp = path.with_name(f".tmp-{name}.safetensors")
                save_file({key: array.contiguous() for key, array in result.arrays.items()}, tmp)
                tmp.chmod(0o644)
                tmp.replace(path.with_suffix(".safetensors"))
        for other, value in result.files.items():
            files.write_json(run.eval_file(other), value)
        files.write_json(path, result)


def _acts(sae: SAE) -> Acts:
    own: dict[str, Any] | None = sae.metadata.get("acts")
    if not own:
        raise InputError("this SAE does not say which LM it was trained on; give one: ksparse.LM(name, site=…)")
    return Acts(**own)
