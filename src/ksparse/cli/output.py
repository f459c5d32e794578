"""What the command line prints: messages, estimates, progress."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ksparse.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def print_status(text: str) -> None:
    """Print a line about what is happening to standard error."""
    print(text, file=sys.stderr, flush=True)


def escape_unprintable(text: str) -> str:
    """Return a text with the escape codes of characters that a terminal could take for commands.

    Newlines and tabs stay.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


class EscapingFormatter(logging.Formatter):
    """Formatter for log messages, which may quote documents and file names from anywhere."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().format(record))


def is_first_process() -> bool:
    """Return whether this is the process that prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def format_estimate(estimate: dict[str, float | None]) -> str:
    """Return {"value": v, "se": s} as "v ± s"; "-" if there is no value."""
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.4f}" + (
        "" if estimate["se"] is None else f" ± {estimate['se']:.4f}"
    )


def write_report(run: RunFolder) -> None:
    """Write report.html of a run."""
    from ksparse.report import write

    write(run)


class ProgressBar:
    """Progress of a task: a bar on a terminal, a line every few seconds in a log.

        with Progress("training", total) as progress:
            progress(done, "nmse 0.31")

    Args:
        label: what is being done.
        total: amount of work; 0 if it is not known yet.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, label: str, total: int):
        self.label, self.total = label, total
        self.began, self.last_line = time.monotonic(), 0.0
        self.done_at_start: int | None = None
        self.bar: RichProgress | None = None
        self.task: TaskID

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(self.label, total=self.total or None, note="")
            self.bar.start()
        return self

    def __call__(self, done: int, note: str, total: int = 0, label: str = "") -> None:
        """Show how much is done.

        Args:
            done: amount of work done.
            note: text to show beside it.
            total: amount of work, if it has changed.
            label: what is being done, if it has changed; this starts a new bar.
        """
        self.total = total or self.total
        if label and label != self.label:
            self.label, self.began, self.last_line = label, time.monotonic(), 0.0
            self.done_at_start = None
            if self.bar is not None:
                self.bar.update(self.task, visible=self.bar.tasks[-1].completed > 0)
                self.task = self.bar.add_task(label, total=self.total, note="")
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, note=note)
            return
        now = time.monotonic()
        self.done_at_start = done if self.done_at_start is None else self.done_at_start
        if now - self.last_line < self.SECONDS_BETWEEN_LINES and done < self.total:
            return
        self.last_line = now
        seconds, progressed = now - self.began, done - self.done_at_start
        left = (
            f", about {seconds / progressed * (self.total - done):,.0f} s left"
            if progressed and done < self.total
            else ""
        )
        print_status(
            f"{self.label} {done:,} of {self.total:,}{left}" + (f" · {note}" if note else "")
        )

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
