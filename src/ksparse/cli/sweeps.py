"""sweep, fit: many runs, and their laws."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse.cli.arguments import parse, take_folder, verb
from ksparse.cli.output import Progress, say
from ksparse.errors import InputError
from ksparse.storage import atomic, jsonio


@verb
def sweep(arguments: list[str]) -> None:
    """sweep SWEEP.toml [--key value …]

    train a grid of recipes, many on one stream; the same command goes on, or widens it
    """
    from ksparse.scaling.sweeps.grid import SweepFolder, read
    from ksparse.scaling.sweeps.launch import Launch

    @dataclass(frozen=True)
    class SweepArgs(Launch):
        out: str = ""
        """Folder of the sweep; sweeps/<name of the file> if not given. A sweep's folder may also be
        named in place of its file."""
        plan: bool = False
        """Only say what would be done."""
        only: tuple[str, ...] = ()
        """Train these runs alone, as one cohort in this process: what a worker does."""

    source, rest = take_folder(
        "sweep",
        arguments,
        "a sweep.toml, such as recipes/sweeps/pylm.toml, or the folder of a sweep",
    )
    options = parse(SweepArgs, "sweep SWEEP.toml", rest)
    inside = Path(source).is_dir()
    grid = read(atomic.inside(Path(source), "sweep.toml") if inside else source)
    folder = SweepFolder(Path(options.out or (source if inside else f"sweeps/{Path(source).stem}")))
    say("loading torch and looking at the language models")
    from ksparse.scaling.sweeps import run as sweeping

    if options.only:
        sweeping.train_here(grid, folder, options.only)
        return
    launch = Launch(
        **{each.name: getattr(options, each.name) for each in dataclasses.fields(Launch)}
    )
    if options.plan:
        _show_plan(sweeping.plan(grid, folder, launch))
        return
    with Progress("training", 0) as progress:
        failed = sweeping.sweep(
            grid,
            folder,
            launch,
            observe=lambda done, total, note: progress(done, note, total),
            planned=_show_plan,
        )
    print(
        f"sweep    {folder.path}: {len(grid) - len(failed)} of {len(grid)} runs finished\npoints   "
        f"{folder.points_file}"
    )
    for name, why in failed.items():
        print(f"failed   {folder.run(name).path}: {why}")
    if failed:
        print(f"next     ksparse sweep {folder.path}      (goes on with the failed ones)")
        sys.exit(1)
    print(f"next     ksparse fit {folder.path}; ksparse report {folder.path}")


def _show_plan(plan: Any) -> None:
    from ksparse.planning.plan import amount_of_bytes, duration

    say(
        f"sweep    {plan.total} runs, {len(plan.done)} of them finished; "
        f"{sum(len(cohort.runs) for cohort in plan.cohorts)} to do in {len(plan.cohorts)} cohorts "
        f"on {plan.device}"
    )
    for number, cohort in enumerate(plan.cohorts, 1):
        say(
            f"cohort {number} {len(cohort.runs)} SAEs, {cohort.latents:,} latents, at most "
            f"{cohort.tokens:,} activations in sum: {cohort.flops:.3g} FLOPs "
            f"and {cohort.flops_lm:.3g} of the LM, {amount_of_bytes(cohort.memory)}, about "
            f"{duration(cohort.seconds)}"
        )
    if plan.cohorts:
        say(
            f"in all   {plan.flops:.3g} FLOPs, about {duration(plan.seconds)} within a factor of "
            f"2, {amount_of_bytes(plan.disk)} of checkpoints "
            f"({amount_of_bytes(plan.free)} free here)"
        )


@dataclass(frozen=True)
class FitArgs:
    law: str = ""
    """Of a CSV file: nk, n, c, tokens, lr or s. Of a sweep all that its points allow are fitted."""
    out: str = ""
    """Folder for law.json of a CSV file; the file's own if not given."""
    form: str = "paper"
    """paper, best (the lowest AICc), or the name of a form as law.json lists them."""
    predict: str = ""
    """Where to say the law's value: n=65536,k=32."""
    budget: float = 0.0
    """Training FLOPs: say the best n and tokens for them. Needs a sweep."""
    draws: int = 1_000
    """Of the bootstrap."""


@verb
def fit(arguments: list[str]) -> None:
    """fit SWEEP|POINTS.csv [--key value …]

    fit scaling laws to a sweep's runs or to any table of points, with intervals
    """
    place, rest = take_folder("fit", arguments, "a sweep's folder or a CSV file of points")
    options = parse(FitArgs, "fit SWEEP|POINTS.csv", rest)
    from ksparse.scaling.laws import law as laws

    at = _assignments("--predict", options.predict)
    if options.budget < 0:
        raise InputError(f"--budget is {options.budget}; it is a number of FLOPs, 0 for none")
    if options.draws < 0:
        raise InputError(
            f"--draws is {options.draws}; it is a number of bootstrap draws, 0 for none"
        )
    if Path(place).is_dir():
        if options.law or options.out:
            raise InputError(
                "--law and --out are for a CSV file; of a sweep every law is fitted, into its own "
                "law.json"
            )
        found = survey_of(place, form=options.form, draws=options.draws)
        for law in found.laws.values():
            _show_law(law)
        for sentence in [*found.notes, *found.absent.values()]:
            print(f"  note: {sentence}")
        for line in [*found.predictions(at), *found.budgeted(options.budget, at)]:
            print(line)
        print(f"laws     {Path(place) / 'law.json'}\nnext     ksparse report {place}")
        return
    if options.budget:
        raise InputError("--budget needs the curves of a sweep; a CSV of points has none")
    if not options.law:
        raise InputError(
            f"{place} is not a sweep's folder; for a CSV of points say which law, --law "
            f"{'|'.join(name for name in laws.LAWS if name != 'optimal')}"
        )
    law = laws.fit(
        laws.read_points(place, options.law), options.law, form=options.form, draws=options.draws
    )
    file = Path(options.out or Path(place).parent) / "law.json"
    jsonio.write_json(file, {"format": laws.FORMAT, **law.to_dict()}, sealed=True)
    _show_law(law)
    if at:
        print(law.predict(**at).summary(law.kind.target, at))
    print(f"law      {file}")


def survey_of(folder: str, **options: Any) -> Any:
    """Fit all laws of a sweep and write its law.json."""
    from ksparse.scaling.laws import survey

    with Progress("laws", len(survey.LAWS)) as progress:
        found = survey.fit_sweep(
            folder, **options, observe=lambda done, total, what: progress(done, what, total)
        )
    jsonio.write_json(Path(folder) / "law.json", found.to_dict(), sealed=True)
    return found


def _show_law(law: Any) -> None:
    print(f"{law.kind.title}   {law.form.equation}")
    for name, each in law.coefficients.items():
        low, high = ("-" if end is None else f"{end:.4g}" for end in (each.low, each.high))
        print(f"  {name:<12}{each.value:>12.5g}   [{low}, {high}]")
    for sentence in law.summary():
        print(f"  {sentence}")


def _assignments(flag: str, text: str) -> dict[str, Any]:
    """Return the values of n=65536,k=32."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        try:
            number = found[name.strip()] = value.strip() if name.strip() == "lm" else float(value)
        except ValueError:
            equals = ""
        if (
            not equals
            or not name.strip()
            or (isinstance(number, float) and not 0 < number < math.inf)
        ):
            raise InputError(
                f"{flag} takes NAME=NUMBER,NAME=NUMBER, such as n=65536,k=32; got {part!r}"
            )
    return found
