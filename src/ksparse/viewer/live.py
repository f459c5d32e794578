"""What needs the LM: a text's latents, and what becomes of a text when a latent is held at a value.

A latent is changed in the activation itself: x' = x + (v' - v) W_dec[latent], in the activation's own scale. All that the
autoencoder does not explain stays as it was.
"""

from __future__ import annotations

import math
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ksparse.errors import InputError
from ksparse.report.tokens import safe_token
from ksparse.runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from ksparse.acts.lm import LM
    from ksparse.sae.model import SAE, Code

TOKENS = 512
"""Tokens of a text at most."""
CONTINUED, LISTED = 24, 12
"""Tokens that a text is continued by; predictions listed."""


class Live:
    """The LM and the autoencoder of a run, loaded when first asked, one request at a time."""

    def __init__(self, run: RunFolder):
        self.run, self._lock = run, threading.Lock()

    @cached_property
    def _loaded(self) -> tuple[SAE, LM]:
        from ksparse.acts.lm import LM, resolve_device
        from ksparse.sae.store import load

        recipe = self.run.recipe()
        device = resolve_device("auto")
        sae = load(self.run.path).to(device).eval()
        return sae, LM(acts=recipe.acts, device=device, trust_remote_code=recipe.run.trust_remote_code)

    def activations(self, text: str) -> dict[str, Any]:
        """Return the text's tokens, and of each the latents active there, [latent, value], the largest first."""
        import torch

        with self._lock, torch.inference_mode():
            sae, lm = self._loaded
            tokens, shown = self._read(lm, text)
            values, indices = self._code(tokens, len(shown))
            found = [[[i, rounded(v)] for v, i in zip(value, index) if v > 0] for value, index in zip(values.tolist(), indices.tolist())]
            return {"tokens": shown, "latents": found}

    def change(self, text: str, latent: Any, value: Any, at: Any = None) -> dict[str, Any]:
        """Return what the LM predicts after a text, and how it goes on, as it is and with a latent held at a value.

        at: the number of the token at which it is held; at all of them, also those that are written, if None.
        """
        import torch

        with self._lock, torch.inference_mode():
            sae, lm = self._loaded
            tokens, shown = self._read(lm, text)
            if not isinstance(latent, int) or isinstance(latent, bool) or not 0 <= latent < sae.shape.n_latents:
                raise InputError(f"latent {latent!r} is not one of 0 to {sae.shape.n_latents - 1}")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"a latent is held at a number, not at {value!r}")
            if at is not None and (not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(shown)):
                raise InputError(f"token {at!r} is not one of 0 to {len(shown) - 1}")
            lead = tokens.shape[1] - len(shown)  # BOS is none of the text's tokens
            first, last = (lead, None) if at is None else (lead + at, lead + at + 1)

            def hold(x: Tensor) -> Tensor:
                changed = x.clone()
                changed[:, first:last] = held(sae, x[:, first:last], latent, float(value))
                return changed

            was = value_of(self._code(tokens, len(shown)), latent)
            plain, text_plain = self._continued(lm, tokens, None)
            other, text_other = self._continued(lm, tokens, hold)
            kl = float((plain.exp() * (plain - other)).sum())
            return {"tokens": shown, "was": [rounded(each) for each in was.flatten().tolist()], "kl": rounded(kl), "predictions": self._predictions(lm, plain, other), "plain": text_plain, "changed": text_other}

    def _code(self, tokens: Tensor, last: int) -> Code:
        """Return the codes [t, k] of the last so many tokens."""
        import torch

        sae, lm = self._loaded
        return sae.encode(lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -last:])

    def _read(self, lm: LM, text: str) -> tuple[Tensor, list[str]]:
        """Return ids [1, t], a BOS first as in training, and the text's tokens made safe to show."""
        text = text.encode("utf-8", "replace").decode()  # half a character from a browser is none
        if not text:
            raise InputError("there is no text to read")
        tokens, most = lm.tokenize(text), min(TOKENS, (lm.context or TOKENS) - CONTINUED)
        if tokens.shape[1] > most:
            raise InputError(f"the text has {tokens.shape[1]:,} tokens; at most {most:,} are read here")
        return tokens, [safe_token(token) for token in lm.tokens(text)]

    def _continued(self, lm: LM, tokens: Tensor, edit: Any) -> tuple[Tensor, list[str]]:
        """Return the log-probabilities [v] of the next token, and the likeliest continuation, with the site's activations edited."""
        import torch

        from ksparse.acts.text import token_strings

        begun, first = tokens.shape[1], None
        for _ in range(CONTINUED):
            watched = lm.watch(tokens, torch.ones_like(tokens, dtype=torch.bool))
            logits = (watched.logits if edit is None else lm.replay(watched, edit))[0, -1].float().log_softmax(-1)
            first = logits if first is None else first
            tokens = torch.cat([tokens, logits.argmax().view(1, 1)], 1)
        return first, [safe_token(token) for token in token_strings(lm.tokenizer, tokens[0, begun:].tolist())]

    def _predictions(self, lm: LM, plain: Tensor, other: Tensor) -> list[dict[str, Any]]:
        """Return the likeliest tokens of either distribution with both probabilities."""
        from ksparse.acts.text import token_strings

        chosen = list(dict.fromkeys([*plain.topk(min(LISTED, len(plain))).indices.tolist(), *other.topk(min(LISTED, len(other))).indices.tolist()]))
        chosen.sort(key=lambda token: -max(float(plain[token]), float(other[token])))
        return [{"token": safe_token(string), "plain": rounded(plain[token].exp()), "changed": rounded(other[token].exp())}
                for token, string in zip(chosen, token_strings(lm.tokenizer, chosen))]


def held(sae: SAE, x: Tensor, latent: int, value: float) -> Tensor:
    """Return raw activations x[..., d] with a latent at `value` and everything else, the reconstruction's error too, as it was."""
    inputs = sae.normalize(x)
    was = value_of(sae.encode_normalized(inputs.x), latent)
    return x + (value - was) * sae.W_dec[latent] * inputs.scale


def value_of(code: Code, latent: int) -> Tensor:
    """Return a latent's value in codes, [..., 1]; 0 where it is not among the active."""
    return (code.values * (code.indices == latent)).sum(-1, keepdim=True)


def rounded(value: Any) -> float:
    return float(f"{float(value):.5g}")
