"""Verbs that show results: report, view."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse import progress
from ksparse.cli.arguments import parse, refuse_arguments, split_folder, verb
from ksparse.cli.output import ProgressBar, print_status, write_report
from ksparse.cli.studies import print_study
from ksparse.cli.sweeps import fit_sweep
from ksparse.errors import Interrupted
from ksparse.storage.run_folder import open_run
from ksparse.trust import code_is_trusted


@verb
def report(arguments: list[str]) -> None:
    """report RUN|SWEEP|STUDY

    Write report.html of a run, of the results of `eval SAE --out`, a sweep or a study.
    """
    folder, flags = split_folder("report", arguments)
    refuse_arguments("report", flags)
    if (Path(folder) / "study.json").is_file():
        print_study(Path(folder))
        return
    if (Path(folder) / "points.csv").is_file():
        from ksparse.report import sweep

        if not (Path(folder) / "law.json").is_file():
            fit_sweep(folder)
        print(f"report   {sweep.write(Path(folder)).resolve().as_uri()}")
        return
    run = open_run(folder)
    write_report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


@verb
def view(arguments: list[str]) -> None:
    """view RUN [--export DIR] [--port N]

    Browse the latents of a run, or of the SAE judged by `eval SAE --out`, on this machine, or write
    pages for any web host.
    """

    @dataclass(frozen=True)
    class ViewArgs:
        """Options of `ksparse view`."""

        export: str = ""
        """Folder to write static pages to, instead of serving them. They leave out what needs the
        LM."""
        port: int = 8765
        """Port on 127.0.0.1; 0: any that is free."""
        trust_remote_code: bool = False
        """Let code that comes with the LM run, if you trust its author. No file can allow it."""

    folder, flags = split_folder("view", arguments)
    options = parse(ViewArgs, "view RUN", flags)
    run = open_run(folder)
    from ksparse import viewer

    if run.is_judged():
        from ksparse.interop import load_judged

        load_judged(run)  # the pages need its weights: say now if it has moved or changed
    if options.export:
        with ProgressBar("pages"), raise_on_signal(signal.SIGTERM):
            page = viewer.export(run, Path(options.export), observe=progress.report)
        print(f"pages    {page.resolve().as_uri()}")
        return
    listener, token = viewer.listen(options.port), secrets.token_urlsafe(24)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}"
    print(f"latents  {address}   (Ctrl-C stops it)", flush=True)
    try:
        viewer.serve(run, listener, token, trust_remote_code=code_is_trusted())
    except Interrupted as interrupted:
        print_status(str(interrupted))
        os._exit(interrupted.exit_code)  # without waiting for a thread in which the LM may run


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
