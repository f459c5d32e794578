"""Reading what others wrote, without trust: tensors by name and shape, settings by key and type, and nothing left over.

    weights.take("W_enc", "d", "n")     a tensor of that shape as float32; a letter stands for the same length in all calls
    weights.finish(ignored)             raises if the file holds a tensor that nobody took: it would be lost
    settings.want("k", int)             the value of a key, of that type

Pickles are not run: of a torch file only tensors and plain values are read, and one that wants more is refused.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksparse import files
from ksparse.errors import CorruptError, InputError
from ksparse.sae.model import SAE, Shape

_PLAIN = (bool, int, float, str, type(None))


class Weights:
    """The tensors of one file."""

    def __init__(self, file: Path, tensors: Mapping[str, Any]):
        self.file, self.lengths, self._taken = file, {}, set()
        self._tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str, *dims: str) -> Tensor:
        """Return a tensor as float32, whose dims are the lengths of those letters; the first to name a letter decides its length."""
        if key not in self._tensors:
            raise InputError(f"{self.file} lacks the tensor {key!r}; it has {self.names()}")
        found = self._tensors[key]
        shape = [self.lengths.setdefault(letter, length) for letter, length in zip(dims, found.shape)]
        if len(found.shape) != len(dims) or list(found.shape) != shape:
            expected = ", ".join(f"{letter} = {self.lengths[letter]}" if letter in self.lengths else letter for letter in dims)
            raise InputError(f"{self.file}: tensor {key!r} has shape {list(found.shape)}, expected [{expected}]")
        if found.is_complex() or found.dtype == torch.bool:
            raise InputError(f"{self.file}: tensor {key!r} is of type {found.dtype}, expected numbers")
        self._taken.add(key)
        found = found.detach().to(torch.float32).contiguous()
        if not torch.isfinite(found).all():
            raise InputError(f"{self.file}: tensor {key!r} holds NaN or infinity; it is damaged, or training had failed")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """Return a tensor with one element as a number; `default`, if given, where there is none."""
        if key not in self._tensors and default is not None:
            return default
        if key in self._tensors and self._tensors[key].numel() == 1:
            self._taken.add(key)
            return float(self._tensors[key])
        raise InputError(f"{self.file} lacks the number {key!r}" if key not in self._tensors
                         else f"{self.file}: {key!r} has shape {list(self._tensors[key].shape)}, expected a single number")

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Raise InputError for tensors that were neither taken nor are without effect."""
        left = sorted(set(self._tensors) - self._taken - set(ignored))
        if left:
            raise InputError(f"{self.file} holds {', '.join(left)}, which an SAE of this kind does not have; reading it would lose that")

    def names(self) -> str:
        return ", ".join(sorted(self._tensors)) or "none"


class Settings:
    """The keys of one JSON file, or of a table in it."""

    def __init__(self, file: Path, table: Any):
        if not isinstance(table, dict):
            raise InputError(f"{file} is not a table of settings")
        self.file, self.table = file, table

    def get(self, key: str, default: Any = None) -> Any:
        found = self.table.get(key, default)
        return default if found is None else found

    def want(self, key: str, kind: type) -> Any:
        """Return the value of a key that must be there and be of a type."""
        if key not in self.table:
            raise InputError(f"{self.file} lacks the key {key!r}")
        found = self.table[key]
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise InputError(f"{self.file}: {key!r} is {found!r}, expected a value of type {kind.__name__}")
        return found

    def among(self, key: str, choices: Collection[Any], default: Any = None) -> Any:
        """Return the value of a key, which must be one that ksparse knows."""
        found = self.get(key, default)
        if found not in list(choices):  # a list, because what is found may have no hash
            raise InputError(f"{self.file}: {key} is {found!r}; ksparse reads {', '.join(map(repr, choices))}")
        return found

    def refuse(self, **harmless: Any) -> None:
        """Raise InputError for a setting that changes what the SAE computes in a way that ksparse does not have."""
        for key, value in harmless.items():
            if self.get(key, value) != value:
                raise InputError(f"{self.file}: {key} is {self.table[key]!r}; ksparse has no such SAE, and only reads {key} = {value!r}")


