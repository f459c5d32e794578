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

from ksparse import pylm
from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.pylm.text import SPLITS
from ksparse.storage import rows

PIECE = 20_000
SUFFIXES = (".txt", ".jsonl", ".parquet")
_log = logging.getLogger("ksparse")


class Document(NamedTuple):
    """One document; `index` counts the documents of the source (of the split, for the built-in
    text)."""

    index: int  # type: ignore[assignment]  # hides the method of a tuple
    name: str
    text: str


# ---- documents -----------------------------------------------------------------------------------


def documents(acts: ActsConfig, split: str, start: int = 0) -> Iterator[Document]:
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


def _local(acts: ActsConfig, nulls: _Noted) -> Iterator[tuple[str, str | Iterable[str]]]:
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


def _hub(acts: ActsConfig, nulls: _Noted) -> Iterator[tuple[str, str]]:
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


def _texts_of(found: Iterable[Any], acts: ActsConfig) -> Iterator[tuple[int, str | None]]:
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
