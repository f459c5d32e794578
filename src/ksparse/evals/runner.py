"""Run several evaluations of several SAEs in one pass over held-out text, and save the results.

    downstream      does the LM predict as well from the reconstruction?
    stats           how good is the reconstruction, and what do latents fire on?
    probes          do single latents match labels that we know?
    n2g             can latents be explained by short patterns of tokens?
    explained_loss  how well does the LM predict with each latent replaced by its explanation?
    ablation        does a latent matter to few predictions, or a little to all?

    positions       how good is the reconstruction at each position of a context?
    refinement      are the values of a code the best ones for its latents?
    progressive     is the code still good at another k, or with a threshold in place of k?
    latents         how often do latents fire, how strongly, and on what kinds of position?
    subspaces       do groups of latents use separate subspaces?
    token_driven    do latents follow single tokens, whatever the context?
    norms           do activations of large norm take the slots?
    absorption      do special cases escape general latents?
    decoder_projection   a proxy for whether k is too low or too high

The first six are the default (`registry.DEFAULT`); the others run when they are named.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from safetensors.torch import save_file

from ksparse import progress
from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.device import resolve_device
from ksparse.errors import CorruptError, InputError
from ksparse.evals import own_loss
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import HeldOut, HeldOutBatch, HeldOutPass, SAEBatch, acts_of
from ksparse.evals.own_loss import RowLoss
from ksparse.evals.registry import DEFAULT, EVALS, check_names, metric_of
from ksparse.evals.rows import HeldOutRows, RowPass, check_without_text, open_rows
from ksparse.evals.statistics import Result
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.planning import evaluation as planning
from ksparse.planning.plan import lm_spec
from ksparse.progress import Expected, Progress, no_progress
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.steering import load_lm
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder

log = logging.getLogger("ksparse")

OnResult = Callable[[str, str, Result], None]
"""Called as `on_result(label, name, result)`."""
_TRAINING_ONLY = (
    "normalize",
    "mix",
    "shards",
    "shard_window",
    "lm_batch",
)  # may differ within a shared pass


def evaluate(
    sae: SAE,
    lm: LM | None = None,
    names: Sequence[str] = tuple(DEFAULT),
    options: EvalConfig = EvalConfig(),
    *,
    force: bool = False,
    observe: Progress = no_progress,
) -> dict[str, Result]:
    """Evaluate an SAE on held-out text, the part of its text that training did not see.

    Args:
        sae: the SAE. It is moved to the LM's device and set to evaluation mode.
        lm: the LM with its site; by default the one that the SAE was trained on.
        names: the evaluations to run (`ksparse.evals.registry.EVALS`); by default downstream,
            stats, probes, n2g, explained_loss and ablation.
        options: how many tokens to read, of which split, and the options of each evaluation.
        force: evaluate at another site, or in other contexts and positions, than those the SAE
            was trained with; the notes of each result then say so.
        observe: called with the work under way, how much of it is done, and how much there is.

    Returns:
        {name: result}. A result is a dict of plain values, with tensors in `result.arrays`; a
        number with a standard error is {"value": …, "se": …}. Losses are in nats.
        docs/formats.md describes every field.

    Raises:
        InputError: if an evaluation or option does not exist, the SAE does not fit the LM, or the
            split has no text.
        NonFiniteError: if an activation of the LM is NaN or infinite.

    Example:
        >>> import tempfile
        >>> import ksparse
        >>> from ksparse.config.evaluation import EvalConfig
        >>> run = ksparse.train(ksparse.Recipe(tokens=8_192), tempfile.mkdtemp())
        >>> sae = ksparse.load(run.path)
        >>> results = ksparse.evaluate(sae, names=["stats"], options=EvalConfig(tokens=1_000))
        >>> sorted(results)
        ['stats']
        >>> results["stats"]["l0"]["value"]
        32.0
    """
    if not isinstance(sae, SAE):
        raise InputError(
            f"evaluate needs an SAE, not {sae!r:.80}; ksparse.load(…) makes one from a run, a "
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
    loss: RowLoss | None = None,
    observe: Progress = no_progress,
    on_result: OnResult = lambda label, name, result: None,
) -> dict[str, dict[str, Result]]:
    """Evaluate several SAEs at one site, running the LM once for all of them.

    Args:
        saes: the SAEs by label; labels are paths or names.
        lm: as in `evaluate`; by default the one that the first SAE was trained on.
        names: as in `evaluate`.
        options: as in `evaluate`.
        like: text, contexts and positions to use for all, instead of the SAEs' own.
        loss: a function of edited activations, for SAEs that were trained on activations alone; the
            result `own_loss` is then one more.
        observe: as in `evaluate`.
        on_result: called with (label, name, result) as soon as a result is complete, so that it
            can be written while slower evaluations go on.

    Returns:
        {label: {name: result}}.

    Raises:
        InputError: as in `evaluate`, and if the SAEs were trained on different texts, contexts or
            positions and `like` is not given.
        NonFiniteError: as in `evaluate`.
    """
    with progress.observed(observe):
        return _evaluate_many(saes, lm, names, options, like, on_result, loss)


def _evaluate_many(
    saes: dict[str, SAE],
    lm: LM | None,
    names: Sequence[str],
    options: EvalConfig,
    like: ActsConfig | None,
    on_result: OnResult,
    loss: RowLoss | None,
) -> dict[str, dict[str, Result]]:
    names = (names,) if isinstance(names, str) else tuple(names)
    check_names(names)
    _check_lm(lm)
    of_rows = lm is None and like is None and _any_of_rows(saes)
    _check_loss(loss, of_rows)
    options = options.resolved()
    data: HeldOut | HeldOutRows
    if of_rows:
        names = applicable(names, saes) + ((own_loss.NAME,) if loss else ())
        options = dataclasses.replace(options, examples=0)
        data = open_rows(saes, options, resolve_device(options.device), loss)
        notes: dict[str, list[str]] = {label: [] for label in saes}
    else:
        data, notes = _open_text(saes, lm, options, like)
    contexts = {
        label: EvalContext(sae.to(data.device).eval(), cast(HeldOut, data), notes[label])
        for label, sae in saes.items()
    }
    for context in contexts.values():
        for name in names:
            context.part(metric_of(name))
    results: dict[str, dict[str, Result]] = {label: {} for label in contexts}
    progress.expect(_expected_parts(contexts, names, data))
    for name, by_label in _run_metrics(contexts, names, data):
        for label, result in by_label.items():
            results[label][name] = result
            on_result(label, name, result)
    return {label: {name: by_name[name] for name in names} for label, by_name in results.items()}


def _check_loss(loss: Any, of_rows: bool) -> None:
    if loss is not None and not callable(loss):
        raise InputError(
            f"loss is {loss!r:.80}; it must be a function of activations x[m, d] and their rows "
            "that returns losses (docs/own-activations.md)"
        )
    if loss is not None and not of_rows:
        raise InputError(
            "loss is for SAEs that were trained on activations alone, judged on their held-out "
            "rows; with an LM and text, the evaluation downstream measures the LM's own"
        )


def _check_lm(lm: Any) -> None:
    if lm is not None and not isinstance(lm, LM):
        raise InputError(
            f"lm is {lm!r:.80}; it must be an LM with its site: ksparse.LM(name, site=…)"
        )


def _any_of_rows(saes: dict[str, SAE]) -> bool:
    """Return whether one of some SAEs was trained on activations that anybody made."""
    return any(provenance.made_by_others(sae.metadata) for sae in saes.values())


def _open_text(
    saes: dict[str, SAE], lm: LM | None, options: EvalConfig, like: ActsConfig | None
) -> tuple[HeldOut, dict[str, list[str]]]:
    """Return the held-out text of SAEs, and the notes on the provenance of each."""
    if not (options.text or like):
        for label, sae in saes.items():
            if provenance.made_by_others(sae.metadata):
                raise InputError(
                    f"{label or 'this SAE'} was trained on activations alone; give the text to "
                    "judge it on (--text, or text=)"
                )
    progress.report("loading the LM")
    lm = lm or load_lm(next(iter(saes.values())), options.device)
    acts = _common_acts(saes, lm, options, like)
    acts = dataclasses.replace(acts, lm_batch=options.lm_batch or acts.lm_batch)
    notes = {label: _provenance_notes(label, sae, lm, options, like) for label, sae in saes.items()}
    return HeldOut(lm, acts, options), notes


def applicable(names: Sequence[str], saes: dict[str, SAE]) -> tuple[str, ...]:
    """Return the evaluations to run: of the default ones, those that SAEs can have.

    Raises:
        InputError: an evaluation needs text, and was named for an SAE of activations without.
    """
    names, of_rows = (
        tuple(names),
        [provenance.made_by_others(sae.metadata) for sae in saes.values()],
    )
    if not any(of_rows):
        return names
    if not all(of_rows):
        raise InputError(
            "some of these SAEs were trained on text, others on activations without; evaluate them "
            "apart"
        )
    needs_text = {name: metric.needs_text for name, metric in EVALS.items()}
    if set(names) == set(DEFAULT):
        names = tuple(name for name in names if not needs_text[name])
        log.warning(
            "%s are left out: they need an LM and text, and this SAE was trained on activations "
            "alone",
            ", ".join(name for name in DEFAULT if needs_text[name]),
        )
    check_without_text(names, needs_text)
    return names


def _expected_parts(
    contexts: dict[str, EvalContext], names: Sequence[str], data: HeldOut | HeldOutRows
) -> dict[str, Expected]:
    """Return the work of each phase, by the name under which it will be reported."""
    if isinstance(data, HeldOutRows):
        return {}
    shape = next(iter(contexts.values())).sae.shape
    return planning.parts(
        names,
        planning.EvalCase(
            lm_spec(data.lm.model, data.lm.module, data.lm.at, data.lm.d_model),
            data.acts,
            data.options,
            shape.n_latents,
            shape.k,
            saes=len(contexts),
        ),
    )


class _Stopwatch:
    """Adds up the seconds spent in each metric.

    Work that metrics share is counted for the first one that needs it.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[Metric, float] = defaultdict(float)

    @contextmanager
    def time(self, metric: Metric) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[metric] += time.monotonic() - start


