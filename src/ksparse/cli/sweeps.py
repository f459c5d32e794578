"""Verbs for scaling laws: sweep, fit."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksparse.cli.arguments import parse, split_folder, verb
from ksparse.cli.output import ProgressBar, print_status
from ksparse.errors import InputError
from ksparse.progress import report
from ksparse.storage import atomic, jsonio

if TYPE_CHECKING:  # `ksparse --help` needs no torch
    from ksparse.scaling.sweeps.grid import SweepFolder


@verb
def sweep(arguments: list[str]) -> None:
    """sweep SWEEP.toml [--key value …]

    Train a grid of recipes, many SAEs on one stream; the same command continues or extends it.
    """
    from ksparse.scaling.sweeps import grid as grids
    from ksparse.scaling.sweeps.launch import Launch

    @dataclass(frozen=True)
    class SweepArgs(Launch):
        """Options of `ksparse sweep`."""

        out: str = ""
        """Folder of the sweep; by default sweeps/NAME, with the name of the file. The folder of a
        sweep can also be given in place of its file."""
        plan: bool = False
        """Show what would be done, and stop."""
        only: tuple[str, ...] = ()
        """Train these runs together in this process and stop. This is what a worker does."""

    source, flags = split_folder(
        "sweep",
        arguments,
        "a sweep.toml, such as recipes/sweeps/pylm.toml, or the folder of a sweep",
    )
    options = parse(SweepArgs, "sweep SWEEP.toml", flags)
    is_folder = Path(source).is_dir()
    grid = grids.read(atomic.inside(Path(source), "sweep.toml") if is_folder else source)
    default = source if is_folder else f"sweeps/{Path(source).stem}"
    folder = grids.SweepFolder(Path(options.out or default))
    print_status("loading torch and reading the sizes of the language models")
    from ksparse.scaling.sweeps import run as sweeping

    if options.only:
        sweeping.train_here(grid, folder, options.only)
        return
    launch = Launch(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Launch)}
    )
    if options.plan:
        _print_plan(sweeping.plan(grid, folder, launch))
        return
    with ProgressBar("training") as bar:

        def observe(done: int, total: int, note: str) -> None:
            bar.note(note)
            if launch.launcher != "here":  # what runs here reports each step itself
                report("training", done, total)

        failed = sweeping.sweep(
            grid,
            folder,
            launch,
            observe=observe,
            planned=_print_plan,
        )
    _print_result(folder, len(grid), failed)
    if failed:
        sys.exit(1)


def _print_result(folder: SweepFolder, total: int, failed: dict[str, str]) -> None:
    print(
        f"sweep    {folder.path}: {total - len(failed)} of {total} runs finished\npoints   "
        f"{folder.points_file}"
    )
    for name, reason in failed.items():
        print(f"failed   {folder.run(name).path}: {reason}")
    if failed:
        print(f"next     ksparse sweep {folder.path}      (continues with the failed ones)")
        return
    print(f"next     ksparse fit {folder.path}; ksparse report {folder.path}")


def _print_plan(plan: Any) -> None:
    from ksparse.planning.plan import format_bytes, format_duration

    print_status(
        f"sweep    {plan.total} runs, {len(plan.done)} of them finished; "
        f"{sum(len(cohort.runs) for cohort in plan.cohorts)} to do in {len(plan.cohorts)} cohorts "
        f"on {plan.device}"
    )
    for number, cohort in enumerate(plan.cohorts, 1):
        print_status(
            f"cohort {number} {len(cohort.runs)} SAEs, {cohort.latents:,} latents, at most "
            f"{cohort.tokens:,} activations in sum: {cohort.flops:.3g} FLOPs "
            f"and {cohort.flops_lm:.3g} of the LM, {format_bytes(cohort.memory)}, about "
            f"{format_duration(cohort.seconds)}"
        )
    if plan.cohorts:
        print_status(
            f"in all   {plan.flops:.3g} FLOPs, about {format_duration(plan.seconds)} "
            f"within a factor of 2, {format_bytes(plan.disk)} of checkpoints "
            f"({format_bytes(plan.free)} free here)"
        )


@dataclass(frozen=True)
class FitArgs:
    """Options of `ksparse fit`."""

    law: str = ""
    """Law to fit to a CSV file: nk, n, c, tokens, lr or s. For a sweep all laws are fitted for
    which it has points."""
    out: str = ""
    """Folder for the law.json of a CSV file; by default the file's own."""
    form: str = "paper"
    """Form of the law: paper, best (lowest AICc), or the name of a form as listed in law.json."""
    predict: str = ""
    """Where to evaluate the law, such as n=65536,k=32."""
    budget: float = 0.0
    """Training FLOPs: show the best n and number of tokens for them. Needs a sweep."""
    draws: int = 1_000
    """Bootstrap samples for the intervals; 0: no intervals."""


