"""Build the paper's tasks into a folder.

Tasks with the same source are made in one pass over it. A source that fails is recorded with the
reason and does not stop the others. A finished task is kept when the command runs again. index.json
says how each task was made:

    {"format": 1,
     "tasks": {TASK: {rows, positive, source, revision, licence, template, label, position,
                      seed, sha256, settings}},
     "failed": {TASK: reason}}

`settings` is a hash of everything that decides the content of the file; a task whose settings
differ is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ksparse.errors import DiskError, InputError, unknown
from ksparse.evals.probing.suites import folder as suite
from ksparse.evals.probing.suites.paper import POSITION, ROWS, TASKS, TEXT, PaperTask
from ksparse.evals.probing.suites.sample import LabelledText, TaskSample
from ksparse.evals.probing.suites.sources import (
    DatasetPart,
    DatasetSource,
    check_hub,
    is_local,
    one_line,
    open_source,
)
from ksparse.evals.probing.suites.templates import MissingValue
from ksparse.storage.atomic import remove_leftovers, sha256
from ksparse.storage.jsonio import digest, read_json, write_json

INDEX = "index.json"
DOCUMENTS = 200_000  # of running text; 'prime factors' and 'second derivative' are rare
FORMAT = 1


@dataclass(frozen=True)
class Step:
    """Progress of a build.

    Attributes:
        name: The task, or the source being read.
        state: "reading", "made", "kept" or "failed".
        words: Details.
    """

    name: str
    state: str
    words: str = ""


@dataclass(frozen=True)
class Report:
    """The outcome of a build: tasks made now, kept from before, and failed with the reason."""

    folder: Path
    built: tuple[str, ...]
    kept: tuple[str, ...]
    failed: dict[str, str]


@dataclass(frozen=True)
class BuildPlan:
    """Options that all tasks of a build share."""

    folder: Path
    rows: int
    seed: int
    text: str
    documents: int
    local: Path | None


class DrawnTask(NamedTuple):
    """The rows of a task, and the source and revision they come from."""

    texts: list[LabelledText]
    source: DatasetSource
    revision: str


OnStep = Callable[[Step], None]


def build(
    folder: Path | str,
    *,
    rows: int = ROWS,
    seed: int = 0,
    text: str = TEXT,
    documents: int = DOCUMENTS,
    local: Path | str | None = None,
    only: Sequence[str] = (),
    observe: OnStep = lambda step: None,
) -> Report:
    """Build every task of the paper that can be built, as a suite in a folder.

    Args:
        folder: The suite's folder; tasks that are finished there are kept.
        rows: Rows of each task, half of each label.
        seed: Seed of the choice of rows.
        text: Running text for base64 and phrase_*: a data set of the Hub ('OWNER/NAME' or
            'OWNER/NAME:CONFIG') with a column 'text', or a local file or folder.
        documents: How many documents of `text` to read.
        local: A folder of local copies of data sets of the Hub (see `sources`).
        only: Names of the tasks to build; all by default.
        observe: Called with each step.

    Raises:
        InputError: An option is not usable, a task is unknown, or nothing can be read at all.
    """
    plan = BuildPlan(Path(folder), rows, seed, text, documents, Path(local) if local else None)
    tasks = _select_tasks(only)
    _check_plan(plan)
    index = _read_index(plan.folder)
    remove_leftovers(plan.folder)
    kept = [task for task in tasks if _is_finished(task, plan, index)]
    pending = [task for task in tasks if task not in kept]
    for task in kept:
        index["failed"].pop(task.name, None)
        observe(Step(task.name, "kept"))
    _check_reachable(pending, plan)
    built: list[str] = []
    failed: dict[str, str] = {}
    for sources, family in _group_by_sources(pending, plan).items():
        for task, result in _make(family, sources, plan, observe):
            reason = _write_task(task, result, plan, index)
            if reason is not None:
                failed[task.name] = index["failed"][task.name] = reason
                step = Step(task.name, "failed", reason)
            else:
                index["failed"].pop(task.name, None)
                built.append(task.name)
                step = Step(task.name, "made", f"{index['tasks'][task.name]['rows']:,} rows")
            write_json(plan.folder / INDEX, index)
            observe(step)
    write_json(plan.folder / INDEX, index)
    return Report(plan.folder, tuple(built), tuple(task.name for task in kept), failed)


# ---- the plan ------------------------------------------------------------------------------------


def _select_tasks(only: Sequence[str]) -> list[PaperTask]:
    names = [task.name for task in TASKS]
    for name in only:
        if name not in names:
            raise unknown("the paper has no task", name, names)
    return [task for task in TASKS if not only or task.name in only]


def _check_plan(plan: BuildPlan) -> None:
    minimum = 2 * suite.LEAST
    if plan.rows < minimum or plan.rows % 2:
        raise InputError(
            f"{plan.rows} rows a task; expected an even number of at least {minimum}, half of them "
            "of each label"
        )
    if plan.documents < 1:
        raise InputError(f"{plan.documents} documents of running text; expected at least 1")
    if plan.local is not None and not plan.local.is_dir():
        raise InputError(
            f"the folder {plan.local} does not exist; expected folders OWNER__NAME in it that "
            "replace data sets"
        )
    if plan.folder.exists() and not plan.folder.is_dir():
        raise InputError(f"{plan.folder} is not a folder; give one for the suite")


def _read_index(folder: Path) -> dict[str, Any]:
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
            f"{folder / INDEX} was not written by this version of ksparse; give a new folder "
            "for the suite"
        )
    return index


def _settings(task: PaperTask, plan: BuildPlan) -> str:
    """Return a hash of what decides a task's rows; a local copy counts as its data set."""
    text = () if task.sources else (plan.text, plan.documents)
    sources = [(str(source), source.splits, source.revision) for source in task.sources]
    return digest([FORMAT, task.description, task.positive, sources, text, plan.rows, plan.seed])


