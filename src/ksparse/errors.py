"""The errors that ksparse raises on purpose, each with the exit code of the command line.

A message says what is wrong, where, what was found, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KsparseError(Exception):
    """Base of all errors that ksparse raises on purpose.

    `exit_code` is that of the command line.

    Example:
        >>> from ksparse import KsparseError, Recipe
        >>> try:
        ...     Recipe(sae={"k": 0})
        ... except KsparseError as error:
        ...     print(error, error.exit_code)
        sae.k is 0; it must be at least 1 2
    """

    exit_code = 1


class InputError(KsparseError, ValueError):
    """An input is wrong: a key, a path, a shape, a text."""

    exit_code = 2


class CorruptError(InputError):
    """A file that ksparse wrote is truncated or was altered."""


class NonFiniteError(KsparseError, ArithmeticError):
    """Activations, loss or gradients are NaN or infinite."""

    exit_code = 3


class OutOfMemoryError(KsparseError):
    """The device or the machine has too little memory for the recipe."""

    exit_code = 4


class DiskError(KsparseError, OSError):
    """A disk is full or cannot be written."""

    exit_code = 5


class PeerError(KsparseError):
    """Another process of the same run has ended or does not answer."""

    exit_code = 6


class Interrupted(KsparseError):
    """The run was stopped by a signal (SIGHUP, Ctrl-C, SIGTERM) and has saved a checkpoint."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def unknown(what: str, name: object, known: Iterable[str], otherwise: str = "") -> InputError:
    """Return the error for a name that does not exist, with the nearest name that does.

    Args:
        what: the sentence up to the name, such as "there is no format".
        name: what was given.
        known: the names that exist.
        otherwise: what to say if no known name is near; by default the list of all of them.

    Example:
        >>> str(unknown("there is no law", "L(M)", ["L(N)", "L(C)"]))
        "there is no law 'L(M)'; did you mean 'L(N)'?"
    """
    names = [*known]
    nearest = nearest_name(name, names)
    hint = f"did you mean {nearest!r}?" if nearest else otherwise or f"there are {', '.join(names)}"
    return InputError(f"{what} {str(name)[:80]!r}; {hint}")


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a mistyped one, or None if none is near."""
    return next(iter(difflib.get_close_matches(str(name)[:80], [*known], 1, 0.6)), None)
