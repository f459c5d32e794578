"""Read a text source as documents, split into train, validation and held-out text.

A *document* is a (name, text) pair. Sources are the built-in text, local files (.txt, .jsonl,
.parquet, also compressed) and data sets on the Hugging Face Hub.

Documents longer than PIECE_CHARACTERS are cut at line ends into pieces that count as documents of
their own, so that one long file can be split and has standard errors. A hash of the content decides
which split a document belongs to (of the path, for the built-in text), so the same text is never in
two splits.
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
from ksparse.storage import hub, rows

PIECE_CHARACTERS = 20_000
SUFFIXES = (".txt", ".jsonl", ".parquet")
_log = logging.getLogger("ksparse")


class Document(NamedTuple):
    """A document, or a piece of a long one."""

    index: int  # type: ignore[assignment]  # hides the method of a tuple
    """Its number in the source (in the split, for the built-in text)."""
    name: str
    text: str


def documents(acts: ActsConfig, split: str, start: int = 0) -> Iterator[Document]:
    """Yield one split's documents in the source's own order, from document number `start` on.

    Raises:
        InputError: The source does not exist, cannot be read, or has no text.
    """
    pairs: Iterator[tuple[str, str | Iterable[str]]]
    if acts.text == "pylm":
        pairs = pylm.documents(split)
        for index, (name, text) in enumerate(itertools.islice(_pieces(pairs), start, None), start):
            yield Document(index, name, text)
        return
    surrogates = _Report(acts.text, "half a character (a lone surrogate), which is read as U+FFFD")
    nulls = _Report(acts.text, f"null in the column {acts.text_field!r}, which is skipped")
    pairs = _read_local(acts, nulls) if _is_local(acts.text) else _read_hub(acts, nulls)
    for index, (name, text) in enumerate(_pieces(pairs)):
        if rows.has_lone_surrogate(text):
            surrogates.add(name)
            text = rows.replace_lone_surrogates(text)
        if index >= start and _hash(text) % 100 in SPLITS[split]:
            yield Document(index, name, text)
    surrogates.finish()
    nulls.finish()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class _Report:
    """Warns about texts that are not used as they are: names the first, then counts all."""

    def __init__(self, source: str, what: str):
        self.source, self.what, self.count = source, what, 0

    def add(self, name: str) -> None:
        self.count += 1
        if self.count == 1:
            _warn_once(
                f"text {self.source}: {name} holds {self.what}, like all others of this kind"
            )

    def finish(self) -> None:
        if self.count > 1:
            _warn_once(f"text {self.source}: {self.count:,} texts in all hold {self.what}")


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


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


# ---- sources


def _is_local(source: str) -> bool:
    path = Path(source)
    try:
        exists = path.exists()
    except OSError as error:  # a name of thousands of characters
        raise InputError(
            f"text {source[:60]!r} cannot be looked up: {error.strerror or error}"
        ) from None
    has_suffix = path.suffix in (*SUFFIXES, *rows.COMPRESSIONS)
    return exists or has_suffix or hub.is_plainly_local(source)


def _read_local(acts: ActsConfig, nulls: _Report) -> Iterator[tuple[str, str | Iterable[str]]]:
    path, field = Path(acts.text), acts.text_field
    for file in _text_files(path):
        suffix = _suffix(file)
        if suffix is None:
            raise InputError(
                f"text {file} is of no known kind; expected a name ending in {', '.join(SUFFIXES)} "
                f"(also with {', '.join(rows.COMPRESSIONS)})"
            )
        if suffix == ".txt":
            for number, chunks in enumerate(rows.documents(file)):
                yield f"{file.name}:{number}", chunks
            continue
        texts = (
            enumerate(rows.parquet(file, field))
            if suffix == ".parquet"
            else (
                (number - 1, rows.read_text(row, field, f"{file}, line {number}"))
                for number, row in rows.jsonl(file)
            )
        )
        yield from _skip_nulls(texts, str(file), file.name, field, nulls)


def _text_files(path: Path) -> list[Path]:
    """Return the file, or the text files in a folder in order; raise InputError for none."""
    if not path.exists():
        raise InputError(
            f"text {path} does not exist; give a file or folder of {', '.join(SUFFIXES)}, a Hub "
            "data set, or 'pylm'"
        )
    try:
        files = (
            sorted(file for file in path.rglob("*") if _suffix(file)) if path.is_dir() else [path]
        )
    except OSError as error:
        raise InputError(f"folder {path} cannot be read: {error.strerror or error}") from None
    if not files:
        raise InputError(
            f"folder {path} holds no text: expected files ending in {', '.join(SUFFIXES)} "
            f"(also with {', '.join(rows.COMPRESSIONS)})"
        )
    return files


def _suffix(file: Path) -> str | None:
    """Return the suffix of a text file, without that of a compression; None for other files."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in rows.COMPRESSIONS]
    return suffixes[-1] if file.is_file() and suffixes and suffixes[-1] in SUFFIXES else None


def _read_hub(acts: ActsConfig, nulls: _Report) -> Iterator[tuple[str, str]]:
    absence = hub.absence(acts.text)
    datasets = rows.import_extra("datasets", "datasets", f"the data set {acts.text!r}{absence}")
    try:
        dataset = datasets.load_dataset(
            acts.text, acts.text_config or None, split=acts.text_split, streaming=True
        )
    except Exception as error:  # of any kind: the user has named something that cannot be read
        raise InputError(
            f"text {acts.text!r} is neither a file here nor a data set that can be "
            f"read ({_summary(error)}){absence}"
        ) from error
    texts = _read_rows(dataset, acts)
    yield from _skip_nulls(texts, f"text {acts.text!r}", acts.text, acts.text_field, nulls)


def _read_rows(dataset: Iterable[Any], acts: ActsConfig) -> Iterator[tuple[int, str | None]]:
    number = 0
    try:
        for number, row in enumerate(dataset):
            yield number, rows.read_text(row, acts.text_field, f"{acts.text}, row {number}")
    except InputError:
        raise
    except Exception as error:  # a connection that breaks, a damaged file of the data set
        raise InputError(
            f"text {acts.text!r} cannot be read after row {number:,} ({_summary(error)})"
        ) from error


def _skip_nulls(
    texts: Iterable[tuple[int, str | None]], source: str, name: str, field: str, nulls: _Report
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


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
