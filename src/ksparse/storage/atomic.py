"""Folders and files that are there whole or not at all, and that notice a flipped bit.

    with committed(path) as tmp: ...   write into tmp; on success it becomes path, with a manifest
                                       of SHA-256 sums
    with filled(path) as tmp: ...      the same without a manifest, also for folders of folders
    with placed(path) as tmp: ...      write the file tmp; on success it becomes path
    with temporary(path) as tmp: ...   a folder beside path that is removed in the end
    inside(folder, name, ...)          a path of a folder, refused where a link leads out of it
    with locked(folder, name): ...     one process at a time
    verify(path)                       raise CorruptError unless every file is as the manifest says
    remove(path)                       a folder that is gone at once or not at all
    remove_leftovers(folder)           what killed processes left; what living ones write stays
    write_json / read_json             one JSON file, replaced atomically; sealed, it has its own
                                       sum in it
    read_table / read_lines            a JSON table with keys of known types; JSON lines, damaged
                                       ones left out
    read_numbered                      a table with a format number and a known list of keys

Neither safetensors nor torch.save notices an altered bit, and neither syncs to disk, so both happen
here.
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
_OLD = re.compile(r"\.tmp-old-(?:[0-9a-f]{16}-(?P<name>.+)|(?P<formerly>.+)-\d+)")
_DAY = 86_400  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BARRED = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EBUSY,
    errno.ENOENT,  # it was removed meanwhile
    errno.ESTALE,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


# ---- whose files -------------------------------------------------------------------------------


def inside(folder: Path, *names: str) -> Path:
    """Return folder/names, there or not; raise InputError where that is not in the folder.

    Somebody else's folder may hold links to any file of whoever opens it. What is read through one
    would be shown or published, and what is written would land behind it. Links that stay in the
    folder are followed, and those of the Hub's cache, whose snapshots link to its blobs.
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
    """Keep other processes, and threads, from what the lock folder/name stands for.

    The system lets go of a lock when its process dies. Raise InputError, naming the process that
    holds it, if that has not let go after `wait` seconds.
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
            if os.fstat(handle).st_nlink == 1:  # else it is another folder's file as well
                stream.truncate(0)
                stream.seek(0)
                stream.write(str(os.getpid()).encode())
        yield


@contextmanager
def atomic_dir(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place once all of it is synced.

    new: raise InputError, and leave what is there, where `path` has come to hold anything.
    """
    path = Path(path)
    if os.path.realpath(path) == os.getcwd():
        raise InputError(
            f"{path} is the working folder, which cannot be replaced; give the name of a new one"
        )
    with translate_oserrors(path), temporary(path) as tmp:
        yield tmp
        mode = _mode(tmp)
        for file in sorted(tmp.rglob("*"), reverse=True):
            if file.is_file():
                file.chmod(mode)  # safetensors makes files that only their owner can read
            _sync(file)
        _sync(tmp)
        if not new:
            _replace(tmp, path)
        elif not _renamed(tmp, path):
            raise InputError(f"{path} is there already and not empty; give a new folder")
        _sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file at, which takes the place of `path` once it is synced."""
    path = Path(path)
    with translate_oserrors(path), temporary(path) as folder:
        tmp = folder / path.name
        yield tmp
        tmp.chmod(_mode(folder))
        _sync(tmp)
        tmp.replace(path)
        _sync(path.parent)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, of a name that nobody can guess; remove it in the end.

    A folder for a single file too: whoever writes it may do so by way of names of its own, and none
    of those is one that others could have put a link at.
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
    """Return a handle that says, until it is closed, that a living process uses `path`.

    None where another one has said so. The lock is on what is there, whatever its name comes to be,
    and ends with its process. aged: on a file system without locks, only what is a day old.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists()  # else another process took it for a leftover, just now
    except BlockingIOError:
        free = False
    except OSError:
        free = not aged or time.time() - os.fstat(handle).st_mtime > _DAY
    if free:
        return handle
    os.close(handle)
    return None


