"""Rows and documents of files that others wrote: .txt, .jsonl, .csv and .parquet, also compressed.

Anything wrong with such a file is one InputError that names the file and the line or row. A file is
never held in memory as a whole. A line or a cell is, so it may have LONGEST bytes: neither an
endless line nor a small file that decompresses to terabytes takes all memory.

Text is UTF-8. Lone surrogates, which scraped JSON contains, are let through: the reader of the text
decides whether to replace or refuse them. Lines end with LF, CR LF or CR; a byte order mark at the
start is dropped.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksparse.errors import InputError

COMPRESSIONS = (".xz", ".gz", ".zst")
SEPARATOR = "<|endoftext|>"
"""Text between the documents of a .txt file."""
LONGEST = 1 << 28
"""Largest size of a line or a cell, in bytes."""
_CHUNK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: the module, such as "pyarrow.parquet".
        extra: the extra of ksparse that installs the package.
        purpose: what needs the package, for the message.

    Raises:
        InputError: if it is not installed; it says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise InputError(
            f"{purpose} needs the package {package}: pip install 'ksparse[{extra}]'"
        ) from None


def columns(row: Any) -> str:
    """Return the names of a row's columns for a message, or the type of what is not a row."""
    if not isinstance(row, Mapping):
        return type(row).__name__
    names = [shown(name) for name in itertools.islice(row, 20)]
    return ", ".join(names + ["…"] * (len(row) > 20)) or "nothing"


def shown(value: Any) -> str:
    """Return a value from a file as text for a message: 60 characters, without lone surrogates."""
    return replace_lone_surrogates(str(value)[:60])


# ---- lone surrogates -----------------------------------------------------------------------------


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text has lone surrogates (halves of UTF-16 pairs).

    No tokenizer accepts them, and UTF-8 cannot encode them.
    """
    return not text.isascii() and _SURROGATE.search(text) is not None


def replace_lone_surrogates(text: str) -> str:
    """Return a text with U+FFFD in place of each lone surrogate; a pair becomes its character.

    Example:
        >>> replace_lone_surrogates("a\\ud83d\\ude00 b\\ud83d") == "a\\U0001f600 b\\ufffd"
        True
    """
    return (
        text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if has_lone_surrogate(text)
        else text
    )


# ---- bytes and lines -----------------------------------------------------------------------------


class _Zstandard(io.RawIOBase):
    """Reader of a .zst file. zstandard's own reader does not notice that a file is truncated."""

    def __init__(self, file: Path):
        self.package = import_extra("zstandard", "zstandard", f"reading {file}")
        self.source = file.open("rb")
        self.frame: Any = None
        self.packed, self.unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.unpacked:
            if not self.packed:  # read little: it may decompress to 30,000 times the size
                self.packed = self.source.read(4096)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self.frame = self.frame or self.package.ZstdDecompressor().decompressobj()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except self.package.ZstdError as error:
                raise OSError(error) from None
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        taken = min(len(buffer), len(self.unpacked))
        buffer[:taken], self.unpacked = self.unpacked[:taken], self.unpacked[taken:]
        return taken

    def close(self) -> None:
        self.source.close()
        super().close()


def _open_decompressed(file: Path) -> io.BufferedReader | lzma.LZMAFile | gzip.GzipFile:
    if file.suffix == ".zst":
        return io.BufferedReader(_Zstandard(file), _CHUNK)
    if file.suffix == ".xz":
        return lzma.open(file, "rb")
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


@contextmanager
def _translate_errors(file: Path, where: Callable[[], str] = str) -> Iterator[None]:
    """Turn errors of reading and decompressing into InputError; `where` says how far it got."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, EOFError, OSError, MemoryError) as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(
            f"{file} cannot be read{where()}: {reason}; it is truncated or not what its name says"
        ) from None


def lines(file: Path, *, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, also compressed.

    Args:
        file: the file; its ending says how it is compressed.
        keep_ends: keep the newline characters.

    Yields:
        The number of a line, from 1, and the line.
    """
    number = 0
    with (
        _translate_errors(file, lambda: f" after line {number:,}"),
        _open_decompressed(file) as stream,
    ):
        while block := stream.readline(LONGEST + 1):
            if len(block) > LONGEST:
                raise InputError(
                    f"{file}, line {number + 1}: longer than {LONGEST:,} bytes; "
                    "a line holds one row"
                )
            for line in block.splitlines(keep_ends):
                number += 1
                try:
                    text = (line if number > 1 else line.removeprefix(codecs.BOM_UTF8)).decode(
                        "utf-8", "surrogatepass"
                    )
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{file}, line {number}: not UTF-8: {error}; convert the file first"
                    ) from None
                yield number, text


# ---- file formats --------------------------------------------------------------------------------


def jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of a file of JSON lines; blank lines are left out."""
    for number, line in lines(file):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{file}, line {number}: not JSON: {error}; expected one row in each line"
                ) from None
            yield number, value


def table(file: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of separated values (.csv, .tsv), whose first line names the
    columns."""
    rows = csv.DictReader((line for _, line in lines(file, keep_ends=True)), delimiter=delimiter)
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{file} cannot be read after line {rows.line_num:,}: {error}") from None


