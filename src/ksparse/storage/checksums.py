"""Folders with a manifest: a JSON file with the SHA-256 checksum of every other file.

    with checksummed_dir(path) as tmp: ...   write into tmp; on success it becomes path
    verify(path)                             raise CorruptError unless the files match the manifest
    check_replaceable(path)                  raise InputError if the folder holds other files

Neither safetensors nor torch.save would notice a flipped bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.storage.atomic import atomic_dir, inside, sha256
from ksparse.storage.jsonio import read_table, write_json

MANIFEST = "manifest.json"


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def checksummed_dir(path: Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path`, with a manifest, once it is synced to disk.

    On any error the temporary folder is removed and `path` stays as it was.

    Args:
        path: the folder to make or replace.
        facts: further keys of the manifest.
    """
    with atomic_dir(path) as tmp:
        yield tmp
        checksums = {file.name: sha256(file) for file in sorted(tmp.iterdir())}
        write_json(tmp / MANIFEST, {**facts, "sha256": checksums}, sealed=True)


def check_replaceable(folder: Path) -> None:
    """Raise InputError if a folder holds anything that its manifest does not list.

    A folder that does not exist, is empty, or was written by `checksummed_dir` may be replaced.
    """
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    listed = read_table(folder / MANIFEST, sha256=dict)["sha256"] if MANIFEST in names else {}
    unlisted = next((name for name in names if name not in listed and name != MANIFEST), None)
    if unlisted or (folder.exists() and not folder.is_dir()):
        what = f"holds {unlisted}" if unlisted else "is a file"
        raise InputError(f"{folder} {what}, which would be lost; give a new folder")


# ---- checking ------------------------------------------------------------------------------------


def verify(path: Path, *names: str) -> dict[str, Any]:
    """Check the files of a folder against its manifest, and return the manifest.

    Args:
        path: the folder.
        names: the files to check; by default all.

    Raises:
        CorruptError: for a file that is missing, altered or not listed.
    """
    manifest = read_table(path / MANIFEST, sha256=dict)
    checksums = manifest["sha256"]
    unlisted = sorted({file.name for file in path.glob("*.safetensors")} - set(checksums))
    if unlisted:
        raise CorruptError(
            f"{path} holds {unlisted[0]}, which its {MANIFEST} does not list; take it out, or use "
            f"an older copy of {path.name}"
        )
    for name in names or checksums:
        if name not in checksums:
            raise CorruptError(
                f"{path / MANIFEST} does not list {name}; use an older copy of {path.name}"
            )
        check_file(path, name, checksums[name])
    return manifest


def check_file(folder: Path, name: str, expected: str) -> Path:
    """Return folder/name after checking that it is a file with the SHA-256 checksum `expected`.

    Raises:
        CorruptError: for a name that is a path, a missing file, and another checksum.
    """
    file = inside(folder, plain_name(name, folder / MANIFEST))
    if not file.is_file():
        raise CorruptError(
            f"{file} is missing, though {MANIFEST} lists it; use an older copy of {folder.name}"
        )
    actual = sha256(file)
    if actual != expected:
        raise CorruptError(
            f"{file} is damaged: its SHA-256 is {actual[:12]}…, {MANIFEST} says "
            f"{str(expected)[:12]}… "
            f"({file.stat().st_size:,} bytes there); use an older copy of {folder.name}"
        )
    return file


def plain_name(name: Any, where: Path) -> str:
    """Return a file name that was read from a file, if it can only be in the same folder.

    Args:
        name: what the file says.
        where: the file, for the message.

    Raises:
        CorruptError: for a path, and for anything that cannot be a file name.
    """
    if not (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", "..")
        and name.isprintable()
        and len(name.encode()) <= 255
    ):
        raise CorruptError(
            f"{where} names {str(name)[:80]!r}, which is not a file of its own folder"
        )
    return name
