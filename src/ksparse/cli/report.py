"""Verbs that show results: report, view."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksparse import progress
from ksparse.cli.arguments import parse, refuse_arguments, split_folder, verb
from ksparse.cli.output import ProgressBar, print_status, write_report
from ksparse.cli.studies import print_study
from ksparse.errors import InputError, Interrupted
from ksparse.storage.run_folder import RunFolder, open_run, runs_in
from ksparse.trust import code_is_trusted


@verb
def report(arguments: list[str]) -> None:
    """report RUN|SWEEP|STUDY|SITES

    Write report.html of a run, of the results of `eval SAE --out`, a sweep, a study, or the runs of
    several sites.
    """
    folder, flags = split_folder("report", arguments)
    refuse_arguments("report", flags)
    if (Path(folder) / "study.json").is_file():
        print_study(Path(folder))
        return
    if (Path(folder) / "points.csv").is_file():
        from ksparse.report import sweep
        from ksparse.scaling import calls

        if not (Path(folder) / "law.json").is_file():
            calls.fit(folder)
        print(f"report   {sweep.write(Path(folder)).resolve().as_uri()}")
        return
    if not RunFolder(Path(folder)).keeps_results() and runs_in(folder):
        from ksparse.report import sites

        print(f"report   {sites.write(folder).resolve().as_uri()}")
        return
    run = open_run(folder)
    write_report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


@verb
def view(arguments: list[str]) -> None:
    """view RUN … [--export DIR] [--map umap] [--port N] [--latent N]

    Browse the latents of a run, or of the SAE judged by `eval SAE --out`, on this machine, or write
    pages for any web host. Of several runs, a latent is shown beside its nearest in another.
    """

    @dataclass(frozen=True)
    class ViewArgs:
        """Options of `ksparse view`."""

        export: str = ""
        """Folder to write static pages to, instead of serving them; of several runs, each into a
        folder in it. They leave out what needs the LM, and the comparison of runs."""
        map: Literal["pca", "umap"] = "pca"
        """Layouts that the map offers: by PCA alone, or also by UMAP (pip install 'ksparse[umap]'),
        which is computed once, in minutes where latents are many, and kept in RUN."""
        port: int = 8765
        """Port on 127.0.0.1; 0: any that is free."""
        latent: int = -1
        """Latent whose page the printed address opens; -1: the start page."""
        trust_remote_code: bool = False
        """Let code that comes with the LM run, if you trust its author. No file can allow it."""

    folder, flags = split_folder("view", arguments)
    others = list(itertools.takewhile(lambda word: not word.startswith("-"), flags))
    options = parse(ViewArgs, "view RUN …", flags[len(others) :])
    runs = [open_run(each) for each in (folder, *others)]
    last = runs[0].subject().n_latents - 1
    if not -1 <= options.latent <= last:
        raise InputError(
            f"--latent {options.latent}: there is no such latent; {folder} has latents 0 to "
            f"{last:,}. Give one of these, or leave --latent out"
        )
    from ksparse import viewer
    from ksparse.viewer.runs import name_runs

    for run in runs:
        if run.is_judged():
            from ksparse.interop import load_judged

            load_judged(run)  # the pages need its weights: say now if it has moved or changed
        if options.map == "umap":
            with ProgressBar("UMAP"), raise_on_signal(signal.SIGTERM):
                viewer.lay_out(run, observe=progress.report)
    place = f"#/latent/{options.latent}" if options.latent >= 0 else ""
    if options.export:
        export(runs, Path(options.export), place)
        return
    name_runs(runs)  # none is given twice
    listener, token = viewer.listen(options.port), secrets.token_urlsafe(24)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}{place}"
    print(f"latents  {address}   (Ctrl-C stops it)", flush=True)
    try:
        viewer.serve(runs, listener, token, trust_remote_code=code_is_trusted())
    except Interrupted as interrupted:
        print_status(str(interrupted))
        os._exit(interrupted.exit_code)  # without waiting for a thread in which the LM may run


def export(runs: list[RunFolder], folder: Path, fragment: str = "") -> None:
    """Write the static pages of a run into a folder; those of several each into a folder in it."""
    from ksparse import viewer
    from ksparse.viewer.runs import name_runs

    names = name_runs(runs)
    folders = [folder] if len(runs) == 1 else [folder / name for name in names]
    for run, place in zip(runs, folders):
        with ProgressBar("pages"), raise_on_signal(signal.SIGTERM):
            page = viewer.export(run, place, observe=progress.report)
        print(f"pages    {page.resolve().as_uri()}{fragment}")


@contextmanager
def raise_on_signal(signum: int) -> Iterator[None]:
    """Raise Interrupted on a signal inside the block, so that nothing half written is left."""

    def interrupt(signum: int, frame: Any) -> None:
        raise Interrupted("stopped", signum)

    before = signal.getsignal(signum)
    if before is not signal.SIG_IGN:
        signal.signal(signum, interrupt)
    try:
        yield
    finally:
        signal.signal(signum, before)
