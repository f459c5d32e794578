"""Evaluate and compare autoencoders in Python: what `ksparse eval` and `compare` do.

`ksparse.evals` knows autoencoders and language models as objects; here they may also be named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ksparse import display, interop
from ksparse.config.evaluation import COMPARED, EvalConfig
from ksparse.errors import InputError, unknown
from ksparse.evals import registry, runner
from ksparse.evals.comparison import SAEComparison
from ksparse.evals.own_loss import RowLoss
from ksparse.evals.statistics import Result, Results
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.progress import report
from ksparse.sae.model import SAE
from ksparse.steering import load_lm
from ksparse.storage.run_folder import RunFolder

SAESource = SAE | RunFolder | Path | str
"""An SAE, a run, or what `ksparse.load` takes."""
LMSource = LM | Path | str
"""An LM with its site, or the name or folder of one, which is read at the SAE's site."""
Names = str | Sequence[str]
"""Evaluations: "downstream", "downstream,stats" or a list."""


def evaluate(
    sae: SAESource,
    lm: LMSource | None = None,
    names: Names = tuple(registry.DEFAULT),
    options: EvalConfig | None = None,
    *,
    loss: RowLoss | None = None,
    force: bool = False,
    save: bool = False,
    progress: bool = True,
    **changes: Any,
) -> Results:
    """Evaluate an SAE on held-out text, the part of its text that training did not see.

    Args:
        sae: the SAE, a run, or what `ksparse.load` takes. An SAE is moved to the LM's device and
            set to evaluation mode.
        lm: the LM with its site, or its name or folder; by default the one that the SAE was
            trained on.
        names: the evaluations to run (`ksparse.evals.registry.EVALS`), one or several; by default
            downstream, stats, probes, n2g, explained_loss and ablation.
        options: how many tokens to read, of which split, and the options of each evaluation.
        loss: for an SAE that was trained on activations alone: a function that is called with
            activations x[m, d] in place of held-out rows, and which rows they are (`numbers` and
            `documents`, [m]); it returns the loss of each row, [m], or of each document. The result
            `own_loss` says how much is lost with reconstructions (docs/own-activations.md).
        force: evaluate at another site, or in other contexts and positions, than those the SAE
            was trained with; the notes of each result then say so.
        save: write each result into the SAE's run as soon as it is complete, as `ksparse eval`
            does. Reports, `sae.latent` and `ksparse.steer` read them there.
        progress: show progress on standard error, and at the end, where a script runs on a
            terminal, the table of results. A prompt and a notebook show what is returned.
        changes: single options by name, such as `tokens=10_000` or `text="essays/"`, a file, a
            folder or a data set on the Hub.

    Returns:
        {name: result}. A result is a dict of plain values, with tensors in `result.arrays`; a
        number with a standard error is {"value": …, "se": …}. Losses are in nats. Both have
        `to_frame()`. docs/formats.md describes every field.

    Raises:
        InputError: if an argument is not what it should be, an evaluation or option does not
            exist, the SAE does not fit the LM, the split has no text, or results are to be saved
            and the SAE is of no run.
        NonFiniteError: if an activation of the LM is NaN or infinite.

    Example:
        >>> import ksparse
        >>> result = ksparse.evaluate("runs/demo", names="stats", tokens=1_000)
        >>> result["stats"]["l0"]["value"]
        32.0
    """
    chosen = _names(names)
    options = _options(options, force, changes)
    _check_lm(lm)
    opened = _open("evaluate", sae)
    run = _run_of(opened, lm, options.force) if save else None

    def write(label: str, name: str, result: Result) -> None:
        if run is not None:
            runner.write_results(run, {result["name"]: result})

    with display.shown("evaluating", progress):
        at_site = _load_lm(lm, opened, options)
        found = runner.evaluate_many(
            {"": opened}, at_site, chosen, options, loss=loss, on_result=write
        )
        results = Results(found[""])
    if progress:
        display.show(results)
    return results


def compare(
    saes: Sequence[SAESource] | Mapping[str, SAESource],
    lm: LMSource | None = None,
    names: Names = COMPARED,
    options: EvalConfig | None = None,
    *,
    against: str = "",
    by: str = "",
    loss: RowLoss | None = None,
    force: bool = False,
    progress: bool = True,
    **changes: Any,
) -> SAEComparison:
    """Compare SAEs on the same text and positions, with differences paired by document.

    Args:
        saes: the SAEs as in `evaluate`, in a list or by name. In a list a path is its own name,
            and an SAE is called by its size.
        lm: as in `evaluate`; by default the one that the first SAE was trained on.
        names: as in `evaluate`; by default downstream and stats.
        options: as in `evaluate`.
        against: name of the SAE that the others are compared with; by default the first.
        by: the number to rank by; by default the first that can be ranked.
        loss: as in `evaluate`.
        force: as in `evaluate`.
        progress: as in `evaluate`.
        changes: as in `evaluate`.

    Returns:
        The numbers of each SAE, the best first, and its differences to one of them with standard
        errors; it has `to_frame()`.

    Raises:
        InputError: as in `evaluate`, and if the SAEs were not trained on the same text, contexts
            and positions.

    Example:
        >>> import ksparse
        >>> from ksparse.sae.model import SAE
        >>> sae = ksparse.load("runs/demo")
        >>> untrained = SAE(sae.shape, sae.metadata)
        >>> found = ksparse.compare({"trained": sae, "untrained": untrained}, tokens=1_000)
        >>> found.differences["untrained"]["nmse"]["paired"]
        True
    """
    chosen = _names(names)
    options = _options(options, force, changes)
    _check_lm(lm)
    opened = _open_several(saes)
    if against and against not in opened:
        raise unknown("against names an SAE that is not compared,", against, opened)
    with display.shown("evaluating", progress):
        at_site = _load_lm(lm, next(iter(opened.values())), options)
        results = runner.evaluate_many(opened, at_site, chosen, options, loss=loss)
    normalizations = {name: sae.shape.normalize for name, sae in opened.items()}
    found = SAEComparison.of(results, normalizations, against or next(iter(opened)), by)
    if progress:
        display.show(found)
    return found


