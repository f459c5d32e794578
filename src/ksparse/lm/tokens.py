"""TODO ksparse.lm.tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ksparse.storage import rows

_log = logging.getLogger("ksparse")


class TokenBatch(NamedTuple):
    """A batch of contexts, each field [b, t]: tokens; is it a token at all; is its activation kept;
    its document."""

    tokens: Tensor
    attention: Tensor
    keep: Tensor
    documents: Tensor


# ---- tokens --------------------------------------------------------------------------------------


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return how each token looks in a text, a leading space included; a part of a character is
    shown as its bytes."""
    ids = list(ids)
    known = len(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens([i if i < known else 0 for i in ids])
    plain = tokenizer.batch_decode(
        [[i] if i < known else [] for i in ids], clean_up_tokenization_spaces=False
    )
    return [
        _shown(i, piece, text) if i < known else f"<id {i}>"
        for i, piece, text in zip(ids, pieces, plain)
    ]


def _shown(token: int, piece: str | None, text: str) -> str:
    if piece is None:
        return f"<id {token}>"
    if piece.startswith(
        "\u2581"
    ):  # SentencePiece marks a leading space so, and decoding a single token drops it
        return piece.replace("\u2581", " ")
    return f"<{piece}>" if "\ufffd" in text else text


# ---- contexts ------------------------------------------------------------------------------------


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that somebody gives by hand; half a character is read as U+FFFD."""
    if rows.has_half(text):
        _log.warning("the text holds half a character (a lone surrogate), which is read as U+FFFD")
        text = rows.whole_characters(text)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def without_bos(ids: list[int], bos: int | None) -> list[int]:
    """Return a text's ids without the BOS that they begin with, if they do.

    Whoever puts BOS before them then gives the text one, not two. Chat templates that are rendered
    to text (`apply_chat_template(tokenize=False)`) begin with the string of BOS.
    """
    return ids[1:] if bos is not None and ids[:1] == [bos] else ids
