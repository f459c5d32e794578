"""One reader for tensors in files from anywhere, which checks each before it is used.

    weights = safetensors_file(file)    read names, shapes and types from the header, no tensor yet
    weights.take("W_enc", "n", 768)     a tensor as float32; a letter is one length in all calls
    weights.counts("since", 4096)       a tensor of whole numbers, as int64
    weights.number("k")                 a tensor with a single element
    weights.finish(ignored)             raise if any tensor was not taken: it would be lost
    weights.all({"W_enc": (n, d), …})   exactly these tensors

A tensor that is missing, has another shape or type, or is not finite is refused by its name. Shape
and type are checked before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_HEADER = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class StoredTensor(NamedTuple):
    """A tensor in a file that has not been read. dtype is torch's, or the name of a type that this
    reader does not support."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


class CheckedTensors:
    """The tensors of one file, or of one SAE in several files.

    Args:
        file: the file, for messages.
        tensors: the tensors by name.
        error: the class that is raised; CorruptError for files that ksparse wrote.
    """

    def __init__(
        self, file: Path, tensors: Mapping[str, StoredTensor], error: type[InputError] = InputError
    ):
        self.file, self.error, self.lengths = file, error, dict[str, int]()
        self._tensors, self._taken = dict(tensors), set[str]()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def take(self, key: str, *dims: str | int) -> Tensor:
        """Return a tensor of the shape `dims` as float32. The first use of a letter sets its
        length."""
        values = self._read(key, dims, FLOATS).to(torch.float32).contiguous()
        if values.numel() and not all(math.isfinite(end) for end in values.aminmax()):
            raise self.error(
                f"{self.file}: tensor {key!r} holds NaN or infinity; it is damaged, or training "
                f"had failed"
            )
        return values

    def counts(self, key: str, *dims: str | int) -> Tensor:
        """Return a tensor of the shape `dims`, of whole numbers of at least 0, as int64."""
        values = self._read(key, dims, INTEGERS).to(torch.int64).contiguous()
        if values.numel() and int(values.min()) < 0:
            raise self.error(
                f"{self.file}: tensor {key!r} holds {int(values.min())}, expected counts of at "
                f"least 0"
            )
        return values

    def number(self, key: str, default: float | None = None) -> float:
        """Return a tensor with one element as a number; `default`, if given, where it is
        missing."""
        if key not in self._tensors and default is not None:
            return default
        if math.prod(self.stored(key).shape) != 1:
            raise self.error(
                f"{self.file}: {key!r} has shape {list(self.stored(key).shape)}, expected a "
                f"single number"
            )
        number = float(self._read(key, self.stored(key).shape, FLOATS + INTEGERS))
        if not math.isfinite(number):
            raise self.error(f"{self.file}: {key!r} is {number}, expected a finite number")
        return number

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a tensor with one element as a whole number."""
        number = self.number(key, default)
        if number != int(number):
            raise self.error(f"{self.file}: {key!r} is {number}, expected a whole number")
        return int(number)

    def all(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        counts: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Mapping[str, Tensor]:
        """Return exactly the tensors named in `shapes`, as float32, and `counts`, as int64. Names,
        shapes and types are checked now; a tensor is read each time that it is looked up, so that
        no more than one need be in memory."""
        counts = counts or {}
        for key, shape in {**shapes, **counts}.items():
            self._check(key, shape, INTEGERS if key in counts else FLOATS)
        self.finish({*shapes, *counts})
        return _ReadWhenUsed(
            {key: partial(self.take, key, *shape) for key, shape in shapes.items()}
            | {key: partial(self.counts, key, *shape) for key, shape in counts.items()}
        )

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Raise for tensors that were neither taken nor are named in `ignored`."""
        left = sorted(map(str, set(self._tensors) - self._taken - set(ignored)))
        if left:
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            raise self.error(
                f"{self.file} holds {', '.join(left[:8])[:300]}{more}, which an SAE of this kind "
                "does not have; reading it would lose that"
            )

    def names(self) -> str:
        """Return the names of all tensors, for messages."""
        return ", ".join(sorted(map(str, self._tensors))) or "none"

    def stored(self, key: str) -> StoredTensor:
        """Return a tensor that has not been read; raise, listing the others, where it is
        missing."""
        if key not in self._tensors:
            raise self.error(f"{self.file} lacks the tensor {key!r}; it has {self.names()}")
        return self._tensors[key]

    def _read(
        self, key: str, dims: tuple[str | int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> Tensor:
        self._check(key, dims, dtypes)
        self._taken.add(key)
        return self.stored(key).read().detach()

    def _check(
        self, key: str, dims: tuple[str | int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """Raise unless a tensor exists with that shape and one of these types."""
        stored = self.stored(key)
        if len(stored.shape) == len(dims):
            for dim, length in zip(dims, stored.shape):
                if isinstance(dim, str):
                    self.lengths.setdefault(dim, length)
        expected = [self.lengths.get(dim) if isinstance(dim, str) else dim for dim in dims]
        if list(stored.shape) != expected:
            said = (
                f"{dim} = {self.lengths[dim]}" if dim in self.lengths else str(dim) for dim in dims
            )
            raise self.error(
                f"{self.file}: tensor {key!r} has shape {list(stored.shape)}, expected "
                f"[{', '.join(said)}]"
            )
        if stored.dtype not in dtypes:
            raise self.error(
                f"{self.file}: tensor {key!r} is of type "
                f"{str(stored.dtype).removeprefix('torch.')}, expected "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
            )


class _ReadWhenUsed(Mapping[str, Tensor]):
    """Tensors by name, each of which is read when it is looked up."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self._readers = readers

    def __getitem__(self, key: str) -> Tensor:
        return self._readers[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def safetensors_file(file: Path, error: type[InputError] = InputError) -> CheckedTensors:
    """Return the tensors of a safetensors file; its header is checked against its length."""
    return CheckedTensors(file, {key: stored for key, (stored, _) in views(file).items()}, error)


def views(file: Path) -> dict[str, tuple[StoredTensor, Callable[[slice], Tensor]]]:
    """Return each tensor of a safetensors file, with a function that reads a range of its rows."""
    with reading(file):
        opened = safe_open(file, framework="pt")
        keys = opened.keys()
        return {key: _view(file, opened, key) for key in keys}


def _view(file: Path, opened: Any, key: str) -> tuple[StoredTensor, Callable[[slice], Tensor]]:
    view = opened.get_slice(key)
    shape, dtype = tuple(view.get_shape()), view.get_dtype()

    def read_all() -> Tensor:
        with reading(file):
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def read_rows(rows: slice) -> Tensor:
        with reading(file):
            tensor: Tensor = view[rows]
        return tensor

    return StoredTensor(shape, _HEADER.get(dtype, str(dtype)), read_all), read_rows


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Translate errors in reading tensors into CorruptError."""
    try:
        with atomic.read_errors(file):
            yield
    except SafetensorError as error:
        raise CorruptError(f"{file} is truncated or damaged: {error}") from None
