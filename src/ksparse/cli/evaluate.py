"""Verbs that evaluate: eval, compare, probes."""

from __future__ import annotations

import dataclasses
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ksparse.cli.arguments import parse, split_folder, verb
from ksparse.cli.output import ProgressBar, format_estimate, print_status, write_report
from ksparse.cli.subjects import (
    SubjectArgs,
    check_source,
    open_subject,
    place_subject,
    refuse_for_a_run,
)
from ksparse.config import ActsConfig
from ksparse.config.evaluation import (
    COMPARED,
    EvalConfig,
    check_evaluations,
)
from ksparse.errors import InputError, Interrupted
from ksparse.progress import report
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder, Subject

if TYPE_CHECKING:  # `ksparse --help` needs no torch
    from ksparse.sae.model import SAE


@dataclass(frozen=True)
class EvalArgs(SubjectArgs, EvalConfig):
    """Options of `ksparse eval`."""

    out: str = ""
    """Folder for the results, for `ksparse report` and `view`. A run keeps its results itself;
    those of any other SAE are only printed without it."""
    again: bool = False
    """Compute everything again, also results that are there already with the same options,
    checkpoint, LM, site and text."""
    text_field: str = ""
    """Column of the text, or of the messages, where the SAE does not say it."""
    chat: Literal["", "none", "template"] = ""
    """template: the text is conversations, rendered by the tokenizer's chat template; by default as
    the SAE was trained."""
    roles: tuple[str, ...] = ()
    """With chat, roles whose tokens are evaluated; by default as the SAE was trained."""
    pretokenized: bool = False
    """The column holds lists of token ids of this LM."""

    @property
    def given(self) -> dict[str, Any]:
        """The keys of `acts` that were given, with their values."""
        keys = ("text_field", "chat", "roles", "pretokenized")
        values = {key: getattr(self, key) for key in keys}
        return super().given | {key: value for key, value in values.items() if value}


@verb
def evaluate(arguments: list[str]) -> None:
    """eval SAE … [NAME …] [--key value …]

    Evaluate SAEs on held-out text; without names: downstream, stats, probes, n2g, explained_loss
    and ablation. The same command goes on with what is missing. An SAE is a run, or any that `load`
    takes: give --out DIR, and --lm, --site and --text where it does not say them.
    """
    folder, flags = split_folder("eval", arguments, "an SAE, such as the run runs/demo")
    words = []
    while flags and not flags[0].startswith("-"):
        words.append(flags.pop(0))
    args = parse(EvalArgs, "eval SAE [SAE …] [NAME …]", flags)
    sources: list[str] = [folder]
    names: list[str] = []
    for word in words:
        (sources if "/" in word or Path(word).exists() else names).append(word)
    check_evaluations(names)
    for source in sources:
        check_source(source)
    if _is_judged_alone(sources, args):
        run, results = evaluate_subject(folder, names, args)
        _show_results(run, results)
        return
    for source in sources:
        refuse_for_a_run(source, args)
    results_by_source = evaluate_saes(sources, names, _eval_options(args), again=args.again)
    for source, results in results_by_source.items():
        if len(sources) > 1:
            print(f"\n{source}")
        run = RunFolder(Path(source))
        _show_results(run if run.exists() else None, results)


def _is_judged_alone(sources: list[str], args: EvalArgs) -> bool:
    """Return whether an SAE is judged on what flags, its file or a folder of results say, not into
    its own run; raise InputError where several are."""
    folders = {source: RunFolder(Path(source)) for source in sources}
    alone = args.out or args.any_given or any(run.is_judged() for run in folders.values())
    if len(sources) > 1 and alone:
        raise InputError(
            "with --out, --lm and the like, and for folders of results, SAEs are evaluated one by "
            "one; `ksparse compare` puts several side by side"
        )
    return len(sources) == 1 and bool(alone or not folders[sources[0]].exists())


def _show_results(run: RunFolder | None, results: dict[str, Any]) -> None:
    """Print results; where they are kept, write the report too."""
    for result in results.values():
        print_result(result, run.eval_file(result["name"]) if run else "")
    if run:
        write_report(run)
        print(f"report   {run.report_file.resolve().as_uri()}")