def _run_metrics(
    contexts: dict[str, EvalContext], names: Sequence[str], data: HeldOut | HeldOutRows
) -> Iterator[tuple[str, dict[str, Result]]]:
    """Take all metrics through their passes; yield (name, results by label) as they are complete.

    A metric is computed after those it builds on, which come before it among the parts. All SAEs
    have the same parts, so their results of one evaluation are complete together.
    """
    metrics = [metric for context in contexts.values() for metric in context.parts.values()]
    stopwatch, requested = _Stopwatch(), {metric_of(name): name for name in names}
    for metric in metrics:
        with stopwatch.time(metric), progress.stage("pass 1"):
            metric.prepare()
    text = _run_pass(1, metrics, data, stopwatch)

    def complete(kind: type[Metric]) -> tuple[str, dict[str, Result]]:
        name = requested.pop(kind)
        results = {
            label: {name: _finalize(name, context.part(kind), text, stopwatch)}
            for label, context in contexts.items()
        }
        attach_comparisons(results)
        return name, {label: by_name[name] for label, by_name in results.items()}

    for parts in zip(*(context.parts.values() for context in contexts.values()), strict=True):
        name = requested.get(type(parts[0]), type(parts[0]).__name__)
        with progress.stage(name, len(names) - len(requested) + 1, len(names)):
            for metric in parts:
                with stopwatch.time(metric):
                    metric.compute(progress.report)
            done = type(parts[0]) in requested and parts[0].passes < 2
            results = complete(type(parts[0])) if done else None
        if results:
            yield results
    _run_pass(2, metrics, data, stopwatch)
    for kind in list(requested):
        yield complete(kind)


