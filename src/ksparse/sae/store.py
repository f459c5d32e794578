"""An autoencoder on disk: sae.safetensors (W_enc, b_enc, W_dec, b_pre, its activation's own) and sae.json (its shape and what it was trained on)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ksparse import files
from ksparse.errors import CorruptError, InputError
from ksparse.runs import RunFolder
from ksparse.sae.model import KEYS as KEYS
from ksparse.sae.model import SAE, Shape

WEIGHTS, CONFIG, FORMAT = "sae.safetensors", "sae.json", 1


def save(sae: SAE, folder: Path | str) -> None:
    """Write an autoencoder as a folder of its own."""
    with files.committed(Path(folder)) as tmp:
        write(sae, tmp)


def write(sae: SAE, folder: Path) -> None:
    """Write the two files into a folder that somebody else commits, such as a checkpoint."""
    save_file({key: getattr(sae, key).detach().contiguous() for key in sae.keys}, folder / WEIGHTS)
    files.write_json(folder / CONFIG, {"format": FORMAT, **asdict(sae.shape), "metadata": sae.metadata})


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
    """Read the two files of a folder, naming whatever does not fit."""
    config = files.read_table(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG} has format {config.get('format')!r}; this version of ksparse reads {FORMAT}")
    try:
        shape = Shape(**{key: config[key] for key in Shape.__dataclass_fields__ if key != "activation" or key in config})  # none said: TopK
    except KeyError as error:
        raise CorruptError(f"{folder / CONFIG} lacks the key {error}") from None
    if not isinstance(config.get("metadata", {}), dict | None):
        raise CorruptError(f"{folder / CONFIG}: 'metadata' is not a table")
    rows = (shape.n_latents, shape.d_model)
    found = tensors(folder / WEIGHTS, {"W_enc": rows, "W_dec": rows})  # before memory is taken for what a damaged file asks for
    sae = SAE(shape, config.get("metadata"))
    check_shapes(folder / WEIGHTS, found, {key: tuple(getattr(sae, key).shape) for key in sae.keys})
    sae.load_state_dict({key: found[key] for key in sae.keys})
    return sae


def tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the tensors named in `shapes`, each of its shape; raise CorruptError for a file or tensor that is not so."""
    try:
        found = load_file(file)
    except FileNotFoundError:
        raise CorruptError(f"{file} is missing") from None
    except OSError as error:
        raise CorruptError(f"{file} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CorruptError(f"{file} is truncated or damaged: {error}") from None
    check_shapes(file, found, shapes)
    return found


def check_shapes(file: Path, found: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CorruptError unless all tensors named in `shapes` were found, each of its shape."""
    for key, shape in shapes.items():
        if key not in found:
            raise CorruptError(f"{file} lacks the tensor {key!r}; it has {', '.join(sorted(found))}")
        if tuple(found[key].shape) != shape:
            raise CorruptError(f"{file}: tensor {key!r} has shape {list(found[key].shape)}, expected {list(shape)}")


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
