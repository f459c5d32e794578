"""Check that an LM's passes agree, before any number computed with it is believed.

Run once for each LM and site, on eight tokens:

- the site runs once in a pass and gives activations [contexts, tokens, width];
- two passes over a context as long as those that are read give the same;
- no activation depends on later tokens, so the LM is causal;
- `acts`, `run_with_cache` and a plain pass give the same activations and logits;
- `run_patched` without a change gives the unchanged logits;
- `run_patched` with a change gives the same logits whether or not the blocks before the site are
  skipped, and the change has an effect.

A site whose reading fails is refused. Where blocks before the site may not be skipped (later blocks
share their keys and values, say), they are run. A site where changes fail even so is read-only.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.lm.hooks import hooked, not_activations
from ksparse.lm.sites import describe_sites

LM = Any  # ksparse.lm.model.LM, which imports this module
TOKENS = 8
_TEXT = (
    "The old house by the river had been empty for years, and nobody knew why. One day a girl "
    "came back."
)
_log = logging.getLogger("ksparse")


def check_passes_agree(lm: LM) -> None:
    """Compare passes that must agree at the LM's site.

    Sets `lm.read_only_reason` where changes fail, and empties `lm.skippable` where skipping does.

    Raises:
        InputError: The site cannot be read, or the LM is not causal.
    """
    tokens = probe_tokens(lm)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    reads: list[Any] = []

    def record(x: Any) -> None:
        reads.append(x.clone() if isinstance(x, Tensor) else x)

    with torch.inference_mode():
        plain = lm.forward(tokens, attention).logits
        with hooked(lm.site, record):
            logits = lm.forward(tokens, attention).logits
    where = f"site {lm.options.site!r} of {lm.options.lm}"
    if len(reads) > 1:
        raise InputError(
            f"{where} runs {len(reads)} times in one pass, so that it has no single activation of "
            f"a token; choose another:\n{describe_sites(lm.model)}"
        )
    reads_by_site = dict(zip([lm.options.site], reads))
    x = check_activations(lm, lm.options.site, reads_by_site, tokens)
    if not bool(torch.isfinite(plain).all() and torch.isfinite(x).all()):
        return  # nothing can be compared; reading real text reports it, with the document
    for what, value in (("activations", x), ("logits", plain)):
        if problem := difference(lm, value[0, :-1], value[1, :-1]):
            raise InputError(
                f"{lm.options.lm} is not a causal LM: its {what} of a token change with the token "
                f"after it ({problem}), as an encoder's do; give a model that reads from left to "
                "right"
            )
    problem = (
        difference(lm, lm.acts(tokens, attention), x.float())
        or difference(lm, logits, plain)
        or _repetition_difference(lm)
    )
    if problem:
        raise InputError(
            f"{where} cannot be read: two passes over the same tokens do not agree ({problem})"
        )
    lm.read_only_reason = _check_changes(lm, tokens, attention, plain)


def _repetition_difference(lm: LM) -> str:
    """Describe how two passes over a whole context differ; '' if they do not. Hashing attention may
    be random in long contexts alone (Reformer)."""
    length = min(lm.options.context, lm.context or lm.options.context)
    tokens = (torch.arange(length)[None] * 7919 % lm.vocab).to(lm.device)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    x = [lm.acts(tokens, attention) for _ in range(2)]
    with torch.inference_mode():
        rows = [lm.predict(tokens, attention).at(attention) for _ in range(2)]
        logits = [predicted[next(predicted.slices())] for predicted in rows]
    if not all(bool(torch.isfinite(values).all()) for values in (*logits, *x)):
        return ""  # reading real text reports it
    return difference(lm, *x) or difference(lm, *logits)


def head_runs_alone(lm: LM) -> bool:
    """Return whether the LM's head, run on the last hidden states, gives the logits of a pass."""
    tokens = probe_tokens(lm)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    with torch.inference_mode():
        expected = lm.forward(tokens, attention).logits
        lm.head_runs_alone = True
        try:
            predictions = lm.predict(tokens, attention)
            logits = predictions.full()
            rows = predictions.at(attention)
            picked = torch.cat([rows[part] for part in rows.slices()])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an architecture's own code may fail on hidden states in any way
            return False
    if logits.shape != expected.shape or picked.shape[1:] != expected.shape[2:]:
        return False
    flat = expected.flatten(0, 1)
    return not (difference(lm, logits, expected) or difference(lm, picked, flat))


def check_activations(lm: LM, site: str, reads: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return reads[site]; raise InputError if it is missing or no activations of tokens[b, t]."""
    if site not in reads:
        raise InputError(
            f"site {site!r} was not reached in a forward pass of {lm.options.lm}; "
            f"choose another:\n{describe_sites(lm.model)}"
        )
    if problem := not_activations(reads[site], tokens.shape):
        raise InputError(
            f"site {site!r} of {lm.options.lm} gives {problem}, not activations [contexts, tokens, "
            f"width]; choose another:\n{describe_sites(lm.model)}"
        )
    return reads[site]


def _check_changes(lm: LM, tokens: Tensor, attention: Tensor, plain: Tensor) -> str:
    """Return why activations at the site cannot be changed, '' if they can; stop skipping blocks
    where that is what fails."""
    reason = _patch_disagreement(lm, tokens, attention, plain)
    if reason and lm.skippable:
        _log.warning(
            "%s at %s: skipping the blocks before the site changes what comes after it (%s); "
            "they are run again, which is slower",
            lm.options.lm,
            lm.options.site,
            reason,
        )
        lm.skippable = []
        reason = _patch_disagreement(lm, tokens, attention, plain)
    return reason


def _patch_disagreement(lm: LM, tokens: Tensor, attention: Tensor, plain: Tensor) -> str:
    try:
        cached = lm.run_with_cache(tokens, attention)
        if problem := difference(lm, cached.logits, plain) or difference(
            lm, lm.run_patched(cached, lambda x: x), plain
        ):
            return f"unchanged activations do not give the unchanged logits: {problem}"
        patched = lm.run_patched(cached, lambda x: x.roll(1, -1))
        with torch.inference_mode(), hooked(lm.site, lambda x: x.roll(1, -1)):
            expected = lm.forward(tokens, attention).logits
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # an architecture's own code may fail on skipped blocks in any way
        return describe_error(error)
    if problem := difference(lm, patched, expected):
        return f"changed activations give other logits than in a whole pass: {problem}"
    return "" if difference(lm, expected, plain) else "a change there does not reach the logits"


def describe_error(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def probe_tokens(lm: LM) -> Tensor:
    """Return ids [2, 8] of plain text whose rows differ in the last token only."""
    ids = lm.tokenizer(_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    ids = (ids * TOKENS)[: TOKENS + 1] if ids else [0] * (TOKENS + 1)
    lead = [] if lm.bos is None else [lm.bos]
    row = torch.tensor([*lead, *ids])[: min(TOKENS, lm.context or TOKENS)]
    other = row.clone()
    other[-1] = next((i for i in ids if i != row[-1]), (int(row[-1]) + 1) % lm.vocab)
    return torch.stack([row, other]).to(lm.device)


def difference(lm: LM, a: Tensor, b: Tensor) -> str:
    """Describe by how much two tensors differ; '' if by rounding alone."""
    a, b = a.double(), b.double()
    scale = (b - b.mean(-1, keepdim=True)).norm()
    size = float((a - b).norm() / scale) if scale > 0 else float((a - b).norm())
    # Far above rounding, far below the effect of another token.
    limit = math.sqrt(torch.finfo(getattr(torch, lm.options.lm_dtype)).eps)
    return "" if size <= limit else f"relative difference {size:.2g}"