def _run_pass(
    number: int, metrics: list[Metric], data: HeldOut | HeldOutRows, stopwatch: _Stopwatch
) -> HeldOutPass | RowPass:
    """Update the metrics that take this pass with each batch; read nothing if there are none."""
    text = data.start_pass()
    metrics = [metric for metric in metrics if metric.passes >= number]
    if not metrics:
        return text
    what, total = planning.READING if number == 1 else planning.READING_AGAIN, data.options.tokens
    contexts = dict.fromkeys(metric.context for metric in metrics)
    with progress.stage(f"pass {number}"):
        progress.report(what, 0, total)
        for held_out in text:
            # Rows have all of a batch of text that metrics without `needs_text` ask for.
            of_all = cast(HeldOutBatch, held_out)
            batches = {context: SAEBatch(context.sae, of_all) for context in contexts}
            for metric in metrics:
                update = metric.update if number == 1 else metric.update_second_pass
                with stopwatch.time(metric):
                    update(batches[metric.context])
            progress.report(what, min(text.tokens, total), total)
    if not text.tokens:
        raise data.nothing()
    return text


def _finalize(
    name: str, metric: Metric, text: HeldOutPass | RowPass, stopwatch: _Stopwatch
) -> Result:
    """Return a metric's result, with the fields that all results have."""
    with stopwatch.time(metric):
        result = metric.finalize()
    assert result is not None  # a metric that only serves others is not in the registry
    data, sae, notes = metric.context.data, metric.context.sae, metric.context.notes
    values = _origin(name, data.options, data.acts, sae.metadata)
    if metric.passes:
        values |= {
            "policy": data.policy(),
            "n_tokens": text.tokens,
            "n_documents": len(text.documents),
        }
        notes = notes + text.notes()
    values |= {
        **result,
        "notes": [*notes, *result.get("notes", [])],
        "seconds": round(stopwatch.seconds[metric], 2),
    }
    return Result(values, result.arrays, result.files)


