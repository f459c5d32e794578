"""How long-running functions report their progress.

Every function that takes a while accepts a callback of type `Progress`. The library never prints;
the command line passes a callback that draws a progress bar.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`: the work under way, and how much of it is done."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore a progress report; the default callback.

    Args:
        what: the work under way, such as "reading the text".
        done: units of work done so far.
        total: units of work in all.
    """
