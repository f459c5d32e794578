"""What a page asks of the LM: tables of a request, whose entries may be of any type, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ksparse.errors import InputError
from ksparse.viewer.run_data import quote_value

MOST_CHARACTERS = 20_000
"""Characters of a text at most."""
MOST_LATENTS = 16
"""Latents that are steered at once at most."""
MOST_TIMES = 1e6
"""The largest multiple of its largest activation at which a latent is held, of either sign."""
MOST_CONTINUED = 256
"""Tokens that a text is continued by at most."""
COLDEST, HOTTEST = 1e-3, 100.0
"""The temperatures of sampling, apart from 0: the likeliest token."""
MOST_SEED = 2**32 - 1
"""The largest seed."""


@dataclass(frozen=True)
class SteerRequest:
    """A text, the latents to hold, and how the text is continued.

    Args:
        text: the text, not empty.
        times: {latent: the multiple of its largest activation at which it is held}.
        at: the token at which the latents are held; None holds them at all tokens, generated ones
            too.
        tokens: how many tokens are generated at most.
        temperature: of sampling; 0 always takes the likeliest token.
        seed: of sampling.
    """

    text: str
    times: dict[int, float]
    at: int | None = None
    tokens: int = 24
    temperature: float = 0.0
    seed: int = 0

    @staticmethod
    def read(body: dict[str, Any]) -> SteerRequest:
        """Return the request in a table; its `latents` are [[latent, times], …].

        Raises:
            InputError: an entry is missing or not valid.

        Example:
            >>> from ksparse.viewer.requests import SteerRequest
            >>> SteerRequest.read({"text": "import", "latents": [[7, 2]], "tokens": 8}).times
            {7: 2.0}
        """
        default = SteerRequest
        temperature = read_number(body, "temperature", default.temperature)
        if temperature and not COLDEST <= temperature <= HOTTEST:
            raise InputError(
                f"the temperature is {quote_value(temperature)}; it must be 0, for the likeliest "
                f"token, or from {COLDEST:g} to {HOTTEST:g}"
            )
        at = body.get("at")
        return SteerRequest(
            text=read_text(body),
            times=_read_latents(body.get("latents")),
            at=None if at is None else read_whole(body, "at", 0, 0, MOST_CHARACTERS),
            tokens=read_whole(body, "tokens", default.tokens, 1, MOST_CONTINUED),
            temperature=float(temperature),
            seed=read_whole(body, "seed", default.seed, 0, MOST_SEED),
        )


def read_text(body: dict[str, Any]) -> str:
    """Return the text of a request; a lone surrogate, as browsers may send, is read as "?".

    Raises:
        InputError: there is none, or it is too long.
    """
    if not isinstance(text := body.get("text"), str):
        raise InputError("the text to read is missing")
    if not text:
        raise InputError("there is no text to read")
    if len(text) > MOST_CHARACTERS:
        raise InputError(
            f"the text has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read here"
        )
    return text.encode("utf-8", "replace").decode()


def read_whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    """Return a whole number of a request.

    Raises:
        InputError: it is none, or not from `least` to `most`.
    """
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        words = {"at": "the token to steer at", "tokens": "the number of tokens to write"}
        raise InputError(
            f"{words.get(name, f'the {name}')} is {quote_value(value)}; it must be a whole number "
            f"from {least} to {most:,}"
        )
    return value


def read_number(body: dict[str, Any], name: str, default: float) -> float:
    """Return a number of a request; raise InputError if it is none."""
    value = body.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"the {name} is {quote_value(value)}; it must be a number")
    return value


def _read_latents(entries: Any) -> dict[int, float]:
    """Return {latent: times} of [[latent, times], …]."""
    if not isinstance(entries, list) or not entries:
        raise InputError("there is no latent to steer; add one by its number")
    if len(entries) > MOST_LATENTS:
        raise InputError(f"{len(entries)} latents are to be steered; at most {MOST_LATENTS} are")
    times: dict[int, float] = {}
    for entry in entries:
        latent, multiple = entry if isinstance(entry, list) and len(entry) == 2 else (entry, None)
        if not isinstance(latent, int) or isinstance(latent, bool):
            raise InputError(f"a latent is named by its number, not by {quote_value(latent)}")
        if latent in times:
            raise InputError(f"latent {quote_value(latent)} is given twice; give it once")
        if (
            not isinstance(multiple, (int, float))
            or isinstance(multiple, bool)
            or not abs(multiple) <= MOST_TIMES
        ):
            raise InputError(
                f"a latent is held at a multiple of its largest activation, not at "
                f"{quote_value(multiple)}; give a number of at most {MOST_TIMES:,.0f} either way"
            )
        times[latent] = float(multiple)
    return times
