"""Methods of an object that are written in a room above its own.

A run's files know nothing of the figures that are drawn of them. Each such method only names the
function that does the work, which is imported when the method is called. These are all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

FUNCTIONS = {
    "RunFolder.figure": ("ksparse.report", "draw_figure"),
    "RunFolder.figures": ("ksparse.report", "draw_figures"),
}
"""{method: (module, function)}."""


def function_of(method: str) -> Any:
    """Return the function behind a method of FUNCTIONS.

    Example:
        >>> function_of("RunFolder.figure").__name__
        'figure'
    """
    module, name = FUNCTIONS[method]
    return getattr(import_module(module), name)