def documents(file: Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a .txt file, without blank ones.

    Yields:
        Each document as an iterator of chunks of text, to be read before the next document.
    """
    with (
        _translate_errors(file),
        _open_decompressed(file) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", "surrogatepass") as stream,
    ):
        try:
            for _, pairs in itertools.groupby(_chunks(file, stream), lambda pair: pair[0]):
                chunks = (chunk for _, chunk in pairs)
                blank, length = [], 0
                for chunk in chunks:
                    blank.append(chunk)
                    length += len(chunk)
                    if chunk.strip():
                        yield itertools.chain(blank, chunks)
                        break
                    if length > LONGEST:
                        raise InputError(f"{file} has {LONGEST:,} blank characters in one document")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8: {error}; convert it first") from None


def joined(chunks: Iterable[str], file: Path) -> str:
    """Return a document's chunks as one text; raise InputError if it is longer than LONGEST."""
    parts, length = [], 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length > LONGEST:
            raise InputError(
                f"{file} has a document of more than {LONGEST:,} characters; "
                f"put {SEPARATOR} between documents"
            )
    return "".join(parts)


def _chunks(file: Path, stream: io.TextIOBase) -> Iterator[tuple[int, str]]:
    """Yield (document number, chunk of it).

    The end of what was read is kept for the next chunk, since a separator may start there.
    """
    number, kept = 0, ""
    while chunk := stream.read(_CHUNK):
        if 4 * chunk.count("\0") > len(chunk):
            raise InputError(
                f"{file} is not UTF-8 text: it is full of NUL, as UTF-16 and binary files are; "
                "convert it first"
            )
        text, *following = (kept + chunk).split(SEPARATOR)
        for start in following:
            yield number, text
            number, text = number + 1, start
        end = max(0, len(text) - len(SEPARATOR) + 1)
        kept = text[end:]
        yield number, text[:end]
    yield number, kept


def parquet(file: Path, column: str = "", *, only: Sequence[str] = ()) -> Iterator[Any]:
    """Yield the rows of a .parquet file as dictionaries, or the texts of one column, None for null.

    Args:
        file: the file.
        column: a column of text, whose texts to yield.
        only: columns of the dictionaries, as far as there are such; all if the file has none of
            them.
    """
    reader = import_extra("pyarrow.parquet", "datasets", f"reading {file}")
    number = 0
    try:
        with reader.ParquetFile(file) as table:
            if column:
                _check_column(file, column, table.schema_arrow)
            names = table.schema_arrow.names
            wanted = [column] if column else [name for name in names if name in only]
            for batch in table.iter_batches(256, columns=wanted or None):
                for value in batch.column(0) if column else batch.to_pylist():
                    yield _cell(value, f"{file}, row {number}") if column else value
                    number += 1
    except InputError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InputError(
            f"{file} cannot be read after row {number:,}: {reason}; "
            "it is truncated or not what its name says"
        ) from None


def _check_column(file: Path, column: str, schema: Any) -> None:
    """Raise InputError unless a column of an Arrow schema holds text."""
    index = schema.get_field_index(column)  # -1 also if two columns have the name
    dtype = schema.field(index).type if index >= 0 else None
    dtype = getattr(dtype, "value_type", dtype) if str(dtype).startswith("dictionary") else dtype
    if str(dtype) not in ("string", "large_string", "string_view", "null"):
        what = (
            f"the column {column!r} holds {dtype}, not text"
            if index >= 0
            else f"no text in the column {column!r}"
        )
        raise InputError(
            f"{file}: {what}; there are {columns(dict.fromkeys(schema.names))}. "
            f"Name it with --acts.text-field{_other_kinds('list' in str(dtype))}"
        )


def _cell(scalar: Any, where: str) -> str | None:
    """Return the text of an Arrow scalar, None for null."""
    scalar = getattr(scalar, "value", scalar)  # of a dictionary-encoded column
    data = scalar.as_buffer() if scalar is not None and scalar.is_valid else None
    if data is None:
        return None
    if data.size > LONGEST:
        raise InputError(f"{where}: longer than {LONGEST:,} bytes")
    try:
        text: str = data.to_pybytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None
    return text


def read_text(row: Any, column: str, where: str) -> str | None:
    """Return the text in a column of a row.

    Args:
        row: a row of a file; anything but a mapping is refused.
        column: the column.
        where: file and line, for the message.

    Returns:
        The text, or None for null.

    Raises:
        InputError: if the row has no such column, or something other than text in it.
    """
    if isinstance(row, Mapping) and column in row:
        value = row[column]
        if value is None or isinstance(value, str):
            return value
        type_name = type(value).__name__
        what = f"the column {column!r} holds {shown(value)!r}, of type {type_name}, not text"
        is_list = isinstance(value, list)
    else:
        what, is_list = f"no text in the column {column!r}", False
    raise InputError(
        f"{where}: {what}; there are {columns(row)}. Name it with --acts.text-field"
        f"{_other_kinds(is_list)}"
    )


def _other_kinds(is_list: bool) -> str:
    """Say how a column of lists is read."""
    return (
        "; for conversations give --acts.chat template, for token ids --acts.pretokenized True"
        if is_list
        else ""
    )
