"""Folders that are read and written a file at a time: on this machine, or in an object store.

    store = open_store("s3://bucket/acts/HASH")      a path and file:// are folders of this machine
    with store.writing(name) as file: ...            the file is `name` once the block has ended
    with store.reading(name) as file: ...            a small file, as it is now
    store.fetch(name, sha256)                        a large file, verified, as a path to map

Object stores are reached through fsspec. They cannot rename, and a file appears when all of it has
arrived, so whoever writes several files writes last the one that names the others. What is fetched
from one lies in a cache on this machine (`storage.cache`).
"""

from __future__ import annotations

import errno
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ksparse.errors import CorruptError, DiskError, InputError, NonFiniteError
from ksparse.progress import report
from ksparse.storage import atomic, checksums
from ksparse.storage.cache import Cache

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before a request that failed is sent again."""
FETCHING = "fetching files"
"""What this is called in progress reports."""
_AT_A_TIME = 4
_FILE = "file://"
_LACKING = (
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("TokenRetrievalError", "ProfileNotFound", "DefaultCredentialsError"),
)
"""Exceptions of clients of object stores that mean: no credentials."""
_REFUSED = ("ParamValidationError", "InvalidRegionError")
_log = logging.getLogger("ksparse")
Found = TypeVar("Found")


def is_remote(where: Path | str) -> bool:
    """Return whether a place is in an object store.

    Example:
        >>> [is_remote(where) for where in ("acts", "file:///data/acts", "s3://bucket/acts")]
        [False, False, True]
    """
    return isinstance(where, str) and "://" in where and not where.startswith(_FILE)


def join(where: Path | str, name: str) -> Path | str:
    """Return the place of a folder or file in a folder.

    Example:
        >>> join("s3://bucket/acts/", "HASH"), join("acts", "HASH")
        ('s3://bucket/acts/HASH', PosixPath('acts/HASH'))
    """
    if is_remote(where):
        return f"{str(where).rstrip('/')}/{name}"
    return Path(str(where).removeprefix(_FILE)) / name


def open_store(where: Path | str) -> Store:
    """Return a folder, which need not exist.

    Args:
        where: a path, or a URL: `file://` of this machine, `s3://`, `gs://` or any other that
            fsspec has a file system for.

    Raises:
        InputError: nothing that is installed reads such URLs.

    Example:
        >>> str(open_store("file:///data/acts"))
        '/data/acts'
    """
    if is_remote(where):
        return RemoteStore(str(where).rstrip("/"))
    return Store(Path(str(where).removeprefix(_FILE)))


class Store:
    """A folder of this machine.

    Args:
        path: the folder.

    Attributes:
        place: what names the folder in messages and recipes: its path, or URL.
    """

    is_remote = False

    def __init__(self, path: Path):
        self.path = path
        self.place: Path | str = path

    def __str__(self) -> str:
        return str(self.place)

    def names(self) -> set[str]:
        """Return the names of the files; none where there is no such folder."""
        return {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return (self.path / name).stat().st_size

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Yield a path to write a file to; it becomes `name` when the block ends without error."""
        return atomic.atomic_file(self.path / name)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Yield the path of a file as it is now; errors in the block name the file where it is."""
        yield self.path / name

    @contextmanager
    def naming(self, copy: Path, name: str) -> Iterator[None]:
        """Name a file where it is, and not its copy, in errors of the block."""
        try:
            yield
        except (InputError, NonFiniteError) as error:
            where = str(join(self.place, name))
            raise type(error)(str(error).replace(str(copy), where)) from None

    def fetch(self, name: str, sha256: str) -> Path:
        """Return the path of a file whose checksum has been verified.

        Raises:
            CorruptError: the file is missing or another one.
        """
        return checksums.check_file(self.path, name, sha256)

    def check_room(self, size: int) -> None:
        """Raise InputError unless files of so many bytes can be used at the same time."""

    def fetch_all(self, sums: dict[str, str]) -> list[Path]:
        """Return the paths of several files, each with its checksum, as `fetch` does."""
        return [self.fetch(name, sha256) for name, sha256 in sums.items()]

    def prefetch(self, sums: dict[str, str]) -> None:
        """Begin to bring files here that `fetch` will be asked for soon."""

    @property
    def disk(self) -> Path:
        """Where on this machine's disks files are written first."""
        return self.path

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what killed processes left."""
        atomic.remove_leftovers(self.path)


class RemoteStore(Store):
    """A folder in an object store; a request that fails is sent again a few times.

    Args:
        url: where it is.

    Raises:
        InputError: nothing that is installed reads such URLs.
    """

    is_remote = True

    def __init__(self, url: str):
        self.place = url
        self.path = Path(url.partition("://")[2])  # its last part is what messages name
        self._fs, self._root = _filesystem(url)
        self._cache = Cache.of_environment()

    def _url(self, name: str) -> str:
        return f"{self.place}/{name}" if name else str(self.place)

    def _ask(self, what: str, name: str, call: Callable[[], Found]) -> Found:
        """Return what a request returns.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: the request is refused, or the bucket does not exist.
            DiskError: the request failed each time.
        """
        for pause in (*PAUSES, None):
            try:
                return call()
            except Exception as error:  # of whichever client
                self._check_permanent(name, error)
                if pause is None:
                    raise DiskError(
                        f"cannot {what} {self._url(name)}: {_text(error)}; tried "
                        f"{len(PAUSES) + 1} times. Run the same command again when the store "
                        "answers: what is there is kept"
                    ) from error
                _log.warning(
                    "cannot %s %s: %s; trying again in %g s",
                    *(what, self._url(name), _text(error), pause),
                )
                time.sleep(pause)
        raise AssertionError

    def _check_permanent(self, name: str, error: Exception) -> None:
        """Raise what an error means that a second request would not help."""
        kind, text = type(error).__name__, _text(error)
        if "bucket" in text.lower() and "not exist" in text.lower():
            raise InputError(
                f"{self._url(name)}: there is no such bucket ({text}); create it, or correct its "
                "name or the endpoint"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise error
        if isinstance(error, OSError) and error.errno in (*atomic.FULL, errno.EROFS):
            raise error  # of this machine's disk
        if kind in _LACKING:
            raise InputError(
                f"{self._url(name)}: no credentials were found ({text}); for s3 set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile in ~/.aws, for gs run "
                "`gcloud auth application-default login`"
            ) from None
        if isinstance(error, PermissionError) or kind in _REFUSED:
            raise InputError(
                f"{self._url(name)}: the store refuses access ({text}); check the credentials, and "
                "that they may read and write there"
            ) from None

    def names(self) -> set[str]:
        """Return the names of the files; none where there is no such folder."""

        def ask() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.ls(self._root, detail=False))

        try:
            return {str(path).rstrip("/").rpartition("/")[2] for path in self._ask("list", "", ask)}
        except FileNotFoundError:
            return set()

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """

        def ask() -> int:
            self._fs.invalidate_cache()
            return int(self._fs.size(f"{self._root}/{name}"))

        return self._ask("read", name, ask)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a path to write a file to; it is sent when the block ends without error."""
        with tempfile.TemporaryDirectory(prefix="ksparse-") as folder:
            file = Path(folder, name)
            yield file
            bytes_here = file.stat().st_size

            def send() -> None:
                self._fs.put_file(str(file), f"{self._root}/{name}")
                self._fs.invalidate_cache()
                there = int(self._fs.size(f"{self._root}/{name}"))
                if there != bytes_here:
                    raise OSError(f"{there:,} of {bytes_here:,} bytes arrived")

            try:
                self._ask("write", name, send)
            except FileNotFoundError as error:
                raise InputError(
                    f"{self._url(name)} cannot be written: {_text(error)}; give a bucket or folder "
                    "that is there"
                ) from None

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """Yield the path of a copy of a file; errors in the block name the file where it is."""
        with tempfile.TemporaryDirectory(prefix="ksparse-") as folder:
            file = Path(folder, self.path.name, name)
            file.parent.mkdir()
            self.download(name, file)
            with self.naming(file, name):
                yield file

    def download(self, name: str, file: Path) -> None:
        """Copy a file to this machine.

        Raises:
            CorruptError: there is no such file.
        """
        path = f"{self._root}/{name}"
        try:
            self._ask("read", name, lambda: self._fs.get_file(path, str(file)))
        except FileNotFoundError:
            raise CorruptError(f"{self._url(name)} is missing") from None

    def fetch(self, name: str, sha256: str) -> Path:
        """Return the path of a verified copy of a file, in the cache.

        Raises:
            CorruptError: the file is missing or another one.
        """
        checksums.plain_name(name, self.path / checksums.MANIFEST)
        return self._cache.fetch(self._url(name), sha256, lambda file: self.download(name, file))

    def check_room(self, size: int) -> None:
        """Raise InputError unless the cache can hold files of so many bytes together."""
        self._cache.check_holds(str(self), size)

    def fetch_all(self, sums: dict[str, str]) -> list[Path]:
        """Return the paths of verified copies of several files, fetched a few at a time."""
        if not sums:
            return []
        report(FETCHING, 0, len(sums))
        found: list[Path] = []
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            waiting = [pool.submit(self.fetch, name, sha256) for name, sha256 in sums.items()]
            try:
                for each in waiting:
                    found.append(each.result())
                    report(FETCHING, len(found), len(sums))
            finally:
                for each in waiting:
                    each.cancel()
        return found

    def prefetch(self, sums: dict[str, str]) -> None:
        """Begin to bring files here that `fetch` will be asked for soon; in a thread, whose errors
        are then found again."""

        def bring() -> None:
            with suppress(Exception):
                self.fetch_all(sums)

        if sums:
            threading.Thread(target=bring, name="ksparse-prefetch", daemon=True).start()

    @property
    def disk(self) -> Path:
        """Where on this machine's disks files are written first."""
        return Path(tempfile.gettempdir())

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._ask("remove", name, lambda: self._fs.rm_file(f"{self._root}/{name}"))

    def clear(self) -> None:
        """Do nothing: what is half sent is not there."""


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    protocol = url.partition("://")[0]
    extra = "pip install 'ksparse[remote]'"
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise InputError(f"{url}: object stores need fsspec: {extra}") from None
    try:
        options = {"auto_mkdir": True} if protocol == "local" else {}
        fs, root = url_to_fs(url, **options)
    except ImportError as error:
        raise InputError(
            f"{url}: a package for {protocol}:// is not installed ({_text(error)}); for s3: {extra}"
        ) from None
    except ValueError as error:
        raise InputError(f"{url} is not a URL that fsspec reads: {_text(error)}") from None
    return fs, str(root).rstrip("/")


def _text(error: BaseException) -> str:
    """Return the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
