"""Folders and files that are replaced in one step, so that a killed process leaves no half of one.

    with atomic_dir(path) as tmp: ...    write into tmp; on success it becomes path
    with atomic_file(path) as tmp: ...   the same for a single file
    with temporary(path) as tmp: ...     a folder beside path that is removed at the end
    write_text, write_bytes              a file written through atomic_file
    inside(folder, name, ...)            a path in a folder, refused where a link leads out of it
    with locked(folder): ...             one process at a time
    remove(path)                         a folder that is gone completely or not at all
    remove_leftovers(folder)             remove what killed processes left
    read_errors, translate_oserrors      the system's errors as CorruptError and DiskError

safetensors and torch.save do not sync what they write to disk, so this happens here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ksparse.errors import CorruptError, DiskError, InputError

log = logging.getLogger("ksparse")
_PREFIX = ".tmp-"
_MOVED_AWAY = re.compile(r"\.tmp-old-(?:[0-9a-f]{16}-(?P<name>.+)|(?P<formerly>.+)-\d+)")
_DAY = 86_400  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EBUSY,
    errno.ENOENT,  # another process removed it
    errno.ESTALE,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


# ---- paths and locks -----------------------------------------------------------------------------


def inside(folder: Path, *names: str) -> Path:
    """Return the path folder/names, which need not exist, after checking that it is in the folder.

    A folder from someone else may hold links to the files of whoever opens it. What is read through
    such a link would be shown or published, and what is written would go to its target. Links
    within the folder are followed, and those of the Hub's cache, whose snapshots link to blobs.

    Raises:
        InputError: if a link leads out of the folder, and for a path that exists and is neither a
            file nor a folder.
    """
    path, home = Path(folder, *names), Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in [home, *blobs]):
        steps = [Path(folder, *names[:number]) for number in range(1, len(names) + 1)]
        link = next((step for step in steps if step.is_symlink()), path)
        raise InputError(
            f"{link} leads out of {folder}, to {real}; ksparse follows no such link. "
            "Remove it, or put a copy of what is meant in its place"
        )
    with suppress(OSError):
        mode = os.lstat(real).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path} is neither a file nor a folder; remove it")
    return path


@contextmanager
def locked(
    folder: Path, name: str = ".lock", *, wait: float = 0.0, advice: str = "wait for it"
) -> Iterator[None]:
    """Hold a lock, which no other process or thread can hold at the same time.

    The system releases the lock when its process dies.

    Args:
        folder: the folder to lock; it is made if it does not exist.
        name: name of the lock file in it.
        wait: seconds to wait for the lock.
        advice: what to do if it is not released, for the message.

    Raises:
        InputError: if another process still holds the lock after `wait` seconds; it names that
            process.
    """
    with translate_oserrors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(inside(folder, name), flags, 0o666)
        stream = open(handle, "r+b", buffering=0)  # noqa: SIM115 (closed by `with stream` below)
    with stream:
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue
                holder = stream.read().decode(errors="replace").strip() or "unknown"
                raise InputError(f"{folder} is in use by process {holder}; {advice}") from None
        with translate_oserrors(folder):
            if os.fstat(handle).st_nlink == 1:  # else a hard link shares it with another folder
                stream.truncate(0)
                stream.seek(0)
                stream.write(str(os.getpid()).encode())
        yield


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic_dir(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that replaces it once all its files are synced.

    On any error the temporary folder is removed and `path` stays as it was.

    Args:
        path: the folder to make or replace.
        new: raise InputError, and replace nothing, if `path` is no longer empty at the end.
    """
    path = Path(path)
    if os.path.realpath(path) == os.getcwd():
        raise InputError(
            f"{path} is the working folder, which cannot be replaced; give the name of a new one"
        )
    with translate_oserrors(path), temporary(path) as tmp:
        yield tmp
        mode = _new_file_mode(tmp)
        for file in sorted(tmp.rglob("*"), reverse=True):
            if file.is_file():
                file.chmod(mode)  # safetensors makes files that only the owner can read
            _sync(file)
        _sync(tmp)
        if not new:
            _replace(tmp, path)
        elif not _rename_if_free(tmp, path):
            raise InputError(f"{path} is there already and not empty; give a new folder")
        _sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to, which replaces `path` once it is synced."""
    path = Path(path)
    with translate_oserrors(path), temporary(path) as folder:
        tmp = folder / path.name
        yield tmp
        tmp.chmod(_new_file_mode(folder))
        _sync(tmp)
        tmp.replace(path)
        _sync(path.parent)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, with an unpredictable name, and remove it at the end.

    A single file is written in such a folder too. The library that writes it may use temporary
    names of its own, and in a new folder no other user can have put a link at any of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_for(path)
    while True:
        tmp = path.parent / f"{_PREFIX}{secrets.token_hex(8)}-{path.name}~"  # no *.json or the like
        tmp.mkdir()
        handle = _hold(tmp)
        if handle is not None:
            break
    try:
        yield tmp
    finally:
        try:
            _discard(tmp)
        finally:
            os.close(handle)


def _hold(path: Path, *, aged: bool = False) -> int | None:
    """Lock a file or folder, to show that a living process uses it, and return the handle.

    The lock is on the file itself, also if it is renamed, and ends with the handle or the process.

    Args:
        path: the file or folder.
        aged: on a file system without locks, take a lock only on what is at least a day old.

    Returns:
        The handle, or None if another process holds the lock or the path does not exist.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists()  # else another process has just removed it as a leftover
    except BlockingIOError:
        free = False
    except OSError:
        free = not aged or time.time() - os.fstat(handle).st_mtime > _DAY
    if free:
        return handle
    os.close(handle)
    return None


