"""Text -> documents -> contexts of tokens.

A *document* is a (name, text) pair. Documents longer than PIECE characters are cut at line ends
into pieces that count as documents of their own, so that one long file can be split and has
standard errors. A hash of the content decides on which side of the train / validation / held-out
split a document lies (of the path, for the built-in text).

A *context* is a row of `acts.context` tokens. With borders = 'pack' documents follow one another
with a separator (BOS, else EOS, else nothing) between them; with 'split' each context belongs to
one document and its end is padded. With bos = 'auto' position 0 is the tokenizer's BOS, if it has
one. A document that brings its own BOS or separator gets no second one. keep = 'text' leaves out
position 0 whether or not it is BOS (in a model without BOS the first token takes its role), all
BOS, EOS and separator tokens, and padding.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksparse import pylm, rows
from ksparse.errors import InputError
from ksparse.pylm.text import SPLITS
from ksparse.recipe import Acts

PIECE = 20_000
SUFFIXES = (".txt", ".jsonl", ".parquet")
_log = logging.getLogger("ksparse")


class Document(NamedTuple):
    """One document; `index` counts the documents of the source (of the split, for the built-in
    text)."""

    index: int  # type: ignore[assignment]  # hides the method of a tuple
    name: str
    text: str


class Place(NamedTuple):
    """Where the next context begins: the token `offset` (separator included) of document `index`,
    in pass `epoch`."""

    epoch: int = 0
    index: int = 0  # type: ignore[assignment]  # hides the method of a tuple
    offset: int = 0


class Context(NamedTuple):
    """One row: its tokens[t], the document of each (-1: padding), where it began, and where the
    next one begins."""

    tokens: list[int]
    documents: list[int]
    start: Place
    next: Place


class Contexts(NamedTuple):
    """A batch of contexts, each field [b, t]: tokens; is it a token at all; is its activation kept;
    its document."""

    tokens: Tensor
    attention: Tensor
    keep: Tensor
    documents: Tensor


# ---- documents -----------------------------------------------------------------------------------


def documents(acts: Acts, split: str, start: int = 0) -> Iterator[Document]:
    """Yield one split's documents of a source, in its own order, from document number `start`
    on."""
    pairs: Iterator[tuple[str, str | Iterable[str]]]
    if acts.text == "pylm":
        pairs = pylm.documents(split)
        for index, (name, text) in enumerate(itertools.islice(_pieces(pairs), start, None), start):
            yield Document(index, name, text)
        return
    halves = _Noted(acts.text, "half a character (a lone surrogate), which is read as U+FFFD")
    nulls = _Noted(acts.text, f"null in the column {acts.text_field!r}, which is skipped")
    pairs = _local(acts, nulls) if _is_local(acts.text) else _hub(acts, nulls)
    for index, (name, text) in enumerate(_pieces(pairs)):
        if rows.has_half(text):
            halves.add(name)
            text = rows.whole_characters(text)
        if index >= start and _key(text) % 100 in SPLITS[split]:
            yield Document(index, name, text)
    halves.end()
    nulls.end()


class _Noted:
    """Texts of a source that are not used as they are: the first is named, all are counted."""

    def __init__(self, source: str, what: str):
        self.source, self.what, self.count = source, what, 0

    def add(self, name: str) -> None:
        self.count += 1
        if self.count == 1:
            _warn_once(
                f"text {self.source}: {name} holds {self.what}, like all others of this kind"
            )

    def end(self) -> None:
        if self.count > 1:
            _warn_once(f"text {self.source}: {self.count:,} texts in all hold {self.what}")


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _pieces(pairs: Iterator[tuple[str, str | Iterable[str]]]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of documents, given whole or in chunks; names of pieces have a number."""
    for name, text in pairs:
        pieces = _cut([text] if isinstance(text, str) else text)
        first, second = next(pieces, ""), next(pieces, None)
        if second is None:
            yield name, first
        else:
            for part, piece in enumerate(itertools.chain([first, second], pieces)):
                yield f"{name}#{part}", piece