def _names(names: Any) -> list[str]:
    """Return the names of evaluations; raise InputError for one that does not exist."""
    words = names.replace(",", " ").split() if isinstance(names, str) else names
    if not isinstance(words, Iterable) or not all(isinstance(word, str) for word in words):
        raise InputError(
            f"names is {names!r:.80}; it must be an evaluation or a list of them, such as "
            '"downstream" or ["downstream", "stats"]'
        )
    chosen = list(dict.fromkeys(words))
    registry.check_names(chosen)
    if not chosen:
        raise InputError(f"no evaluation is named; there are {', '.join(registry.EVALS)}")
    return chosen


def _options(options: Any, force: bool, changes: dict[str, Any]) -> EvalConfig:
    """Return the options with changes; raise InputError for one that does not exist."""
    if isinstance(options, Mapping):
        options, changes = None, {**options, **changes}
    if options is not None and not isinstance(options, EvalConfig):
        raise InputError(
            f"options is {options!r:.80}; it must be an EvalConfig or a dictionary; single options "
            "are given by name, such as tokens=10_000"
        )
    known = [field.name for field in dataclasses.fields(EvalConfig)]
    for name in changes:
        if name not in known:
            raise unknown("there is no option", name, known)
    text = changes.get("text", "")
    if isinstance(text, Path):
        changes = {**changes, "text": str(text)}
    elif not isinstance(text, str) or "\n" in text:
        raise InputError(
            f"text is {text!r:.60}; it must name a file, a folder or a data set on the Hub. "
            "Evaluations need many documents, so write a text of your own to a file first"
        )
    options = dataclasses.replace(options or EvalConfig(), **changes)
    return dataclasses.replace(options, force=options.force or force)


def _check_lm(lm: Any) -> None:
    if lm is None or isinstance(lm, (LM, Path)):
        return
    words = lm if isinstance(lm, (list, tuple)) else [lm]
    if all(isinstance(word, str) and word in registry.EVALS for word in words):
        raise InputError(
            f"{lm!r} is in the place of the LM; evaluations are the third argument: names={lm!r}"
        )
    if isinstance(lm, str) and lm:
        return
    raise InputError(
        f"lm is {lm!r:.80}; it must be an LM with its site, ksparse.LM(name, site=…), its name or "
        "folder, or left out for the one that the SAE was trained on"
    )


def _load_lm(lm: LMSource | None, sae: SAE, options: EvalConfig) -> LM | None:
    """Return an LM that is named, at an SAE's site; others as they are."""
    if lm is None or isinstance(lm, LM):
        return lm
    report("loading the LM")
    return load_lm(sae, options.device, name=str(lm))


def _run_of(sae: SAE, lm: LMSource | None, force: bool) -> RunFolder:
    """Return the run that an SAE was loaded from; raise InputError where it is of none, or its
    results would not be on its own LM and site."""
    run = None if sae.source is None else RunFolder(sae.source)
    if run is None or not run.exists():
        where = "was not loaded from a run" if run is None else f"is of {run.path}, which is no run"
        raise InputError(
            f"save=True writes results into the SAE's run, and this one {where}; leave it out, or "
            "judge it into a folder: `ksparse eval SAE --out DIR`"
        )
    own = provenance.trained_on(sae.metadata)
    here = {"lm": lm.options.lm, "site": lm.options.site} if isinstance(lm, LM) else {"lm": str(lm)}
    other = [f"{key} {here[key]!r}" for key in here if lm and here[key] != own.get(key)]
    if other or force:
        raise InputError(
            f"save=True: {run.path} is a run, which keeps only results on its own LM and site, not "
            f"those {'with force' if force else 'on ' + ' and '.join(other)}; leave it out, or "
            f"judge it into a folder: `ksparse eval {run.path} --out DIR`"
        )
    return run


def _open(function: str, source: Any) -> SAE:
    """Return an SAE that is given as an object, a run or a path."""
    if isinstance(source, SAE):
        return source
    if isinstance(source, RunFolder):
        return interop.load(source.path)
    if isinstance(source, (Path, str)):
        return interop.load(source)
    swapped = " (the LM is the second argument)" if isinstance(source, LM) else ""
    raise InputError(
        f"{function} needs an SAE, not {source!r:.80}{swapped}; give a run, a path, or what "
        "ksparse.load(…) returns"
    )


def _open_several(saes: Any) -> dict[str, SAE]:
    """Return SAEs by name."""
    if isinstance(saes, Mapping):
        named = {str(name): _open("compare", source) for name, source in saes.items()}
    elif isinstance(saes, (list, tuple)):
        named = {}
        for source in saes:
            sae = _open("compare", source)
            name = base = _name_of(source, sae)
            number = 1
            while name in named:
                number += 1
                name = f"{base} ({number})"
            named[name] = sae
    else:
        raise InputError(
            f"compare needs a list of SAEs, or a dictionary of them by name, not {saes!r:.80}"
        )
    if len(named) < 2:
        raise InputError(
            f"compare needs two SAEs or more, not {len(named)}; of one, use ksparse.evaluate"
        )
    return named


def _name_of(source: Any, sae: SAE) -> str:
    if isinstance(source, SAE):
        kind = f"k = {sae.shape.k}" if sae.shape.k else type(sae.activation).__name__
        return f"n = {sae.shape.n_latents:,}, {kind}"
    return str(source.path if isinstance(source, RunFolder) else source)
