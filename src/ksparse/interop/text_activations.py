"""Raw activations of an SAE's LM on its text, where an export must measure something."""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.data.contexts import Context, Corpus
from ksparse.errors import InputError
from ksparse.lm.model import LM

PER_DOCUMENT = 128
"""Tokens used of each document, at most, so that a small sample sees many documents."""
_MAX_EMPTY_BATCHES = 1000
"""Batches of contexts in a row of which nothing is kept, before the text is given up."""


def read_activations(lm: LM, split: str, tokens: int) -> Tensor:
    """Return the activations that an SAE of this LM, site and text is about.

    Args:
        lm: the LM, with the site, text and policy of the SAE.
        split: split of the text: "train", "validation" or "held-out".
        tokens: number of activations; fewer where one reading of the split has fewer.

    Returns:
        Raw activations [rows, d] in float32 on the CPU, in the order of the text.

    Raises:
        InputError: the text has no activation to use.
    """
    corpus = Corpus(lm.options, lm.tokenizer, split, per_document=PER_DOCUMENT)
    found: list[Tensor] = []
    group: list[Context] = []
    missing, empty = tokens, 0
    for context in corpus.contexts():
        is_end = context.start.epoch > 0
        if not is_end:
            group.append(context)
        if group and (is_end or len(group) == lm.options.lm_batch):
            batch = corpus.batch(group)
            x = lm.acts(batch.tokens, batch.attention)[batch.keep.to(lm.device)][:missing]
            found.append(x.cpu().clone())
            missing -= len(x)
            empty = 0 if len(x) else empty + 1
            group = []
        if is_end or missing <= 0 or empty >= _MAX_EMPTY_BATCHES:
            break
    rows = torch.cat(found) if found else torch.empty(0, lm.d_model)
    if not len(rows):
        raise InputError(
            f"text {lm.options.text!r} has no activation to use in its split {split!r}: all its "
            "tokens are special, or first in their context; choose another --acts.text"
        )
    return rows
