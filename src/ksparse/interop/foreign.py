"""Reading what others wrote, without trust: tensors by name and shape (`ksparse.sae.tensor_files`),
settings by key and type.

    settings.want("k", int)             the value of a key, of that type

Pickles are not run: of a torch file only tensors and plain values are read, and one that wants more
is refused.
"""

from __future__ import annotations

import io
import math
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

_PLAIN = (bool, int, float, str, type(None))
_PICKLE = 2**18
"""Bytes of a pickle, or calls to read one: tensors lie outside it, and much more would take
long."""
_REQUIRED: Any = object()
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80
# since a pickle of 1 kB can name a list of 2^60 entries


class Settings:
    """The keys of one JSON file, or of a table in it."""

    def __init__(self, file: Path, table: Any):
        if not isinstance(table, dict):
            raise InputError(f"{file} is not a table of settings")
        self.file, self.table = file, table

    def get(self, key: str, default: Any = None) -> Any:
        found = self.table.get(key, default)
        return default if found is None else found

    def want(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of a key, which must be of a type; `default`, if given, where there is
        none or null.

        Subclasses of dict are dicts; a boolean is no number.
        """
        if default is not _REQUIRED and self.table.get(key) is None:
            return default
        if key not in self.table:
            raise InputError(f"{self.file} lacks the key {key!r}")
        found = self.table[key]
        if kind is float and type(found) is int and abs(found) < 2**63:
            found = float(found)
        if (
            not isinstance(found, kind)
            or (isinstance(found, bool) and kind is not bool)
            or (kind is int and isinstance(found, int) and abs(found) >= 2**63)
        ):
            raise InputError(
                f"{self.file}: {key!r} is {_short.repr(found)}, expected a value of type "
                f"{kind.__name__}"
            )
        return found

    def under(self, key: str) -> Settings:
        """Return the table of a key, an empty one where there is none."""
        return Settings(self.file, self.want(key, dict, {}))

    def text(self, key: str) -> str | None:
        """Return a string that says where an SAE comes from; None where it says nothing, or not in
        a string.
        """
        found = self.table.get(key)
        return found if isinstance(found, str) and found else None

    def among(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        """Return the value of a key, which must be one that ksparse knows."""
        found = self.get(key, default)
        if found not in list(choices):  # a list, because what is found may have no hash
            raise InputError(
                f"{self.file}: {key} is {_short.repr(found)}; ksparse reads "
                f"{', '.join(map(repr, choices))}"
            )
        return found

    def refuse(self, **harmless: Any) -> None:
        """Raise InputError for a setting that changes what the SAE computes in a way that ksparse
        does not have."""
        for key, value in harmless.items():
            if self.get(key, value) != value:
                raise InputError(
                    f"{self.file}: {key} is {_short.repr(self.table[key])}; ksparse has no such "
                    f"SAE, and only reads {key} = {value!r}"
                )


def new_folder(folder: Path | str) -> Path:
    """Return a folder that can be made or filled; raise InputError where something is already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not empty; give a new folder")
    return folder


# ---- files ---------------------------------------------------------------------------------------


def json_file(file: Path) -> Settings:
    return Settings(file, jsonio.read_json(file))


def torch_file(file: Path) -> dict[str, Any]:
    """Return the dictionary of a file of torch.save, if it holds tensors and plain values only."""
    try:
        with atomic.read_errors(file), _Counted(file) as stream:
            if zipfile.is_zipfile(file):
                _check_archive(file)
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                found = torch.load(stream, map_location="cpu", weights_only=True)
    except KsparseError:
        raise
    except Exception as error:  # of many types, those of the unpickler among them
        wanted = re.search(r"GLOBAL (\S+)|`([\w.]+)`? (?:was not|is not)", str(error))
        if type(error).__name__ == "UnpicklingError" and "weights_only" in str(
            error
        ).lower().replace(" ", "_"):
            what = f" ({next(filter(None, wanted.groups()))})" if wanted else ""
            raise InputError(
                f"{file} is a pickle with code in it{what}; ksparse reads tensors and plain values "
                "only. Load it where you trust it, "
                "and save its state_dict"
            ) from None
        said = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise CorruptError(f"{file} is not a file of torch.save, or is damaged: {said}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}, expected a dictionary of tensors")
    return found


class _Counted(io.BufferedReader):
    """A file whose pickle ends the reading after so many calls; the tensors behind it are read in a
    few.
    """

    def __init__(self, file: Path):
        super().__init__(io.FileIO(file))
        self.file, self.left = file, _PICKLE

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise _too_long(self.file)
        return super().read(size)


def _check_archive(file: Path) -> None:
    """Raise unless an archive is one that torch.save makes: nothing compressed, and no large
    pickle.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CorruptError(f"{file} is not a file of torch.save, or is damaged: {error}") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise CorruptError(
                f"{file} is not a file of torch.save, or is damaged: {member.filename[:80]} in "
                f"it is compressed"
            )
        if member.filename.endswith(".pkl") and member.file_size > _PICKLE:
            raise _too_long(file)


def _too_long(file: Path) -> InputError:
    return InputError(
        f"{file} holds a pickle of more than {_PICKLE:,} bytes beside its tensors; that of an "
        f"SAE is a few kB. Load it where you trust "
        "it, and save its state_dict"
    )


def tensors_of(file: Path, table: Any) -> CheckedTensors:
    """Return the tensors of a dictionary out of a torch file; values of other types are left over
    like tensors.
    """
    if not isinstance(table, dict):
        raise InputError(
            f"{file} holds a {type(table).__name__} in the place of a dictionary of tensors"
        )
    return CheckedTensors(file, {key: _stored(file, key, value) for key, value in table.items()})


def _stored(file: Path, key: Any, value: Any) -> StoredTensor:
    """Return a value of a torch file as a tensor that is read when it is taken."""
    if type(value) in (int, float):
        return StoredTensor((), torch.float64, lambda: torch.tensor(value, dtype=torch.float64))
    plain = (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
    )
    if not plain or value.is_quantized or value.is_nested:
        return StoredTensor(
            (), f"a {type(value).__name__} that is no plain tensor", lambda: torch.empty(())
        )

    def read() -> Tensor:
        held = value.untyped_storage().nbytes() // value.element_size()
        if held < value.numel():
            raise InputError(
                f"{file}: tensor {key!r} is expanded: {value.numel():,} numbers on {held:,} that "
                f"are stored; "
                "save a copy of it (tensor.contiguous())"
            )
        return value

    return StoredTensor(tuple(value.shape), value.dtype, read)


def npz_file(file: Path) -> CheckedTensors:
    """Return the arrays of a NumPy archive; each is read when it is taken."""
    try:
        with atomic.read_errors(file):
            if not zipfile.is_zipfile(file):
                raise CorruptError(f"{file} is not a NumPy archive of numbers, or is damaged")
            with np.load(file, allow_pickle=False) as archive:
                return CheckedTensors(
                    file, {key: _in_archive(file, archive, key) for key in archive.files}
                )
    except KsparseError:
        raise
    except Exception as error:  # of zipfile, zlib or NumPy
        raise _no_archive(file, error) from None


def _in_archive(file: Path, archive: Any, key: str) -> StoredTensor:
    """Return an array of a NumPy archive by its header."""
    name = f"{key}.npy" if f"{key}.npy" in archive.zip.namelist() else key
    with archive.zip.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(stream)
    if dtype.hasobject:
        raise InputError(
            f"{file} is a pickle with code in it; ksparse reads arrays of numbers only"
        )
    held, packed = archive.zip.getinfo(name).file_size, archive.zip.getinfo(name).compress_size
    if held < math.prod(shape) * dtype.itemsize:
        raise _no_archive(
            file,
            ValueError(
                f"{name[:80]} has {held:,} bytes, too few for an array of shape {list(shape)}"
            ),
        )
    if held > 2**26 + 100 * packed:
        raise _no_archive(
            file, ValueError(f"{name[:80]} would grow from {packed:,} bytes to {held:,}")
        )

    def read() -> Tensor:
        try:
            with np.load(file, allow_pickle=False) as again:
                return torch.from_numpy(np.array(again[key], dtype=dtype.newbyteorder("=")))
        except Exception as error:
            raise _no_archive(file, error) from None

    return StoredTensor(
        tuple(shape),
        getattr(torch, dtype.name, dtype.name) if dtype.kind in "fiu" else dtype.name,
        read,
    )


def _no_archive(file: Path, error: Exception) -> CorruptError:
    said = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
    return CorruptError(f"{file} is not a NumPy archive of numbers, or is damaged: {said}")


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)


def write_torch(table: Mapping[str, Any], file: Path) -> None:
    """Write tensors and plain values as torch.save does."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (
                value.detach().cpu().contiguous().clone()
            )  # of its own, or a view would bring the whole storage along
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, _PLAIN):
            return value
        raise TypeError(f"{type(value).__name__} is not a tensor or a plain value")

    made = io.BytesIO()
    torch.save(plain(table), made)
    file.write_bytes(
        made.getbuffer()
    )  # torch, writing by itself, says of a full disk only that its position is unexpected


