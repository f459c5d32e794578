"""The text of the built-in subject: the standard library of the running interpreter.

Nothing is copied: the files are read where Python keeps them. A fixed hash of each file's path
decides its split, and the same hash orders the documents, so any prefix of a split is an unbiased
sample of it and a file never changes sides between machines or Python versions.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = {"train": range(0, 85), "validation": range(85, 90), "held-out": range(90, 100)}

# Tables and reference pages rather than source, and packages that are not the standard library.
EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "_bundled"}


def documents(split: str = "train") -> Iterator[tuple[str, str]]:
    """Yield (path inside the library, source) of one split, in the order of a hash of the path."""
    if split not in SPLITS:
        raise ValueError(
            f"split {split!r} of the built-in text does not exist; there are {', '.join(SPLITS)}"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    keyed = sorted((_key(path), path) for path in paths if not EXCLUDED & set(path.parts))
    for key, path in keyed:
        if key % 100 in SPLITS[split]:
            source = _read(root / path)
            if source:
                yield path.as_posix(), source


def _key(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big")


def _read(path: Path) -> str:
    """Read one file as UTF-8 with Unix line ends; a file in another encoding (some tests are) gives
    ''."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError):
        return ""
