"""Verbs that train several SAEs to answer a question: study, sanity."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ksparse.cli.arguments import parse, split_folder, verb
from ksparse.cli.evaluate import evaluate_saes, print_result
from ksparse.cli.output import ProgressBar, write_report
from ksparse.config.evaluation import EVALUATIONS, STUDIES, EvalConfig, StudyConfig
from ksparse.errors import InputError, unknown
from ksparse.storage.run_folder import open_run


@verb
def study(arguments: list[str]) -> None:
    """study NAME [RECIPE.toml] [--run RUN] [--key value …]

    Answer a question with several SAEs (paper, baselines, …), or with an evaluation of one run.
    """
    name, flags = split_folder("study", arguments, "the name of a study, such as paper")
    if flags and not flags[0].startswith("-"):
        flags = ["--recipe", *flags]
    options = parse(StudyConfig, "study NAME [RECIPE.toml]", flags)
    if name and name not in (known := (*STUDIES, *EVALUATIONS)):
        raise unknown("there is no study", name, known)
    from ksparse import studies

    if name in STUDIES:
        with ProgressBar(f"study {name}"):
            folder = studies.run(name, options)
        print_study(folder)
        return
    if not options.run:
        raise InputError(f"study {name!r} is an evaluation of one SAE: name it with --run RUN")
    run = open_run(options.run)
    results = evaluate_saes(
        [options.run],
        [name],
        EvalConfig(tokens=options.eval_tokens, text=options.text, device=options.device),
    )
    print_result(results[options.run][name], run.eval_file(name))
    write_report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


@dataclass(frozen=True)
class SanityArgs:
    """Options of `ksparse sanity`."""

    controls: tuple[str, ...] = ()
    """Controls to train: seeds, frozen_decoder, held_decoder, frozen_encoder, redrawn,
    redrawn_keep_embedding, shuffled, sweep_k, sweep_n, or all; by default all but
    redrawn_keep_embedding, shuffled and sweep_n."""
    out: str = ""
    """Folder of the controls and the page; by default RUN/sanity."""
    eval_tokens: int = 30_000
    """Held-out activations to evaluate on."""
    suite: str = ""
    """Folder of probe tasks; by default the built-in tasks on Python tokens."""
    probe_rows: int = 200
    """Largest number of rows of a probe task."""
    threads: int = 0
    """CPU threads; 0: those of the run."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps."""


@verb
def sanity(arguments: list[str]) -> None:
    """sanity RUN [--controls NAME …] [--key value …]

    Ask whether a run is better than an artefact, beside controls trained on its own stream.
    """
    folder, flags = split_folder("sanity", arguments)
    options = parse(SanityArgs, "sanity RUN", flags)
    if not folder:
        return
    from ksparse import studies

    with ProgressBar("sanity"):
        path = studies.run("sanity", StudyConfig(run=folder, **dataclasses.asdict(options)))
    print_study(path)


def print_study(folder: Path) -> None:
    """Write the report of a study, and print its findings."""
    from ksparse.report import studies as pages

    page = pages.write(folder)
    for finding in pages.read(folder)["findings"]:
        print(f"- {finding}")
    print(f"study    {folder / 'study.json'}\nreport   {page.resolve().as_uri()}")
