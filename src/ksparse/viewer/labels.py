"""Labels and stars that a reader gives latents: labels.json in the run's folder.

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
from ksparse.viewer.run_data import quote_value

FORMAT = 1
"""The version of labels.json that is read and written."""
LONGEST = 1000
"""Characters of a label at most."""
ADVICE = "repair it, or move it away to start with no labels"
PATIENCE = 15.0
"""Seconds to wait for another viewer that is writing."""


class Labels:
    """The labels of one run. The file is read each time, since others may write it too.

    Args:
        run: the run folder.
        n_latents: the run's number of latents.
    """

    def __init__(self, run: RunFolder, n_latents: int):
        self.folder, self.file, self.n_latents = run.path, run.path / "labels.json", n_latents

    def all(self) -> dict[str, dict[str, Any]]:
        """Return {latent: {"label", "star"}} of the latents that have a label or a star."""
        labels = {}
        for key, entry in self._read().items():
            label, star = entry.get("label"), entry.get("star") is True
            label = label if isinstance(label, str) else ""
            number = int(key) if re.fullmatch("0|[1-9][0-9]{0,11}", key) else self.n_latents
            if (label or star) and number < self.n_latents:
                labels[key] = {"label": label, "star": star}
        return labels

    def set(self, latent: Any, label: Any, star: Any) -> dict[str, Any]:
        """Replace the entry of one latent; an empty label without a star removes it.

        The arguments come from a request and may be of any type.

        Returns:
            The entry as it was written.

        Raises:
            InputError: there is no such latent, or the label or the star is not valid.
        """
        if (
            not isinstance(latent, int)
            or isinstance(latent, bool)
            or not 0 <= latent < self.n_latents
        ):
            raise InputError(
                f"latent {quote_value(latent)} is not one of 0 to {self.n_latents - 1}"
            )
        if not isinstance(label, str) or not isinstance(star, bool):
            raise InputError("a label must be a text, and a star true or false")
        if len(label) > LONGEST:
            raise InputError(
                f"a label has {len(label):,} characters; at most {LONGEST:,} are allowed"
            )
        entry = {"label": label.encode("utf-8", "replace").decode().strip(), "star": star}
        with atomic.locked(self.folder, ".labels.lock", wait=PATIENCE, advice="try again"):
            latents = self._read()
            latents.pop(str(latent), None)
            if entry["label"] or star:
                latents[str(latent)] = entry
            ordered = {key: latents[key] for key in sorted(latents, key=_order)}
            atomic.write_text(self.file, self._dumps({"format": FORMAT, "latents": ordered}) + "\n")
        return entry

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the file's table as it is, with entries that were written by hand."""
        if not os.path.lexists(atomic.inside(self.folder, self.file.name)):
            return {}
        content = jsonio.read_json(self.file)
        is_table = isinstance(content, dict) and content.get("format") == FORMAT
        latents = content.get("latents") if is_table else None
        if not isinstance(latents, dict) or not all(isinstance(e, dict) for e in latents.values()):
            raise CorruptError(f"{self.file} is not a table of labels of format {FORMAT}; {ADVICE}")
        return latents

    def _dumps(self, table: dict[str, Any]) -> str:
        """Return a table as readable JSON; lone surrogates have no UTF-8 and stay escaped."""
        try:
            text = json.dumps(table, indent=1, allow_nan=False, ensure_ascii=False)
        except RecursionError:
            raise CorruptError(f"{self.file} is nested too deep; {ADVICE}") from None
        return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _order(key: str) -> tuple[bool, int, str]:
    """Return a sort key: numbers in their order, other keys after them."""
    return (not (key.isascii() and key.isdecimal()), len(key), key)
