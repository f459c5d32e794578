"""`ksparse.train(data=…)`: activations that the caller has, as shards of the run.

An array or an iterator is written to RUN/acts; a folder or file is indexed there, with links to it.
The same call later writes an iterator again and compares, so a run goes on only with the
activations that it was begun on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ksparse.config import Planted, Recipe
from ksparse.data.tensors import is_index, write_index
from ksparse.errors import InputError, NonFiniteError
from ksparse.progress import report
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.stores import is_remote, open_store

ACTS = "acts"
"""Folder of a run with the activations that it was given."""
_FILE_BYTES = 256_000_000
_WRITING, _INDEXING = "writing activations", "indexing"


def place(data: Any, recipe: Recipe, out: Path | str | None) -> tuple[Recipe, Path]:
    """Make activations shards of a run.

    Args:
        data: a folder or file; a numpy array or torch tensor [rows, d]; an iterator of them;
            planted features, which are drawn as they are needed and kept nowhere.
        recipe: what to train, without `acts.shards`.
        out: the run's folder; by default runs/HASH, with a hash of the recipe and the data. An
            iterator needs one.

    Returns:
        The recipe with `acts.shards`, and the run's folder.

    Raises:
        InputError: `data` is none of these, something in it is no activation, or the run was begun
            on others.
        NonFiniteError: an activation is NaN or infinite.
    """
    if recipe.acts.shards:
        raise InputError(
            f"data was given, and acts.shards = {recipe.acts.shards}: both say where activations "
            "come from; give one of them"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "data is for one process; write it to a folder, index that with `ksparse shard --from "
            "DIR`, and give every process acts.shards = DIR"
        )
    if isinstance(data, Planted):
        text = data.to_text()
        recipe = dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, text=text))
        return recipe, Path(out or _name(recipe, text))
    if isinstance(data, (str, Path)):
        # Shards, or indexed already; what is in an object store stays there.
        if is_remote(data) or open_store(data).has(checksums.MANIFEST):
            name = str(data)
            return _with_shards(recipe, name), Path(out or _name(recipe, name))
        run = Path(out or _name(recipe, str(data)))
        return _with_shards(recipe, str(_keep(run, open_store(data).path))), run
    if not isinstance(data, (np.ndarray, Tensor)) and not isinstance(data, Iterable):
        raise InputError(
            f"data is of type {type(data).__name__}; give a folder, an array or tensor [rows, d], "
            "an iterator of them, or ksparse.config.Planted"
        )
    if isinstance(data, (np.ndarray, Tensor)):
        _check(data, "data")
        run = Path(out or _name(recipe, _digest(data)))
        return _with_shards(recipe, str(_keep(run, [data], "data"))), run
    if out is None:
        raise InputError(
            "data is an iterator, of which no name for the run can be made; give out, such as "
            'out="runs/mine"'
        )
    return _with_shards(recipe, str(_keep(Path(out), data, "item {}"))), Path(out)


def _with_shards(recipe: Recipe, folder: str) -> Recipe:
    return dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, shards=folder))


def _name(recipe: Recipe, data: str) -> str:
    return f"runs/{jsonio.digest([recipe.fingerprint(), data])}"


def _digest(data: np.ndarray | Tensor) -> str:
    x = _tensor(data)
    flat = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _keep(run: Path, data: Path | Iterable[Any], what: str = "") -> Path:
    """Write or index activations as the folder `acts` of a run; return that folder."""
    folder = run / ACTS
    with atomic.translate_oserrors(folder), atomic.temporary(folder) as temporary:
        new = temporary / ACTS
        source = data if isinstance(data, Path) else _write(data, new, what)
        write_index(source, new, progress=lambda done, total: report(_INDEXING, done, total))
        if not folder.exists():
            new.rename(folder)
            return folder
        if not is_index(folder) or _content(folder) != _content(new):
            raise InputError(
                f"{run} was begun on other activations than data has; give another out"
            )
    return folder


def _content(folder: Path) -> Any:
    return jsonio.read_json(folder / checksums.MANIFEST)["files"]


def _write(data: Iterable[Any], folder: Path, what: str) -> Path:
    """Write tensors to files of about `_FILE_BYTES` each."""
    folder.mkdir()
    parts: list[Tensor] = []
    held = files = rows = 0
    for x in _checked(data, what):
        report(_WRITING, rows)
        if parts and (x.dtype != parts[0].dtype or held + x.nbytes > _FILE_BYTES):
            files, parts, held = files + _write_file(folder, files, parts), [], 0
        parts, held, rows = [*parts, x], held + x.nbytes, rows + len(x)
    if not rows:
        raise InputError("data is empty: there is no activation in it")
    _write_file(folder, files, parts)
    return folder


def _write_file(folder: Path, number: int, parts: list[Tensor]) -> int:
    save_file({"x": torch.cat(parts)}, folder / f"{number:05d}.safetensors")
    return 1


def _checked(data: Iterable[Any], what: str) -> Iterator[Tensor]:
    width = 0
    for number, item in enumerate(data):
        where = what.format(number)
        _check(item, where)
        if width and item.shape[1] != width:
            raise InputError(
                f"{where} has the width {item.shape[1]}, those before it {width}; all activations "
                "are of one width"
            )
        width = item.shape[1]
        x = _tensor(item)
        bad = ~torch.isfinite(x.float()).all(1)
        if bad.any():
            raise NonFiniteError(
                f"{where}, row {int(bad.nonzero()[0]):,}: an activation is NaN or infinite in "
                "float32"
            )
        if len(x):
            yield x


def _check(item: Any, where: str) -> None:
    """Raise InputError unless an item is a floating-point matrix."""
    if not isinstance(item, (np.ndarray, Tensor)):
        raise InputError(
            f"{where} is of type {type(item).__name__}, expected an array or tensor [rows, d]"
        )
    floating = item.is_floating_point() if isinstance(item, Tensor) else item.dtype.kind == "f"
    if item.ndim != 2 or not item.shape[1] or not floating:
        raise InputError(
            f"{where} is {item.dtype} of shape {list(item.shape)}, expected floating-point numbers "
            "[rows, d]"
        )


def _tensor(item: np.ndarray | Tensor) -> Tensor:
    """Return an item as a contiguous tensor in main memory."""
    if isinstance(item, Tensor):
        return item.detach().cpu().contiguous()
    return torch.from_numpy(np.ascontiguousarray(item, item.dtype.newbyteorder("=")))