def _origin(
    name: str, options: EvalConfig, acts: ActsConfig, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of a result that say what it was computed from."""
    return {
        "name": file_name(name, options),
        "options": options.for_eval(name),
        "lm": acts.lm,
        "site": acts.site,
        **({} if acts.lm_weights == ActsConfig.lm_weights else {"lm_weights": acts.lm_weights}),
        "checkpoint": metadata.get("step"),
        **({"text": acts.text} if metric_of(name).passes else {}),
    }


def read_kept(
    run: RunFolder,
    name: str,
    options: EvalConfig,
    metadata: dict[str, Any],
    beside: Sequence[str] = (),
    acts: ActsConfig | None = None,
) -> dict[str, Any] | None:
    """Return a result on disk that evaluating an SAE again would give.

    Its options, checkpoint, LM, site and text are compared. A damaged result is none; a warning
    names it.

    Args:
        run: the run with the results.
        name: the evaluation.
        options: its options.
        metadata: the metadata of the SAE, which names its checkpoint, LM, site and text.
        beside: the labels of other SAEs whose numbers the result must have for comparison.
        acts: the LM, site and text, where they are not those of the metadata.

    Returns:
        The result as `RunFolder.eval` gives it; None where there is none to keep.
    """
    options = options.resolved()
    if acts is None and provenance.made_by_others(metadata):
        options = dataclasses.replace(options, examples=0)
    acts = acts or serialization.acts_of(metadata, named=False)
    acts = dataclasses.replace(acts, text=options.text or acts.text)
    try:
        result = run.eval(file_name(name, options))
        if result is None:
            return None
        run.arrays_file(result["name"], result)
    except CorruptError as error:
        log.warning("%s: it is computed again", error)
        return None
    same = all(
        result.get(key) == value for key, value in _origin(name, options, acts, metadata).items()
    )
    compared = not EVALS[name].comparison_keys or set(beside) <= set(result.get("beside", ()))
    return result if same and compared else None


def file_name(name: str, options: EvalConfig) -> str:
    """Return the name under which a run saves a result.

    A result on another split than the held-out one gets the split's name as a suffix, so it never
    replaces a held-out result.

    Example:
        >>> from ksparse.config.evaluation import EvalConfig
        >>> file_name("stats", EvalConfig(split="train"))
        'stats-train'
    """
    return name if options.split == "held-out" else f"{name}-{options.split}"


def attach_comparisons(results: dict[str, dict[str, Result]]) -> None:
    """Copy each metric's `comparison_keys` into the results of the other SAEs.

    They go under the key "beside" of each result, by the last part of the other SAE's label, or by
    the whole label where two last parts are equal.

    Args:
        results: {label: {name: result}}, changed in place.
    """
    names = short_names(results)
    for label, by_name in results.items():
        for name, result in by_name.items():
            if keys := metric_of(name).comparison_keys:
                result["beside"] = {
                    names[other]: {key: others[name][key] for key in keys}
                    for other, others in results.items()
                    if other != label
                }


def short_names(labels: Iterable[str]) -> dict[str, str]:
    """Return the names by which results call the other SAEs, by label.

    Example:
        >>> short_names(["runs/a", "runs/b"])
        {'runs/a': 'a', 'runs/b': 'b'}
    """
    short = {label: label.rstrip("/").rpartition("/")[2] for label in labels}
    return short if len(set(short.values())) == len(short) else {label: label for label in short}


def write_results(run: RunFolder, results: dict[str, Result]) -> None:
    """Write results into a run's folder `evals/`.

    The arrays are written first, under a name made of their checksum, and the JSON that names them
    is renamed into place last: a reader sees either the old pair or the new one.

    Args:
        run: the run.
        results: results by file name (`file_name`).
    """
    with run.lock_evals():
        for name, result in results.items():
            if result.arrays:
                result |= _write_arrays(run, name, result.arrays)
            for other, value in result.files.items():
                jsonio.write_json(run.eval_file(other), value)
            jsonio.write_json(run.eval_file(name), result, sealed=True)


def _write_arrays(run: RunFolder, name: str, arrays: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write arrays to a file named after their checksum; return the file's name and checksum."""
    file = run.file("evals", f"{name}.safetensors")
    with atomic.translate_oserrors(file), atomic.temporary(file) as folder:
        save_file({key: array.contiguous() for key, array in arrays.items()}, folder / file.name)
        checksum = atomic.sha256(folder / file.name)
        final = f"{name}-{checksum[:16]}.safetensors"
        with atomic.atomic_file(run.file("evals", final)) as temporary:
            (folder / file.name).rename(temporary)
    return {"arrays": final, "arrays_sha256": checksum}


def _provenance_notes(
    label: str, sae: SAE, lm: LM, options: EvalConfig, like: ActsConfig | None
) -> list[str]:
    """Return the notes on an SAE's provenance; raise InputError, with its label, if it does not fit
    the LM."""
    try:
        return provenance.check(sae.metadata, lm, force=options.force, like=like)
    except InputError as error:
        raise InputError(f"{label}: {error}" if label else str(error)) from None


def _common_acts(
    saes: dict[str, SAE], lm: LM, options: EvalConfig, like: ActsConfig | None
) -> ActsConfig:
    """Return the activations to evaluate all SAEs on.

    Raises InputError where they were trained on different texts, contexts or positions.
    """
    if like is not None:
        return dataclasses.replace(
            like,
            lm=lm.options.lm,
            site=lm.options.site,
            lm_batch=lm.options.lm_batch,
            text=options.text or like.text,
        )
    trained_on = {label: provenance.trained_acts(sae.metadata, lm) for label, sae in saes.items()}
    if options.text:
        trained_on = {
            label: dataclasses.replace(acts, text=options.text)
            for label, acts in trained_on.items()
        }
    (label, acts), *others = trained_on.items()
    for other, other_acts in others:
        for name, value in dataclasses.asdict(acts).items():
            if name not in _TRAINING_ONLY and getattr(other_acts, name) != value:
                raise InputError(
                    f"{label} and {other} cannot share a pass: acts.{name} is {value!r} of one and "
                    f"{getattr(other_acts, name)!r} "
                    "of the other; evaluate them one by one, or all on what one was trained with: "
                    "`ksparse compare --like`"
                )
    return acts_of(saes[label], lm, options)
