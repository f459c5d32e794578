"""Whether code that comes with a language model may run.

Only the call itself can allow it, with `--trust-remote-code True` or the argument
`trust_remote_code`. It is stored nowhere: no recipe, run, SAE or sweep can allow it.

    with trusted(True): ...     allow it inside the block
    code_is_trusted()           whether it is allowed, for code that loads a model
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ksparse.errors import InputError

FLAG = "--trust-remote-code"
_VALUES = ("True", "False", "true", "false", "yes", "no", "on", "off", "1", "0")
"""What can only be meant as the flag's value; all but the first two are refused."""
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def code_is_trusted() -> bool:
    """Return whether code that comes with a model may run in this call."""
    return _trusted.get()


@contextmanager
def trusted(allow: bool) -> Iterator[None]:
    """Allow code that comes with a model to run inside a with block.

    Args:
        allow: False changes nothing; it does not take back what an enclosing block allows.

    Example:
        >>> with trusted(True):
        ...     code_is_trusted()
        True
        >>> code_is_trusted()
        False
    """
    token = _trusted.set(allow or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def split_trust_flag(arguments: list[str]) -> tuple[bool, list[str]]:
    """Split --trust-remote-code off the words of a command line; without a value it means True.

    Returns:
        Whether code is trusted, and the other words.

    Raises:
        InputError: for a value other than True and False, and for the flag as a key of a recipe.
    """
    others, allow, words = [], False, iter(enumerate(arguments, 1))
    for at, word in words:
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--run.trust-remote-code":
            raise InputError(
                f"{word} is not a key of a recipe, since a stored one could set it; give {FLAG} "
                "True, which applies to this call only"
            )
        if name != FLAG:
            others.append(word)
            continue
        bare = not equals and (at == len(arguments) or arguments[at] not in _VALUES)
        value = "True" if bare else value if equals else arguments[at]
        if not (bare or equals):
            next(words)
        if value not in ("True", "False"):
            raise InputError(f"{FLAG} is {value!r}; give it alone, or with True or False")
        allow = value == "True"
    return allow, others
