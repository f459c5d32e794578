"""What needs the LM: a text's latents, and how a text continues with a latent held at a value.

Latents are held by `ksparse.steering`, so the autoencoder's error stays in the activation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ksparse.errors import InputError, NonFiniteError, OutOfMemoryError
from ksparse.report.tokens import safe_token
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.run_data import number, quote_value

if TYPE_CHECKING:
    from torch import Tensor

    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE, Code
    from ksparse.steering import Change, Comparison

MOST_CHARACTERS, MOST_TOKENS = 20_000, 512
"""Characters and tokens of a text at most."""
MOST_VALUE = 2.0**127
"""The largest value that a latent can be held at: float32 has room above it."""
CONTINUED = 24
"""Tokens that a text is continued by."""
PREDICTIONS = 12
"""Likeliest tokens listed of each distribution."""


class Live:
    """The LM and the autoencoder of a run, loaded on the first request; one request at a time.

    Args:
        run: the run folder.
        trust_remote_code: let code that comes with the LM run. Whoever opens the run decides,
            never the run's own files.
    """

    def __init__(self, run: RunFolder, *, trust_remote_code: bool = False):
        self.run, self.trust_remote_code, self._lock = run, trust_remote_code, threading.Lock()

    @cached_property
    def _loaded(self) -> tuple[SAE, LM]:
        from ksparse.device import resolve_device
        from ksparse.interop import load
        from ksparse.lm.model import LM

        device = resolve_device("auto")
        sae = load(self.run.path).to(device).eval()
        return sae, LM(
            acts=self.run.subject().acts, device=device, trust_remote_code=self.trust_remote_code
        )

    def activations(self, text: str) -> dict[str, Any]:
        """Return a text's tokens and, for each, [latent, value] of its active latents by value.

        Raises:
            InputError: the text is empty or too long.
            NonFiniteError: the LM or the autoencoder gives NaN or infinity.
        """
        import torch

        with self._lock, translate_memory_errors(), torch.inference_mode():
            _, lm = self._loaded
            text, tokens, strings = self._tokenize(lm, text)
            values, indices = self._encode(tokens, len(strings))
            if not bool(values.isfinite().all()):
                raise NonFiniteError("the LM or the autoencoder gives NaN or infinity on this text")
            latents = [
                [[i, round_for_json(v)] for v, i in zip(row, row_indices) if v > 0]
                for row, row_indices in zip(values.tolist(), indices.tolist())
            ]
            return {"tokens": strings, "latents": latents}

    def change(self, text: str, latent: Any, value: Any, at: Any = None) -> dict[str, Any]:
        """Return predictions and continuations of a text, plain and with a latent held at a value.

        The arguments come from a request and may be of any type.

        Args:
            text: the text.
            latent: the latent's number.
            value: the value that it is held at.
            at: the token at which it is held; None holds it at all tokens, generated ones too.

        Raises:
            InputError: an argument is not valid, or the text is empty or too long.
            NonFiniteError: the LM predicts NaN.
        """
        from ksparse import steering

        with self._lock, translate_memory_errors():
            sae, lm = self._loaded
            text, tokens, strings = self._tokenize(lm, text)
            if not isinstance(latent, int) or isinstance(latent, bool):
                raise InputError(f"a latent is named by its number, not by {quote_value(latent)}")
            steering.check_latents(sae, [latent])
            value = check_value(value)
            if at is not None and (
                not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(strings)
            ):
                raise InputError(f"token {quote_value(at)} is not one of 0 to {len(strings) - 1}")
            change = steering.clamped({latent: value})
            if at is not None:
                # BOS comes before the text's own tokens.
                change = change_once_at(change, tokens.shape[1] - len(strings) + at)
            before = steering.continue_text(lm, text, tokens=CONTINUED)
            with steering.attach(lm.model, sae, lm.options.site, change=change):
                after = steering.continue_text(lm, text, tokens=CONTINUED)
            comparison = steering.Comparison(before, after)
            if bool(before.log_probs.isnan().any()):
                raise NonFiniteError("the LM predicts NaN after this text")
            if bool(after.log_probs.isnan().any()):
                raise NonFiniteError(
                    f"with latent {latent} held at {value:g} the LM predicts NaN; "
                    "hold it nearer to the values that it has on text"
                )
            plain, changed = (self._token_strings(lm, side.tokens) for side in comparison)
            return {
                "tokens": strings,
                "kl": number(comparison.kl),
                "plain": plain,
                "changed": changed,
                "predictions": self._list_predictions(lm, comparison),
            }

    def _encode(self, tokens: Tensor, last: int) -> Code:
        """Return the codes [last, k] of the last tokens."""
        import torch

        sae, lm = self._loaded
        return sae.encode(lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -last:])

    def _tokenize(self, lm: LM, text: str) -> tuple[str, Tensor, list[str]]:
        """Return the text as it is read, ids [1, t] with BOS as in training, and safe tokens."""
        if not text:
            raise InputError("there is no text to read")
        if len(text) > MOST_CHARACTERS:
            raise InputError(
                f"the text has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read here"
            )
        text = text.encode("utf-8", "replace").decode()  # browsers may send lone surrogates
        tokens = lm.tokenize(text)
        most = min(MOST_TOKENS, (lm.context or MOST_TOKENS) - CONTINUED)
        if tokens.shape[1] > most:
            raise InputError(
                f"the text has {tokens.shape[1]:,} tokens; at most {most:,} are read here"
            )
        return text, tokens, [safe_token(token) for token in lm.tokens(text)]

    def _token_strings(self, lm: LM, tokens: list[int]) -> list[str]:
        from ksparse.lm.tokens import token_strings

        return [safe_token(token) for token in token_strings(lm.tokenizer, tokens)]

    def _list_predictions(self, lm: LM, comparison: Comparison) -> list[dict[str, Any]]:
        """Return the likeliest tokens of either distribution, with both probabilities."""
        before, after = (side.log_probs.exp() for side in comparison)
        tokens = list(
            dict.fromkeys(
                token
                for probs in (before, after)
                for token in probs.topk(min(PREDICTIONS, len(probs))).indices.tolist()
            )
        )
        tokens.sort(key=lambda token: -max(float(before[token]), float(after[token])))
        return [
            {
                "token": string,
                "plain": round_for_json(before[token]),
                "changed": round_for_json(after[token]),
            }
            for token, string in zip(tokens, self._token_strings(lm, tokens))
        ]


def change_once_at(change: Change, position: int) -> Change:
    """Return a change at one position of the first forward pass only, which reads the prompt."""
    passes = 0

    def change_at_position(code: Code) -> Code:
        nonlocal passes
        passes += 1
        added, keep = change(code), code.values.new_zeros(code.values.shape[-2], 1)
        if passes == 1:
            keep[position] = 1
        return added._replace(values=added.values * keep)

    return change_at_position


def check_value(value: Any) -> float:
    """Return a value that a latent can be held at; raise InputError if float32 has no room."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MOST_VALUE:
        raise InputError(
            f"a latent is held at a number, not at {quote_value(value)}; "
            f"at most {MOST_VALUE:.1e} either way"
        )
    return float(value)


@contextmanager
def translate_memory_errors() -> Iterator[None]:
    """Raise torch's out-of-memory errors as OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        message = (str(error) or "MemoryError").splitlines()[0]
        raise OutOfMemoryError(f"out of memory: {message} Take a shorter text") from error


def round_for_json(value: Any) -> float:
    """Return a number with five significant digits."""
    return float(f"{float(value):.5g}")
