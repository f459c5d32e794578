"""How long-running functions report their progress, and how long the rest of a task will take.

    observed(observer)                what happens inside the block is reported to the observer
    is_observed()                     whether somebody is told
    report(what, done, total)         a piece of the work under way, from anywhere below
    stage(name, number, of)           what is reported inside belongs to "3 of 6: n2g"
    expect({part: Expected(…)})       what a task will have to do, so that its time can be estimated
    Forecast                          the estimate: of reports and expectations, seconds left

`ksparse.display` observes with a progress bar, for the command line and for `progress=True` of
public functions; `observe` arguments observe with a callback. Every phase reports once with `done`
0 when it starts, so that an observer knows what is going on, and then after each unit of its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`: the work under way, and how much of it is done."""


DIRECT_LOGITS = "direct logits"
FINDING_SUFFIXES = "explaining latents: suffixes"
FINDING_WILDCARDS = "explaining latents: which tokens matter"
"""Phases that one room reports and another plans."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore a progress report; the default callback.

    Args:
        what: the work under way, such as "reading the text".
        done: units of work done so far.
        total: units of work in all.
    """


class Stage(NamedTuple):
    """A named part of a task, such as one evaluation of six.

    Example:
        >>> str(Stage("n2g", 3, 6))
        '3 of 6: n2g'
    """

    name: str = ""
    number: int = 0
    of: int = 0

    def __str__(self) -> str:
        return f"{self.number} of {self.of}: {self.name}" if self.of > 1 else self.name

    def key(self, what: str) -> str:
        """Return the name of a piece of work among the parts of a task."""
        return f"{self.name}: {what}" if self.name else what


class Expected(NamedTuple):
    """How much work a part of a task is expected to be.

    Example:
        >>> Expected(work=2e9, units=1_000).units
        1000
    """

    work: float = 0.0
    """Work that takes time in proportion, in one measure for all parts, such as FLOPs."""
    units: int = 0
    """Units in which the part will be reported, over the whole task; 0: its reports' own total."""
    seconds: float = 0.0
    """Time that does not depend on that measure."""
    rounds: int = 1
    """Times that the part is reported from 0 to its total, such as once for each SAE."""


class Observer:
    """Is told about the progress of a task; by default it ignores it.

    Example:
        >>> with observed(Observer()):
        ...     report("reading", 1, 2)
    """

    def expect(self, parts: Mapping[str, Expected]) -> None:
        """Take note of parts of the task, by `Stage.key`; the first expectation of a part holds."""

    def report(self, what: str, done: int, total: int, stage: Stage = Stage()) -> None:
        """Take note of how much of a piece of work is done; `total` is 0 where it is unknown."""

    def finish(self, stage: Stage) -> None:
        """Take note that a stage has ended."""


class _Callback(Observer):
    """Passes reports to a function."""

    def __init__(self, observe: Progress):
        self._observe = observe

    def report(self, what: str, done: int, total: int, stage: Stage = Stage()) -> None:
        self._observe(f"{stage}: {what}" if stage.name else what, done, total)


_NOBODY, _WHOLE, _NOTHING_KNOWN = Observer(), Stage(), Expected()
_observer: ContextVar[Observer] = ContextVar("observer", default=_NOBODY)
_stage: ContextVar[Stage] = ContextVar("stage", default=_WHOLE)


@contextmanager
def observed(observer: Observer | Progress) -> Iterator[None]:
    """Report what happens inside the block to an observer or a callback.

    Args:
        observer: takes the place of the observer outside; `no_progress` leaves that one.

    Example:
        >>> with observed(lambda what, done, total: print(what, done, "of", total)):
        ...     report("reading", 3, 4)
        reading 3 of 4
    """
    if observer is no_progress:
        yield
        return
    token = _observer.set(observer if isinstance(observer, Observer) else _Callback(observer))
    try:
        yield
    finally:
        _observer.reset(token)


def is_observed() -> bool:
    """Return whether somebody observes.

    Example:
        >>> is_observed()
        False
    """
    return _observer.get() is not _NOBODY


@contextmanager
def stage(name: str, number: int = 0, of: int = 0) -> Iterator[None]:
    """Report what happens inside the block as parts of a stage, which may lie in another.

    Args:
        name: such as "n2g".
        number: which stage this is, from 1.
        of: how many there are.

    Example:
        >>> with observed(lambda what, done, total: print(what)), stage("n2g", 3, 6):
        ...     report("reading", 3, 4)
        3 of 6: n2g: reading
    """
    outer = _stage.get()
    now = Stage(outer.key(name), number, of)
    token = _stage.set(now)
    try:
        yield
        _observer.get().finish(now)
    finally:
        _stage.reset(token)


def report(what: str, done: int = 0, total: int = 0) -> None:
    """Report how much of a piece of work is done to whoever observes.

    Args:
        what: the work under way, such as "reading the text".
        done: units of work done so far.
        total: units of work in all; 0: unknown.

    Example:
        >>> report("loading the LM")
    """
    _observer.get().report(what, done, total, _stage.get())


