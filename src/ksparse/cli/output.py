"""What the command line prints: messages, estimates, progress."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ksparse.progress import Expected, Forecast, Observer, Stage, format_duration, observed
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


class ProgressBar(Observer):
    """Progress of a task: a bar on a terminal, a line every few seconds in a log.

        with ProgressBar("training"):
            …                       # whatever is reported inside is shown

    The line goes on while nothing is reported, so that a phase of one long step is not silent.

    Args:
        label: what is being done.
        clock: returns the time in seconds.
    """

    SECONDS_BETWEEN_LINES = 4.0
    _TICK = 0.25

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic):
        self.label, self._clock = label, clock
        self._forecast = Forecast(clock)
        self._began = self._said_at = clock()
        self._latest: _Latest | None = None
        self._main: _Latest | None = None
        self._note = ""
        self._said_end = False
        self._lock = threading.RLock()  # reports may come from the thread that reads ahead
        self._ended = threading.Event()
        self._stack = ExitStack()
        self._bar: RichProgress | None = None
        self._task: TaskID

    def __enter__(self) -> ProgressBar:
        self._stack.enter_context(observed(self))
        if sys.stderr.isatty():
            self._stack.enter_context(self._draw_bar())
        else:
            ticker = threading.Thread(target=self._tick, name="ksparse-progress", daemon=True)
            ticker.start()
            self._stack.callback(ticker.join)
            self._stack.callback(self._ended.set)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    # ---- what is reported

    def expect(self, parts: Mapping[str, Expected]) -> None:
        with self._lock:
            self._forecast.expect(parts)

    def report(self, what: str, done: int, total: int, stage: Stage = Stage()) -> None:
        with self._lock:
            self._forecast.report(stage.key(what), done, total)
            self._latest, complete = _Latest(what, done, total, stage), False
            if what == self.label:
                self._main = _Latest(what, *self._forecast.counts(stage.key(what)), stage)
                complete = 0 < self._main.total <= self._main.done and not self._said_end
            self._said_end |= complete
            self._show(now=complete)

    def finish(self, stage: Stage) -> None:
        with self._lock:
            self._forecast.finish(f"{stage.name}: ")

    def note(self, text: str) -> None:
        """Show a text at the end of the line from now on."""
        with self._lock:
            self._note = text

    # ---- how it is shown

    def line(self) -> str:
        """Return the line that says how far the task is."""
        latest, main = self._latest, self._main
        if main is None:
            head = f"{self.label} {latest.stage if latest else ''}".rstrip()
        else:
            head = f"{self.label} {main.counts()}"
        parts = [head]
        if latest and latest.what != self.label:
            parts.append(f"{latest.what} {latest.counts()}".rstrip())
        return " · ".join(part for part in [*parts, self._time(), self._note] if part)

    def _time(self) -> str:
        left, spent = self._forecast.seconds_left(), self._clock() - self._began
        if self._said_end:
            return ""
        if left is None:
            return f"{format_duration(spent)} so far" if spent >= 1 else ""
        if not left:
            return ""
        if not self._forecast.is_overall:
            return f"about {format_duration(left)} left"
        return f"about {format_duration(left)} left, {format_duration(spent + left)} in all"

    def _show(self, *, now: bool = False) -> None:
        if self._bar is not None:
            self._update_bar(self._bar)
        elif now or self._clock() - self._said_at >= self.SECONDS_BETWEEN_LINES:
            self._said_at = self._clock()
            print_status(self.line())

    def _tick(self) -> None:
        """Print the line while nothing is reported."""
        while not self._ended.wait(self._TICK):
            with self._lock:
                self._show()

    @contextmanager
    def _draw_bar(self) -> Iterator[None]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            self._task, self._bar = bar.add_task(_markup(self.label), total=None), bar
            try:
                yield
            finally:
                self._bar = None

    def _update_bar(self, bar: RichProgress) -> None:
        left, spent = self._forecast.seconds_left(), self._clock() - self._began
        if self._forecast.is_overall:
            done, total = (spent, None if left is None else spent + left)
        elif self._latest and self._latest.total:
            done, total = float(self._latest.done), float(self._latest.total)
        else:
            done, total = 0.0, None
        bar.update(self._task, completed=done, total=total, description=_markup(self.line()))


class _Latest(NamedTuple):
    what: str
    done: int
    total: int
    stage: Stage

    def counts(self) -> str:
        return f"{self.done:,} of {self.total:,}" if self.total else ""


def _markup(text: str) -> str:
    """Return a text as rich shows it, brackets included."""
    return text.replace("[", "\\[")


def write_report(run: RunFolder) -> None:
    """Write report.html of a run."""
    with ProgressBar("writing the report"):
        from ksparse.report import write

        write(run)
