"""Read a text source as documents, split into train, validation and held-out text.

A *document* is a named text, conversation or list of token ids. Sources are the built-in text,
local files, data sets on the Hugging Face Hub (`data.sources`), and mixtures of them
(`data.mixture`).

Documents longer than PIECE_CHARACTERS, or lists of more than PIECE_TOKENS ids, are cut (texts at
line ends) into pieces that count as documents of their own, so that one long file can be split and
has standard errors. A conversation stays whole. A hash of the content decides which split a
document belongs to (of the path, for the built-in text), so the same text is never in two splits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ksparse import pylm
from ksparse.config import ActsConfig
from ksparse.data.mixture import interleave, parts_of
from ksparse.data.sources import (
    RowReport,
    read_conversations,
    read_texts,
    read_token_ids,
    warn_once,
)
from ksparse.errors import InputError
from ksparse.lm.chat import Conversation
from ksparse.pylm.text import SPLITS
from ksparse.storage import rows

PIECE_CHARACTERS = 20_000
PIECE_TOKENS = 5_000


class Document(NamedTuple):
    """A document, or a piece of a long one."""

    index: int  # type: ignore[assignment]  # hides the method of a tuple
    """Its number in the source (in the split, for the built-in text)."""
    name: str
    text: str = ""
    """Empty where one of the following is given."""
    chat: Conversation | None = None
    """With `acts.chat`."""
    ids: list[int] | None = None
    """With `acts.pretokenized`."""

    @property
    def size(self) -> int:
        """Characters of a text, or of a conversation as JSON; the number of token ids."""
        if self.ids is not None:
            return len(self.ids)
        return len(self.text) if self.chat is None else len(_as_json(self.chat))


def documents(acts: ActsConfig, split: str, start: int = 0) -> Iterator[Document]:
    """Yield one split's documents in the source's own order, from document number `start` on.

    Raises:
        InputError: The source does not exist, cannot be read, or has no text.
    """
    if acts.text == "pylm":
        if acts.chat != "none" or acts.pretokenized:
            raise InputError(
                "acts.text is 'pylm', the built-in text, which has neither conversations nor token "
                "ids; give a file or data set with acts.text"
            )
        pairs = _pieces(pylm.documents(split))
        for index, (name, text) in enumerate(itertools.islice(pairs, start, None), start):
            yield Document(index, name, text)
        return
    for index, document in enumerate(_mixed(acts)):
        if index >= start and _hash(document) % 100 in SPLITS[split]:
            yield document._replace(index=index)


def _mixed(acts: ActsConfig) -> Iterator[Document]:
    """Yield the documents of a source, or those of several by weight."""
    parts = parts_of(acts.text)
    if len(parts) == 1:
        yield from _read(replace(acts, text=parts[0].text))
        return

    def tell(part: int, counts: list[int]) -> None:
        read = ", ".join(f"{count:,} of {name}" for count, (_, name) in zip(counts, parts))
        warn_once(
            f"text {acts.text}: {parts[part].text} is the first that ends, after {read} documents; "
            "the next epoch begins there, so that the weights hold"
        )

    sources = [(weight, _read(replace(acts, text=text))) for weight, text in parts]
    yield from interleave(sources, lambda document: document.size, tell)


def _read(acts: ActsConfig) -> Iterator[Document]:
    """Yield the documents of one source; their numbers are not set."""
    surrogates = RowReport(
        acts.text, "half a character (a lone surrogate), which is read as U+FFFD"
    )
    nothing = "null or no message" if acts.chat != "none" else "null"
    nulls = RowReport(acts.text, f"{nothing} in the column {acts.column!r}, which is skipped")
    for document in _read_any(acts, nulls):
        if rows.has_lone_surrogate(document.text):
            surrogates.add(document.name)
            yield document._replace(text=rows.replace_lone_surrogates(document.text))
        elif document.chat and _replaced(tuple(document.chat)) != tuple(document.chat):
            surrogates.add(document.name)
            yield document._replace(chat=Conversation(*_replaced(tuple(document.chat))))
        else:
            yield document
    surrogates.finish()
    nulls.finish()


def _read_any(acts: ActsConfig, nulls: RowReport) -> Iterator[Document]:
    if acts.chat != "none":
        for name, chat in read_conversations(acts, nulls):
            yield Document(-1, name, chat=chat)
    elif acts.pretokenized:
        for name, ids in read_token_ids(acts, nulls):
            for at in range(0, max(1, len(ids)), PIECE_TOKENS):
                piece = f"{name}#{at // PIECE_TOKENS}" if len(ids) > PIECE_TOKENS else name
                yield Document(-1, piece, ids=ids[at : at + PIECE_TOKENS])
    else:
        for name, text in _pieces(read_texts(acts, nulls)):
            yield Document(-1, name, text)


def _replaced(value: Any) -> Any:
    """Return a value with U+FFFD in place of each lone surrogate in its texts."""
    if isinstance(value, str):
        return rows.replace_lone_surrogates(value)
    if isinstance(value, dict):
        return {_replaced(key): _replaced(item) for key, item in value.items()}
    return type(value)(map(_replaced, value)) if isinstance(value, (list, tuple)) else value


def _as_json(chat: Conversation) -> str:
    return json.dumps([chat.messages, chat.tools], sort_keys=True, default=str)


def _hash(document: Document) -> int:
    content = document.text
    if document.chat is not None:
        content = _as_json(document.chat)
    elif document.ids is not None:
        content = json.dumps(document.ids)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


# ---- pieces


def _pieces(pairs: Iterator[tuple[str, str | Iterable[str]]]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the pieces of documents, whose texts are strings or chunks.

    Pieces of a document that is cut have a number in their name.
    """
    for name, text in pairs:
        pieces = _cut([text] if isinstance(text, str) else text)
        first, second = next(pieces, ""), next(pieces, None)
        if second is None:
            yield name, first
        else:
            for number, piece in enumerate(itertools.chain([first, second], pieces)):
                yield f"{name}#{number}", piece


def _cut(chunks: Iterable[str]) -> Iterator[str]:
    """Yield a document's pieces as soon as they are complete, so that an endless document takes no
    more memory than a piece."""
    text = ""
    for chunk in chunks:
        text, at = text + chunk, 0
        while len(text) - at > PIECE_CHARACTERS:
            end = at + PIECE_CHARACTERS
            end = text.rfind("\n", at + PIECE_CHARACTERS // 2, end) + 1 or end
            yield text[at:end]
            at = end
        text = text[at:]
    if text:
        yield text