def write_npz(tensors: Mapping[str, Tensor], file: Path) -> None:
    arrays = {key: value.detach().cpu().numpy() for key, value in tensors.items()}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no key of ours is allow_pickle


# ---- weights in our terms ------------------------------------------------------------------------


def centre_(tensors: dict[str, Tensor]) -> None:
    """Account, in place, for an encoder that does not subtract b_pre from its input, while ours
    does: b_enc += W_enc b_pre."""
    shift = tensors["W_enc"].double() @ tensors["b_pre"].double()
    tensors["b_enc"] = (tensors["b_enc"].double() + shift).float()
    if "b_mag" in tensors:
        tensors["b_mag"] = (
            tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift
        ).float()


def uncentred(sae: SAE) -> dict[str, Tensor]:
    """Return the biases [n] of an encoder that does not subtract b_pre from its input: b_enc -
    W_enc b_pre, and b_mag's share of it."""
    shift = sae.W_enc.detach().double() @ sae.b_pre.detach().double()
    biases = {"b_enc": (sae.b_enc.detach().double() - shift).float()}
    if sae.shape.activation == "gated":
        biases["b_mag"] = (
            sae.b_mag.detach().double() - sae.r_mag.detach().double().exp() * shift
        ).float()
    return biases


def no_scaling(weights: CheckedTensors) -> None:
    """Raise InputError for a scaling factor of the latents that is not 1."""
    if "scaling_factor" in weights and not bool((weights.take("scaling_factor", "n") == 1).all()):
        raise InputError(
            f"{weights.file}: scaling_factor is not 1; what it multiplies differs between "
            "releases, so it is not guessed. "
            "Put it into the weights and leave it out"
        )


def unit_rows(W_dec: Tensor) -> bool:
    """Return whether decoder rows have norm 1, so that multiplying by their norms changes
    nothing."""
    return bool(((W_dec.norm(dim=1) - 1).abs() <= 1e-6).all())


def weigh_by_decoder_(tensors: dict[str, Tensor]) -> None:
    """Account, in place, for latents that are multiplied by the norm of their decoder row before
    the choice, and divided by it in decoding."""
    norms = tensors["W_dec"].norm(dim=1)
    if not bool((norms > 0).all()):
        raise InputError(
            "a decoder row is 0, though latents are to be multiplied and divided by the norms of "
            "their rows"
        )
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms[:, None], tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def built(file: Path, shape: Shape, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> SAE:
    """Return an SAE of that shape with those tensors, which were computed from those of a file."""
    made = SAE(shape, metadata)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            if not all(math.isfinite(end) for end in tensors[key].aminmax()):
                raise InputError(
                    f"{file}: its numbers make a {key} that holds NaN or infinity; it is "
                    f"damaged, or training had failed"
                )
            tensor.copy_(tensors[key])
    return made
