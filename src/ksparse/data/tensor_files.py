"""Tensors in files that anybody made: one table of activations [rows, d] in each file.

| ending | read |
|---|---|
| .safetensors | memory-mapped |
| .npy | memory-mapped |
| .npz | memory-mapped; a compressed one into memory |
| .parquet | a column of fixed-size lists, into memory (package pyarrow) |

Beside the activations a file may hold, of the same rows, token ids (`tokens`, `token_ids`,
`input_ids`) and document numbers (`documents`, `document`, `document_ids`). A file with `token_ids`
and `hidden_states` is what vLLM writes for one request: one document.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksparse.errors import CorruptError, InputError
from ksparse.storage import rows

TOKENS = ("tokens", "token_ids", "input_ids")
DOCUMENTS = ("documents", "document", "document_ids")
REQUEST = {"token_ids", "hidden_states"}
"""The names in a file of one vLLM request."""
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS = {
    "F64": ("float64", np.float64),
    "F32": ("float32", np.float32),
    "F16": ("float16", np.float16),
    "BF16": ("bfloat16", np.uint16),
    "I64": ("int64", np.int64),
    "I32": ("int32", np.int32),
    "I16": ("int16", np.int16),
    "U8": ("uint8", np.uint8),
}


class Stored(NamedTuple):
    """A tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    """Returns it, memory-mapped where the format allows; the bits of bfloat16 as uint16."""


class FileRows(NamedTuple):
    """One file's activations and what is beside them."""

    x: np.ndarray
    """[rows, d], as stored."""
    dtype: str
    """Of x; the bits of bfloat16 are held as uint16."""
    documents: np.ndarray | None
    """[rows] document numbers."""
    has_tokens: bool
    is_request: bool
    """Whether the file is one request of vLLM."""

    def floats(self, at: slice | np.ndarray) -> Tensor:
        """Return rows in float32, [m, d]."""
        values = np.ascontiguousarray(self.x[at])
        if self.dtype == "bfloat16":
            return torch.from_numpy(values.astype(np.uint16)).view(torch.bfloat16).float()
        with np.errstate(over="ignore"):  # too large for float32: infinite, and refused as such
            return torch.from_numpy(values.astype(np.float32))


def open_table(file: Path, key: str = "", layer: int = -1) -> FileRows:
    """Open the activations of a file.

    Args:
        file: the file; its ending says what it is.
        key: the name of the activations; by default the only tensor that can be them.
        layer: which one of a tensor [rows, layers, d]; -1: it has no layers, or one.

    Raises:
        InputError: the file cannot be read, or has no such activations; what is beside them has
            another number of rows.
    """
    tensors = READERS[file.suffix](file)
    name = _choose(file, tensors, key)
    stored = tensors[name]
    if stored.dtype not in _FLOATS:
        raise InputError(
            f"{file}: {name!r} is of type {stored.dtype}; activations are {', '.join(_FLOATS)}"
        )
    length = stored.shape[0] if stored.shape else 0
    x = _rows_by_width(file, name, stored, layer)
    beside = {
        word: next((tensors[each] for each in words if each in tensors and each != name), None)
        for word, words in (("documents", DOCUMENTS), ("tokens", TOKENS))
    }
    columns = {
        word: _whole_numbers(file, word, column, length)
        for word, column in beside.items()
        if column is not None
    }
    return FileRows(
        x,
        stored.dtype,
        columns.get("documents"),
        "tokens" in columns,
        set(tensors) >= REQUEST and "documents" not in columns,
    )


def _choose(file: Path, tensors: dict[str, Stored], key: str) -> str:
    """Return the name of the activations among the tensors of a file."""
    names = ", ".join(
        f"{name} {each.dtype} {list(each.shape)}" for name, each in sorted(tensors.items())
    )
    if key:
        if file.suffix == ".npy" or key in tensors:
            return key if key in tensors else next(iter(tensors))
        raise InputError(f"{file} has no tensor {key!r}; it has {names[:300] or 'none'}")
    found = [
        name
        for name, each in tensors.items()
        if len(each.shape) in (2, 3) and each.dtype in _FLOATS
    ]
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"{file} has {'several tensors' if found else 'no tensor'} that can be activations "
        f"[rows, d] (it has {names[:300] or 'none'}); name "
        f"{'one' if found else 'a floating-point one of two dimensions'} with --key"
    )


def _rows_by_width(file: Path, name: str, stored: Stored, layer: int) -> np.ndarray:
    """Return a tensor as [rows, d]: itself, or one layer of it."""
    shape = list(stored.shape)
    if len(shape) == 3 and layer < 0 and shape[1] == 1:
        layer = 0
    if len(shape) == 3 and 0 <= layer < shape[1]:
        x = stored.read()[:, layer]
    elif len(shape) == 2 and layer < 0:
        x = stored.read()
    elif len(shape) == 3:
        raise InputError(
            f"{file}: {name!r} has the shape {shape}; if it is [rows, layers, d], give --layer 0 "
            f"to {shape[1] - 1}; if it is [texts, positions, d], write it as [rows, d]"
        )
    else:
        raise InputError(
            f"{file}: {name!r} has the shape {shape}, expected [rows, d]"
            + (" or, with --layer, [rows, layers, d]" if layer >= 0 else "")
        )
    if not x.size:
        raise InputError(f"{file}: {name!r} has the shape {shape}: no activation is in it")
    return x


