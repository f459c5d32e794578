"""Read files of other libraries without trusting them.

Tensors are checked by name, shape and type (`ksparse.sae.tensor_files`), settings by key and type:

    settings = read_settings(file)
    settings.get_typed("k", int)      the value of a key, which must be an int

Pickles are never executed: of a torch file only tensors and plain values are read, and a file that
needs more is refused.
"""

from __future__ import annotations

import io
import math
import os
import re
import reprlib
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ksparse.errors import CorruptError, InputError, KsparseError
from ksparse.sae.model import SAE, Shape
from ksparse.sae.tensor_files import CheckedTensors as CheckedTensors
from ksparse.sae.tensor_files import StoredTensor
from ksparse.sae.tensor_files import safetensors_file as safetensors_file
from ksparse.storage import atomic, jsonio

_PLAIN_TYPES = (bool, int, float, str, type(None))
_PICKLE_LIMIT = 2**18
"""Largest pickle in bytes, and most read calls while unpickling. Tensor data lie outside the
pickle, so an SAE's is a few kB; a much larger one could take very long."""
_REQUIRED: Any = object()
# A pickle of 1 kB can describe a list of 2^60 entries, so values are abbreviated in messages.
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


class Settings:
    """The keys of a JSON file, or of one table in it. A key that is null counts as missing where a
    default is given."""

    def __init__(self, file: Path, table: Any):
        if not isinstance(table, dict):
            raise InputError(f"{file} is not a table of settings")
        self.file, self.table = file, table

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, unchecked; `default` where it is missing or null."""
        value = self.table.get(key, default)
        return default if value is None else value

    def get_typed(self, key: str, type_: type, default: Any = _REQUIRED) -> Any:
        """Return the value of a key, which must have a type.

        Args:
            key: the key.
            type_: the type. Integers below 2^63 count as floats; booleans do not count as numbers.
            default: returned where the key is missing or null; without one the key is required.

        Raises:
            InputError: the key is missing, or its value has another type.
        """
        if default is not _REQUIRED and self.table.get(key) is None:
            return default
        if key not in self.table:
            raise InputError(f"{self.file} lacks the key {key!r}")
        value = self.table[key]
        if type_ is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if (
            not isinstance(value, type_)
            or (isinstance(value, bool) and type_ is not bool)
            or (type_ is int and isinstance(value, int) and abs(value) >= 2**63)
        ):
            raise InputError(
                f"{self.file}: {key!r} is {_short.repr(value)}, expected a value of type "
                f"{type_.__name__}"
            )
        return value

    def get_section(self, key: str) -> Settings:
        """Return the table under a key; an empty one where it is missing."""
        return Settings(self.file, self.get_typed(key, dict, {}))

    def get_text(self, key: str) -> str | None:
        """Return a string; None where it is missing, empty, or not a string.

        For keys that only describe where an SAE comes from.
        """
        value = self.table.get(key)
        return value if isinstance(value, str) and value else None

    def get_choice(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        """Return the value of a key, which must be one of `choices`."""
        value = self.get(key, default)
        if value not in list(choices):  # a list, since the value may not be hashable
            raise InputError(
                f"{self.file}: {key} is {_short.repr(value)}; ksparse reads "
                f"{', '.join(map(repr, choices))}"
            )
        return value

    def require(self, **supported: Any) -> None:
        """Raise InputError where a setting is present with another value than the supported one,
        because it makes the SAE compute something that ksparse does not have."""
        for key, value in supported.items():
            if self.get(key, value) != value:
                raise InputError(
                    f"{self.file}: {key} is {_short.repr(self.table[key])}; ksparse has no such "
                    f"SAE, and only reads {key} = {value!r}"
                )


def check_new_folder(folder: Path | str) -> Path:
    """Return a folder that is absent or empty; raise InputError if it is not."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists and is not empty; give a new folder")
    return folder


def full_path(path: Path) -> Path:
    """Return an absolute path without following links: in the Hub's cache a file is a link to a
    name that says nothing, and its path says which SAE it is."""
    return Path(os.path.abspath(path))


# ---- files ---------------------------------------------------------------------------------------


def read_settings(file: Path) -> Settings:
    """Return the settings of a JSON file."""
    return Settings(file, jsonio.read_json(file))


def load_torch_dict(file: Path) -> dict[str, Any]:
    """Load the dictionary in a `torch.save` file that holds only tensors and plain values.

    Raises:
        InputError: the pickle needs code to load, is too large, or does not hold a dictionary.
        CorruptError: the file is damaged, or not a `torch.save` file.
    """
    try:
        with atomic.read_errors(file), _LimitedReader(file) as stream:
            if zipfile.is_zipfile(file):
                _check_archive(file)
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except KsparseError:
        raise
    except Exception as error:  # torch.load and the unpickler raise many types
        raise _explain_torch_error(file, error) from None
    if not isinstance(loaded, dict):
        raise InputError(
            f"{file} holds a {type(loaded).__name__}, expected a dictionary of tensors"
        )
    return loaded


