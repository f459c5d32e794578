"""The text of the built-in model: the standard library of the running Python interpreter.

Nothing is copied: the files are read where Python keeps them. A hash of each file's path decides
its split and orders the documents. So any prefix of a split is an unbiased sample of it, and a file
is in the same split on every machine and in every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = {"train": range(0, 85), "validation": range(85, 90), "held-out": range(90, 100)}
"""The residues of a document's hash modulo 100 that belong to each split."""
# Tables and reference pages rather than source, and packages outside the standard library.
EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "_bundled"}


def documents(split: str = "train") -> Iterator[tuple[str, str]]:
    """Yield (path in the library, source) of one split's files, in the order of their hashes.

    Raises:
        ValueError: There is no such split.
    """
    if split not in SPLITS:
        raise ValueError(
            f"split {split!r} of the built-in text does not exist; there are {', '.join(SPLITS)}"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    hashed = sorted((_hash(path), path) for path in paths if not EXCLUDED & set(path.parts))
    for number, path in hashed:
        if number % 100 in SPLITS[split]:
            source = _read(root / path)
            if source:
                yield path.as_posix(), source


def _hash(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big")


def _read(path: Path) -> str:
    """Read a file as UTF-8 with Unix line ends; '' for one in another encoding (some tests)."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError):
        return ""