def _whole_numbers(file: Path, name: str, stored: Stored, length: int) -> np.ndarray:
    if stored.shape != (length,):
        raise InputError(
            f"{file}: its {name} have the shape {list(stored.shape)}, its activations {length:,} "
            f"rows; expected one number for each row"
        )
    numbers = stored.read()
    if numbers.dtype.kind not in "iu" or stored.dtype == "bfloat16":
        raise InputError(f"{file}: its {name} are of type {stored.dtype}, not whole numbers")
    low = int(numbers.min()) if length else 0
    if low < 0 or (length and int(numbers.max()) >= 2**63):
        row = int(np.argmin(numbers))
        raise InputError(f"{file}, row {row:,}: its {name} hold {low}, expected 0 or more")
    return numbers


# ---- formats -------------------------------------------------------------------------------------


def _damaged(file: Path, error: object) -> CorruptError:
    return CorruptError(f"{file} is truncated or damaged: {str(error)[:200]}")


def _read_safetensors(file: Path) -> dict[str, Stored]:
    try:
        safe_open(file, "np")  # checks that all the header names is within the file
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(file, error) from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype, bits = _SAFETENSORS.get(entry["dtype"], (entry["dtype"], None))
        shape, offset = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        found[name] = Stored(shape, dtype, _mapper(file, bits, offset, shape))
    return found


def _mapper(
    file: Path, dtype: Any, offset: int, shape: tuple[int, ...], order: str = "C"
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if not math.prod(shape):  # nothing can be mapped
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", offset, shape, "F" if order == "F" else "C")

    return read


class _Header(NamedTuple):
    """What stands before the data of a .npy file."""

    shape: tuple[int, ...]
    order: str
    dtype: np.dtype[Any]
    length: int


def _read_header(stream: Any) -> _Header:
    """Read the header of a .npy file; raise ValueError for any but numbers."""
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran, dtype = readers[version](stream)
    if dtype.kind not in "fiub":
        raise ValueError("it holds Python objects or other things that are no numbers")
    return _Header(shape, "F" if fortran else "C", dtype, stream.tell())


def _read_npy(file: Path) -> dict[str, Stored]:
    try:
        with file.open("rb") as stream:
            header = _read_header(stream)
        _check_size(header, file.stat().st_size - header.length)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, error) from None
    read = _mapper(file, header.dtype, header.length, header.shape, header.order)
    return {file.stem: Stored(header.shape, header.dtype.name, read)}


def _check_size(header: _Header, size: int) -> None:
    needed = math.prod(header.shape) * header.dtype.itemsize
    if size < needed:
        raise ValueError(f"{size:,} bytes of data, {needed:,} expected")


def _read_npz(file: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            members = [each for each in archive.infolist() if each.filename.endswith(".npy")]
            return {
                each.filename.removesuffix(".npy"): _member(file, archive, stream, each)
                for each in members
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(file, error) from None


def _member(file: Path, archive: zipfile.ZipFile, stream: Any, member: zipfile.ZipInfo) -> Stored:
    """Return one array of an archive."""
    with archive.open(member) as content:
        header = _read_header(content)
    _check_size(header, member.file_size - header.length)
    if member.compress_type != zipfile.ZIP_STORED:
        name = member.filename
        return Stored(header.shape, header.dtype.name, lambda: _decompress(file, name, header))
    stream.seek(member.header_offset + 26)  # lengths of the name and of the extra field
    name_length, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
    offset = member.header_offset + 30 + name_length + extra + header.length
    read = _mapper(file, header.dtype, offset, header.shape, header.order)
    return Stored(header.shape, header.dtype.name, read)


def _decompress(file: Path, name: str, header: _Header) -> np.ndarray:
    try:
        with zipfile.ZipFile(file) as archive:
            data = archive.read(name)[header.length :]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(file, error) from None
    values = np.frombuffer(data, header.dtype, math.prod(header.shape))
    return values.reshape(header.shape, order="F" if header.order == "F" else "C")


def _read_parquet(file: Path) -> dict[str, Stored]:
    parquet = rows.import_extra("pyarrow.parquet", "datasets", f"{file}")
    arrow = rows.import_extra("pyarrow", "datasets", f"{file}")
    try:
        opened = parquet.ParquetFile(file)
        schema, length = opened.schema_arrow, opened.metadata.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(file, error) from None
    found = {}
    for field in schema:
        kind = getattr(field.type, "storage_type", field.type)
        width = kind.list_size if arrow.types.is_fixed_size_list(kind) else 0
        shape: tuple[int, ...] = (length, width) if width else (length,)
        if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
            shape, dtype = (length, 0), "list of varying length (write it as a fixed-size list)"
        else:
            dtype = str(kind.value_type if width else kind)
        dtype = {"float": "float32", "halffloat": "float16", "double": "float64"}.get(dtype, dtype)
        found[field.name] = Stored(shape, dtype, _column_reader(file, field.name, shape))
    return found


def _column_reader(file: Path, name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        import pyarrow
        from pyarrow import parquet

        try:
            column = parquet.read_table(file, columns=[name])[name].combine_chunks()
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(file, error) from None
        column = getattr(column, "storage", column)
        values = column.flatten() if len(shape) == 2 else column
        if column.null_count or values.null_count:
            nulls = column.is_null() if column.null_count else values.is_null()
            first = nulls.to_numpy(zero_copy_only=False).argmax()
            row = int(first) if column.null_count else int(first) // max(1, shape[-1])
            raise InputError(f"{file}, row {row:,}: column {name!r} is null there")
        array: np.ndarray = values.to_numpy(zero_copy_only=False)
        return array.reshape(shape)

    return read


READERS: dict[str, Callable[[Path], dict[str, Stored]]] = {
    ".safetensors": _read_safetensors,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}
"""How a file's tensors are found, by its ending."""