def expect(parts: Mapping[str, Expected]) -> None:
    """Say what a task will have to do, before it starts.

    Args:
        parts: the expected work of each part, by its name in the present stage (`Stage.key`).

    Example:
        >>> expect({"reading the text": Expected(work=1e12, units=10_000)})
    """
    key = _stage.get().key
    _observer.get().expect({key(name): expected for name, expected in parts.items()})


# ---- estimates -----------------------------------------------------------------------------------


@dataclass
class _Part:
    expected: Expected = _NOTHING_KNOWN
    is_expected: bool = False
    total: int = 0
    before: int = 0
    """Units of earlier rounds: of a part that is reported from 0 to its total several times."""
    done: int | None = None
    """Units of this round; None before the first report."""
    measured: int = 0
    """Units that `seconds` were needed for."""
    seconds: float = 0.0
    ended: bool = False

    @property
    def units(self) -> int:
        return self.expected.units or self.total * self.expected.rounds

    @property
    def left(self) -> float:
        """The share of the part that is still to do."""
        done = self.before + (self.done or 0)
        return 0.0 if self.ended else max(0.0, 1 - done / self.units) if self.units else 1.0


class Forecast:
    """Estimates how long the rest of a task takes, from the reports of its parts.

    Parts may follow each other or take turns. The time between two reports belongs to the part of
    the second one. A part that has been measured goes on at its average speed, so a part that comes
    in blocks counts with whole blocks. A part that has not begun takes the time that its work takes
    at the speed of parts of the same kind in other stages, or else at that of all parts.

    Args:
        clock: returns the time in seconds.

    Example:
        >>> now = 0.0
        >>> forecast = Forecast(lambda: now)
        >>> forecast.expect({"read": Expected(1.0, 10), "fit": Expected(3.0)})
        >>> forecast.report("read", 0, 10)
        >>> now = 5.0
        >>> forecast.report("read", 5, 10)
        >>> forecast.seconds_left()
        35.0
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._parts: dict[str, _Part] = {}
        self._latest = ""
        self._reported_at = clock()

    @property
    def is_overall(self) -> bool:
        """Whether the estimate is of a whole task, not only of the part that was reported last."""
        return any(part.is_expected for part in self._parts.values())

    def expect(self, parts: Mapping[str, Expected]) -> None:
        """Add parts that are to come; the first expectation of a part holds."""
        for name, expected in parts.items():
            part = self._parts.setdefault(name, _Part())
            if not part.is_expected:
                part.expected, part.is_expected = expected, True

    def report(self, name: str, done: int, total: int) -> None:
        """Take note of how much of a part is done.

        The first report of a part, and one of less than before, begins a round: the time before it
        counts for nothing.
        """
        now, part = self._clock(), self._parts.setdefault(name, _Part())
        part.total, part.ended = total, False
        if part.done is None or done < part.done:
            part.before += part.done or 0
        else:
            part.seconds += now - self._reported_at
            part.measured += done - part.done
        part.done, self._latest, self._reported_at = done, name, now

    def counts(self, name: str) -> tuple[int, int]:
        """Return (done, total) of a part in units of the whole task; total is 0 if unknown."""
        part = self._parts[name]
        return part.before + (part.done or 0), part.units

    def finish(self, prefix: str) -> None:
        """Take note that all parts whose name begins with a prefix have ended."""
        for name, part in self._parts.items():
            part.ended |= name.startswith(prefix)

    def seconds_left(self) -> float | None:
        """Return the seconds that the expected parts still take, or the latest part if none is
        expected; None while nothing is known."""
        parts = {name: part for name, part in self._parts.items() if part.is_expected}
        if not parts and self._latest:
            parts = {self._latest: self._parts[self._latest]}
        estimates = [self._estimate(name, part) for name, part in parts.items()]
        known = [seconds for seconds in estimates if seconds is not None]
        return sum(known) if known and len(known) == len(estimates) else None

    def _estimate(self, name: str, part: _Part) -> float | None:
        if not part.left:
            return 0.0
        if part.measured and part.units:
            return part.seconds / part.measured * part.units * part.left
        kind = name.rpartition(": ")[2]
        alike = [other for key, other in self._parts.items() if key.rpartition(": ")[2] == kind]
        speed = _seconds_per_work(alike) or _seconds_per_work(self._parts.values())
        if not part.is_expected or (speed is None and part.expected.work):
            return None
        return part.left * (part.expected.seconds + part.expected.work * (speed or 0.0))


def _seconds_per_work(parts: Iterable[_Part]) -> float | None:
    """Return the time that a unit of work has taken in parts, as far as they are measured."""
    seconds = work = 0.0
    for part in parts:
        if part.measured and part.units and part.expected.work:
            share = part.measured / part.units
            seconds += max(0.0, part.seconds - share * part.expected.seconds)
            work += share * part.expected.work
    return seconds / work if work else None


def format_duration(seconds: float) -> str:
    """Format a length of time.

    Example:
        >>> format_duration(600)
        '10 min'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def format_elapsed(seconds: float) -> str:
    """Format a length of time that was measured, to the second.

    Example:
        >>> format_elapsed(157)
        '2 min 37 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
