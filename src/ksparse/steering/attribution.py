"""Which latents a behaviour depends on: activation × gradient (Gao et al. 2024, appendix E.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksparse import display, html
from ksparse.errors import InputError
from ksparse.lm import provenance
from ksparse.lm.hooks import hooked
from ksparse.lm.model import LM
from ksparse.lm.tokens import token_strings, tokenize_text
from ksparse.sae.model import SAE, Code
from ksparse.steering.calls import CallTracker

Metric = Callable[[Tensor], Tensor]
"""Maps the logits [v] of the token after a prompt to a scalar."""


def attribute(
    lm: LM, sae: SAE, prompts: Sequence[str], metric: Metric, *, force: bool = False
) -> Tensor:
    """Estimate how much each latent adds to a metric of the next token.

    The estimate is first-order: activation × gradient, with the reconstruction error kept. On an LM
    that is linear after the site it is exactly what ablating the latent removes.

    Args:
        lm: The LM, at the SAE's site.
        sae: The autoencoder, on the LM's device.
        prompts: Texts, at least one.
        metric: A scalar function of the logits [v] after a prompt, such as `logit_difference`.
        force: Allow an LM or site that the SAE was not trained on.

    Returns:
        [n_latents] in float64: summed over positions, averaged over prompts.

    Raises:
        InputError: There is no prompt, or the LM or site is not the one the SAE was trained on.
    """
    if not prompts:
        raise InputError("attribution needs at least one prompt")
    provenance.check(sae.metadata, lm, force=force)
    total = torch.zeros(sae.shape.n_latents, dtype=torch.float64)
    for prompt in prompts:
        contributions = attribute_positions(lm, sae, prompt, metric)
        total.index_add_(
            0, contributions.indices.flatten().cpu(), contributions.values.flatten().cpu().double()
        )
    return total / len(prompts)


def attribute_positions(lm: LM, sae: SAE, prompt: str, metric: Metric) -> Code:
    """Return activation × gradient of the active latents at each position of a prompt, BOS first.

    Returns:
        A code [t, k] whose values are contributions to the metric.
    """
    lm.check_changes()
    leaf: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        leaf.append(x.detach().float().requires_grad_())
        return leaf[0].to(x.dtype)

    with torch.inference_mode(False), torch.enable_grad():
        tokens = lm.tokenize(prompt)
        calls = CallTracker(sae)
        with calls.follow(lm.model, lm.module), hooked(lm.site, record):
            logits = lm.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        gradient = torch.autograd.grad(metric(logits), leaf[0])[0][0]
    with torch.no_grad():
        raw = leaf[0].detach()
        inputs = sae.normalize(raw[0])
        code = sae.encode_normalized(inputs.x)
        slopes = torch.einsum(
            "td,tkd->tk", inputs.scale * gradient.to(inputs.x), sae.W_dec[code.indices]
        )
        keep = calls.positions_to_change(raw)[0][:, None]
        return Code(code.values * slopes * keep, code.indices)


@dataclass(frozen=True, repr=False)
class Attribution:
    """What each latent adds to an LM's preference after a prompt, to first order.

    Attributes:
        question: what is explained, in words.
        value: the metric itself.
        tokens: the tokens of the prompt, BOS first where the LM has one.
        code: [t, k] what the active latents of each token add.
    """

    question: str
    value: float
    tokens: list[str]
    code: Code

    def effects(self) -> dict[int, float]:
        """Return what each active latent adds over all tokens, the largest effect first."""
        sums: dict[int, float] = {}
        for latent, value in zip(*(part.flatten().tolist() for part in reversed(self.code))):
            sums[latent] = sums.get(latent, 0.0) + value
        found = {latent: value for latent, value in sums.items() if value}
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))

    def table(self, most: int = 8) -> display.Table:
        """Return the latents of the largest effect, each with the token where it is largest."""
        rows = []
        for latent, effect in list(self.effects().items())[:most]:
            by_token = (self.code.values * (self.code.indices == latent)).sum(-1)
            at = int(by_token.abs().argmax())
            rows.append((str(latent), f"{effect:+.3f}", f"{self.tokens[at]!r} ({at})"))
        notes = ["To first order: activation x gradient, with the SAE's error kept."]
        return display.Table(self.question, ("latent", "effect", "most at token"), rows, notes)

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: row, token, latent, effect, of each active latent.

        Raises:
            InputError: if pandas is not installed.
        """
        rows = [
            {"row": row, "token": token, "latent": latent, "effect": value}
            for row, token in enumerate(self.tokens)
            for latent, value in zip(
                self.code.indices[row].tolist(), self.code.values[row].tolist()
            )
            if value
        ]
        return display.to_frame(rows)

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        most = float(self.code.values.abs().max()) or 1.0
        marks = []
        for values, indices in zip(self.code.values.tolist(), self.code.indices.tolist()):
            pairs = sorted(((v, i) for v, i in zip(values, indices) if v), key=lambda p: -abs(p[0]))
            note = ", ".join(f"latent {i}: {v:+.3f}" for v, i in pairs[:3])
            mark = (pairs[0][1], abs(pairs[0][0]) / most, note) if pairs else (-1, 0.0, "")
            marks.append(mark)
        return self.table().html() + html.tokens(self.tokens, marks)


