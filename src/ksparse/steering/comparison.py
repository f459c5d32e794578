"""Continue a text with an LM, and compare the continuations with and without steering."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ksparse import display, html
from ksparse.errors import InputError
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.lm.tokens import token_strings
from ksparse.sae.model import SAE
from ksparse.steering.attachment import Unit, steer

_CHANGED = 3
"""The latent whose colour marks tokens that steering changes: amber."""
_COLDEST = 1e-3
"""The lowest temperature of sampling: logits are divided by it in float32."""


class Continuation(NamedTuple):
    """A continuation of a prompt."""

    text: str
    tokens: list[int]
    log_probs: Tensor
    """[v] log-probabilities of the first token after the prompt."""
    prompt: str = ""
    tokenizer: Any = None

    @property
    def strings(self) -> list[str]:
        """The text of each token of the continuation."""
        return token_strings(self.tokenizer, self.tokens)

    def __repr__(self) -> str:
        return f"Continuation({self.prompt + self.text!r})"


class Comparison(NamedTuple):
    """Continuations of the same prompt by the unchanged and by the steered LM."""

    before: Continuation
    after: Continuation

    @property
    def kl(self) -> float:
        """KL(unchanged || steered) of the next token, in nats."""
        before, after = self.before.log_probs.double(), self.after.log_probs.double()
        return float((before.exp() * (before - after)).sum())

    def moved(self, most: int) -> list[tuple[int, float, float]]:
        """Return (token, probability before, probability after) of the `most` tokens whose
        probability changes most."""
        before, after = self.before.log_probs.exp(), self.after.log_probs.exp()
        order = (after - before).abs().argsort(descending=True, stable=True)[:most]
        return [(int(i), float(before[i]), float(after[i])) for i in order]

    def table(self, most: int = 6) -> display.Table:
        """Return the next tokens whose probability changes most, as a table."""
        rows = self.moved(most)
        words = token_strings(self.before.tokenizer, [token for token, _, _ in rows])
        cells = [
            (repr(word), f"{old:.4f}", f"{new:.4f}") for word, (_, old, new) in zip(words, rows)
        ]
        title = f"Next token: KL {self.kl:.4f} nats"
        return display.Table(title, ("token", "before", "steered"), cells)

    def __repr__(self) -> str:
        texts = [f"{self.before.prompt}{side.text}" for side in self[:2]]
        return f"before:\n{texts[0]}\n\nsteered:\n{texts[1]}\n\n{self.table()}"

    def _repr_html_(self) -> str:
        shown = []
        for name, side in (("Before", self.before), ("Steered", self.after)):
            pairs = zip_longest(side.tokens, self.before.tokens[: len(side.tokens)])
            marks = [(_CHANGED, float(a != b), "" if a == b else "changed") for a, b in pairs]
            text = html.tokens([side.prompt, *side.strings], [(-1, 0.0, "the prompt"), *marks])
            shown.append(f"<div><strong>{name}</strong></div>{text}")
        return "".join(shown) + self.table().html()


def compare(
    lm: LM,
    sae: SAE,
    prompt: str,
    clamp: Mapping[int, float] | None = None,
    *,
    unit: Unit = "max",
    scale: Mapping[int, float] | None = None,
    error: Literal["keep", "drop"] = "keep",
    tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    largest: Mapping[int, float] | None = None,
    force: bool = False,
) -> Comparison:
    """Continue a prompt without and with steering, with the same random numbers.

    Args:
        lm: The LM, at the SAE's site.
        sae: The autoencoder, on the LM's device.
        prompt: The text to continue.
        clamp: As in `steer`.
        unit: As in `steer`.
        scale: As in `steer`.
        error: As in `steer`.
        tokens: As in `continue_text`.
        temperature: As in `continue_text`.
        seed: As in `continue_text`.
        largest: As in `steer`.
        force: Allow an LM or site that the SAE was not trained on.

    Returns:
        Both continuations. A notebook shows them, those tokens marked that differ from the
        unchanged ones place by place, and the next tokens whose probability changes most.

    Raises:
        InputError: The LM or its site is not the one the SAE was trained on; and whatever `steer`
            and `continue_text` raise.

    Example:
        >>> import ksparse
        >>> from ksparse import steering
        >>> sae = ksparse.load("runs/demo")
        >>> found = steering.compare(sae.lm(), sae, "import os", {3: 0.0}, tokens=2)
        >>> len(found.before.tokens), found.kl >= 0
        (2, True)
    """
    provenance.check(sae.metadata, lm, force=force)
    before = continue_text(lm, prompt, tokens=tokens, temperature=temperature, seed=seed)
    with steer(
        lm.model,
        sae,
        clamp,
        unit=unit,
        scale=scale,
        site=lm.options.site,
        error=error,
        largest=largest,
    ):
        after = continue_text(lm, prompt, tokens=tokens, temperature=temperature, seed=seed)
    return Comparison(before, after)


@torch.inference_mode()
def continue_text(
    lm: LM, prompt: str, *, tokens: int = 40, temperature: float = 0.0, seed: int = 0
) -> Continuation:
    """Continue a prompt; inside `steer`, with the steered LM.

    Args:
        lm: The LM.
        prompt: The text to continue.
        tokens: How many tokens to generate at most.
        temperature: Of sampling; 0 always takes the most likely token.
        seed: Seed of sampling. The same seed gives the same random numbers, so two continuations
            differ only by what was done to the LM.

    Raises:
        InputError: `temperature` is negative or too near 0, `tokens` is below 1, or prompt and
            continuation exceed the LM's context.
    """
    if temperature != 0 and not _COLDEST <= temperature < math.inf:
        raise InputError(
            f"temperature is {temperature}; it must be 0, for the likeliest token, or from "
            f"{_COLDEST:g} on"
        )
    if tokens < 1:
        raise InputError(f"a continuation of {tokens} tokens cannot be made; give at least 1")
    ids = lm.tokenize(prompt)
    if lm.context is not None and ids.shape[1] + tokens > lm.context:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, {tokens} more make {ids.shape[1] + tokens}; "
            f"{lm.options.lm} takes {lm.context}"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    candidates = (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id, 0)
    pad = next(token for token in candidates if token is not None)
    devices = [lm.device] if lm.device.type == "cuda" else []
    with _plain_generation(lm.model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
            **sampling,
        )
    prompt_ids, new = ids[0].tolist(), output.sequences[0, ids.shape[1] :].tolist()
    text, before = (
        lm.tokenizer.decode(tokens_, skip_special_tokens=True)
        for tokens_ in (prompt_ids + new, prompt_ids)
    )
    log_probs = output.logits[0][0].float().log_softmax(-1).cpu()
    return Continuation(text[len(before) :], new, log_probs, prompt, lm.tokenizer)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Ignore the model's own generation settings, except for its end-of-text tokens.

    A generation_config.json may ask for beam search or repetition penalties, or name ids that are
    not tokens.
    """
    from transformers import GenerationConfig

    original = model.generation_config
    ends = original.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = [end for end in ends if type(end) is int and end >= 0]
    model.generation_config = GenerationConfig(eos_token_id=ends or None)
    try:
        yield
    finally:
        model.generation_config = original
