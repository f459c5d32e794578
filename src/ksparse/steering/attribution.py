"""Which latents a behaviour depends on: activation × gradient (Gao et al. 2024, appendix E.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
