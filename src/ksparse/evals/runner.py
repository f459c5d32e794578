"""One file per question asked of an autoencoder; `evaluate` asks several in one pass over held-out
text.

    downstream       does the LM predict as well from the reconstruction?
    stats            how good is the reconstruction, and what do latents fire on?
    probes           do single latents know what we know?
    n2g              can latents be explained by short patterns of tokens?
    explained_loss   how well does the LM predict if each latent is replaced by its explanation?
    ablation         does a latent matter to few predictions, or a little to all?

    positions        how good is the reconstruction at each position of a context?
    refinement       are the values of a code the best ones for its latents?
    progressive      is the code still good at another k, or with a threshold in the place of k?
    latents          how often do latents fire, how strongly, and on what kinds of position?
    subspaces        do groups of latents keep to subspaces of their own?

The first six are asked if none is named (DEFAULT), the others by name.

    held_out         the text and what the LM and the SAE make of it       estimate   values with
                     standard errors
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.batches import HeldOut, SAEBatch, acts_of
from ksparse.evals.registry import DEFAULT, EVALS, check_names
from ksparse.evals.statistics import Result
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.sae.model import SAE
from ksparse.steering import lm_of
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder

_OF_TRAINING = (
    "normalize",
    "mix",
    "shards",
    "lm_batch",
)  # what may differ between SAEs that share a pass


def evaluate(
    sae: SAE,
    lm: LM | None = None,
    names: Sequence[str] = tuple(DEFAULT),
    options: EvalConfig = EvalConfig(),
    *,
    force: bool = False,
    observe: Progress = lambda what, done, total: None,
) -> dict[str, Result]:
    """Return {name: result} of evaluations of an SAE on held-out text (docs/formats.md has every
    field).

    lm: the LM with its site; the one that the SAE was trained on if not given. The SAE is moved to
    its device.
    force: evaluate at another site, or in other contexts and positions, than those it was trained
    at; the results say so.
    observe: called with what is being done, and how much of how much is done.
    """
    if not isinstance(sae, SAE):
        raise InputError(
            f"what is evaluated is an SAE, not {sae!r:.80}; ksparse.load(…) makes one of a run, a "
            "folder or a name on the Hub"
        )
    return evaluate_many(
        {"": sae},
        lm,
        names,
        dataclasses.replace(options, force=options.force or force),
        observe=observe,
    )[""]


@torch.inference_mode()
def evaluate_many(
    saes: dict[str, SAE],
    lm: LM | None = None,
    names: Sequence[str] = tuple(DEFAULT),
    options: EvalConfig = EvalConfig(),
    *,
    like: ActsConfig | None = None,
    observe: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, Result]]:
    """Return {SAE's name: {evaluation's name: result}} for SAEs at one site, which share the LM's
    work; else like `evaluate`.

    like: text, contexts and positions for all, in place of their own.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    check_names(names)
    if lm is not None and not isinstance(lm, LM):
        raise InputError(
            f"lm is {lm!r:.80}; it must be an LM with its site: ksparse.LM(name, site=…)"
        )
    options = options.resolved()
    first = next(iter(saes.values()))
    lm = lm or lm_of(first, options.device)
    acts = _common_acts(saes, lm, options, like)
    notes = {label: _checked(label, sae, lm, options, like) for label, sae in saes.items()}
    data = HeldOut(lm, acts, options)
    contexts = {
        label: EvalContext(sae.to(lm.device).eval(), data, notes[label])
        for label, sae in saes.items()
    }
    asked = {
        label: {name: context.part(EVALS[name]) for name in names}
        for label, context in contexts.items()
    }
    clock = _Clock()
    for part, batch in _pass(contexts, data, 1, observe):
        with clock.of(part):
            part.update(batch)
    for part in _parts(contexts, 0):
        with clock.of(part):
            part.compute(observe)
    for part, batch in _pass(contexts, data, 2, observe):
        with clock.of(part):
            part.update_second_pass(batch)
    results = {
        label: {name: _finished(name, part, clock) for name, part in parts.items()}
        for label, parts in asked.items()
    }
    attach_comparisons(results)
    return results


def _parts(contexts: dict[str, EvalContext], passes: int) -> list[Metric]:
    """Return the parts that see the text at least so often."""
    return [
        part
        for context in contexts.values()
        for part in context.parts.values()
        if part.passes >= passes
    ]


def _pass(contexts: dict[str, EvalContext], data: HeldOut, number: int, observe: Progress) -> Any:
    """Yield (part, batch as its SAE sees it) for all that want this pass; no pass if none does."""
    wanting = _parts(contexts, number)
    if not wanting:
        return
    what = "reading the text" if number == 1 else "reading the text again"
    for held_out in data:
        batches = {id(context): SAEBatch(context.sae, held_out) for context in contexts.values()}
        for part in wanting:
            yield part, batches[id(part.context)]
        observe(what, min(data.tokens, data.options.tokens), data.options.tokens)
    if not data.tokens:
        raise data.nothing()


