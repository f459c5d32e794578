"""What people see: lines, numbers, progress."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ksparse.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Return a text that no terminal takes for a command: what cannot be printed, but ends of lines
    and tabs, as its code."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


class Lines(logging.Formatter):
    """A log's messages alone, which may name documents and files of others."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def first_process() -> bool:
    """Return whether this is the one of torchrun's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def written(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.4f}" + (
        "" if estimate["se"] is None else f" ± {estimate['se']:.4f}"
    )


def write_report(run: RunFolder) -> None:
    from ksparse.report import write

    write(run)


class Progress:
    """How far, how fast, how long still: a bar on a terminal, a line every few seconds in a log."""

    EVERY = 5.0

    def __init__(self, what: str, total: int):
        self.what, self.total, self.began, self.last = what, total, time.monotonic(), 0.0
        self.first: int | None = None
        self.bar: Bar | None = None
        self.task: TaskID

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(self.what, total=self.total or None, note="")
            self.bar.start()
        return self

    def __call__(self, done: int, note: str, total: int = 0, what: str = "") -> None:
        """Say how much is done; another `what` than before begins a new bar."""
        self.total = total or self.total
        if what and what != self.what:
            self.what, self.began, self.last, self.first = what, time.monotonic(), 0.0, None
            if self.bar is not None:
                self.bar.update(self.task, visible=self.bar.tasks[-1].completed > 0)
                self.task = self.bar.add_task(what, total=self.total, note="")
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, note=note)
            return
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < self.EVERY and done < self.total:
            return
        self.last = now
        spent, moved = now - self.began, done - self.first
        left = (
            f", about {spent / moved * (self.total - done):,.0f} s left"
            if moved and done < self.total
            else ""
        )
        say(f"{self.what} {done:,} of {self.total:,}{left}" + (f" · {note}" if note else ""))

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
