"""An autoencoder on disk: sae.safetensors (W_enc, b_enc, W_dec, b_pre, its activation's own) and sae.json (its shape and what it was trained on).

Where several processes wrote it, each left its rows in a file of its own: sae.0-of-2.safetensors, sae.1-of-2.safetensors. `rows_of` reads any
range of latents from either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ksparse import files
from ksparse.errors import CorruptError, InputError
from ksparse.runs import RunFolder, pieces
from ksparse.sae.model import KEYS as KEYS
from ksparse.sae.model import SAE, Shape

WEIGHTS, CONFIG, FORMAT = "sae.safetensors", "sae.json", 1


def save(sae: SAE, folder: Path | str) -> None:
    """Write an autoencoder as a folder of its own."""
    files.check_replaceable(Path(folder))
    with files.committed(Path(folder)) as tmp:
        write(sae, tmp)


def write(sae: SAE, folder: Path) -> None:
    """Write the two files into a folder that somebody else commits, such as a checkpoint."""
    write_weights({key: getattr(sae, key) for key in sae.keys}, folder / WEIGHTS)
    write_shape(sae.shape, sae.metadata, folder)


def write_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write the weights, or those of one slice."""
    save_file({key: value.detach().contiguous() for key, value in weights.items()}, file)


def write_shape(shape: Shape, metadata: dict[str, Any], folder: Path) -> None:
    """Write what an autoencoder is, without its weights."""
    files.write_json(folder / CONFIG, {"format": FORMAT, **asdict(shape), "metadata": metadata})


def load(source: Path | str, *, revision: str | None = None, subfolder: str = "") -> SAE:
    """Load an autoencoder: a run (its newest intact checkpoint), a checkpoint, a folder with sae.safetensors, or a Hub
    repository with such a folder."""
    folder = locate(source, revision=revision, subfolder=subfolder)
    run = RunFolder(folder)
    if run.exists():
        checkpoint, wrong = run.newest_intact()
        if checkpoint is None:
            why = "; ".join(wrong) or "nothing has been saved yet"
            raise InputError(f"run {folder} has no checkpoint to load: {why}")
        return read(checkpoint)
    if not (folder / CONFIG).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        raise InputError(f"{folder} holds no SAE: expected {CONFIG} and {WEIGHTS}, or a run with recipe.toml; found {there}")
    if (folder / files.MANIFEST).is_file():
        files.verify(folder)
    return read(folder)


def locate(source: Path | str, *, revision: str | None = None, subfolder: str = "") -> Path:
    """Return where an autoencoder is on this machine, after fetching it from the Hub if it is not here."""
    path = Path(source)
    return (path if path.exists() else _download(str(source), revision, subfolder)) / subfolder


def read(folder: Path) -> SAE:
    """Read an autoencoder from its folder, naming whatever does not fit."""
    shape, metadata = read_shape(folder)
    rows = (shape.n_latents, shape.d_model)
    found = rows_of(folder, "sae", {"W_enc": rows, "W_dec": rows})  # before memory is taken for what a damaged file asks for
    sae = SAE(shape, metadata)
    check_shapes(pieces(folder, "sae")[0], found, {key: tuple(getattr(sae, key).shape) for key in sae.keys})
    sae.load_state_dict({key: found[key] for key in sae.keys})
    return sae


def read_shape(folder: Path) -> tuple[Shape, dict[str, Any]]:
    """Read what an autoencoder is, and what it was trained on."""
    config = files.read_table(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG} has format {config.get('format')!r}; this version of ksparse reads {FORMAT}")
    try:
        shape = Shape(**{key: config[key] for key in Shape.__dataclass_fields__ if key != "activation" or key in config})  # none said: TopK
    except KeyError as error:
        raise CorruptError(f"{folder / CONFIG} lacks the key {error}") from None
    if not isinstance(config.get("metadata", {}), dict | None):
        raise CorruptError(f"{folder / CONFIG}: 'metadata' is not a table")
    return shape, config.get("metadata")


def tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the tensors named in `shapes`, each of its shape; raise CorruptError for a file or tensor that is not so."""
    with _reading(file):
        found = load_file(file)
    check_shapes(file, found, shapes)
    return found


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading tensors into a CorruptError."""
    try:
        with files.read_errors(file):
            yield
    except SafetensorError as error:
        raise CorruptError(f"{file} is truncated or damaged: {error}") from None


def check_shapes(file: Path, found: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CorruptError unless all tensors named in `shapes` were found, each of its shape."""
    for key, shape in shapes.items():
        if key not in found:
            raise CorruptError(f"{file} lacks the tensor {key!r}; it has {', '.join(sorted(found))}")
        if tuple(found[key].shape) != shape:
            raise CorruptError(f"{file}: tensor {key!r} has shape {list(found[key].shape)}, expected {list(shape)}")


def by_rows(key: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor has a row for each latent: all but scalars and what belongs to b_pre."""
    return len(shape) > 0 and key.rpartition(".")[2] != "b_pre"


def rows_of(folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], rows: slice | None = None) -> dict[str, torch.Tensor]:
    """Read all tensors of `stem` in a folder, whether one file holds all latents or several hold some each.

    rows: which of the latents, if not all. Raises CorruptError unless the tensors named in `shapes` are of these shapes.
    """
    found, parts, at = pieces(folder, stem), {}, 0
    if len(found) == 1 and rows is None:
        return tensors(found[0], shapes)
    for file in found:
        at = _add(parts, file, at, rows or slice(0, 2**62))
    for key, values in parts.items():
        if len({(value.dtype, value.shape[1:]) for value in values}) > 1:
            raise CorruptError(f"{folder}: tensor {key!r} of {stem} is of different shapes or types in its {len(found)} files")
    joined = {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items()}
    for key, shape in shapes.items():
        got = list(joined[key].shape) if key in joined else "none"
        if got != list(shape):
            raise CorruptError(f"{folder}: tensor {key!r} of {stem}, in {len(found)} files, has shape {got}, expected {list(shape)}")
    return joined


def _add(parts: dict[str, list[Any]], file: Path, at: int, rows: slice) -> int:
    """Add what a file, whose first row is number `at`, has of `rows`; return the number of the row after its last."""
    with _reading(file), safe_open(file, framework="pt") as held:
        views = {key: held.get_slice(key) for key in held.keys()}
        sizes = {key: view.get_shape() for key, view in views.items()}
        own = max((shape[0] for key, shape in sizes.items() if by_rows(key, shape)), default=0)
        for key, shape in sizes.items():
            if not by_rows(key, shape):
                parts.setdefault(key, [held.get_tensor(key)])
            elif rows.start < at + own and at < rows.stop:
                parts.setdefault(key, []).append(views[key][max(0, rows.start - at) : min(own, rows.stop - at)])
    return at + own


def _download(repository: str, revision: str | None, subfolder: str) -> Path:
    """Fetch a Hub repository's SAE; raise InputError if there is no such repository, or no way to it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    patterns = [subfolder, f"{subfolder}/*"] if subfolder else ["*"]  # which may be a file
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{repository} is neither a folder here nor a Hub repository that can be reached "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
