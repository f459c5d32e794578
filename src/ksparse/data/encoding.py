"""Codes of texts: cut into contexts as in an SAE's training, read by the LM in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ksparse import progress
from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.lm.tokens import token_strings, tokenize_text, without_bos
from ksparse.sae.code import Code, TextCode
from ksparse.sae.model import SAE
from ksparse.sae.normalization import Normalized

ENCODING = "encoding texts"


class _Row(NamedTuple):
    """A context: part of one text, after BOS if there is one."""

    ids: list[int]
    text: int


def encode_texts(lm: LM, texts: str | Sequence[str], sae: SAE, *, force: bool = False) -> TextCode:
    """Return the code of texts: a row for each token of each text, in their order.

    A text longer than the context of the SAE's training is cut into contexts of that length, each
    of which begins with BOS as in training. Where the SAE does not say how it was trained, the
    options of the LM decide (`acts.context`). No context holds parts of two texts.

    Args:
        lm: the LM, at the SAE's site.
        texts: a text, or several.
        sae: the autoencoder.
        force: allow an LM, site or contexts that contradict the SAE's metadata.

    Raises:
        InputError: a text is no str or has no token, or the LM contradicts the SAE's metadata.
    """
    texts = _listed(texts)
    if not isinstance(sae, SAE):
        raise InputError(
            f"texts are encoded by an SAE, got {type(sae).__name__}; ksparse.load(…) makes one"
        )
    provenance.check(sae.metadata, lm, force=force)
    acts = provenance.acts_to_read(sae.metadata, lm)
    bos = lm.tokenizer.bos_token_id if acts.bos == "auto" else None
    rows, strings = _cut(lm, texts, bos, acts.context)
    codes: list[Code] = []
    inputs: list[Normalized] = []
    size = acts.lm_batch or 64
    for first in range(0, len(rows), size):
        progress.report(ENCODING, first, len(rows))
        x, trained = _read(lm, rows[first : first + size], bos, acts)
        with torch.no_grad():
            code = sae.encode(x.to(sae.device))
        assert code.inputs is not None
        codes.append(Code(code.values * trained.to(code.values)[:, None], code.indices))
        inputs.append(code.inputs)
    progress.report(ENCODING, len(rows), len(rows))
    found = TextCode(*Code.concat(codes))
    found.inputs = Normalized(*(torch.cat(parts) for parts in zip(*inputs)))
    found.n_latents, found.tokens = sae.shape.n_latents, strings
    lengths = torch.tensor([len(row.ids) for row in rows])
    found.documents = torch.tensor([row.text for row in rows]).repeat_interleave(lengths)
    return found


def _listed(texts: str | Sequence[str]) -> list[str]:
    """Return texts as a list; raise InputError for anything else."""
    if isinstance(texts, str):
        return [texts]
    listed: list[str] = [*texts] if isinstance(texts, Iterable) else [texts]
    for text in listed:
        if not isinstance(text, str):
            raise InputError(
                f"texts are a str or a list of str, got {type(text).__name__}; the contents of a "
                "file: Path(…).read_text()"
            )
    if not listed:
        raise InputError("there is no text to encode; give at least one")
    return listed


def _cut(lm: LM, texts: list[str], bos: int | None, context: int) -> tuple[list[_Row], list[str]]:
    """Return the contexts of texts, and the string of each of their tokens."""
    rows, strings = [], []
    room = context - (bos is not None)
    for number, text in enumerate(texts):
        ids = without_bos(tokenize_text(lm.tokenizer, text), bos)
        if not ids:
            raise InputError(f"text {number} has no token: {text!r:.80}")
        rows += [_Row(ids[at : at + room], number) for at in range(0, len(ids), room)]
        strings += token_strings(lm.tokenizer, ids)
    return rows, strings


def _read(lm: LM, rows: list[_Row], bos: int | None, acts: ActsConfig) -> tuple[Tensor, Tensor]:
    """Return the activations x[tokens, d] of contexts, and which are of the kind that the SAE was
    trained on."""
    head = [] if bos is None else [bos]
    tokenizer = lm.tokenizer
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    longest = max(len(head) + len(row.ids) for row in rows)
    pad = special[0] if special else 0
    padded = [head + row.ids + [pad] * (longest - len(head) - len(row.ids)) for row in rows]
    tokens = torch.tensor(padded)
    lengths = torch.tensor([len(head) + len(row.ids) for row in rows])
    attention = torch.arange(longest) < lengths[:, None]
    own = attention.clone()
    own[:, : len(head)] = False
    trained = own.clone()
    if acts.keep == "text":
        trained[:, 0] = False
        for token in special:
            trained &= tokens != token
    x = lm.acts(tokens.to(lm.device), attention.to(lm.device))
    return x[own.to(x.device)], trained[own]
