"""TODO ksparse.storage.checksums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.storage.atomic import atomic_dir, inside, sha256
from ksparse.storage.jsonio import read_table, write_json

MANIFEST = "manifest.json"


# ---- whole or not at all -----------------------------------------------------------------------


@contextmanager
def checksummed_dir(path: Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place, with a manifest, once it is
    synced.

    `facts` go into the manifest. On any error the temporary folder is removed and `path` stays what
    it was.
    """
    with atomic_dir(path) as tmp:
        yield tmp
        sums = {file.name: sha256(file) for file in sorted(tmp.iterdir())}
        write_json(tmp / MANIFEST, {**facts, "sha256": sums}, sealed=True)


def check_replaceable(folder: Path) -> None:
    """Raise InputError if a folder holds anything but what `committed` put there."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    listed = read_table(folder / MANIFEST, sha256=dict)["sha256"] if MANIFEST in names else {}
    strange = next((name for name in names if name not in listed and name != MANIFEST), None)
    if strange or (folder.exists() and not folder.is_dir()):
        what = f"holds {strange}" if strange else "is a file"
        raise InputError(f"{folder} {what}, which would be lost; give a new folder")


# ---- what is in them ---------------------------------------------------------------------------


def verify(path: Path, *names: str) -> dict[str, Any]:
    """Return the manifest of a committed folder; raise CorruptError where a file is not what it
    says. names: those to look at, if not all."""
    manifest = read_table(path / MANIFEST, sha256=dict)
    sums = manifest["sha256"]
    strangers = sorted({file.name for file in path.glob("*.safetensors")} - set(sums))
    if strangers:
        raise CorruptError(
            f"{path} holds {strangers[0]}, which its {MANIFEST} does not list; take it out, or use "
            f"an older copy of {path.name}"
        )
    for name in names or sums:
        if name not in sums:
            raise CorruptError(
                f"{path / MANIFEST} does not list {name}; use an older copy of {path.name}"
            )
        check_file(path, name, sums[name])
    return manifest


def check_file(folder: Path, name: str, expected: str) -> Path:
    """Return folder/name if it is a plain name whose file has the SHA-256 sum `expected`."""
    file = inside(folder, plain_name(name, folder / MANIFEST))
    if not file.is_file():
        raise CorruptError(
            f"{file} is missing, though {MANIFEST} lists it; use an older copy of {folder.name}"
        )
    found = sha256(file)
    if found != expected:
        raise CorruptError(
            f"{file} is damaged: its SHA-256 is {found[:12]}…, {MANIFEST} says "
            f"{str(expected)[:12]}… "
            f"({file.stat().st_size:,} bytes there); use an older copy of {folder.name}"
        )
    return file


def plain_name(name: Any, where: Path) -> str:
    """Return a name that a file gives another one, if that can only be beside it; raise
    CorruptError for a path, and for what cannot be a name."""
    good = (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", "..")
        and name.isprintable()
        and len(name.encode()) <= 255
    )
    if not good:
        raise CorruptError(
            f"{where} names {str(name)[:80]!r}, which is not a file of its own folder"
        )
    return name