def _new_file_mode(folder: Path) -> int:
    """Return the mode that a new file in a folder gets: 0666 without the umask."""
    probe = folder / ".mode"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def _replace(tmp: Path, path: Path) -> None:
    """Rename `tmp` to `path`; first move away what is there, since a rename cannot replace a folder
    with files in it."""
    while not _rename_if_free(tmp, path):
        old = path.parent / f"{_PREFIX}old-{secrets.token_hex(8)}-{path.name}"
        with ExitStack() as stack:
            with suppress(OSError):  # a link cannot be held
                if (handle := _hold(path)) is not None:
                    stack.callback(os.close, handle)
            with suppress(FileNotFoundError):
                path.rename(old)
            try:
                if _rename_if_free(tmp, path):
                    break
            except OSError:
                old.rename(path)
                raise
            finally:
                if os.path.lexists(path):
                    _discard(old)


def _rename_if_free(tmp: Path, path: Path) -> bool:
    """Rename `tmp` to `path`; return False if that is occupied, which can happen at any time."""
    try:
        tmp.rename(path)
    except OSError as error:
        if error.errno in _OCCUPIED:
            return False
        raise
    return True


def remove(path: Path) -> None:
    """Remove a folder. A process killed meanwhile leaves it complete, or under a temporary name."""
    with translate_oserrors(path):
        _discard(path.rename(path.parent / f"{_PREFIX}gone-{secrets.token_hex(8)}-{path.name}"))


def _discard(path: Path) -> None:
    """Remove a file, a folder or a link (not its target), ignoring errors inside a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left, and restore what they had moved away.

    What living processes are writing stays.
    """
    for tmp in Path(folder).glob(f"{_PREFIX}*"):
        _clear(tmp)


def _clear_for(path: Path) -> None:
    """Remove what killed processes left of `path`; other leftovers in the folder are not ours."""
    name = re.escape(path.name)
    ours = re.compile(rf"\.tmp-([0-9a-f]{{16}}-{name}~|(old|gone)-[0-9a-f]{{16}}-{name})")
    for entry in [entry.name for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)]:
        _clear(path.parent / entry)


def _clear(tmp: Path) -> None:
    """Remove a leftover, or restore what was moved away, unless its process is alive."""
    with suppress(OSError):
        if tmp.is_symlink():
            tmp.unlink()
            return
        handle = _hold(tmp, aged=True)
        if handle is None:
            return
        try:
            moved = _MOVED_AWAY.fullmatch(tmp.name)
            name = moved and (moved["name"] or moved["formerly"])
            if name and not os.path.lexists(tmp.parent / name):
                tmp.rename(tmp.parent / name)
            else:
                _discard(tmp)
        finally:
            os.close(handle)


def unshare(path: Path) -> None:
    """Replace a file that has other hard links by a copy, so that writing to it in place does not
    change a folder that was copied by hard links."""
    with suppress(FileNotFoundError):
        if os.lstat(path).st_nlink > 1 and path.is_file():
            write_bytes(path, path.read_bytes())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file: under a temporary name, synced to disk, then renamed."""
    with atomic_file(path) as tmp, tmp.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file: under a temporary name, synced to disk, then renamed."""
    with atomic_file(path) as tmp:
        tmp.write_bytes(content)


# ---- reading, and errors -------------------------------------------------------------------------


def sha256(file: Path) -> str:
    """Return the SHA-256 checksum of a file, as hex digits."""
    with read_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading `path` inside a with block into CorruptError, and refuse FIFOs and
    devices, which could block the reader forever."""
    try:
        check_regular(path)
        yield
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not JSON: {error}; it is truncated or was altered") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror or error}") from None


def check_regular(path: Path) -> None:
    """Raise CorruptError for a FIFO, a socket or a device: opening one may block forever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        names = {
            stat.S_IFIFO: "a FIFO",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        raise CorruptError(
            f"{path} is {names.get(stat.S_IFMT(mode), 'of a special kind')}, expected a file"
        )


def exists(path: Path) -> bool:
    """Return whether a path exists. One that the system cannot represent (too long, with NUL or a
    lone surrogate) does not."""
    try:
        return path.exists()
    except ValueError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise InputError(f"{path} cannot be accessed: {error.strerror or error}") from None


@contextmanager
def translate_oserrors(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` inside a with block into DiskError, with the free space."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(path) from error
        if error.errno in _NOT_WRITABLE:
            raise DiskError(
                f"cannot write {path}: {error.strerror}; give a folder that you may write, and "
                "that is there, with --out"
            ) from error
        raise
    except Exception as error:  # safetensors has its own exception for a full disk
        if (
            "No space left" in str(error)
            or "os error 28" in str(error)
            or "File too large" in str(error)
        ):
            raise _disk_full(path) from error
        raise


def _disk_full(path: Path) -> DiskError:
    return DiskError(
        f"disk full while writing {path}: {_free_space(path)}; what was saved before is intact. "
        "Make room and run the same command again"
    )


def _free_space(path: Path) -> str:
    for folder in (path, *path.parents):
        with suppress(OSError):  # the folder may have been removed
            return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free at {folder}"
    return "free space unknown"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