def new_folder(folder: Path | str) -> Path:
    """Return a folder that can be made or filled; raise InputError where something is already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not empty; give a new folder")
    return folder


# ---- files -------------------------------------------------------------------------------------------------------


def json_file(file: Path) -> Settings:
    return Settings(file, files.read_json(file))


def safetensors_file(file: Path) -> Weights:
    try:
        return Weights(file, load_file(file))
    except FileNotFoundError:
        raise CorruptError(f"{file} is missing") from None
    except SafetensorError as error:
        raise CorruptError(f"{file} is truncated or damaged: {error}") from None


def torch_file(file: Path) -> dict[str, Any]:
    """Return the dictionary of a file of torch.save, if it holds tensors and plain values only."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CorruptError(f"{file} is missing") from None
    except Exception as error:  # of many types, those of the unpickler among them
        wanted = re.search(r"GLOBAL (\S+)|`([\w.]+)`? (?:was not|is not)", str(error))
        if type(error).__name__ == "UnpicklingError" and "weights_only" in str(error).lower().replace(" ", "_"):
            what = f" ({next(filter(None, wanted.groups()))})" if wanted else ""
            raise InputError(f"{file} is a pickle with code in it{what}; ksparse reads tensors and plain values only. Load it where you trust it, "
                             "and save its state_dict") from None
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptError(f"{file} is not a file of torch.save, or is damaged: {said}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}, expected a dictionary of tensors")
    return found


def npz_file(file: Path) -> Weights:
    """Return the arrays of a NumPy archive."""
    if file.is_file() and not zipfile.is_zipfile(file):
        raise CorruptError(f"{file} is not a NumPy archive of numbers, or is damaged")
    try:
        with np.load(file, allow_pickle=False) as archive:
            return Weights(file, {key: torch.from_numpy(np.array(archive[key])) for key in archive.files})
    except FileNotFoundError:
        raise CorruptError(f"{file} is missing") from None
    except Exception as error:  # of zipfile, zlib, NumPy, or torch for a type that it lacks
        if "allow_pickle" in str(error):
            raise InputError(f"{file} is a pickle with code in it; ksparse reads arrays of numbers only") from None
        raise CorruptError(f"{file} is not a NumPy archive of numbers, or is damaged: {str(error).splitlines()[0]}") from None


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)


def write_torch(table: Mapping[str, Any], file: Path) -> None:
    """Write tensors and plain values as torch.save does."""
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu().contiguous().clone()  # of its own, or a view would bring the whole storage along
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, _PLAIN):
            return value
        raise TypeError(f"{type(value).__name__} is not a tensor or a plain value")

    made = io.BytesIO()
    torch.save(plain(table), made)
    file.write_bytes(made.getbuffer())  # torch, writing by itself, says of a full disk only that its position is unexpected


def write_npz(tensors: Mapping[str, Tensor], file: Path) -> None:
    np.savez(file, **{key: value.detach().cpu().numpy() for key, value in tensors.items()})


# ---- weights in our terms ----------------------------------------------------------------------------------------


def centre_(tensors: dict[str, Tensor]) -> None:
    """Account, in place, for an encoder that does not subtract b_pre from its input, while ours does: b_enc += W_enc b_pre."""
    shift = tensors["W_enc"].double() @ tensors["b_pre"].double()
    tensors["b_enc"] = (tensors["b_enc"].double() + shift).float()
    if "b_mag" in tensors:
        tensors["b_mag"] = (tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift).float()


def uncentred(sae: SAE) -> dict[str, Tensor]:
    """Return the biases [n] of an encoder that does not subtract b_pre from its input: b_enc - W_enc b_pre, and b_mag's share of it."""
    shift = sae.W_enc.detach().double() @ sae.b_pre.detach().double()
    biases = {"b_enc": (sae.b_enc.detach().double() - shift).float()}
    if sae.shape.activation == "gated":
        biases["b_mag"] = (sae.b_mag.detach().double() - sae.r_mag.detach().double().exp() * shift).float()
    return biases


def no_scaling(weights: Weights) -> None:
    """Raise InputError for a scaling factor of the latents that is not 1."""
    if "scaling_factor" in weights and not bool((weights.take("scaling_factor", "n") == 1).all()):
        raise InputError(f"{weights.file}: scaling_factor is not 1; what it multiplies differs between releases, so it is not guessed. "
                         "Put it into the weights and leave it out")


def weigh_by_decoder_(tensors: dict[str, Tensor]) -> None:
    """Account, in place, for latents that are multiplied by the norm of their decoder row before the choice, and divided by it in decoding."""
    norms = tensors["W_dec"].norm(dim=1)
    if not bool((norms > 0).all()):
        raise InputError("a decoder row is 0, though latents are to be multiplied and divided by the norms of their rows")
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms[:, None], tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def built(shape: Shape, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> SAE:
    """Return an SAE of that shape with those tensors."""
    made = SAE(shape, metadata)
    with torch.no_grad():
        for key in made.keys:
            getattr(made, key).copy_(tensors[key])
    return made