def _finished(name: str, part: Metric, clock: _Clock) -> Result:
    """Return a part's result with what all results say."""
    with clock.of(part):
        result = part.finalize()
    assert result is not None  # only parts that others build on have none, and those have no name
    data, sae, notes = part.context.data, part.context.sae, part.context.notes
    values: dict[str, Any] = {
        "name": file_name(name, data.options),
        "options": data.options.for_eval(name),
        "lm": data.acts.lm,
        "site": data.acts.site,
        "checkpoint": sae.metadata.get("step"),
    }
    if part.passes:
        values |= {
            "policy": data.corpus.policy(),
            "text": data.acts.text,
            "n_tokens": data.tokens,
            "n_documents": len(data.documents),
        }
        notes = notes + data.notes()
    values |= {
        **result,
        "notes": [*notes, *result.get("notes", [])],
        "seconds": round(clock.seconds[part], 2),
    }
    return Result(values, result.arrays, result.files)


def file_name(name: str, options: EvalConfig) -> str:
    """Return what a result is called in a run: one of text that was trained on never takes the
    place of the held-out one."""
    return name if options.split == "held-out" else f"{name}-{options.split}"


def attach_comparisons(results: dict[str, dict[str, Result]]) -> None:
    """Give each result what a figure shows of the other SAEs: the keys that its evaluation names,
    by the SAE's short name."""
    short = {label: label.rstrip("/").rpartition("/")[2] for label in results}
    names = short if len(set(short.values())) == len(short) else {label: label for label in results}
    for label, mine in results.items():
        for name, result in mine.items():
            if keys := EVALS[name].comparison_keys:
                result["beside"] = {
                    names[other]: {key: theirs[name][key] for key in keys}
                    for other, theirs in results.items()
                    if other != label
                }


class _Clock:
    """Counts the seconds of each part. What several share is counted for the first that asks for
    it."""

    def __init__(self) -> None:
        self.seconds: dict[Metric, float] = {}

    def of(self, part: Metric) -> _Clock:
        self._part, self._began = part, time.monotonic()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self.seconds[self._part] = (
            self.seconds.get(self._part, 0.0) + time.monotonic() - self._began
        )


def write(run: RunFolder, results: dict[str, Result]) -> None:
    """Write results into a run's folder evals/. A JSON names its arrays: its rename commits
    both."""
    with run.writing_evals():
        for name, result in results.items():
            if result.arrays:
                result |= _placed(run, name, result.arrays)
            for other, value in result.files.items():
                jsonio.write_json(run.eval_file(other), value)
            jsonio.write_json(run.eval_file(name), result, sealed=True)


def _placed(run: RunFolder, name: str, arrays: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write arrays under a name made of their sum, beside the older result's; return both."""
    file = run.file("evals", f"{name}.safetensors")
    with atomic.translate_oserrors(file), atomic.temporary(file) as folder:
        save_file({key: array.contiguous() for key, array in arrays.items()}, folder / file.name)
        total = atomic.sha256(folder / file.name)
        named = f"{name}-{total[:16]}.safetensors"
        with atomic.atomic_file(run.file("evals", named)) as tmp:
            (folder / file.name).rename(tmp)
    return {"arrays": named, "arrays_sha256": total}


def _checked(
    label: str, sae: SAE, lm: LM, options: EvalConfig, like: ActsConfig | None
) -> list[str]:
    """Return what is to be said of an SAE on this LM; raise InputError, naming it, where it does
    not belong there."""
    try:
        return provenance.check(sae.metadata, lm, force=options.force, like=like)
    except InputError as error:
        raise InputError(f"{label}: {error}" if label else str(error)) from None


def _common_acts(
    saes: dict[str, SAE], lm: LM, options: EvalConfig, like: ActsConfig | None
) -> ActsConfig:
    """Return what all SAEs are evaluated on; raise InputError where they were trained on different
    contexts or positions."""
    if like is not None:
        return dataclasses.replace(
            like,
            lm=lm.options.lm,
            site=lm.options.site,
            lm_batch=lm.options.lm_batch,
            text=options.text or like.text,
        )
    found = {label: provenance.own_acts(sae.metadata, lm) for label, sae in saes.items()}
    if options.text:
        found = {
            label: dataclasses.replace(acts, text=options.text) for label, acts in found.items()
        }
    (label, acts), *others = found.items()
    for other, theirs in others:
        for name, value in dataclasses.asdict(acts).items():
            if name not in _OF_TRAINING and getattr(theirs, name) != value:
                raise InputError(
                    f"{label} and {other} cannot share a pass: acts.{name} is {value!r} of one and "
                    f"{getattr(theirs, name)!r} "
                    "of the other; evaluate them one by one, or all on what one was trained with: "
                    "`ksparse compare --like`"
                )
    return acts_of(saes[label], lm, options)