def _mode(folder: Path) -> int:
    """Return the mode of a new file in a folder: what the umask leaves of 0666."""
    probe = folder / ".mode"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def _replace(tmp: Path, path: Path) -> None:
    """Put `tmp` in the place of `path`; move away what is there: no folder with files is
    overwritten."""
    while not _renamed(tmp, path):
        old = path.parent / f"{_PREFIX}old-{secrets.token_hex(8)}-{path.name}"
        with ExitStack() as stack:
            with suppress(OSError):  # a link cannot be held
                if (handle := _hold(path)) is not None:
                    stack.callback(os.close, handle)
            with suppress(FileNotFoundError):
                path.rename(old)
            try:
                if _renamed(tmp, path):
                    break
            except OSError:
                old.rename(path)
                raise
            finally:
                if os.path.lexists(path):
                    _discard(old)


def _renamed(tmp: Path, path: Path) -> bool:
    """Rename, if nothing is in the way; another process may put something there at any time."""
    try:
        tmp.rename(path)
    except OSError as error:
        if error.errno in _OCCUPIED:
            return False
        raise
    return True


def remove(path: Path) -> None:
    """Remove a folder: a process that is killed meanwhile leaves it whole, or under a temporary
    name, never half of it under its own."""
    with translate_oserrors(path):
        _discard(path.rename(path.parent / f"{_PREFIX}gone-{secrets.token_hex(8)}-{path.name}"))


def _discard(path: Path) -> None:
    """Remove whatever is there as far as that goes; of a link, the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders and files that killed processes left; give back what was moved
    away."""
    for tmp in Path(folder).glob(f"{_PREFIX}*"):
        _clear(tmp)


def _clear_for(path: Path) -> None:
    """Remove what killed processes left of `path`, and nothing else: the folder may be
    anybody's."""
    name = re.escape(path.name)
    ours = re.compile(rf"\.tmp-([0-9a-f]{{16}}-{name}~|(old|gone)-[0-9a-f]{{16}}-{name})")
    for entry in [entry.name for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)]:
        _clear(path.parent / entry)


def _clear(tmp: Path) -> None:
    """Remove a leftover, or give it back, unless its process lives or it is not ours to remove."""
    with suppress(OSError):
        if tmp.is_symlink():
            tmp.unlink()
            return
        handle = _hold(tmp, aged=True)
        if handle is None:
            return
        try:
            moved = _OLD.fullmatch(tmp.name)
            name = moved and (moved["name"] or moved["formerly"])
            if name and not os.path.lexists(tmp.parent / name):
                tmp.rename(tmp.parent / name)
            else:
                _discard(tmp)
        finally:
            os.close(handle)


def unshare(path: Path) -> None:
    """Before a file is written in its place: put a copy there if it has other names as well, as in
    a folder that was copied by hard links."""
    with suppress(FileNotFoundError):
        if os.lstat(path).st_nlink > 1 and path.is_file():
            write_bytes(path, path.read_bytes())


def sha256(file: Path) -> str:
    """Return the sum of a file's bytes."""
    with read_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary name, sync, rename."""
    with atomic_file(path) as tmp, tmp.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a temporary name, sync, rename."""
    with atomic_file(path) as tmp:
        tmp.write_bytes(content)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors of reading `path` into a CorruptError; refuse what would keep a
    reader waiting.
    """
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
    """Raise CorruptError for what is there and is neither a file nor a folder: opening a FIFO or a
    device may never end.
    """
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
    """Return whether a path is there; a name that the system cannot have (too long, with NUL, half
    characters) is not.
    """
    try:
        return path.exists()
    except ValueError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise InputError(f"{path} cannot be looked at: {error.strerror or error}") from None


@contextmanager
def translate_oserrors(path: Path) -> Iterator[None]:
    """Turn the system's write errors under `path` into one DiskError that says how much room there
    is."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise DiskError(
                f"disk full while writing {path}: {_free(path)}; what was saved before is intact. "
                "Make room and run the same command again"
            ) from error
        if error.errno in _BARRED:
            raise DiskError(
                f"cannot write {path}: {error.strerror}; give a folder that you may write, and "
                "that is there, with --out"
            ) from error
        raise
    except Exception as error:  # safetensors reports a full disk in an exception of its own
        if (
            "No space left" in str(error)
            or "os error 28" in str(error)
            or "File too large" in str(error)
        ):
            raise DiskError(
                f"disk full while writing {path}: {_free(path)}; what was saved before is intact. "
                "Make room and run the same command again"
            ) from error
        raise


def _free(path: Path) -> str:
    for folder in (path, *path.parents):
        with suppress(OSError):  # it may just have been removed
            return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free at {folder}"
    return "nothing is known of the room there"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
