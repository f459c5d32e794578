"""The errors that ksparse raises on purpose, each with the exit code that the command line ends
with.

A message says what is wrong, where, what was got, what was expected, and what to do.
"""


class KsparseError(Exception):
    """Whatever ksparse refuses or cannot go on with."""

    exit_code = 1


class InputError(KsparseError, ValueError):
    """Something given to ksparse does not fit: a key, a path, a shape, a text."""

    exit_code = 2


class CorruptError(InputError):
    """A file that ksparse wrote is truncated or altered."""


class NonFiniteError(KsparseError, ArithmeticError):
    """NaN or infinity in activations, loss or gradients."""

    exit_code = 3


class OutOfMemoryError(KsparseError):
    """The device or the machine has too little memory for the recipe."""

    exit_code = 4


class DiskError(KsparseError, OSError):
    """A disk that is full or that cannot be written."""

    exit_code = 5


class PeerError(KsparseError):
    """Another process of the same run is gone, or does not answer."""

    exit_code = 6


class Interrupted(KsparseError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
