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
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ksparse.errors import CorruptError, DiskError, InputError

log = logging.getLogger("ksparse")

MANIFEST = "manifest.json"
SEAL = "checksum"
_PREFIX = ".tmp-"
_OLD = re.compile(r"\.tmp-old-(?:[0-9a-f]{16}-(?P<name>.+)|(?P<formerly>.+)-\d+)")
_DAY = 86_400  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Types = type | tuple[type, ...]
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
    with explained(folder):
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
        with explained(folder):
            if os.fstat(handle).st_nlink == 1:  # else it is another folder's file as well
                stream.truncate(0)
                stream.seek(0)
                stream.write(str(os.getpid()).encode())
        yield


# ---- whole or not at all -----------------------------------------------------------------------


@contextmanager
def committed(path: Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place, with a manifest, once it is
    synced.

    `facts` go into the manifest. On any error the temporary folder is removed and `path` stays what
    it was.
    """
    with filled(path) as tmp:
        yield tmp
        sums = {file.name: sha256(file) for file in sorted(tmp.iterdir())}
        write_json(tmp / MANIFEST, {**facts, "sha256": sums}, sealed=True)


@contextmanager
def filled(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place once all of it is synced.

    new: raise InputError, and leave what is there, where `path` has come to hold anything.
    """
    path = Path(path)
    if os.path.realpath(path) == os.getcwd():
        raise InputError(
            f"{path} is the working folder, which cannot be replaced; give the name of a new one"
        )
    with explained(path), temporary(path) as tmp:
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
def placed(path: Path) -> Iterator[Path]:
    """Yield a path to write a file at, which takes the place of `path` once it is synced."""
    path = Path(path)
    with explained(path), temporary(path) as folder:
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


def check_replaceable(folder: Path) -> None:
    """Raise InputError if a folder holds anything but what `committed` put there."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    listed = read_table(folder / MANIFEST, sha256=dict)["sha256"] if MANIFEST in names else {}
    strange = next((name for name in names if name not in listed and name != MANIFEST), None)
    if strange or (folder.exists() and not folder.is_dir()):
        what = f"holds {strange}" if strange else "is a file"
        raise InputError(f"{folder} {what}, which would be lost; give a new folder")


def remove(path: Path) -> None:
    """Remove a folder: a process that is killed meanwhile leaves it whole, or under a temporary
    name, never half of it under its own."""
    with explained(path):
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


def sha256(file: Path) -> str:
    """Return the sum of a file's bytes."""
    with read_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(facts: Any) -> str:
    """Return a short name for JSON-able facts: the first 16 hex digits of the SHA-256 of their
    canonical form."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write JSON (never NaN) to a temporary name, sync, rename. sealed: a table gets the sum of all
    else in it, which `read_json` checks and takes off."""
    text = _dumps(value)
    write_text(path, (_dumps({**value, SEAL: _seal(json.loads(text))}) if sealed else text) + "\n")


def _dumps(value: Any) -> str:
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which no UTF-8 can hold and an escape can
        return json.dumps(value, indent=1, allow_nan=False)
    return text


def _seal(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary name, sync, rename."""
    with placed(path) as tmp, tmp.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a temporary name, sync, rename."""
    with placed(path) as tmp:
        tmp.write_bytes(content)


def read_json(path: Path) -> Any:
    """Read one JSON file; say which one is missing, damaged, or not what its seal says."""
    path = Path(path)
    with read_errors(path):
        found = parse(path.read_text(encoding="utf-8"), path)
    if isinstance(found, dict) and SEAL in found and found.pop(SEAL) != _seal(found):
        raise CorruptError(
            f"{path} was altered: it does not have the sum that it was written with; use an older "
            "copy, or have it written again"
        )
    return found


def read_table(path: Path, **keys: Types) -> dict[str, Any]:
    """Read a JSON table; raise CorruptError, naming the key, unless it has these keys with values
    of these types."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CorruptError(
            f"{path} is not a table but {type(found).__name__}; it was not written by ksparse or "
            "is damaged"
        )
    check_keys(path, found, keys)
    return found


def read_numbered(
    path: Path,
    newest: int,
    keys: Mapping[str, Types],
    optional: Mapping[str, Types] | None = None,
    *,
    unnumbered: int | None = None,
) -> dict[str, Any]:
    """Read a JSON table whose `format` is a number of 1 to `newest`, and return all else in it:
    `keys`, perhaps `optional` ones, and nothing that a newer ksparse may mean something by.

    unnumbered: the format of a table without a number; None: there is none.
    """
    found, optional = read_table(path), optional or {}
    number = found.pop("format", unnumbered)
    check_format(path, number, newest)
    unknown = sorted(set(found) - set(keys) - set(optional))
    if unknown:
        raise CorruptError(
            f"{path} has the key {unknown[0][:80]!r}, which this ksparse does not know in format "
            f"{number}; "
            "it was written by another version or is damaged"
        )
    check_keys(
        path, found, {**keys, **{key: kind for key, kind in optional.items() if key in found}}
    )
    return found


def check_format(path: Path, number: Any, newest: int) -> None:
    """Raise InputError unless the format number of a file is one of 1 to `newest`."""
    if type(number) is int and number > newest:
        raise InputError(
            f"{path} was written by a newer ksparse (format {number}); this one reads up to "
            f"{newest}. "
            "Install a newer ksparse to read it"
        )
    if type(number) is not int or number < 1:
        raise CorruptError(
            f"{path} has format {str(number)[:80]!r}, expected a number of 1 to {newest}; "
            "it was not written by ksparse or is damaged"
        )


def check_keys(
    path: Path, table: Mapping[str, Any], keys: Mapping[str, Types], under: str = ""
) -> None:
    """Raise CorruptError, naming the key, unless a table of a file has these keys with values of
    these types.

    A boolean is no number, and no whole number has more than 63 bits. under: where in the file the
    table is.
    """
    for key, kind in keys.items():
        name = f"{under}{key}"
        if key not in table:
            raise CorruptError(
                f"{path} has no {'table' if kind is dict else 'key'} {name!r}; it was not "
                f"written by ksparse or is damaged"
            )
        kinds, value = kind if isinstance(kind, tuple) else (kind,), table[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(
                "null" if each is type(None) else each.__name__ for each in kinds
            )
            raise CorruptError(f"{path}: {name!r} is {str(value)[:80]!r}, expected {expected}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CorruptError(f"{path}: {name!r} is too large a number; it must be below 2^63")


def read_strings(path: Path) -> list[str]:
    """Read a JSON list of strings."""
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CorruptError(
            f"{path} is not a list of strings; it was not written by ksparse or is damaged"
        )
    return found


def read_lines(path: Path, **keys: Types) -> list[dict[str, Any]]:
    """Return the tables of a file of JSON lines that have these keys; leave out others with a
    warning, the last without: a killed process was writing it."""
    with read_errors(path):
        lines = path.read_bytes().splitlines()
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line.decode("utf-8"), path)
        except (CorruptError, UnicodeDecodeError):
            row = None
        if isinstance(row, dict) and all(
            isinstance(row.get(key), kind) and not isinstance(row[key], bool)
            for key, kind in keys.items()
        ):
            rows.append(row)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        log.warning(
            "%s: %s damaged and left out, the first of them line %s",
            path,
            "1 line is" if len(damaged) == 1 else f"{len(damaged):,} lines are",
            damaged[0],
        )
    return rows


def parse(text: str, path: Path) -> Any:
    """Return what JSON says, where it is JSON without NaN and infinity; else raise CorruptError."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}; it is truncated or was altered") from None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


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
def explained(path: Path) -> Iterator[None]:
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
