"""What needs the LM: a text's latents, and what becomes of a text when a latent is held at a value,
by `ksparse.steering`: all that the autoencoder does not explain stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ksparse.errors import InputError, NonFiniteError, OutOfMemoryError
from ksparse.report.tokens import safe_token
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.run_data import number, written

if TYPE_CHECKING:
    from torch import Tensor

    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE, Code
    from ksparse.steering import Change, Comparison

CHARACTERS, TOKENS = 20_000, 512
"""Characters and tokens of a text at most."""
FLOAT32 = 2.0**127
"""The largest value that a latent is held at."""
CONTINUED, LISTED = 24, 12
"""Tokens that a text is continued by; predictions listed."""


class Live:
    """The LM and the autoencoder of a run, loaded when first asked, one request at a time.

    trust_remote_code: whether code that comes with the LM may run. Whoever opens the run says so,
        never the run's own files.
    """

    def __init__(self, run: RunFolder, *, trust_remote_code: bool = False):
        self.run, self.trust_remote_code, self._lock = run, trust_remote_code, threading.Lock()

    @cached_property
    def _loaded(self) -> tuple[SAE, LM]:
        from ksparse.device import resolve_device
        from ksparse.lm.model import LM
        from ksparse.sae.serialization import load

        recipe = self.run.recipe()
        device = resolve_device("auto")
        sae = load(self.run.path).to(device).eval()
        return sae, LM(acts=recipe.acts, device=device, trust_remote_code=self.trust_remote_code)

    def activations(self, text: str) -> dict[str, Any]:
        """Return the text's tokens, and of each the latents active there, [latent, value], the
        largest first."""
        import torch

        with self._lock, room_explained(), torch.inference_mode():
            _, lm = self._loaded
            text, tokens, shown = self._read(lm, text)
            values, indices = self._code(tokens, len(shown))
            if not bool(values.isfinite().all()):
                raise NonFiniteError("the LM or the autoencoder gives NaN or infinity on this text")
            found = [
                [[i, rounded(v)] for v, i in zip(value, index) if v > 0]
                for value, index in zip(values.tolist(), indices.tolist())
            ]
            return {"tokens": shown, "latents": found}

    def change(self, text: str, latent: Any, value: Any, at: Any = None) -> dict[str, Any]:
        """Return what the LM predicts after a text, and how it goes on, as it is and with a latent
        held at a value.

        at: the number of the token at which it is held; at all of them, also those that are
        written, if None.
        """
        from ksparse import steering

        with self._lock, room_explained():
            sae, lm = self._loaded
            text, tokens, shown = self._read(lm, text)
            if not isinstance(latent, int) or isinstance(latent, bool):
                raise InputError(f"a latent is named by its number, not by {written(latent)}")
            steering.check_latents(sae, [latent])
            value = finite(value)
            if at is not None and (
                not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(shown)
            ):
                raise InputError(f"token {written(at)} is not one of 0 to {len(shown) - 1}")
            change = steering.clamped({latent: value})
            if at is not None:
                change = once_at(
                    change, tokens.shape[1] - len(shown) + at
                )  # BOS is none of the text's tokens
            before = steering.continue_text(lm, text, tokens=CONTINUED)
            with steering.attach(lm.model, sae, lm.options.site, change=change):
                found = steering.Comparison(
                    before, steering.continue_text(lm, text, tokens=CONTINUED)
                )
            if bool(before.log_probs.isnan().any()):
                raise NonFiniteError("the LM predicts NaN after this text")
            if bool(found.after.log_probs.isnan().any()):
                raise NonFiniteError(
                    f"with latent {latent} held at {value:g} the LM predicts NaN; "
                    "hold it nearer to the values that it has on text"
                )
            plain, changed = (self._strings(lm, each.tokens) for each in found)
            return {
                "tokens": shown,
                "kl": number(found.kl),
                "plain": plain,
                "changed": changed,
                "predictions": self._predictions(lm, found),
            }

    def _code(self, tokens: Tensor, last: int) -> Code:
        """Return the codes [t, k] of the last so many tokens."""
        import torch

        sae, lm = self._loaded
        return sae.encode(lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -last:])

    def _read(self, lm: LM, text: str) -> tuple[str, Tensor, list[str]]:
        """Return the text as it is read, ids [1, t] with BOS as in training, and safe tokens."""
        if not text:
            raise InputError("there is no text to read")
        if len(text) > CHARACTERS:
            raise InputError(
                f"the text has {len(text):,} characters; at most {CHARACTERS:,} are read here"
            )
        text = text.encode("utf-8", "replace").decode()  # half a character from a browser is none
        tokens, most = lm.tokenize(text), min(TOKENS, (lm.context or TOKENS) - CONTINUED)
        if tokens.shape[1] > most:
            raise InputError(
                f"the text has {tokens.shape[1]:,} tokens; at most {most:,} are read here"
            )
        return text, tokens, [safe_token(token) for token in lm.tokens(text)]

    def _strings(self, lm: LM, tokens: list[int]) -> list[str]:
        from ksparse.lm.tokens import token_strings

        return [safe_token(token) for token in token_strings(lm.tokenizer, tokens)]

    def _predictions(self, lm: LM, found: Comparison) -> list[dict[str, Any]]:
        """Return the likeliest tokens of either distribution with both probabilities."""
        before, after = (each.log_probs.exp() for each in found)
        chosen = list(
            dict.fromkeys(
                i
                for each in (before, after)
                for i in each.topk(min(LISTED, len(each))).indices.tolist()
            )
        )
        chosen.sort(key=lambda token: -max(float(before[token]), float(after[token])))
        return [
            {"token": string, "plain": rounded(before[token]), "changed": rounded(after[token])}
            for token, string in zip(chosen, self._strings(lm, chosen))
        ]


def once_at(change: Change, position: int) -> Change:
    """Return the change at one position of the first forward pass alone, which has the whole
    prompt."""
    passes = 0

    def there(code: Code) -> Code:
        nonlocal passes
        passes += 1
        added, keep = change(code), code.values.new_zeros(code.values.shape[-2], 1)
        if passes == 1:
            keep[position] = 1
        return added._replace(values=added.values * keep)

    return there


def finite(value: Any) -> float:
    """Return the value that a latent is to be held at, one that the autoencoder's float32 has."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= FLOAT32:
        raise InputError(
            f"a latent is held at a number, not at {written(value)}; "
            f"at most {FLOAT32:.1e} either way"
        )
    return float(value)


@contextmanager
def room_explained() -> Iterator[None]:
    """Turn what torch says of too little memory into an error of ours."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        why = (str(error) or "MemoryError").splitlines()[0]
        raise OutOfMemoryError(f"out of memory: {why} Take a shorter text") from error


def rounded(value: Any) -> float:
    return float(f"{float(value):.5g}")
