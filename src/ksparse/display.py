"""What people see while something runs and when it is done: progress, and small tables.

    shown("training")      progress until the block ends, unless somebody observes already
    ProgressBar            a bar on a terminal, one line in a notebook, lines in a log
    show(table)            print a table on a terminal, for a script; elsewhere its value is shown
    Table                  rows of text, as plain text and as HTML in which all text is escaped
    to_frame(table)        rows or columns as a pandas DataFrame

Beside the command line, this is the only module that prints, and `progress=False` silences it.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ksparse import html
from ksparse.errors import InputError
from ksparse.progress import (
    Expected,
    Forecast,
    Observer,
    Stage,
    format_duration,
    is_observed,
    observed,
)

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def print_status(text: str) -> None:
    """Print a line about what is happening to standard error."""
    print(text, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Return whether this is the process that prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def place() -> Literal["terminal", "notebook", "log"]:
    """Return where standard error goes: to a terminal, into a notebook's cell, or elsewhere.

    Example:
        >>> place() in ("terminal", "notebook", "log")
        True
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if sys.stderr.isatty() else "log"


@contextmanager
def shown(label: str, progress: bool = True) -> Iterator[ProgressBar | None]:
    """Show progress until the block ends.

    Args:
        label: what is being done, such as "training".
        progress: False shows nothing.

    Yields:
        The bar; None if nothing is shown: where somebody observes already, such as the command
        line's own bar, and in all processes of torchrun but the first.

    Example:
        >>> with shown("reading", progress=False) as bar:
        ...     bar is None
        True
    """
    if not progress or is_observed() or not is_first_process():
        yield None
        return
    with ProgressBar(label) as bar:
        yield bar


def format_estimate(estimate: dict[str, float | None]) -> str:
    """Return {"value": v, "se": s} as "v ± s"; "-" if there is no value."""
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.4f}" + (
        "" if estimate["se"] is None else f" ± {estimate['se']:.4f}"
    )


class ProgressBar(Observer):
    """Progress of a task: a bar on a terminal, a line that changes in a notebook, lines in a log.

        with ProgressBar("training"):
            …                       # whatever is reported inside is shown

    The line goes on while nothing is reported, so that a phase of one long step is not silent.

    Args:
        label: what is being done.
        clock: returns the time in seconds.
    """

    SECONDS_BETWEEN_LINES = 4.0
    SECONDS_BETWEEN_CHANGES = 0.5
    """Of the line in a notebook."""
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
        self._where = place()
        self._cell: _NotebookLine | None = None
        self._bar: RichProgress | None = None
        self._task: TaskID

    def __enter__(self) -> ProgressBar:
        self._stack.enter_context(observed(self))
        if self._where == "terminal":
            self._stack.enter_context(self._draw_bar())
        else:
            if self._where == "notebook":
                self._cell = _NotebookLine()
                self._stack.callback(self._end_cell)
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

    def note_metrics(self, row: Mapping[str, Any]) -> None:
        """Show a row of a run's metrics at the end of the line from now on."""
        nmse = "-" if row["nmse"] is None else f"{row['nmse']:.4f}"
        site = f"{row['site']} " if "site" in row else ""  # of several
        self.note(
            f"{site}nmse {nmse} · dead {row['dead']:.1%} · {row['tokens_per_s']:,.0f} tokens/s"
        )

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
            return
        pause = self.SECONDS_BETWEEN_CHANGES if self._cell else self.SECONDS_BETWEEN_LINES
        if now or self._clock() - self._said_at >= pause:
            self._said_at = self._clock()
            (self._cell.show if self._cell else print_status)(self.line())

    def _end_cell(self) -> None:
        """Leave in the notebook what was done and how long it took."""
        assert self._cell is not None
        spent = format_duration(self._clock() - self._began)
        self._cell.show(" · ".join(part for part in (self.label, spent, self._note) if part))

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


class _NotebookLine:
    """One output of a cell, replaced each time, so that a saved notebook has the last one alone."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        from IPython.display import display

        line = _InCell(text, f"<code>{escape(text)}</code>")
        if self._handle is None:
            self._handle = display(line, display_id=True, metadata={"ksparse": "progress"})
        else:
            self._handle.update(line, metadata={"ksparse": "progress"})


@dataclass(frozen=True)
class _InCell:
    """What a notebook's cell shows, as text and as HTML."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


# ---- tables


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Args:
        title: stands above it.
        header: names of the columns.
        rows: text, a row for each.
        notes: stand below it.

    Example:
        >>> print(Table("stats", ("number", "value"), [("l0", "32 ± 1")]))
        stats
          number  value
          l0      32 ± 1
        >>> "&lt;b&gt;" in Table("<b>", (), []).html()
        True
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows)]
        lines = [
            "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
            for row in ([self.header, *self.rows] if self.rows else [])
        ]
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    def html(self) -> str:
        """Return the table as HTML."""
        table = html.grid(self.header, self.rows) if self.rows else ""
        notes = "".join(f"<div><small>{escape(note)}</small></div>" for note in self.notes)
        return f"<div><strong>{escape(self.title)}</strong>{table}{notes}</div>"


def show(table: Any) -> None:
    """Print an object on a terminal, where a script runs.

    At a prompt and in a notebook nothing is printed: both show the value of the last expression
    themselves. In a log, where another program may read what is printed, nothing is either.
    """
    if place() == "terminal" and not _is_interactive() and is_first_process():
        print_status(repr(table))


def _is_interactive() -> bool:
    """Return whether Python shows the value of an expression by itself."""
    return hasattr(sys, "ps1") or getattr(builtins, "__IPYTHON__", False)


def to_frame(table: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Any:
    """Return rows, or columns by name, as a pandas DataFrame.

    Raises:
        InputError: if pandas is not installed.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        raise InputError(
            "to_frame() makes a pandas DataFrame, and pandas is not installed: pip install pandas. "
            "The object itself holds the same numbers"
        ) from None
    return pd.DataFrame(dict(table) if isinstance(table, Mapping) else list(table))
