"""Other libraries' formats: one file each, with a table of its keys; all are read and written, or
say why not.

load       an SAE of any format, recognised by what is there        convert, write     one in
           another's format
hub        a repository on the Hub, with a card                    neuronpedia, atoms   what
           Neuronpedia and OpenAI's viewer show, of a run

sae_lens · sparsify · dictionary_learning · openai · gemma_scope · llamascopium
foreign    their tensors and settings, without trust        fit    what a format can hold
           sites    names of places
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ksparse.errors import InputError, unknown
from ksparse.interop import (
    compatibility,
    dictionary_learning,
    foreign,
    gemma_scope,
    llamascopium,
    openai,
    sae_lens,
    sparsify,
)
from ksparse.interop.compatibility import Normalization
from ksparse.sae import serialization
from ksparse.sae.model import SAE
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder

SIDECAR = "ksparse.json"
"""Beside what we write in another's format: what that cannot say of where an SAE comes from."""


_MOST_FOLDERS = 10_000
"""Folders that are looked into for an SAE to propose."""


class Format(Protocol):
    """What each format's module has."""

    @property
    def HOLDS(self) -> Mapping[str, tuple[str, ...]]:
        """The activations that it can be written with, and the normalisations that it can hold
        with each."""

    def find(self, path: Path) -> Path | None: ...
    def read(self, path: Path) -> SAE: ...
    def write(self, sae: SAE, folder: Path) -> None: ...


FORMATS: dict[str, Format] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
    "gemma_scope": gemma_scope,
    "llamascopium": llamascopium,
}


def load(source: Path | str, *, revision: str | None = None, subfolder: str = "") -> SAE:
    """Load an autoencoder of any format: a run (its newest intact checkpoint), a folder or file
    here, or one in a Hub repository."""
    path = serialization.locate(source, revision=revision, subfolder=subfolder)
    with atomic.read_errors(path):
        return _load(path)


def _load(path: Path) -> SAE:
    if not _is_ours(path):
        for form in FORMATS.values():
            place = form.find(path)
            if place is not None:
                return _read(form, place)
        inside = _folders_with_saes(path)
        if inside:
            more = " …" if len(inside) > 8 else ""
            raise InputError(
                f"{path} holds no SAE itself; its folders {', '.join(inside[:8])}{more} do: name "
                "one (subfolder=…)"
            )
    return serialization.load(path)


def write(sae: SAE, folder: Path | str, to: str, *, normalization: Normalization = "exact") -> None:
    """Write an autoencoder as a folder in a format: one of FORMATS, or ksparse. What that cannot
    hold is an InputError.

    normalization: what to do if the format has not the SAE's own (see `interop.compatibility`).
    """
    if to == "ksparse":
        serialization.save(sae, folder)
        return
    form = FORMATS.get(to)
    if form is None:
        raise unknown("there is no format", to, ["ksparse", *FORMATS])
    fitted = compatibility.fitted(
        sae, to, form.HOLDS, normalization, unit_rows=getattr(form, "UNIT_ROWS", False)
    )
    checksums.check_replaceable(Path(folder))
    with checksums.checksummed_dir(Path(folder)) as tmp:
        form.write(fitted, tmp)
        jsonio.write_json(
            tmp / SIDECAR,
            {
                "format": serialization.FORMAT,
                "activation": fitted.shape.activation,
                "k": fitted.shape.k,
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
    """Write an SAE of any format as a folder in another; return what is read from there."""
    foreign.new_folder(folder)
    write(
        load(source, revision=revision, subfolder=subfolder),
        folder,
        to,
        normalization=normalization,
    )
    return load(folder)


def _is_ours(path: Path) -> bool:
    return RunFolder(path).exists() or (path / serialization.CONFIG).is_file()


def _read(form: Format, place: Path) -> SAE:
    """Read an SAE of another format, with what its sidecar says."""
    folder = place if place.is_dir() else place.parent
    ours = (folder / SIDECAR).is_file()
    if (folder / checksums.MANIFEST).is_file() and (
        ours or "sha256" in foreign.json_file(folder / checksums.MANIFEST).table
    ):
        checksums.verify(folder)
    try:
        sae = form.read(place)
    except InputError as error:
        raise error if str(folder) in str(error) else type(error)(f"{place}: {error}") from None
    if not ours:
        return sae
    said = jsonio.read_numbered(
        folder / SIDECAR,
        serialization.FORMAT,
        {"activation": str, "k": int, "metadata": (dict, type(None))},
    )
    serialization.check_metadata(said["metadata"] or {}, folder / SIDECAR)
    if sae.shape.activation == said["activation"]:
        sae.shape = dataclasses.replace(
            sae.shape, k=said["k"]
        )  # most activations need none to be used, so most formats have none
    sae.metadata = dict(said["metadata"] or sae.metadata)
    return sae


def _folders_with_saes(path: Path) -> list[str]:
    """Return the folders below, three deep at most, that hold an SAE; links, and what may not be
    entered or read, are passed over.
    """
    with_saes, level = [], [path]
    looked = 0
    for _ in range(3):
        below = [
            Path(entry.path)
            for folder in level
            for entry in _entries(folder)
            if not entry.name.startswith(".")
        ]
        level = below[: max(0, _MOST_FOLDERS - looked)]
        looked += len(level)
        with_saes += [str(folder.relative_to(path)) for folder in level if _holds_sae(folder)]
    return with_saes


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the folders in a folder by name; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if entry.is_dir(follow_symlinks=False)),
                key=lambda entry: entry.name,
            )
    except OSError:
        return []


def _holds_sae(folder: Path) -> bool:
    try:
        return _is_ours(folder) or any(form.find(folder) for form in FORMATS.values())
    except (InputError, OSError):
        return False