def _explain_torch_error(file: Path, error: Exception) -> InputError:
    message = str(error)
    if type(error).__name__ == "UnpicklingError" and "weights_only" in message.lower().replace(
        " ", "_"
    ):
        match = re.search(r"GLOBAL (\S+)|`([\w.]+)`? (?:was not|is not)", message)
        name = f" ({next(filter(None, match.groups()))})" if match else ""
        return InputError(
            f"{file} is a pickle with code in it{name}; ksparse reads tensors and plain values "
            "only. Load it where you trust it, and save its state_dict"
        )
    return CorruptError(f"{file} is not a file of torch.save, or is damaged: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


class _LimitedReader(io.BufferedReader):
    """A file that allows a limited number of `read` calls: unpickling makes many, reading the
    tensor data few.
    """

    def __init__(self, file: Path):
        super().__init__(io.FileIO(file))
        self.file, self.reads_left = file, _PICKLE_LIMIT

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _pickle_too_large(self.file)
        return super().read(size)


def _check_archive(file: Path) -> None:
    """Raise unless an archive looks like `torch.save`'s: nothing compressed, no large pickle."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CorruptError(f"{file} is not a file of torch.save, or is damaged: {error}") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise CorruptError(
                f"{file} is not a file of torch.save, or is damaged: {member.filename[:80]} in "
                "it is compressed"
            )
        if member.filename.endswith(".pkl") and member.file_size > _PICKLE_LIMIT:
            raise _pickle_too_large(file)


def _pickle_too_large(file: Path) -> InputError:
    return InputError(
        f"{file} holds a pickle of more than {_PICKLE_LIMIT:,} bytes beside its tensors; an SAE's "
        "is a few kB. Load it where you trust it, and save its state_dict"
    )


def check_tensors(file: Path, table: Any) -> CheckedTensors:
    """Wrap a dictionary from a torch file, so that each tensor is checked when it is taken.

    Values of other types count as tensors that nothing takes, so `finish` reports them.
    """
    if not isinstance(table, dict):
        raise InputError(
            f"{file} holds a {type(table).__name__} instead of a dictionary of tensors"
        )
    return CheckedTensors(file, {key: _stored(file, key, value) for key, value in table.items()})


def _stored(file: Path, key: Any, value: Any) -> StoredTensor:
    """Describe a value of a torch file as a tensor that is read when taken."""
    if type(value) in (int, float):
        return StoredTensor((), torch.float64, lambda: torch.tensor(value, dtype=torch.float64))
    is_dense = (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
    )
    if not is_dense or value.is_quantized or value.is_nested:
        return StoredTensor(
            (), f"a {type(value).__name__} that is not a plain tensor", lambda: torch.empty(())
        )

    def read() -> Tensor:
        stored = value.untyped_storage().nbytes() // value.element_size()
        if stored < value.numel():
            raise InputError(
                f"{file}: tensor {key!r} is expanded: {value.numel():,} numbers on {stored:,} that "
                "are stored; save a copy of it (tensor.contiguous())"
            )
        return value

    return StoredTensor(tuple(value.shape), value.dtype, read)


def open_npz(file: Path) -> CheckedTensors:
    """Open a NumPy archive; each array is read when taken.

    Raises:
        InputError: an array holds Python objects.
        CorruptError: the file is damaged, or not a NumPy archive.
    """
    try:
        with atomic.read_errors(file):
            if not zipfile.is_zipfile(file):
                raise CorruptError(f"{file} is not a NumPy archive of numbers, or is damaged")
            with np.load(file, allow_pickle=False) as archive:
                return CheckedTensors(
                    file, {key: _stored_array(file, archive, key) for key in archive.files}
                )
    except KsparseError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many types
        raise _bad_npz(file, _first_line(error)) from None


def _stored_array(file: Path, archive: Any, key: str) -> StoredTensor:
    """Describe an array of a NumPy archive from its header."""
    name = f"{key}.npy" if f"{key}.npy" in archive.zip.namelist() else key
    with archive.zip.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise InputError(
            f"{file} is a pickle with code in it; ksparse reads arrays of numbers only"
        )
    info = archive.zip.getinfo(name)
    if info.file_size < math.prod(shape) * dtype.itemsize:
        raise _bad_npz(
            file,
            f"{name[:80]} has {info.file_size:,} bytes, too few for an array of shape "
            f"{list(shape)}",
        )
    if info.file_size > 2**26 + 100 * info.compress_size:
        raise _bad_npz(
            file,
            f"{name[:80]} would grow from {info.compress_size:,} bytes to {info.file_size:,}",
        )

    def read() -> Tensor:
        try:
            with np.load(file, allow_pickle=False) as reopened:
                return torch.from_numpy(np.array(reopened[key], dtype=dtype.newbyteorder("=")))
        except Exception as error:
            raise _bad_npz(file, _first_line(error)) from None

    return StoredTensor(
        tuple(shape),
        getattr(torch, dtype.name, dtype.name) if dtype.kind in "fiu" else dtype.name,
        read,
    )


def _bad_npz(file: Path, reason: str) -> CorruptError:
    return CorruptError(f"{file} is not a NumPy archive of numbers, or is damaged: {reason[:200]}")


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors."""
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)


