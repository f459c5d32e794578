"""Names and stars that a reader gives latents: labels.json in the run's folder.

    {"format": 1, "latents": {"17": {"label": "numbers in lists", "star": true}}}
"""

from __future__ import annotations

import threading
from typing import Any

from ksparse import files
from ksparse.errors import CorruptError, InputError
from ksparse.runs import RunFolder

FORMAT, LONGEST = 1, 1000


class Labels:
    """The labels of one run, read anew each time: the file may also be edited by hand."""

    def __init__(self, run: RunFolder, n_latents: int):
        self.file, self.n_latents, self._lock = run.path / "labels.json", n_latents, threading.Lock()

    def all(self) -> dict[str, dict[str, Any]]:
        """Return {latent: {"label", "star"}} of all that have either."""
        if not self.file.is_file():
            return {}
        found = files.read_json(self.file)
        latents = found.get("latents") if isinstance(found, dict) and found.get("format") == FORMAT else None
        if not isinstance(latents, dict) or not all(isinstance(entry, dict) for entry in latents.values()):
            raise CorruptError(f"{self.file} is no table of labels of format {FORMAT}; mend it, or move it away to begin anew")
        return latents

    def set(self, latent: Any, label: Any, star: Any) -> dict[str, Any]:
        """Replace what is said of one latent; an empty label without a star removes it."""
        if not isinstance(latent, int) or isinstance(latent, bool) or not 0 <= latent < self.n_latents:
            raise InputError(f"latent {latent!r} is not one of 0 to {self.n_latents - 1}")
        if not isinstance(label, str) or not isinstance(star, bool):
            raise InputError("a label is a text and a star true or false")
        if len(label) > LONGEST:
            raise InputError(f"a label has {len(label):,} characters; at most {LONGEST:,} are kept")
        entry = {"label": label.encode("utf-8", "replace").decode().strip(), "star": star}
        with self._lock:
            latents = self.all()
            latents.pop(str(latent), None)
            if entry["label"] or star:
                latents[str(latent)] = entry
            files.write_json(self.file, {"format": FORMAT, "latents": {key: latents[key] for key in sorted(latents, key=_number)}})
        return entry


def _number(key: str) -> tuple[bool, int, str]:
    """Order keys as numbers, and what somebody wrote by hand after them."""
    return (not key.isdecimal(), int(key) if key.isdecimal() else 0, key)
