"""Folders that are there whole or not at all, and that notice a flipped bit.

    with committed(path) as tmp: ...   write into tmp; on success it becomes path, with a manifest of SHA-256 sums
    verify(path)                       raise CorruptError unless every file is as the manifest says
    write_json / read_json             one JSON file, replaced atomically

Neither safetensors nor torch.save notices an altered bit, and neither syncs to disk, so both happen here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, DiskError

MANIFEST = "manifest.json"
_PREFIX = ".tmp-"


@contextmanager
def committed(path: Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` once all of it is synced, with its manifest.

    `facts` go into the manifest. On any error the temporary folder is removed and `path` stays what it was.
    """
    path = Path(path)
    tmp = path.parent / f"{_PREFIX}{path.name}-{os.getpid()}"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        try:
            yield tmp
            sums = {file.name: sha256(file) for file in sorted(tmp.iterdir())}
            write_json(tmp / MANIFEST, {**facts, "sha256": sums})
            for file in tmp.iterdir():
                file.chmod(0o644)  # safetensors makes files that only their owner can read
                _sync(file)
            _sync(tmp)
            _replace(tmp, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def _replace(tmp: Path, path: Path) -> None:
    """Put `tmp` in the place of `path`, moving away what is there, since a folder with files cannot be overwritten."""
    if path.exists():
        old = path.parent / f"{_PREFIX}old-{path.name}-{os.getpid()}"
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        try:
            tmp.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old)
    else:
        tmp.rename(path)


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a committed folder; raise CorruptError where a file is not what it says."""
    manifest = read_json(path / MANIFEST)
    sums = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict):
        raise CorruptError(f"{path / MANIFEST} has no table 'sha256'; the folder was not written by ksparse or is damaged")
    for name, expected in sums.items():
        check_file(path, name, expected)
    return manifest


def check_file(folder: Path, name: str, expected: str) -> Path:
    """Return folder/name if it is a plain name whose file has the SHA-256 sum `expected`."""
    if Path(name).name != name:
        raise CorruptError(f"{folder / MANIFEST} names {name!r}, which is not a file of its own folder")
    file = folder / name
    if not file.is_file():
        raise CorruptError(f"{file} is missing, though {MANIFEST} lists it; use an older copy of {folder.name}")
    found = sha256(file)
    if found != expected:
        raise CorruptError(
            f"{file} is damaged: its SHA-256 is {found[:12]}…, {MANIFEST} says {str(expected)[:12]}… "
            f"({file.stat().st_size:,} bytes there); use an older copy of {folder.name}")
    return file


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders and files that a killed process left in `folder`; give back an old one that was moved away."""
    for tmp in Path(folder).glob(f"{_PREFIX}*"):
        name = tmp.name.removeprefix(f"{_PREFIX}old-").rpartition("-")[0]
        if tmp.name.startswith(f"{_PREFIX}old-") and not (tmp.parent / name).exists():
            tmp.rename(tmp.parent / name)
        elif tmp.is_file():
            tmp.unlink()
        else:
            shutil.rmtree(tmp, ignore_errors=True)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(facts: Any) -> str:
    """Return a short name for JSON-able facts: the first 16 hex digits of the SHA-256 of their canonical form."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON (never NaN) to a temporary name, sync, rename."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary name, sync, rename."""
    path = Path(path)
    tmp = path.with_name(f"{_PREFIX}{path.name}-{os.getpid()}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tmp.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read one JSON file; say which one is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not JSON: {error}; it is truncated or was altered") from None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's write errors under `path` into one DiskError that says how much room there is."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskError(f"disk full while writing {path}: {_free(path)}; what was saved before is intact. "
                            "Make room and run the same command again") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"cannot write {path}: {error.strerror}; give a folder that you may write with --out") from error
        raise
    except Exception as error:  # safetensors reports a full disk in an exception of its own
        if "No space left" in str(error) or "os error 28" in str(error) or "File too large" in str(error):
            raise DiskError(f"disk full while writing {path}: {_free(path)}; what was saved before is intact. "
                            "Make room and run the same command again") from error
        raise


def _free(path: Path) -> str:
    folder = next(parent for parent in [path, *path.parents] if parent.exists())
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free at {folder}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
