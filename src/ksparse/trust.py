"""Whether code that comes with a language model may run: only where the very call says so, never
because a file does.

    with trusted(True): ...     what the command line's --trust-remote-code and the argument
                                trust_remote_code do
    code_is_trusted()           what whoever loads a model asks

It is stored nowhere. A recipe, a run, an SAE or a sweep of somebody else cannot set it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ksparse.errors import InputError

FLAG = "--trust-remote-code"
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def code_is_trusted() -> bool:
    """Return whether code that comes with a model may run in this call."""
    return _trusted.get()


@contextmanager
def trusted(code: bool) -> Iterator[None]:
    """Let code that comes with a model run inside a with block, if `code`; a block around it is not
    taken back."""
    token = _trusted.set(code or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def taken_from(arguments: list[str]) -> tuple[bool, list[str]]:
    """Return what --trust-remote-code says on a command line, and the other arguments."""
    rest, code, words = [], False, iter(arguments)
    for word in words:
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--run.trust-remote-code":
            raise InputError(
                f"{word} is no key of a recipe, since a stored one could set it; give {FLAG} True, "
                "which counts for this call alone"
            )
        if name != FLAG:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if value not in ("True", "False"):
            raise InputError(f"{FLAG} is {value!r}; it must be True or False")
        code = value == "True"
    return code, rest