def _cut(chunks: Iterable[str]) -> Iterator[str]:
    """Yield a document's pieces as soon as they are known: one without end takes no more memory."""
    rest = ""
    for chunk in chunks:
        rest, at = rest + chunk, 0
        while len(rest) - at > PIECE:
            end = rest.rfind("\n", at + PIECE // 2, at + PIECE) + 1 or at + PIECE
            yield rest[at:end]
            at = end
        rest = rest[at:]
    if rest:
        yield rest


def _is_local(source: str) -> bool:
    path = Path(source)
    try:
        exists = path.exists()
    except OSError as error:  # a name of thousands of characters
        raise InputError(
            f"text {source[:60]!r} cannot be looked up: {error.strerror or error}"
        ) from None
    is_named_so = path.suffix in (*SUFFIXES, *rows.COMPRESSIONS)
    return exists or path.is_absolute() or source.startswith(".") or is_named_so


def _local(acts: Acts, nulls: _Noted) -> Iterator[tuple[str, str | Iterable[str]]]:
    path, field = Path(acts.text), acts.text_field
    if not path.exists():
        raise InputError(
            f"text {path} does not exist; give a file or folder of {', '.join(SUFFIXES)}, a Hub "
            "data set, or 'pylm'"
        )
    try:
        files = sorted(file for file in path.rglob("*") if _kind(file)) if path.is_dir() else [path]
    except OSError as error:
        raise InputError(f"folder {path} cannot be read: {error.strerror or error}") from None
    if not files:
        raise InputError(
            f"folder {path} holds no text: expected files ending in {', '.join(SUFFIXES)} "
            f"(also with {', '.join(rows.COMPRESSIONS)})"
        )
    for file in files:
        kind = _kind(file)
        if kind is None:
            raise InputError(
                f"text {file} is of no known kind; expected a name ending in {', '.join(SUFFIXES)} "
                f"(also with {', '.join(rows.COMPRESSIONS)})"
            )
        if kind == ".txt":
            for number, chunks in enumerate(rows.documents(file)):
                yield f"{file.name}:{number}", chunks
            continue
        texts = (
            enumerate(rows.parquet(file, field))
            if kind == ".parquet"
            else (
                (number - 1, rows.text_of(row, field, f"{file}, line {number}"))
                for number, row in rows.jsonl(file)
            )
        )
        yield from _without_nulls(texts, str(file), file.name, field, nulls)


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in rows.COMPRESSIONS]
    return suffixes[-1] if file.is_file() and suffixes and suffixes[-1] in SUFFIXES else None


def _without_nulls(
    texts: Iterable[tuple[int, str | None]], source: str, name: str, field: str, nulls: _Noted
) -> Iterator[tuple[str, str]]:
    """Yield ('NAME:ROW', text) of (row, text); raise InputError where no row has text."""
    row, is_empty = -1, True
    for row, text in texts:
        if text is None:
            nulls.add(f"{name}:{row}")
        else:
            is_empty = False
            yield f"{name}:{row}", text
    if is_empty and row >= 0:
        raise InputError(
            f"{source}: the column {field!r} is null in every row; "
            "name another with --acts.text-field"
        )


def _hub(acts: Acts, nulls: _Noted) -> Iterator[tuple[str, str]]:
    datasets = rows.extra("datasets", "datasets", f"the data set {acts.text!r}")
    try:
        found = datasets.load_dataset(
            acts.text, acts.text_config or None, split=acts.text_split, streaming=True
        )
    except Exception as error:  # whatever it is, the user has named something that cannot be read
        raise InputError(
            f"text {acts.text!r} is neither a file here nor a data set that can be "
            f"read ({_in_short(error)})"
        ) from error
    texts = _texts_of(found, acts)
    yield from _without_nulls(texts, f"text {acts.text!r}", acts.text, acts.text_field, nulls)


def _texts_of(found: Iterable[Any], acts: Acts) -> Iterator[tuple[int, str | None]]:
    number = 0
    try:
        for number, row in enumerate(found):
            yield number, rows.text_of(row, acts.text_field, f"{acts.text}, row {number}")
    except InputError:
        raise
    except Exception as error:  # a connection that breaks, a damaged file of the data set
        raise InputError(
            f"text {acts.text!r} cannot be read after row {number:,} ({_in_short(error)})"
        ) from error


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


