"""Names and stars that a reader gives latents: labels.json in the run's folder.

{"format": 1, "latents": {"17": {"label": "numbers in lists", "star": true}}}
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.run_data import written

FORMAT, LONGEST = 1, 1000
MEND = "mend it, or move it away to begin anew"
PATIENCE = 15.0
"""Seconds to wait for another viewer that is writing."""


class Labels:
    """The labels of one run, read anew each time: others may write the file too, also by hand."""

    def __init__(self, run: RunFolder, n_latents: int):
        self.folder, self.file, self.n_latents = run.path, run.path / "labels.json", n_latents

    def all(self) -> dict[str, dict[str, Any]]:
        """Return {latent: {"label", "star"}} of those of the run's latents that have either."""
        shown = {}
        for key, entry in self._table().items():
            label, star = entry.get("label"), entry.get("star") is True
            label = label if isinstance(label, str) else ""
            number = int(key) if re.fullmatch("0|[1-9][0-9]{0,11}", key) else self.n_latents
            if (label or star) and number < self.n_latents:
                shown[key] = {"label": label, "star": star}
        return shown

    def set(self, latent: Any, label: Any, star: Any) -> dict[str, Any]:
        """Replace what is said of one latent; an empty label without a star removes it."""
        if (
            not isinstance(latent, int)
            or isinstance(latent, bool)
            or not 0 <= latent < self.n_latents
        ):
            raise InputError(f"latent {written(latent)} is not one of 0 to {self.n_latents - 1}")
        if not isinstance(label, str) or not isinstance(star, bool):
            raise InputError("a label is a text and a star true or false")
        if len(label) > LONGEST:
            raise InputError(f"a label has {len(label):,} characters; at most {LONGEST:,} are kept")
        entry = {"label": label.encode("utf-8", "replace").decode().strip(), "star": star}
        with atomic.locked(self.folder, ".labels.lock", wait=PATIENCE, advice="try again"):
            latents = self._table()
            latents.pop(str(latent), None)
            if entry["label"] or star:
                latents[str(latent)] = entry
            ordered = {key: latents[key] for key in sorted(latents, key=_order)}
            atomic.write_text(self.file, self._dumps({"format": FORMAT, "latents": ordered}) + "\n")
        return entry

    def _table(self) -> dict[str, dict[str, Any]]:
        """Return the file's table as it is: also what a reader wrote there by hand is kept."""
        if not os.path.lexists(atomic.inside(self.folder, self.file.name)):
            return {}
        content = jsonio.read_json(self.file)
        ours = isinstance(content, dict) and content.get("format") == FORMAT
        latents = content.get("latents") if ours else None
        if not isinstance(latents, dict) or not all(isinstance(e, dict) for e in latents.values()):
            raise CorruptError(f"{self.file} is no table of labels of format {FORMAT}; {MEND}")
        return latents

    def _dumps(self, table: dict[str, Any]) -> str:
        """Return a table as JSON for the eye; half a character has no UTF-8: it stays escaped."""
        try:
            text = json.dumps(table, indent=1, allow_nan=False, ensure_ascii=False)
        except RecursionError:
            raise CorruptError(f"{self.file} is nested too deep; {MEND}") from None
        return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def _order(key: str) -> tuple[bool, int, str]:
    """Order keys as numbers, and what somebody wrote by hand after them."""
    return (not (key.isascii() and key.isdecimal()), len(key), key)
