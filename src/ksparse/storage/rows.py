"""Rows and documents of files that somebody else wrote: .txt .jsonl .csv .parquet, also compressed.

Whatever is wrong with such a file is one InputError that names it, and the line or row. A file is
never held whole; what must be, a line or a cell, may have LONGEST bytes, so that neither an endless
line nor a small file that unpacks to terabytes takes the memory. Text is UTF-8. Half a character (a
lone surrogate), which scraped JSON has, is let through: what reads texts decides whether to mend it
or to refuse it. Lines end with LF, CR LF or CR; a byte order mark at the start is dropped.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksparse.errors import InputError

COMPRESSIONS = (".xz", ".gz", ".zst")
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
LONGEST = 1 << 28
"""Bytes that one line or one cell may have."""
_CHUNK = 1 << 20
_HALF = re.compile("[\ud800-\udfff]")


def extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise InputError(
            f"{purpose} needs the package {package}: pip install 'ksparse[{extra}]'"
        ) from None


def columns(row: Any) -> str:
    """Say which columns a row has, or what it is instead of a row."""
    if not isinstance(row, Mapping):
        return type(row).__name__
    names = [shown(name) for name in itertools.islice(row, 20)]
    return ", ".join(names + ["…"] * (len(row) > 20)) or "nothing"


def shown(value: Any) -> str:
    """Return a value from a file as it can stand in a message: short, and in whole characters."""
    return whole_characters(str(value)[:60])


# ---- half characters -----------------------------------------------------------------------------


def has_half(text: str) -> bool:
    """Return whether a text holds half a character, which no tokenizer and no UTF-8 file takes."""
    return not text.isascii() and _HALF.search(text) is not None


def whole_characters(text: str) -> str:
    """Return a text with U+FFFD for each half character; two that belong together become one."""
    return (
        text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if has_half(text)
        else text
    )


# ---- bytes and lines -----------------------------------------------------------------------------


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file, unpacked; zstandard's own reader takes a cut one for a whole
    one."""

    def __init__(self, file: Path):
        self.package = extra("zstandard", "zstandard", f"reading {file}")
        self.source = file.open("rb")
        self.frame: Any = None
        self.packed, self.unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.unpacked:
            self.packed = self.packed or self.source.read(
                4096
            )  # little, since it may unpack to 30,000 times as much
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


def _open(file: Path) -> io.BufferedReader | lzma.LZMAFile | gzip.GzipFile:
    if file.suffix == ".zst":
        return io.BufferedReader(_Zstandard(file), _CHUNK)
    if file.suffix == ".xz":
        return lzma.open(file, "rb")
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


@contextmanager
def _explained(file: Path, where: Callable[[], str] = str) -> Iterator[None]:
    """Say which file cannot be read; `where` says how far it could."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, EOFError, OSError, MemoryError) as error:
        why = str(error).strip() or type(error).__name__
        raise InputError(
            f"{file} cannot be read{where()}: {why}; it is truncated or not what its name says"
        ) from None


def lines(file: Path, *, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line)."""
    number = 0
    with _explained(file, lambda: f" after line {number:,}"), _open(file) as stream:
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


# ---- kinds of files ------------------------------------------------------------------------------


def jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a file of JSON lines, without blank ones."""
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
    """Yield the rows of a file of separated values, whose first line names the columns."""
    rows = csv.DictReader((line for _, line in lines(file, keep_ends=True)), delimiter=delimiter)
    try:
        yield from rows
    except csv.Error as error:
        raise InputError(f"{file} cannot be read after line {rows.line_num:,}: {error}") from None


def documents(file: Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a .txt file that are not blank, each as chunks.

    They are to be read before the next document is asked for.
    """
    with (
        _explained(file),
        _open(file) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", "surrogatepass") as stream,
    ):
        try:
            for _, pairs in itertools.groupby(_chunks(file, stream), lambda pair: pair[0]):
                rest = (chunk for _, chunk in pairs)
                begun, length = [], 0
                for chunk in rest:
                    begun.append(chunk)
                    length += len(chunk)
                    if chunk.strip():
                        yield itertools.chain(begun, rest)
                        break
                    if length > LONGEST:
                        raise InputError(f"{file} has {LONGEST:,} blank characters in one document")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8: {error}; convert it first") from None


def joined(chunks: Iterable[str], file: Path) -> str:
    """Return a document that is wanted whole."""
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
    """Yield (document, a part of it). What may begin a separator waits for the next part."""
    number, rest = 0, ""
    while chunk := stream.read(_CHUNK):
        if 4 * chunk.count("\0") > len(chunk):
            raise InputError(
                f"{file} is not UTF-8 text: it is full of NUL, as UTF-16 and binary files are; "
                "convert it first"
            )
        first, *others = (rest + chunk).split(SEPARATOR)
        for text in others:
            yield number, first
            number, first = number + 1, text
        border = max(0, len(first) - len(SEPARATOR) + 1)
        rest = first[border:]
        yield number, first[:border]
    yield number, rest


def parquet(file: Path, column: str = "") -> Iterator[Any]:
    """Yield the rows of a .parquet file; of a column of text what it holds, None for null."""
    reader = extra("pyarrow.parquet", "datasets", f"reading {file}")
    number = 0
    try:
        with reader.ParquetFile(file) as opened:
            if column:
                _check_column(file, column, opened.schema_arrow)
            for batch in opened.iter_batches(256, columns=[column] if column else None):
                for value in batch.column(0) if column else batch.to_pylist():
                    yield _cell(value, f"{file}, row {number}") if column else value
                    number += 1
    except InputError:
        raise
    except Exception as error:  # pyarrow has many, of several kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InputError(
            f"{file} cannot be read after row {number:,}: {why}; "
            "it is truncated or not what its name says"
        ) from None


def _check_column(file: Path, column: str, schema: Any) -> None:
    at = schema.get_field_index(column)  # -1 also where two have the name
    held = schema.field(at).type if at >= 0 else None
    held = getattr(held, "value_type", held) if str(held).startswith("dictionary") else held
    if str(held) not in ("string", "large_string", "string_view", "null"):
        what = (
            f"the column {column!r} holds {held}, not text"
            if at >= 0
            else f"no text in the column {column!r}"
        )
        raise InputError(
            f"{file}: {what}; there are {columns(dict.fromkeys(schema.names))}. "
            "Name it with --acts.text-field"
        )


def _cell(scalar: Any, where: str) -> str | None:
    scalar = getattr(scalar, "value", scalar)  # of a dictionary
    data = scalar.as_buffer() if scalar is not None and scalar.is_valid else None
    if data is None:
        return None
    if data.size > LONGEST:
        raise InputError(f"{where}: longer than {LONGEST:,} bytes")
    try:
        return data.to_pybytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None


def text_of(row: Any, column: str, where: str) -> str | None:
    """Return the text in a row's column, None where it is null; raise InputError for none."""
    if (
        isinstance(row, Mapping)
        and column in row
        and (row[column] is None or isinstance(row[column], str))
    ):
        return row[column]
    if isinstance(row, Mapping) and column in row:
        kind = type(row[column]).__name__
        what = f"the column {column!r} holds {shown(row[column])!r}, of type {kind}, not text"
    else:
        what = f"no text in the column {column!r}"
    raise InputError(f"{where}: {what}; there are {columns(row)}. Name it with --acts.text-field")
