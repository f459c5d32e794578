"""Copies of files from object stores on this machine, by their SHA-256, up to a number of bytes.

KSPARSE_CACHE names the folder (by default ksparse/files in the user's cache folder) and
KSPARSE_CACHE_GB its size (100). Files that were not used for longest go first. What a process has
mapped stays readable for it after its file has gone. Several processes may share a cache: one
fetches, the others wait.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic

FOLDER, GIGABYTES = "KSPARSE_CACHE", "KSPARSE_CACHE_GB"
"""Environment variables."""
_DEFAULT_GB = 100.0
_WAIT = 3600.0  # seconds that another process may take to fetch a file
_COPY = re.compile(r"[0-9a-f]{64}(\.\w+)?")
_log = logging.getLogger("ksparse")


class Cache:
    """A folder of copies.

    Args:
        folder: where they lie.
        limit: how many bytes they may take.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    @classmethod
    def of_environment(cls) -> Cache:
        """Return the cache that the environment names.

        Raises:
            InputError: the size is no number.
        """
        text = os.environ.get(GIGABYTES, "") or str(_DEFAULT_GB)
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if not 0 < limit < 1e9:
            raise InputError(
                f"{GIGABYTES} is {text!r}; it is the size of the cache in gigabytes, such as 100"
            )
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = home if home.is_absolute() else Path("~/.cache").expanduser()
        folder = Path(os.environ.get(FOLDER, "") or home / "ksparse" / "files")
        return cls(folder, int(limit * 1e9))

    def fetch(self, name: str, sha256: str, download: Callable[[Path], None]) -> Path:
        """Return the verified copy of a file; copy it if it is not there.

        Args:
            name: the file where it is, for messages.
            sha256: its checksum.
            download: writes the file to a path.

        Raises:
            CorruptError: the file has another checksum, also when it is fetched again.
            DiskError: there is no room on the disk.
        """
        if not _COPY.fullmatch(sha256):
            raise CorruptError(f"{name}: {sha256[:80]!r} is no SHA-256 checksum")
        path = self.folder / f"{sha256}{Path(name).suffix}"
        advice = "wait for it, or remove the folder"
        with atomic.locked(self.folder, f".lock-{sha256[:2]}", wait=_WAIT, advice=advice):
            if path.is_file():
                if atomic.sha256(path) == sha256:
                    os.utime(path)
                    return path
                _log.warning("%s, a copy of %s, is damaged; it is fetched again", path, name)
                path.unlink()
            try:
                self._download(path, name, sha256, download)
            except CorruptError as error:
                _log.warning("%s; it is fetched once more", error)
                self._download(path, name, sha256, download)
        return path

    def _download(
        self, path: Path, name: str, sha256: str, download: Callable[[Path], None]
    ) -> None:
        with atomic.translate_oserrors(path), atomic.temporary(path) as folder:
            file = folder / path.name
            download(file)
            actual, size = atomic.sha256(file), file.stat().st_size
            if actual != sha256:
                raise CorruptError(
                    f"{name} is damaged: its SHA-256 is {actual[:12]}…, manifest.json says "
                    f"{sha256[:12]}… ({size:,} bytes there); put an intact copy in its place, or "
                    "have it written again"
                )
            with atomic.locked(self.folder, wait=_WAIT):
                self._make_room(size)
                file.replace(path)

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for longest, until `size` bytes more are allowed."""
        files = []
        for file in self.folder.iterdir():
            try:
                if _COPY.fullmatch(file.name):
                    files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
            except FileNotFoundError:
                continue  # another process has just removed it
        held = sum(held for _, held, _ in files)
        for _, freed, file in sorted(files):
            if held + size <= self.limit:
                break
            file.unlink(missing_ok=True)
            held -= freed

    def check_holds(self, what: str, size: int) -> None:
        """Raise InputError unless files of `size` bytes fit, which are needed at the same time."""
        if size > self.limit:
            raise InputError(
                f"{what} takes {size / 1e9:,.1f} GB, all of which is needed at the same time; the "
                f"cache in {self.folder} keeps {self.limit / 1e9:,.1f} GB. Set {GIGABYTES} to "
                f"{size / 1e9 + 0.1:,.1f} or more, and {FOLDER} to a disk that has the room; or "
                "shuffle fewer activations together, with --acts.shard-window"
            )
