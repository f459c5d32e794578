"""report, view."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse.cli.arguments import no_options, parse, take_folder, verb
from ksparse.cli.evaluate import show_study
from ksparse.cli.output import Progress, say, write_report
from ksparse.cli.sweeps import survey_of
from ksparse.errors import Interrupted
from ksparse.storage.run_folder import open_run
from ksparse.trust import code_is_trusted


@verb
def report(arguments: list[str]) -> None:
    """report RUN|SWEEP|STUDY

    write report.html from what a folder holds
    """
    folder, rest = take_folder("report", arguments)
    no_options("report", rest)
    if (Path(folder) / "study.json").is_file():
        show_study(Path(folder))
        return
    if (Path(folder) / "points.csv").is_file():
        from ksparse.report import sweep

        if not (Path(folder) / "law.json").is_file():
            survey_of(folder)
        print(f"report   {sweep.write(Path(folder)).resolve().as_uri()}")
        return
    run = open_run(folder)
    write_report(run)
    print(f"report   {run.report_file.resolve().as_uri()}")


@verb
def view(arguments: list[str]) -> None:
    """view RUN [--export DIR] [--port N]

    look at its latents in the browser, on this machine; or write pages for any web host
    """

    @dataclass(frozen=True)
    class ViewArgs:
        export: str = ""
        """Folder to write static pages to, without the parts that need the LM; nothing is served
        then."""
        port: int = 8765
        """Port on 127.0.0.1; 0 takes any that is free."""
        trust_remote_code: bool = False
        """Let code that comes with the LM run, if you trust its author. The run cannot say so."""

    folder, rest = take_folder("view", arguments)
    options = parse(ViewArgs, "view RUN", rest)
    run = open_run(folder)
    from ksparse import viewer

    if options.export:
        with Progress("pages", 0) as progress, stopped_by(signal.SIGTERM):
            page = viewer.export(
                run,
                Path(options.export),
                observe=lambda what, done, total: progress(done, "", total, what),
            )
        print(f"pages    {page.resolve().as_uri()}")
        return
    listener, token = viewer.listen(options.port), secrets.token_urlsafe(24)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}"
    print(f"latents  {address}   (Ctrl-C ends it)", flush=True)
    try:
        viewer.serve(run, listener, token, trust_remote_code=code_is_trusted())
    except Interrupted as stopped:
        say(str(stopped))
        os._exit(stopped.exit_code)  # the LM may be at work in another thread, for nobody


@contextmanager
def stopped_by(signum: int) -> Iterator[None]:
    """Raise Interrupted where a signal comes, so that nothing half written is left behind."""

    def stop(signum: int, frame: Any) -> None:
        raise Interrupted("stopped", signum)

    before = signal.getsignal(signum)
    if before is not signal.SIG_IGN:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        signal.signal(signum, before)