def evaluate_subject(
    source: str, names: list[str], args: EvalArgs
) -> tuple[RunFolder | None, dict[str, Any]]:
    """Evaluate one SAE of any kind on the LM, site and text that flags and its metadata name.

    Args:
        source: what `ksparse.load` takes, or a folder of results to go on with.
        names: evaluations; empty for the default ones.
        args: flags. The text is a part of the subject, not an option of its evaluations.

    Returns:
        The folder of results, None without one; and the results by name.

    Raises:
        InputError: see `open_subject`; or the folder holds results of something else.
        Interrupted: on Ctrl-C; complete results are on disk.
    """
    if not args.out:
        refuse_for_a_run(source, args)
    with ProgressBar("evaluating"):
        report("loading torch")
        from ksparse.evals import registry

        registry.check_names(names)
        opened = open_subject(source, args, text=args.text, force=args.force)
        out = args.out or (source if RunFolder(Path(source)).is_judged() else "")
        run, subject = (RunFolder(Path(out)) if out else None), opened.subject
        if run:
            subject = place_subject(run, subject)
        assert subject.judged is not None
        options = dataclasses.replace(
            _eval_options(args), text="", force=args.force or subject.judged.forced
        )
        task = _Evaluations(list(dict.fromkeys(names or registry.DEFAULT)), options, args.again)
        results = task.run({source: opened.sae}, {source: run} if run else {}, subject)
    return run, results[source]


def _eval_options(args: EvalConfig) -> EvalConfig:
    """Return the options of the evaluations among those of a verb."""
    return EvalConfig(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EvalConfig)}
    )


def print_result(result: dict[str, Any], file: Path | str) -> None:
    """Print the name, file, numbers and notes of an evaluation's result."""
    print(f"{result['name']}   {file}".rstrip())
    for key, value in result.items():
        if isinstance(value, dict) and set(value) == {"value", "se"}:
            print(f"  {key:<32}{format_estimate(value)}")
    for note in result["notes"]:
        print(f"  note: {note}")


def evaluate_saes(
    sources: list[str], names: list[str], options: EvalConfig, *, again: bool = False
) -> dict[str, dict[str, Any]]:
    """Evaluate SAEs, and write each result of a run as soon as it is complete.

    Args:
        sources: runs, folders of any format, or Hub repositories.
        names: evaluations; empty for the default ones.
        options: for all of them.
        again: compute also what the runs have; by default that is kept.

    Returns:
        For each source, the results by name.

    Raises:
        Interrupted: on Ctrl-C; complete results are on disk.
    """
    with ProgressBar("evaluating"):
        report("loading torch")
        from ksparse.evals import registry
        from ksparse.interop import load

        registry.check_names(names)
        task = _Evaluations(list(dict.fromkeys(names or registry.DEFAULT)), options, again)
        folders = {source: RunFolder(Path(source)) for source in sources}
        return task.run(
            {source: load(source, device="cpu") for source in sources},
            {source: run for source, run in folders.items() if run.exists()},
        )


