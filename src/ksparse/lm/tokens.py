"""Token ids and their texts, and the tensors of a batch of contexts."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ksparse.storage import rows

_log = logging.getLogger("ksparse")


class TokenBatch(NamedTuple):
    """A batch of contexts, each field [b, t]."""

    tokens: Tensor
    """Token ids."""
    attention: Tensor
    """bool: False for padding."""
    keep: Tensor
    """bool: whether the activation at this position is used."""
    documents: Tensor
    """Index of the document each token belongs to; -1 for padding."""


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return each token's text as it looks inside a text, with its leading space.

    A token that is part of a character is shown as its bytes, an unknown id as `<id 123>`.
    """
    ids = list(ids)
    known = len(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens([i if i < known else 0 for i in ids])
    texts = tokenizer.batch_decode(
        [[i] if i < known else [] for i in ids], clean_up_tokenization_spaces=False
    )
    return [
        _token_string(i, piece, text) if i < known else f"<id {i}>"
        for i, piece, text in zip(ids, pieces, texts)
    ]


def _token_string(token: int, piece: str | None, text: str) -> str:
    if piece is None:
        return f"<id {token}>"
    # SentencePiece marks a leading space like this; decoding a single token drops it.
    if piece.startswith("\u2581"):
        return piece.replace("\u2581", " ")
    return f"<{piece}>" if "\ufffd" in text else text


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text given by the user, without special tokens; a lone surrogate is read as
    U+FFFD."""
    if rows.has_lone_surrogate(text):
        _log.warning("the text holds half a character (a lone surrogate), which is read as U+FFFD")
        text = rows.replace_lone_surrogates(text)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def without_bos(ids: list[int], bos: int | None) -> list[int]:
    """Return ids without the BOS they begin with, if any, so that a caller who adds BOS adds no
    second one.

    Chat templates rendered to text (`apply_chat_template(tokenize=False)`) begin with BOS.
    """
    return ids[1:] if bos is not None and ids[:1] == [bos] else ids