@verb
def fit(arguments: list[str]) -> None:
    """fit SWEEP|POINTS.csv [--key value …]

    Fit scaling laws, with intervals, to the runs of a sweep or to a table of points.
    """
    source, flags = split_folder("fit", arguments, "a sweep's folder or a CSV file of points")
    options = parse(FitArgs, "fit SWEEP|POINTS.csv", flags)
    at = _parse_assignments("--predict", options.predict)
    if options.budget < 0:
        raise InputError(f"--budget is {options.budget}; it is a number of FLOPs, 0 for none")
    if options.draws < 0:
        raise InputError(
            f"--draws is {options.draws}; it is a number of bootstrap draws, 0 for none"
        )
    (_fit_sweep_folder if Path(source).is_dir() else _fit_csv)(source, options, at)


def _fit_sweep_folder(folder: str, options: FitArgs, at: dict[str, Any]) -> None:
    if options.law or options.out:
        raise InputError(
            "--law and --out are for a CSV file; of a sweep every law is fitted, into its own "
            "law.json"
        )
    from ksparse.scaling import calls

    survey = calls.fit(folder, form=options.form, draws=options.draws)
    for law in survey.laws.values():
        _print_law(law)
    for sentence in [*survey.notes, *survey.absent.values()]:
        print(f"  note: {sentence}")
    for line in [*survey.predictions(at), *survey.budgeted(options.budget, at)]:
        print(line)
    print(f"laws     {Path(folder) / 'law.json'}\nnext     ksparse report {folder}")


def _fit_csv(points: str, options: FitArgs, at: dict[str, Any]) -> None:
    from ksparse.scaling.laws import law as laws

    if options.budget:
        raise InputError("--budget needs the curves of a sweep; a CSV of points has none")
    if not options.law:
        raise InputError(
            f"{points} is not a sweep's folder; for a CSV of points say which law, --law "
            f"{'|'.join(name for name in laws.LAWS if name != 'optimal')}"
        )
    law = laws.fit(
        laws.read_points(points, options.law), options.law, form=options.form, draws=options.draws
    )
    file = Path(options.out or Path(points).parent) / "law.json"
    jsonio.write_json(file, {"format": laws.FORMAT, **law.to_dict()}, sealed=True)
    _print_law(law)
    if at:
        print(law.predict(**at).summary(law.kind.target, at))
    print(f"law      {file}")


def _print_law(law: Any) -> None:
    print(f"{law.kind.title}   {law.form.equation}")
    for name, coefficient in law.coefficients.items():
        low, high = (
            "-" if end is None else f"{end:.4g}" for end in (coefficient.low, coefficient.high)
        )
        print(f"  {name:<12}{coefficient.value:>12.5g}   [{low}, {high}]")
    for sentence in law.summary():
        print(f"  {sentence}")


def _parse_assignments(flag: str, text: str) -> dict[str, Any]:
    """Return n=65536,k=32 as {"n": 65536.0, "k": 32.0}; the value of lm stays text."""
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, word = (piece.strip() for piece in part.partition("="))
        try:
            value = word if name == "lm" else float(word)
        except ValueError:
            equals, value = "", 0.0
        if not equals or not name or (isinstance(value, float) and not 0 < value < math.inf):
            raise InputError(
                f"{flag} takes NAME=NUMBER,NAME=NUMBER, such as n=65536,k=32; got {part!r}"
            )
        values[name] = value
    return values
