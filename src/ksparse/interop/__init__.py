"""Read and write the SAE formats of other libraries; refuse, with a reason, what cannot convert.

* `load` reads an SAE of any format and recognises the format by the files.
* `convert` and `write` write an SAE in another format.
* `sae_lens`, `sparsify`, `dictionary_learning`, `openai`, `gemma_scope`, `llamascopium`: one module
  per format. Each begins with a table of its keys. `llama_scope` and `suites` are read only.
* `recognition`: names what is not read. `catalog`: published SAEs by name.
* `foreign`: tensors and settings of untrusted files. `compatibility`: fits an SAE to what a format
  can hold. `hook_names`: names of a site in other libraries.
* `latents`: one latent of a run or on a text, for Python and notebooks.
* `hub`: a repository on the Hub, with a model card. `latent_examples`, `neuronpedia` and
  `openai_viewer`: the latents of a run, for other libraries' viewers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ksparse.device import resolve_device
from ksparse.errors import CorruptError, InputError, unknown
from ksparse.interop import (
    catalog,
    compatibility,
    dictionary_learning,
    foreign,
    gemma_scope,
    llama_scope,
    llamascopium,
    openai,
    recognition,
    sae_lens,
    sparsify,
    suites,
)
from ksparse.interop.compatibility import Normalization
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder

SIDECAR = "ksparse.json"
"""File beside an export that keeps what the other format has no place for."""

_MAX_SEARCHED_FOLDERS = 10_000
"""Folders searched for SAEs to suggest."""


class Reader(Protocol):
    """What reads a format. Some accept more about an SAE by keyword (`catalog.Entry.hints`)."""

    def find(self, path: Path) -> Path | None:
        """Return the file or folder of an SAE in this format; None if `path` is not one."""

    @property
    def read(self) -> Callable[..., SAE]:
        """Read an SAE from a path that `find` returned."""


class Format(Reader, Protocol):
    """What the module of a format that is also written provides."""

    @property
    def SUPPORTED(self) -> Mapping[str, tuple[str, ...]]:
        """Activations the format can hold, each with the input normalisations it can hold."""

    def write(self, sae: SAE, folder: Path) -> None:
        """Write an SAE that this format can hold."""


FORMATS: dict[str, Format] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
    "gemma_scope": gemma_scope,
    "llamascopium": llamascopium,
}
READERS: dict[str, Reader] = {
    **FORMATS,
    "llama_scope": llama_scope,
    "qwen_scope": suites.QWEN_SCOPE,
    "goodfire": suites.GOODFIRE,
    "qresearch": suites.QRESEARCH,
    "hook_z": suites.HOOK_Z,
}


def load(
    source: Path | str | RunFolder,
    *,
    revision: str | None = None,
    subfolder: str = "",
    device: str = "auto",
) -> SAE:
    """Load an autoencoder of any format.

    Its parameters take no gradient until `sae.requires_grad_(True)`.

    Args:
        source: a run (its newest intact checkpoint is loaded), a local folder or file, the name of
            a published SAE, "release/id" (`ksparse list`), or a Hub repository, "owner/name". Of a
            folder of results (`ksparse eval --out`), the SAE that was judged.
        revision: revision of the Hub repository.
        subfolder: folder of the SAE inside `source`.
        device: "auto" for an accelerator if there is one, "cpu", "cuda", "mps", …

    Returns:
        The autoencoder, in float32.

    Raises:
        InputError: `source` holds no SAE, or one that ksparse cannot represent.
        CorruptError: a file is damaged.

    Example:
        >>> import tempfile
        >>> import ksparse
        >>> from ksparse.sae.model import SAE, Shape
        >>> folder = tempfile.mkdtemp()
        >>> ksparse.save(SAE(Shape(d_model=8, n_latents=32, k=4)), f"{folder}/sae")
        >>> ksparse.load(f"{folder}/sae").shape.k
        4
    """
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"an SAE is loaded from a folder, a file or a name, got {type(source).__name__}"
        )
    device = resolve_device(str(device))
    source = source if isinstance(source, str) else Path(source)
    sae = _load_from(source, revision, subfolder).to(device).requires_grad_(False).eval()
    if atomic.exists(Path(source)):
        sae.source = Path(source) / subfolder
    return sae


def _load_from(source: Path | str, revision: str | None, subfolder: str) -> SAE:
    entry = catalog.find(source)
    if entry is not None:
        return _load_published(entry, revision)
    path = serialization.locate(source, revision=revision, subfolder=subfolder)
    with atomic.read_errors(path):
        return _load(path)


def _load_published(entry: catalog.Entry, revision: str | None) -> SAE:
    """Download an SAE that the catalog names, and read it with what the catalog adds."""
    path = serialization.download(entry.repository, revision, entry.files()) / entry.path
    with atomic.read_errors(path):
        reader = READERS[entry.format]
        location = reader.find(path)
        if location is None:
            raise recognition.explain(path)
        sae = _read(reader, location, **entry.hints)
    origin = sae.metadata.setdefault("origin", {})
    origin["name"] = entry.name
    origin.setdefault("lm", entry.lm)
    return sae


def format_of(source: Path | str, *, revision: str | None = None, subfolder: str = "") -> str:
    """Return the name of the format in which `load` reads an SAE: "ksparse" or a key of READERS."""
    entry = catalog.find(source)
    if entry is not None:
        return entry.format
    path = serialization.locate(source, revision=revision, subfolder=subfolder)
    if _is_ksparse(path):
        return "ksparse"
    return next((name for name, reader in READERS.items() if reader.find(path)), "unknown")


def load_judged(run: RunFolder) -> SAE:
    """Load the SAE that a folder of results is about, from where it was when it was judged.

    Raises:
        InputError: it is not there any more, or has other weights than those that were judged.
    """
    judged = run.subject().judged
    assert judged is not None  # the folder has subject.json
    source = run.source_of(judged)
    again = "Put it back, or judge what is there now: `ksparse eval SAE --out` a new folder"
    if judged.local and not atomic.exists(Path(source)):
        raise InputError(
            f"{run.path} holds results of the SAE at {source}, which is not there any more. {again}"
        )
    if judged.local and RunFolder(Path(source)).is_judged():
        raise CorruptError(f"{run.subject_file} names {source}, which holds no SAE itself")
    sae = _load_from(source, judged.revision or None, judged.subfolder)
    found = serialization.weights_sha256(sae)
    if found != judged.weights_sha256:
        raise InputError(
            f"the SAE at {source} is not the one that {run.path} holds results of: the SHA-256 of "
            f"its weights is {found[:12]}…, {run.subject_file.name} says "
            f"{judged.weights_sha256[:12]}…. {again}"
        )
    return sae


def _load(path: Path) -> SAE:
    if RunFolder(path).is_judged():
        return load_judged(RunFolder(path))
    if _is_ksparse(path):
        return serialization.load(path)
    for reader in READERS.values():
        location = reader.find(path)
        if location is not None:
            return _read(reader, location)
    if (other := recognition.find_other(path)) is not None:
        raise other
    parts = _folders_with_saes(path) or _files_with_saes(path)
    if parts:
        more = " …" if len(parts) > 8 else ""
        kind = "folders" if (path / parts[0]).is_dir() else "files"
        raise InputError(
            f"{path} holds no SAE itself; its {kind} {', '.join(parts[:8])}{more} do: "
            f"name one, with --subfolder {parts[0]} (in Python subfolder={parts[0]!r})"
        )
    raise recognition.explain(path)


def write(sae: SAE, folder: Path | str, to: str, *, normalization: Normalization = "exact") -> None:
    """Write an autoencoder in a format.

    Args:
        sae: the autoencoder.
        folder: folder to create, or to replace if ksparse wrote it.
        to: name of the format: "ksparse" or a key of `FORMATS`.
        normalization: what to do where the format lacks the SAE's input normalisation. "exact":
            fold it into the weights or refuse. "layer_norm": also write unit_norm as layer_norm.
            "outside": leave it out, so that the user of the SAE must normalise.

    Raises:
        InputError: the format cannot hold the SAE; names what it cannot hold.
    """
    if to == "ksparse":
        serialization.save(sae, folder)
        return
    format_ = FORMATS.get(to)
    if format_ is None:
        raise unknown("there is no format", to, ["ksparse", *FORMATS])
    adapted = compatibility.adapt(
        sae,
        to,
        format_.SUPPORTED,
        normalization,
        unit_norm_decoder=getattr(format_, "UNIT_NORM_DECODER", False),
    )
    checksums.check_replaceable(Path(folder))
    with checksums.checksummed_dir(Path(folder)) as tmp:
        format_.write(adapted, tmp)
        jsonio.write_json(
            tmp / SIDECAR,
            {
                "format": serialization.FORMAT,
                "activation": adapted.shape.activation,
                "k": adapted.shape.k,
                "metadata": sae.metadata,
            },
        )


def convert(
    source: Path | str,
    folder: Path | str,
    to: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    normalization: Normalization = "exact",
) -> SAE:
    """Convert an SAE of any format to another.

    Args:
        source: what `load` takes.
        folder: a new or empty folder.
        to: name of the format: "ksparse" or a key of `FORMATS`.
        revision: revision of the Hub repository `source`.
        subfolder: folder of the SAE inside `source`.
        normalization: see `write`.

    Returns:
        The SAE as read back from `folder`.

    Raises:
        InputError: see `load` and `write`; or `folder` is not empty.

    Example:
        >>> import tempfile
        >>> import ksparse
        >>> from ksparse.sae.model import SAE, Shape
        >>> folder = tempfile.mkdtemp()
        >>> sae = SAE(Shape(d_model=8, n_latents=32, k=4, normalize="layer_norm"))
        >>> ksparse.save(sae, f"{folder}/sae")
        >>> copy = ksparse.convert(f"{folder}/sae", f"{folder}/for-sae-lens", "sae_lens")
        >>> copy.shape.normalize
        'layer_norm'
    """
    foreign.check_new_folder(folder)
    write(
        load(source, revision=revision, subfolder=subfolder, device="cpu"),
        folder,
        to,
        normalization=normalization,
    )
    return load(folder, device="cpu")


def _is_ksparse(path: Path) -> bool:
    return RunFolder(path).exists() or (path / serialization.CONFIG).is_file()


def _read(reader: Reader, path: Path, **hints: Any) -> SAE:
    """Read an SAE of another format, and what its sidecar adds."""
    folder = path if path.is_dir() else path.parent
    has_sidecar = (folder / SIDECAR).is_file()
    if (folder / checksums.MANIFEST).is_file() and (
        has_sidecar or "sha256" in foreign.read_settings(folder / checksums.MANIFEST).table
    ):
        checksums.verify(folder)
    try:
        sae = reader.read(path, **hints)
    except InputError as error:
        raise error if str(folder) in str(error) else type(error)(f"{path}: {error}") from None
    if not has_sidecar:
        return sae
    sidecar = jsonio.read_numbered(
        folder / SIDECAR,
        serialization.FORMAT,
        {"activation": str, "k": int, "metadata": (dict, type(None))},
    )
    serialization.check_metadata(sidecar["metadata"] or {}, folder / SIDECAR)
    if sae.shape.activation == sidecar["activation"]:
        # Most activations run without k, so most formats do not store it.
        sae.shape = dataclasses.replace(sae.shape, k=sidecar["k"])
    sae.metadata = dict(sidecar["metadata"] or sae.metadata)
    return sae


def _folders_with_saes(path: Path) -> list[str]:
    """Return the folders that hold an SAE, at most three levels below `path`.

    Skips links and folders that cannot be entered or read.
    """
    with_saes, level = [], [path]
    searched = 0
    for _ in range(3):
        subfolders = [
            Path(entry.path)
            for folder in level
            for entry in _subfolders(folder)
            if not entry.name.startswith(".")
        ]
        level = subfolders[: max(0, _MAX_SEARCHED_FOLDERS - searched)]
        searched += len(level)
        with_saes += [str(folder.relative_to(path)) for folder in level if _holds_sae(folder)]
    return with_saes


def _subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """Return the subfolders sorted by name; none if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if entry.is_dir(follow_symlinks=False)),
                key=lambda entry: entry.name,
            )
    except OSError:
        return []


def _files_with_saes(path: Path) -> list[str]:
    """Return the files in a folder that each hold an SAE, at most nine; none for other paths."""
    if not path.is_dir():
        return []
    files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth", ".npz"))
    return [file.name for file in files[:9] if _holds_sae(file)]


def _holds_sae(path: Path) -> bool:
    try:
        return _is_ksparse(path) or any(reader.find(path) for reader in READERS.values())
    except (InputError, OSError):
        return False