class Corpus:
    """One split of a text as contexts of tokens, from any place on, again and again."""

    def __init__(self, acts: Acts, tokenizer: Any, split: str, *, per_document: int | None = None):
        """per_document: use so many tokens of each document, so that a short evaluation sees many.

        cut_documents and cut_tokens say how many documents that has cut so far, and how many of
        their tokens are never seen.
        """
        if split not in SPLITS:
            raise InputError(f"split {split!r} does not exist; there are {', '.join(SPLITS)}")
        self.acts, self.split, self.per_document = acts, split, per_document
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id if acts.bos == "auto" else None
        found = [
            i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None
        ]  # an id of 0 is an id
        self.separator = found[0] if found else None
        self.pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (found or [0])[0]
        )
        self.special = set(found)
        self.names: dict[int, str] = {}
        self._cut: dict[int, int] = {}  # tokens left out, by document: a second pass adds none

    @property
    def cut_documents(self) -> int:
        """Documents so far that have more than `per_document` tokens."""
        return len(self._cut)

    @property
    def cut_tokens(self) -> int:
        """Tokens of these documents that are left out."""
        return sum(self._cut.values())

    def policy(self) -> dict[str, Any]:
        """Return what decides which activations are used, to be saved with every number that
        depends on it."""
        return {
            "context": self.acts.context,
            "bos_token": self.bos,
            "separator_token": self.separator,
            "borders": self.acts.borders,
            "keep": self.acts.keep,
            "split": self.split,
            "tokens_per_document": self.per_document,
        }

    def contexts(self, start: Place = Place()) -> Iterator[Context]:
        """Yield contexts for ever, beginning anew with the next epoch where the text ends."""
        cut = self._packed if self.acts.borders == "pack" else self._split
        while True:
            found = False
            for context in cut(start):
                found = True
                yield context
            if not found and start == Place(epoch=start.epoch):
                raise InputError(self._nothing())
            start = Place(epoch=start.epoch + 1)

    def _nothing(self) -> str:
        total = sum(
            1 for split in SPLITS for _ in itertools.islice(documents(self.acts, split), 1000)
        )
        if not total:
            return f"text {self.acts.text!r} is empty: no document in it"
        return (
            f"text {self.acts.text!r} has no {self.acts.context}-token context in its split "
            f"{self.split!r} "
            f"({total if total < 1000 else 'many'} documents in all, divided by a hash of each: 85 "
            "% train, "
            "5 % validation, 10 % held-out); give more text, or a smaller --acts.context"
        )

    def _tokenized(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (index, ids) from document `start` on, without the border that each gets here."""
        source, packed = documents(self.acts, self.split, start), self.acts.borders == "pack"
        while group := list(itertools.islice(source, 32)):
            rows = self.tokenizer(
                [text for _, _, text in group], add_special_tokens=False, verbose=False
            )["input_ids"]
            for document, ids in zip(group, rows):
                self.names[document.index] = document.name
                ids = without_bos(ids, self.separator if packed else self.bos)
                if packed and ids and ids[-1] == self.separator:
                    ids = ids[:-1]  # the next document's separator does its work
                if self.per_document is not None and len(ids) > self.per_document:
                    self._cut[document.index] = len(ids) - self.per_document
                yield document.index, ids[: self.per_document]

    def _packed(self, start: Place) -> Iterator[Context]:
        head = [] if self.bos is None else [self.bos]
        tokens: list[int] = []
        owners: list[int] = []
        began = start
        for index, ids in self._tokenized(start.index):
            if not ids:
                continue  # else two separators would follow one another
            ids = ids if self.separator is None else [self.separator, *ids]
            at = start.offset if index == start.index else 0
            while at < len(ids):
                if not tokens:
                    began = Place(start.epoch, index, at)
                    if head and at == 0 and ids[0] == self.separator:
                        at = 1  # the context's own BOS does the separator's work
                    tokens, owners = [*head], [index] * len(head)
                taken = ids[at : at + self.acts.context - len(tokens)]
                tokens, owners, at = tokens + taken, owners + [index] * len(taken), at + len(taken)
                if len(tokens) == self.acts.context:
                    yield Context(tokens, owners, began, Place(start.epoch, index, at))
                    tokens, owners = [], []

    def _split(self, start: Place) -> Iterator[Context]:
        head = [] if self.bos is None else [self.bos]
        room = self.acts.context - len(head)
        for index, ids in self._tokenized(start.index):
            for at in range(start.offset if index == start.index else 0, len(ids), room):
                tokens = head + ids[at : at + room]
                if len(tokens) >= 3:  # fewer predict nothing from text
                    missing = self.acts.context - len(tokens)
                    owners = [index] * len(tokens) + [-1] * missing
                    yield Context(
                        tokens + [self.pad] * missing,
                        owners,
                        Place(start.epoch, index, at),
                        Place(start.epoch, index, at + room),
                    )

    def batch(self, contexts: list[Context]) -> Contexts:
        """Stack contexts into tensors, with the mask of padding (by place, not by id) and of what
        is kept."""
        tokens = torch.tensor([context.tokens for context in contexts])
        owners = torch.tensor([context.documents for context in contexts])
        attention = owners >= 0
        keep = attention.clone()
        if self.acts.keep == "text":
            keep[:, 0] = False
            for special in self.special:
                keep &= tokens != special
        return Contexts(tokens, attention, keep, owners)
