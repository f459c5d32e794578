"""eval, compare, study, probes."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksparse import config as recipes
from ksparse.cli.arguments import parse, take_folder, verb
from ksparse.cli.output import Progress, say, write_report, written
from ksparse.config.evaluation import EvalConfig, StudyConfig
from ksparse.errors import InputError
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder, open_run


@verb
def evaluate(arguments: list[str]) -> None:
    """eval RUN … [NAME …] [--key value …]

    judge on held-out text: downstream, stats, probes, … (those six if none is named)
    """
    folder, rest = take_folder("eval", arguments)
    words = [folder]
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    options = parse(EvalConfig, "eval RUN [RUN …] [NAME …]", rest)
    sources: list[str] = [folder]
    names: list[str] = []
    for word in words[1:]:
        (sources if "/" in word or Path(word).exists() else names).append(word)
    for source, results in evaluate_saes(sources, names, options).items():
        run = RunFolder(Path(source))
        if len(sources) > 1:
            print(f"\n{source}")
        for result in results.values():
            show_result(result, run.eval_file(result["name"]) if run.exists() else "")
        if run.exists():
            write_report(run)
            print(f"report   {run.report_file.resolve().as_uri()}")


def show_result(result: dict[str, Any], file: Path | str) -> None:
    print(f"{result['name']}   {file}".rstrip())
    for key, value in result.items():
        if isinstance(value, dict) and set(value) == {"value", "se"}:
            print(f"  {key:<32}{written(value)}")
    for note in result["notes"]:
        print(f"  note: {note}")


def evaluate_saes(
    sources: list[str], names: list[str], options: EvalConfig
) -> dict[str, dict[str, Any]]:
    """Evaluate the SAEs of runs or folders, and write the results of those that are runs."""
    from ksparse.evals import registry, runner
    from ksparse.interop import load

    registry.check_names(names)
    saes = {source: load(source) for source in sources}
    with Progress("evaluating", 0) as progress:
        found = runner.evaluate_many(
            saes,
            None,
            names or list(registry.DEFAULT),
            options,
            observe=lambda what, done, total: progress(done, "", total, what),
        )
    for source, results in found.items():
        run = RunFolder(Path(source))
        if run.exists():
            runner.write(run, {result["name"]: result for result in results.values()})
    return found


@dataclass(frozen=True)
class CompareArgs(EvalConfig):
    lm: str = ""
    """The LM, where no SAE says which; a Hub name, a folder, or pylm."""
    site: str = ""
    """The site, where no SAE says which."""
    like: str = ""
    """Evaluate all on the text, contexts and positions that this SAE was trained with."""
    by: str = ""
    """Rank by this column; by the first if not given."""
    results: Literal["new", "saved"] = "new"
    """new: evaluate. saved: take the results that runs have."""
    json: str = ""
    """File for the table."""


@verb
def compare(arguments: list[str]) -> None:
    """compare A B … [--key value …]

    SAEs of any format on the same text, positions and baselines: one table
    """
    folder, rest = take_folder(
        "compare",
        arguments,
        "the SAEs to compare: runs, folders of any format, or Hub repositories",
    )
    sources = [folder]
    while rest and not rest[0].startswith("-"):
        sources.append(rest.pop(0))
    args = parse(CompareArgs, "compare A B …", rest)
    from ksparse import interop
    from ksparse.evals import comparison

    repeated = [source for source in sources if sources.count(source) > 1]
    if repeated:
        raise InputError(f"{repeated[0]} is named twice")
    saes = {source: interop.load(source) for source in sources}
    results = _saved(sources) if args.results == "saved" else _together(saes, args)
    rows = comparison.table(
        results, {source: sae.shape.normalize for source, sae in saes.items()}, args.by
    )
    width = max(map(len, sources)) + 2
    print(" " * width + "".join(f"{key:>22}" for key in rows[0].values))
    for row in rows:
        print(
            f"{row.name:<{width}}" + "".join(f"{written(each):>22}" for each in row.values.values())
        )
    print(
        "± one standard error over documents; the SAEs saw the same ones, so differences are known "
        "better than that"
    )
    for source, found in results.items():
        for note in dict.fromkeys(note for result in found.values() for note in result["notes"]):
            print(f"note: {source}: {note}")
    if args.json:
        jsonio.write_json(Path(args.json), [{"name": row.name, **row.values} for row in rows])


def _saved(sources: list[str]) -> dict[str, dict[str, Any]]:
    from ksparse.evals.comparison import NAMES

    found = {
        source: {name: result for name in NAMES if (result := RunFolder(Path(source)).eval(name))}
        for source in sources
    }
    for source, results in found.items():
        if not results:
            raise InputError(
                f"{source} has no results of {' and '.join(NAMES)}; `ksparse eval {source}` makes "
                "them of a run, or leave out --results saved"
            )
    return found


def _together(saes: dict[str, Any], args: CompareArgs) -> dict[str, dict[str, Any]]:
    """Evaluate SAEs in one pass, on what one of them was trained with."""
    from ksparse.device import resolve_device
    from ksparse.evals import runner
    from ksparse.evals.comparison import NAMES
    from ksparse.lm.model import LM

    if args.like and args.like not in saes:
        raise InputError(
            f"--like names {args.like!r}, which is not compared; there are {', '.join(saes)}"
        )
    told = {source: sae.metadata.get("acts") or {} for source, sae in saes.items()}
    own = told[args.like] if args.like else next((acts for acts in told.values() if acts), {})
    acts = recipes.ActsConfig(
        **own | {key: value for key in ("lm", "site", "text") if (value := getattr(args, key))}
    )
    if not own and not (args.lm and args.site):
        raise InputError(
            "no SAE says on which LM, site and text it was trained; name them: --lm, --site, --text"
        )
    options = EvalConfig(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EvalConfig)}
    )
    with Progress("evaluating", 0) as progress:
        return runner.evaluate_many(
            saes,
            LM(acts=acts, device=resolve_device(args.device)),
            NAMES,
            options,
            like=acts if args.like else None,
            observe=lambda what, done, total: progress(done, "", total, what),
        )


@verb
def study(arguments: list[str]) -> None:
    """study NAME [--run RUN] [--key value …]

    answer a question with several SAEs, or by an evaluation of one: baselines, sites, …
    """
    name, rest = take_folder("study", arguments, "the name of a study, such as baselines")
    options = parse(StudyConfig, "study NAME", rest)
    from ksparse import studies
    from ksparse.evals.registry import EVALS

    studies.check_name(name, tuple(EVALS))
    if name in studies.STUDIES:
        with Progress("reading", 0) as progress:
            folder = studies.run(
                name, options, observe=lambda what, done, total: progress(done, "", total, what)
            )
        show_study(folder)
        return
    if not options.run:
        raise InputError(
            f"study {name!r} is an evaluation of one SAE: say of which, with --run RUN"
        )
    run = open_run(options.run)
    results = evaluate_saes(
        [options.run],
        [name],
        EvalConfig(tokens=options.eval_tokens, text=options.text, device=options.device),
    )
    show_result(results[options.run][name], run.eval_file(name))
    write_report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


def show_study(folder: Path) -> None:
    from ksparse.report import studies as pages

    page = pages.write(folder)
    for finding in pages.read(folder)["findings"]:
        print(f"- {finding}")
    print(f"study    {folder / 'study.json'}\nreport   {page.resolve().as_uri()}")


@dataclass(frozen=True)
class ProbesArgs:
    rows: int = 1_000
    """Rows of a task, half of each label."""
    seed: int = 0
    """Draws the rows."""
    text: str = ""
    """Running text for base64 and the phrase tasks: a data set of the Hub (OWNER/NAME or
    OWNER/NAME:CONFIG), or a file or folder; monology/pile-uncopyrighted if not given."""
    documents: int = 200_000
    """Documents of that text to read."""
    local: str = ""
    """Folder with OWNER__NAME/ folders that stand in for data sets of the Hub."""
    only: tuple[str, ...] = ()
    """Make these tasks alone."""


@verb
def probes(arguments: list[str]) -> None:
    """probes build DIR [--key value …]

    make the paper's 61 probe tasks from the Hub's data sets: --suite DIR uses them
    """
    if arguments[:1] == ["build"]:
        arguments = arguments[1:]
    elif arguments[:1] not in (["-h"], ["--help"]):
        raise InputError(
            "`ksparse probes` knows one thing to do, `ksparse probes build DIR`; got "
            f"{' '.join(arguments) or 'nothing'}"
        )
    folder, rest = take_folder(
        "probes build", arguments, "the folder to write the tasks to, such as suites/paper"
    )
    options = parse(ProbesArgs, "probes build DIR", rest)
    from ksparse.evals.probing import suites

    built = suites.build(
        folder,
        rows=options.rows,
        seed=options.seed,
        documents=options.documents,
        local=options.local or None,
        only=options.only,
        observe=lambda step: say(
            f"{step.state:<9}{step.name}" + (f" · {step.words}" if step.words else "")
        ),
        **({"text": options.text} if options.text else {}),
    )
    print(
        f"suite    {built.folder}: {len(built.made)} tasks made, {len(built.kept)} there before, "
        f"{len(built.failed)} failed"
    )
    for name, why in built.failed.items():
        print(f"  {name}: {why}")
    if built.made or built.kept:
        print(f"next     ksparse eval RUN probes --suite {built.folder}")
    else:
        sys.exit(1)
