"""The paper's tasks -> a folder of them: build().

Tasks of one source are made from one reading of it. A source that fails is written down with its
reason and never stops the rest. A finished task is kept when the same command is run again;
index.json says how each was made:
    {"format": 1,
     "tasks": {TASK: {rows, positive, source, revision, licence, template, label, position, seed,
     sha256, settings}},
     "failed": {TASK: reason}}
settings is a sum over everything that decides what is in the file; a task whose settings differ is
made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ksparse.errors import DiskError, InputError, unknown
from ksparse.evals.probing.suites import folder as suite
from ksparse.evals.probing.suites.paper import POSITION, ROWS, TASKS, TEXT, PaperTask
from ksparse.evals.probing.suites.sample import Pair, TaskSample
from ksparse.evals.probing.suites.sources import (
    DatasetPart,
    DatasetSource,
    check_hub,
    in_short,
    is_local,
    opened,
)
from ksparse.evals.probing.suites.templates import Blank
from ksparse.storage.atomic import remove_leftovers, sha256
from ksparse.storage.jsonio import digest, read_json, write_json

INDEX = "index.json"
DOCUMENTS = 200_000  # of running text: 'prime factors' and 'second derivative' are rare
FORMAT = 1


@dataclass(frozen=True)
class Step:
    """What has just happened: `state` is reading (of a source), made, kept or failed; `words` says
    more."""

    name: str
    state: str
    words: str = ""


@dataclass(frozen=True)
class Report:
    """What became of the tasks that were asked for; failed = {task: reason}."""

    folder: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]
    failed: dict[str, str]


@dataclass(frozen=True)
class BuildPlan:
    """What is the same for every task of a build."""

    folder: Path
    rows: int
    seed: int
    text: str
    documents: int
    local: Path | None


class Drawn(NamedTuple):
    """The rows of a task and where they are from."""

    pairs: list[Pair]
    source: DatasetSource
    revision: str


Observe = Callable[[Step], None]


def build(
    folder: Path | str,
    *,
    rows: int = ROWS,
    seed: int = 0,
    text: str = TEXT,
    documents: int = DOCUMENTS,
    local: Path | str | None = None,
    only: Sequence[str] = (),
    observe: Observe = lambda step: None,
) -> Report:
    """Make every task of the paper that can be made, as a suite in `folder`.

    text: running text for base64 and phrase_*: a data set of the Hub ('OWNER/NAME' or
    'OWNER/NAME:CONFIG') with a column 'text', or a file or folder here; `documents` of it are read.
    local: folders that stand in for data sets of the Hub (see `sources`). only: these
    tasks.
    """
    plan = BuildPlan(Path(folder), rows, seed, text, documents, Path(local) if local else None)
    asked = _asked(only)
    _check(plan)
    index = _index(plan.folder)
    remove_leftovers(plan.folder)
    kept = [task for task in asked if _is_finished(task, plan, index)]
    pending = [task for task in asked if task not in kept]
    for task in kept:
        index["failed"].pop(task.name, None)
        observe(Step(task.name, "kept"))
    _check_reachable(pending, plan)
    made: list[str] = []
    failed: dict[str, str] = {}
    for sources, tasks in _families(pending, plan).items():
        for task, result in _make(tasks, sources, plan, observe):
            reason = _written(task, result, plan, index)
            if reason is not None:
                failed[task.name] = index["failed"][task.name] = reason
            else:
                index["failed"].pop(task.name, None)
                made.append(task.name)
            write_json(plan.folder / INDEX, index)
            observe(
                Step(
                    task.name,
                    *(
                        ("failed", reason)
                        if reason is not None
                        else ("made", f"{index['tasks'][task.name]['rows']:,} rows")
                    ),
                )
            )
    write_json(plan.folder / INDEX, index)
    return Report(plan.folder, tuple(made), tuple(task.name for task in kept), failed)


# ---- what is asked for ---------------------------------------------------------------------------


def _asked(only: Sequence[str]) -> list[PaperTask]:
    names = [task.name for task in TASKS]
    for name in only:
        if name not in names:
            raise unknown("the paper has no task", name, names)
    return [task for task in TASKS if not only or task.name in only]


def _check(plan: BuildPlan) -> None:
    least = 2 * suite.LEAST
    if plan.rows < least or plan.rows % 2:
        raise InputError(
            f"{plan.rows} rows a task; expected an even number of at least {least}, half of them "
            "of each label"
        )
    if plan.documents < 1:
        raise InputError(f"{plan.documents} documents of running text; expected at least 1")
    if plan.local is not None and not plan.local.is_dir():
        raise InputError(
            f"the folder {plan.local} does not exist; expected folders OWNER__NAME in it that "
            "stand in for data sets"
        )
    if plan.folder.exists() and not plan.folder.is_dir():
        raise InputError(f"{plan.folder} is not a folder; give one for the suite")


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        return {"format": FORMAT, "tasks": {}, "failed": {}}
    index = read_json(folder / INDEX)
    if (
        not isinstance(index, dict)
        or index.get("format") != FORMAT
        or not all(isinstance(index.get(key), dict) for key in ("tasks", "failed"))
        or not all(isinstance(entry, dict) for entry in index["tasks"].values())
    ):
        raise InputError(
            f"{folder / INDEX} is not one that this version of ksparse wrote; give a new folder "
            "for the suite"
        )
    return index


def _settings(task: PaperTask, plan: BuildPlan) -> str:
    """Return a sum over what decides which rows a task gets; a local copy counts as the data set it
    stands in for."""
    text = () if task.sources else (plan.text, plan.documents)
    sources = [(str(source), source.splits, source.revision) for source in task.sources]
    return digest([FORMAT, task.words, task.positive, sources, text, plan.rows, plan.seed])


def _is_finished(task: PaperTask, plan: BuildPlan, index: dict[str, Any]) -> bool:
    entry, file = index["tasks"].get(task.name, {}), plan.folder / f"{task.name}.jsonl.gz"
    return (
        file.is_file()
        and entry.get("settings") == _settings(task, plan)
        and entry.get("sha256") == sha256(file)
    )


def _sources(task: PaperTask, plan: BuildPlan) -> tuple[DatasetSource, ...]:
    """Return what to try, in order: what is here before what must be fetched."""
    sources = task.sources or (_text_source(plan.text),)
    return tuple(sorted(sources, key=lambda source: not is_local(source, plan.local)))


def _text_source(text: str) -> DatasetSource:
    path = Path(text)
    if path.exists():
        return DatasetSource(text, path=text)
    if (
        path.is_absolute()
        or text.startswith(".")
        or path.suffix in (".txt", ".jsonl", ".gz", ".xz", ".parquet", ".csv")
    ):
        raise InputError(
            f"text {text} does not exist; give a file or folder of .txt, .jsonl or .parquet, or a "
            "data set of the Hub"
        )
    repo, _, config = text.partition(":")
    return DatasetSource(repo, (DatasetPart(config),))


def _check_reachable(tasks: list[PaperTask], plan: BuildPlan) -> None:
    """Raise InputError at once if everything needs the Hub and its package is missing, instead of
    failing 61 times."""
    sources = [source for task in tasks for source in _sources(task, plan)]
    if (
        sources
        and not any(is_local(source, plan.local) for source in sources)
        and not all(source.by_hand for source in sources)
    ):
        check_hub()


def _families(
    tasks: list[PaperTask], plan: BuildPlan
) -> dict[tuple[DatasetSource, ...], list[PaperTask]]:
    """Group tasks by their sources, so that each is read once."""
    families: dict[tuple[DatasetSource, ...], list[PaperTask]] = {}
    for task in tasks:
        families.setdefault(_sources(task, plan), []).append(task)
    return families


# ---- making --------------------------------------------------------------------------------------


def _make(
    tasks: list[PaperTask], sources: tuple[DatasetSource, ...], plan: BuildPlan, observe: Observe
) -> Iterator[tuple[PaperTask, Drawn | str]]:
    """Yield each task with its rows, from the first source that has them, or with the reason why
    none has."""
    reasons: dict[str, list[str]] = {task.name: [] for task in tasks}
    missing = list(tasks)
    for source in sources:
        if not missing:
            return
        observe(Step(str(source), "reading"))
        results = _draw(missing, source, plan)
        for task in missing:
            result = results[task.name]
            if isinstance(result, Drawn):
                yield task, result
            else:
                reasons[task.name].append(
                    result
                    if result.startswith(source.repo) or source.by_hand
                    else f"{source.repo}: {result}"
                )
        missing = [task for task in missing if not isinstance(results[task.name], Drawn)]
    for task in missing:
        yield task, "; ".join(dict.fromkeys(reasons[task.name]))


def _draw(tasks: list[PaperTask], source: DatasetSource, plan: BuildPlan) -> dict[str, Drawn | str]:
    """Read a source once for all of its tasks; a row that a template cannot read makes the source
    unfit for that task."""
    samples = {task.name: TaskSample(task.name, plan.rows, plan.seed) for task in tasks}
    results: dict[str, Drawn | str] = {}
    limit = max(20_000, 20 * plan.rows) if tasks[0].sources else plan.documents
    try:
        revision, rows = opened(source, plan.local, limit)
        for config, row in rows:
            for task in tasks:
                if task.name not in results:
                    try:
                        samples[task.name].add(task.template(config, row))
                    except Blank:
                        pass
                    except Exception as error:  # a data set may hold anything
                        results[task.name] = in_short(error)
            if len(results) == len(tasks):
                break
    except DiskError:
        raise
    except Exception as error:  # a broken connection, a damaged file
        return {task.name: results.get(task.name, in_short(error)) for task in tasks}
    for task in tasks:
        if task.name not in results:
            try:
                results[task.name] = Drawn(samples[task.name].draw(), source, revision)
            except InputError as error:
                results[task.name] = f"{error} (read up to {limit:,} rows)"
    return results


def _written(
    task: PaperTask, result: Drawn | str, plan: BuildPlan, index: dict[str, Any]
) -> str | None:
    """Write a task and its entry; return why not, if not."""
    if isinstance(result, str):
        return result
    try:
        path = suite.write(
            plan.folder,
            task.name,
            ({"text": pair.text, "label": pair.label} for pair in result.pairs),
        )
    except InputError as error:
        return str(error)
    index["tasks"][task.name] = {
        "rows": len(result.pairs),
        "positive": sum(pair.label for pair in result.pairs),
        "source": str(result.source),
        "revision": result.revision,
        "licence": task.licence if task.sources else f"that of {plan.text}",
        "template": task.words,
        "label": f"1: {task.positive}",
        "position": POSITION,
        "seed": plan.seed,
        "sha256": sha256(path),
        "settings": _settings(task, plan),
    }
    return None