def _is_finished(task: PaperTask, plan: BuildPlan, index: dict[str, Any]) -> bool:
    entry, file = index["tasks"].get(task.name, {}), plan.folder / f"{task.name}.jsonl.gz"
    return (
        file.is_file()
        and entry.get("settings") == _settings(task, plan)
        and entry.get("sha256") == sha256(file)
    )


def _sources(task: PaperTask, plan: BuildPlan) -> tuple[DatasetSource, ...]:
    """Return the sources to try, in order, local ones first."""
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
    """Raise InputError if all tasks need the Hub and its package is missing, not 61 failures."""
    sources = [source for task in tasks for source in _sources(task, plan)]
    if (
        sources
        and not any(is_local(source, plan.local) for source in sources)
        and not all(source.by_hand for source in sources)
    ):
        check_hub()


def _group_by_sources(
    tasks: list[PaperTask], plan: BuildPlan
) -> dict[tuple[DatasetSource, ...], list[PaperTask]]:
    """Group tasks by their sources, so that each source is read once."""
    groups: dict[tuple[DatasetSource, ...], list[PaperTask]] = {}
    for task in tasks:
        groups.setdefault(_sources(task, plan), []).append(task)
    return groups


# ---- making --------------------------------------------------------------------------------------


def _make(
    tasks: list[PaperTask], sources: tuple[DatasetSource, ...], plan: BuildPlan, observe: OnStep
) -> Iterator[tuple[PaperTask, DrawnTask | str]]:
    """Yield each task with its rows from the first source that works, or why none did."""
    reasons: dict[str, list[str]] = {task.name: [] for task in tasks}
    pending = list(tasks)
    for source in sources:
        if not pending:
            return
        observe(Step(str(source), "reading"))
        results = _draw(pending, source, plan)
        for task in pending:
            result = results[task.name]
            if isinstance(result, DrawnTask):
                yield task, result
            else:
                reasons[task.name].append(
                    result
                    if result.startswith(source.repo) or source.by_hand
                    else f"{source.repo}: {result}"
                )
        pending = [task for task in pending if not isinstance(results[task.name], DrawnTask)]
    for task in pending:
        yield task, "; ".join(dict.fromkeys(reasons[task.name]))


def _draw(
    tasks: list[PaperTask], source: DatasetSource, plan: BuildPlan
) -> dict[str, DrawnTask | str]:
    """Read a source once for all of its tasks.

    A row that a task's template cannot read fails the source for that task.
    """
    samples = {task.name: TaskSample(task.name, plan.rows, plan.seed) for task in tasks}
    results: dict[str, DrawnTask | str] = {}
    limit = max(20_000, 20 * plan.rows) if tasks[0].sources else plan.documents
    try:
        revision, rows = open_source(source, plan.local, limit)
        for config, row in rows:
            for task in tasks:
                if task.name not in results:
                    try:
                        samples[task.name].add(task.template(config, row))
                    except MissingValue:
                        pass
                    except Exception as error:  # a data set can hold anything
                        results[task.name] = one_line(error)
            if len(results) == len(tasks):
                break
    except DiskError:
        raise
    except Exception as error:  # a broken connection, a damaged file
        return {task.name: results.get(task.name, one_line(error)) for task in tasks}
    for task in tasks:
        if task.name not in results:
            try:
                results[task.name] = DrawnTask(samples[task.name].draw(), source, revision)
            except InputError as error:
                results[task.name] = f"{error} (read up to {limit:,} rows)"
    return results


def _write_task(
    task: PaperTask, result: DrawnTask | str, plan: BuildPlan, index: dict[str, Any]
) -> str | None:
    """Write a task and add it to the index; return the reason if it failed."""
    if isinstance(result, str):
        return result
    try:
        path = suite.write(
            plan.folder,
            task.name,
            ({"text": row.text, "label": row.label} for row in result.texts),
        )
    except InputError as error:
        return str(error)
    index["tasks"][task.name] = {
        "rows": len(result.texts),
        "positive": sum(row.label for row in result.texts),
        "source": str(result.source),
        "revision": result.revision,
        "licence": task.licence if task.sources else f"that of {plan.text}",
        "template": task.description,
        "label": f"1: {task.positive}",
        "position": POSITION,
        "seed": plan.seed,
        "sha256": sha256(path),
        "settings": _settings(task, plan),
    }
    return None
