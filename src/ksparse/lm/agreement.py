"""What must agree before numbers of an LM are believed: checked once for each LM and site, on eight
tokens.

    the LM runs the site once in a pass     and the site gives activations [contexts, tokens, width]
    no activation depends on later tokens   an LM that looks ahead is no causal one
    acts, watch, a plain pass               give the same activations and logits
    replay, unchanged                       gives the unchanged logits
    replay, changed                         gives the same whether blocks before the site run again
                                            or not, and the change arrives

What fails here would be a wrong number later. Reading that fails is refused. Where blocks before
the site may not be left out (they share keys and values with later ones, say), they run again. A
site where changes go wrong all the same can be read only.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.lm.hooks import hooked
from ksparse.lm.sites import describe_sites

LM = Any  # ksparse.lm.model.LM, which imports this module
TOKENS = 8
_TEXT = (
    "The old house by the river had been empty for years, and nobody knew why. One day a girl "
    "came back."
)
_log = logging.getLogger("ksparse")


def check_passes_agree(lm: LM) -> None:
    """Compare passes that must agree; raise InputError where reading is wrong, note in `lm` where
    changing is."""
    tokens = probe_tokens(lm)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    with torch.inference_mode():
        plain = lm._forward(tokens, attention).logits
        seen: list[Tensor] = []
        with hooked(
            lm.site, lambda x: seen.append(x.clone()) if isinstance(x, Tensor) else seen.append(x)
        ):
            read = lm._forward(tokens, attention).logits
    where = f"site {lm.options.site!r} of {lm.options.lm}"
    if not seen:
        raise InputError(
            f"site {lm.options.site!r} was not reached in a forward pass of {lm.options.lm}; "
            f"choose another:\n{describe_sites(lm.model)}"
        )
    if len(seen) > 1:
        raise InputError(
            f"{where} runs {len(seen)} times in one pass, so that it has no single activation of a "
            "token; "
            f"choose another:\n{describe_sites(lm.model)}"
        )
    lm._checked(lm.options.site, {lm.options.site: seen[0]}, tokens)
    if not bool(torch.isfinite(plain).all() and torch.isfinite(seen[0]).all()):
        return  # said where it matters, with the document: nothing can be compared here
    for what, rows in (("activations", seen[0]), ("logits", plain)):
        if wrong := difference(lm, rows[0, :-1], rows[1, :-1]):
            raise InputError(
                f"{lm.options.lm} is not a causal LM: its {what} of a token change with the token "
                f"after it ({wrong}); "
                "give a model that reads from left to right"
            )
    if wrong := difference(lm, lm.acts(tokens, attention), seen[0].float()) or difference(
        lm, read, plain
    ):
        raise InputError(
            f"{where} cannot be read: two passes over the same tokens do not agree ({wrong})"
        )
    lm.refused = _changing(lm, tokens, attention, plain)


def _changing(lm: LM, tokens: Tensor, attention: Tensor, plain: Tensor) -> str:
    """Return why activations at the site cannot be changed, '' if they can; turn off what LM.run_patched
    leaves out where that is wrong."""
    why = _replays(lm, tokens, attention, plain)
    if why and lm._before:
        _log.warning(
            "%s at %s: leaving out the blocks before the site changes what comes after it (%s); "
            "they are run again, which is slower",
            lm.options.lm,
            lm.options.site,
            why,
        )
        lm._before = []
        why = _replays(lm, tokens, attention, plain)
    return why


def _replays(lm: LM, tokens: Tensor, attention: Tensor, plain: Tensor) -> str:
    try:
        cached = lm.run_with_cache(tokens, attention)
        if wrong := difference(lm, cached.logits, plain) or difference(
            lm, lm.run_patched(cached, lambda x: x), plain
        ):
            return f"unchanged activations do not give the unchanged logits: {wrong}"
        changed = lm.run_patched(cached, lambda x: x.roll(1, -1))
        with torch.inference_mode(), hooked(lm.site, lambda x: x.roll(1, -1)):
            whole = lm._forward(tokens, attention).logits
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # whatever an architecture's own code does where blocks are left out
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    if wrong := difference(lm, changed, whole):
        return f"changed activations give other logits than in a whole pass: {wrong}"
    return "" if difference(lm, whole, plain) else "a change there does not reach the logits"


def probe_tokens(lm: LM) -> Tensor:
    """Return ids [2, 8] of plain text, the rows alike but for their last token."""
    ids = lm.tokenizer(_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    ids = (ids * TOKENS)[: TOKENS + 1] if ids else [0] * (TOKENS + 1)
    lead = [] if lm.bos is None else [lm.bos]
    row = torch.tensor([*lead, *ids])[: min(TOKENS, lm.context or TOKENS)]
    other = row.clone()
    other[-1] = next((i for i in ids if i != row[-1]), (int(row[-1]) + 1) % lm.vocab)
    return torch.stack([row, other]).to(lm.device)


def difference(lm: LM, a: Tensor, b: Tensor) -> str:
    """Return by how much two tensors differ, if by more than rounding; '' if not."""
    a, b = a.double(), b.double()
    scale = (b - b.mean(-1, keepdim=True)).norm()
    size = float((a - b).norm() / scale) if scale > 0 else float((a - b).norm())
    limit = math.sqrt(
        torch.finfo(getattr(torch, lm.options.lm_dtype)).eps
    )  # far above rounding, far below another token's effect
    return "" if size <= limit else f"relative difference {size:.2g}"