@dataclass(frozen=True)
class _Evaluations:
    """Evaluations of SAEs whose results are written as soon as they are complete.

    Args:
        names: the evaluations.
        options: for all of them.
        again: compute also what is there already.
    """

    names: list[str]
    options: EvalConfig
    again: bool

    def run(
        self, saes: dict[str, SAE], folders: dict[str, RunFolder], subject: Subject | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the results by source and name.

        Args:
            saes: the SAEs by source.
            folders: where to write the results of each; those of others are not written.
            subject: what to judge on, in place of what the SAEs were trained on.
        """
        from ksparse.device import resolve_device
        from ksparse.evals import runner
        from ksparse.lm.model import LM

        acts = subject.acts if subject else None
        names = self.names if subject else list(runner.applicable(self.names, saes))
        kept = {} if self.again else self._kept(names, saes, folders, acts)
        missing = [name for name in names if name not in kept]
        written: list[str] = []

        def write(source: str, name: str, result: Any) -> None:
            if source in folders:
                if subject:
                    folders[source].write_subject(subject)
                runner.write_results(folders[source], {result["name"]: result})
                written.append(name)

        computed: dict[str, dict[str, Any]] = {}
        try:
            if missing:
                lm = LM(acts=acts, device=resolve_device(self.options.device)) if acts else None
                computed = runner.evaluate_many(
                    saes, lm, missing, self.options, like=acts, on_result=write
                )
        except KeyboardInterrupt:
            done = f"{', '.join(dict.fromkeys([*kept, *written])) or 'no result'}"
            raise Interrupted(
                f"stopped; {done} of {', '.join(names)} complete and saved. The same command "
                "goes on with the rest",
                signal.SIGINT,
            ) from None
        return {
            source: {
                name: kept[name][source] if name in kept else computed[source][name]
                for name in names
            }
            for source in saes
        }

    def _kept(
        self,
        names: list[str],
        saes: dict[str, SAE],
        folders: dict[str, RunFolder],
        acts: ActsConfig | None,
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the results that all of the SAEs have already, {name: {source: result}}, and say
        so.

        What one of them lacks is computed for all, which costs little more: the LM runs once.
        """
        from ksparse.evals import runner

        if set(folders) != set(saes):
            return {}
        short, kept = runner.short_names(saes), {}
        for name in names:
            results = {
                source: runner.read_kept(
                    run,
                    name,
                    self.options,
                    saes[source].metadata,
                    [short[other] for other in saes if other != source],
                    acts,
                )
                for source, run in folders.items()
            }
            complete = {source: result for source, result in results.items() if result is not None}
            if len(complete) == len(saes):
                kept[name] = complete
        if kept:
            print_status(
                f"kept     {', '.join(kept)}: computed before, with the same options, checkpoint, "
                "LM and text; --again computes them again"
            )
        return kept


@dataclass(frozen=True)
class CompareArgs(EvalConfig):
    """Options of `ksparse compare`."""

    lm: str = ""
    """LM, where no SAE names one: a name on the Hub, a folder, or pylm."""
    site: str = ""
    """Site, where no SAE names one."""
    evals: str = ""
    """Evaluations to compare, as in downstream,stats,probes,n2g; by default downstream and
    stats."""
    against: str = ""
    """SAE that the others are compared with; by default the first."""
    like: str = ""
    """Evaluate all on the text, contexts and positions that this SAE was trained with."""
    by: str = ""
    """Column to rank by; by default the first."""
    results: Literal["new", "saved"] = "new"
    """new: evaluate. saved: use the results that runs already have, whose differences cannot be
    paired."""
    json: str = ""
    """File to write the table to, as JSON."""

    @property
    def names(self) -> list[str]:
        """The evaluations, as they are named."""
        words = self.evals.replace(",", " ").split()
        check_evaluations(words)
        return list(dict.fromkeys(words)) or list(COMPARED)


@verb
def compare(arguments: list[str]) -> None:
    """compare A B … [--key value …]

    Compare SAEs of any format on the same text, positions and baselines: a table of their numbers,
    and the differences to one of them, paired by document.
    """
    folder, flags = split_folder(
        "compare",
        arguments,
        "the SAEs to compare: runs, folders of any format, or Hub repositories",
    )
    sources = [folder]
    while flags and not flags[0].startswith("-"):
        sources.append(flags.pop(0))
    args = parse(CompareArgs, "compare A B …", flags)
    _check_sources(sources, args)
    names = args.names
    from ksparse import interop
    from ksparse.evals import comparison

    saes = {source: interop.load(source, device="cpu") for source in sources}
    results_by_source = (
        _read_results(sources, names)
        if args.results == "saved"
        else _evaluate_together(saes, names, args)
    )
    normalizations = {source: sae.shape.normalize for source, sae in saes.items()}
    against = args.against or sources[0]
    found = comparison.SAEComparison.of(results_by_source, normalizations, against, args.by)
    print(found)
    if args.json:
        lines = [{"name": row.name, **row.values} for row in found.rows]
        for line in lines:
            if line["name"] in found.differences:
                line |= {"against": against, "differences": found.differences[str(line["name"])]}
        jsonio.write_json(Path(args.json), lines)


def _check_sources(sources: list[str], args: CompareArgs) -> None:
    for source in sources:
        check_source(source)
    repeated = [source for source in sources if sources.count(source) > 1]
    if repeated:
        raise InputError(f"{repeated[0]} is named twice")
    for flag in ("like", "against"):
        if (named := getattr(args, flag)) and named not in sources:
            raise InputError(
                f"--{flag} names {named!r}, which is not compared; there are {', '.join(sources)}"
            )


def _read_results(sources: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the saved results of runs; raise InputError for a run without any."""
    results_by_source = {
        source: {name: result for name in names if (result := RunFolder(Path(source)).eval(name))}
        for source in sources
    }
    for source, results in results_by_source.items():
        if not results:
            raise InputError(
                f"{source} has no results of {' and '.join(names)}; `ksparse eval {source}` makes "
                "them of a run, or leave out --results saved"
            )
    return results_by_source


def _evaluate_together(
    saes: dict[str, SAE], names: list[str], args: CompareArgs
) -> dict[str, dict[str, Any]]:
    """Evaluate SAEs in one pass over the activations that one of them was trained on."""
    from ksparse.device import resolve_device
    from ksparse.evals import runner
    from ksparse.lm.model import LM

    acts = _shared_acts(saes, args)
    with ProgressBar("evaluating"):
        return runner.evaluate_many(
            saes,
            LM(acts=acts, device=resolve_device(args.device)),
            names,
            _eval_options(args),
            like=acts if args.like else None,
        )


def _shared_acts(saes: dict[str, SAE], args: CompareArgs) -> ActsConfig:
    """Return the LM, site and text to compare SAEs on: of --like, or of the first that names each,
    with the flags over them."""
    from ksparse.interop.hook_names import from_hook
    from ksparse.lm import provenance

    known: dict[str, Any] = {}
    for source in [args.like] if args.like else saes:
        folder, metadata = RunFolder(Path(source)), saes[source].metadata
        own = dataclasses.asdict(folder.subject().acts) if folder.is_judged() else None
        known = (own or metadata.get("acts") or provenance.trained_on(metadata)) | known
    flags = {"lm": args.lm, "site": from_hook(args.site), "text": args.text}
    known |= {key: value for key, value in flags.items() if value}
    missing = [key for key in ("lm", "site", "text") if not known.get(key)]
    if missing:
        raise InputError(
            "no SAE says on which LM, site and text it was trained; name them: --lm, --site, --text"
            if len(missing) == 3
            else f"no SAE says its {' and '.join(missing)}; name it: "
            f"{', '.join(f'--{key}' for key in missing)}"
        )
    return ActsConfig(**known)


@dataclass(frozen=True)
class ProbesArgs:
    """Options of `ksparse probes build`."""

    rows: int = 1_000
    """Rows per task, half of them of each label."""
    seed: int = 0
    """Seed of the choice of rows."""
    text: str = ""
    """Text for the base64 and phrase tasks: a data set on the Hub (OWNER/NAME or
    OWNER/NAME:CONFIG), or a file or folder; by default monology/pile-uncopyrighted."""
    documents: int = 200_000
    """Documents of that text to read."""
    local: str = ""
    """Folder with subfolders OWNER__NAME to use instead of data sets on the Hub."""
    only: tuple[str, ...] = ()
    """Tasks to build; by default all."""


@verb
def probes(arguments: list[str]) -> None:
    """probes build DIR [--key value …]

    Build the paper's 61 probe tasks from data sets on the Hub, for `ksparse eval --suite DIR`.
    """
    if arguments[:1] == ["build"]:
        arguments = arguments[1:]
    elif arguments[:1] not in (["-h"], ["--help"]):
        raise InputError(
            "`ksparse probes` knows one thing to do, `ksparse probes build DIR`; got "
            f"{' '.join(arguments) or 'nothing'}"
        )
    folder, flags = split_folder(
        "probes build", arguments, "the folder to write the tasks to, such as suites/paper"
    )
    options = parse(ProbesArgs, "probes build DIR", flags)
    from ksparse.evals.probing import suites

    report = suites.build(
        folder,
        rows=options.rows,
        seed=options.seed,
        documents=options.documents,
        local=options.local or None,
        only=options.only,
        observe=lambda step: print_status(
            f"{step.state:<9}{step.name}" + (f" · {step.words}" if step.words else "")
        ),
        **({"text": options.text} if options.text else {}),
    )
    print(
        f"suite    {report.folder}: {len(report.built)} tasks made, {len(report.kept)} there "
        f"before, {len(report.failed)} failed"
    )
    for name, reason in report.failed.items():
        print(f"  {name}: {reason}")
    if report.built or report.kept:
        print(f"next     ksparse eval RUN probes --suite {report.folder}")
    else:
        sys.exit(1)