def write_torch(table: Mapping[str, Any], file: Path) -> None:
    """Write tensors and plain values with `torch.save`."""

    def to_plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            # A clone, since a view would be saved with its whole storage.
            return value.detach().cpu().contiguous().clone()
        if isinstance(value, Mapping):
            return {key: to_plain(item) for key, item in value.items()}
        if isinstance(value, _PLAIN_TYPES):
            return value
        raise TypeError(f"{type(value).__name__} is not a tensor or a plain value")

    buffer = io.BytesIO()
    torch.save(to_plain(table), buffer)
    # On a full disk torch.save itself raises an unclear error; write_bytes raises an OSError.
    file.write_bytes(buffer.getbuffer())


def write_npz(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as a NumPy archive."""
    arrays = {key: value.detach().cpu().numpy() for key, value in tensors.items()}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no key of ours is allow_pickle


# ---- weights in ksparse's terms ------------------------------------------------------------------


def center_encoder_(tensors: dict[str, Tensor]) -> None:
    """Convert, in place, an encoder of x to ksparse's encoder of x - b_pre: b_enc += W_enc b_pre.

    b_mag of a gated SAE is converted too.
    """
    shift = tensors["W_enc"].double() @ tensors["b_pre"].double()
    tensors["b_enc"] = (tensors["b_enc"].double() + shift).float()
    if "b_mag" in tensors:
        tensors["b_mag"] = (
            tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift
        ).float()


def uncentered_biases(sae: SAE) -> dict[str, Tensor]:
    """Return the biases [n] of the equivalent encoder of x, the inverse of `center_encoder_`:
    b_enc - W_enc b_pre, and b_mag of a gated SAE."""
    shift = sae.W_enc.detach().double() @ sae.b_pre.detach().double()
    biases = {"b_enc": (sae.b_enc.detach().double() - shift).float()}
    if sae.shape.activation == "gated":
        biases["b_mag"] = (
            sae.b_mag.detach().double() - sae.r_mag.detach().double().exp() * shift
        ).float()
    return biases


def check_no_scaling(weights: CheckedTensors) -> None:
    """Raise InputError if the file scales latents by a `scaling_factor` other than 1."""
    if "scaling_factor" in weights and not bool((weights.take("scaling_factor", "n") == 1).all()):
        raise InputError(
            f"{weights.file}: scaling_factor is not 1; what it multiplies differs between "
            "releases, so ksparse does not guess. Fold it into the weights and remove it"
        )


def has_unit_rows(W_dec: Tensor) -> bool:
    """Return whether all decoder rows have norm 1, so that scaling by their norms is a no-op."""
    return bool(((W_dec.norm(dim=1) - 1).abs() <= 1e-6).all())


def fold_decoder_norms_(tensors: dict[str, Tensor]) -> None:
    """Convert, in place, an SAE that multiplies latents by their decoder row's norm before it
    selects, and divides by it before it decodes: fold the norms into the encoder, and normalise the
    decoder."""
    norms = tensors["W_dec"].norm(dim=1)
    if not bool((norms > 0).all()):
        raise InputError(
            "a decoder row is 0, but latents are multiplied and divided by the norms of their rows"
        )
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms[:, None], tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def build_sae(
    file: Path, shape: Shape, tensors: Mapping[str, Tensor], metadata: dict[str, Any]
) -> SAE:
    """Build an SAE from tensors computed from those of a file, which messages name.

    Raises:
        InputError: a tensor is not finite.
    """
    sae = SAE(shape, metadata)
    with torch.no_grad():
        for key, tensor in sae.state_dict().items():
            if not all(math.isfinite(end) for end in tensors[key].aminmax()):
                raise InputError(
                    f"{file}: its numbers give a {key} with NaN or infinity; it is damaged, or "
                    "training had failed"
                )
            tensor.copy_(tensors[key])
    return sae