def attribute_choice(
    lm: LM,
    sae: SAE,
    prompt: str,
    toward: str | Sequence[str],
    away: str | Sequence[str] = (),
    *,
    force: bool = False,
) -> Attribution:
    """Estimate how much each latent adds to the LM's choice of the token after a prompt.

    Args:
        lm: The LM, at the SAE's site.
        sae: The autoencoder, on the LM's device.
        prompt: The text.
        toward: A token, or several, whose mean logit is explained; with its leading space.
        away: A token, or several, whose mean logit is subtracted; that of the whole vocabulary if
            empty.
        force: Allow an LM or site that the SAE was not trained on.

    Returns:
        The effect of each latent and token on the difference of logits; a notebook shows a table
        and the prompt's tokens, coloured by the latent of the largest effect.

    Raises:
        InputError: As `attribute` and `logit_difference`.

    Example:
        >>> import ksparse
        >>> from ksparse import steering
        >>> sae = ksparse.load("runs/demo")
        >>> found = steering.attribute_choice(sae.lm(), sae, "import os", " as", ".")
        >>> len(found.tokens), found.code.values.shape[0]
        (3, 3)
    """
    provenance.check(sae.metadata, lm, force=force)
    plus, minus = ([words] if isinstance(words, str) else list(words) for words in (toward, away))
    metric, values = logit_difference(lm, plus, minus), []

    def watched(logits: Tensor) -> Tensor:
        values.append(metric(logits))
        return values[0]

    code = attribute_positions(lm, sae, prompt, watched)
    code = Code(*(part.cpu() for part in code))
    ids = lm.tokenize(prompt)[0].tolist()
    instead = " or ".join(map(repr, minus)) or "the mean of all tokens"
    value = float(values[0].detach())
    question = f"{' or '.join(map(repr, plus))} over {instead}: logits differ by {value:+.3f}"
    return Attribution(question, value, token_strings(lm.tokenizer, ids), code)


def logit_difference(lm: LM, toward: Sequence[str], away: Sequence[str] = ()) -> Metric:
    """Return the metric: mean logit of some tokens minus the mean logit of others.

    Args:
        lm: The LM whose tokenizer reads the texts.
        toward: Texts of one token each, at least one.
        away: Texts of one token each; the whole vocabulary if empty.

    Raises:
        InputError: `toward` is empty, or a text is not a single token.
    """
    plus, minus = (
        torch.tensor([token_id(lm, text) for text in texts], dtype=torch.long, device=lm.device)
        for texts in (toward, away)
    )
    if not len(plus):
        raise InputError("attribution needs at least one token to look toward")
    return lambda logits: (
        logits[plus].mean() - (logits[minus].mean() if len(minus) else logits.mean())
    )


def token_id(lm: LM, text: str) -> int:
    """Return the id of the single token with this text, its leading space included.

    Raises:
        InputError: The text is not a single token.
    """
    ids = tokenize_text(lm.tokenizer, text)
    if len(ids) == 1:
        return int(ids[0])
    # SentencePiece puts a space of its own before a text, so the text alone can be two tokens.
    strings = token_strings(lm.tokenizer, range(len(lm.tokenizer)))
    if text in strings:
        return strings.index(text)
    pieces = ", ".join(repr(piece) for piece in token_strings(lm.tokenizer, ids))
    raise InputError(
        f"{text!r} is {len(ids)} tokens of {lm.options.lm} ({pieces}); give a text that is a "
        "single token, including its leading space"
    )
