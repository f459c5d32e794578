"""The map's resources: the layouts of a run's latents, and what the dense regions of each are."""

from __future__ import annotations

import base64
import math
import threading
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.progress import Progress, no_progress
from ksparse.report.tokens import safe_text
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer import layouts, regions
from ksparse.viewer.layouts import Layout
from ksparse.viewer.run_data import GLOSS_TOKENS, RunData
from ksparse.viewer.weights import Decoder


class Maps:
    """The maps of a run, by the name of their layout.

    Args:
        data: the run's files.
        decoder: the SAE's decoder.
    """

    def __init__(self, data: RunData, decoder: Decoder):
        self.data, self.decoder = data, decoder
        self._lock = threading.Lock()
        self._made: dict[str, dict[str, Any]] = {}

    def names(self) -> list[str]:
        """Return the layouts that the run has: PCA with weights, UMAP where it was written."""
        run = self.data.source.run
        if not run.has_weights():
            return []
        kept = layouts.file_of(run).is_file() and self._read_kept() is not None
        return ["pca", "umap"] if kept else ["pca"]

    def resource(self, name: str) -> dict[str, Any] | None:
        """Return a map; None if the run has none of that name.

        Its `float32` is base64 of little-endian float32, [n, 2], NaN for latents without a place.
        """
        with self._lock:  # several requests, one computation
            if name not in self._made and name in self.names():
                self._made[name] = self._make(name)
            return self._made.get(name)

    def _read_kept(self) -> Layout | None:
        return layouts.read(self.data.source.run, self.data.n, self.decoder.identity())

    def _make(self, name: str) -> dict[str, Any]:
        drawn = drawn_latents(self.data, self.decoder)
        layout = self._read_kept() if name == "umap" else None
        if layout is None:
            layout = layouts.principal(self.decoder.rows, drawn)
        places = np.where(drawn[:, None], layout.places, np.nan).astype("<f4")
        return {
            "float32": base64.b64encode(places.tobytes()).decode(),
            "left_out": int(np.isnan(places[:, 0]).sum()),
            "regions": regions.describe(places, self._terms(), self.data.token),
            "made": {key: _plain(layout.made[key]) for key in sorted(layout.made)[:10]},
        }

    def _terms(self) -> dict[str, regions.TokenShares]:
        """The tokens of every latent: those it fires on by mass, and the first that it raises."""
        terms = {}
        if self.data.fires_on is not None:
            terms["fires"] = regions.TokenShares(*self.data.fires_on)
        if self.data.raises is not None:
            tokens = self.data.raises[:, :GLOSS_TOKENS]
            weights = np.broadcast_to(np.float32(1 / max(1, tokens.shape[1])), tokens.shape)
            terms["raises"] = regions.TokenShares(tokens, weights)
        return terms


def drawn_latents(data: RunData, decoder: Decoder) -> np.ndarray:
    """Return which latents are drawn, [n] as bool: those that fire, with a row that is not 0.

    Without `stats` it is not known which latents fire, and all are drawn.
    """
    rows = decoder.rows
    drawn: np.ndarray = np.einsum("nd,nd->n", rows, rows) > 0
    if data.stats is not None:
        density = data.stats.tensor("density")
        if density.shape == drawn.shape:
            drawn &= density > 0
    return drawn


def lay_out(run: RunFolder, *, observe: Progress = no_progress) -> bool:
    """Lay a run's latents out by UMAP, unless its folder has that layout; see `viewer.lay_out`."""
    if not run.has_weights():
        raise InputError(
            f"{run.path} has no checkpoint, and a map shows the SAE's decoder; train the run first"
        )
    data, decoder = RunData(run), Decoder(run)
    if layouts.read(run, data.n, decoder.identity()) is not None:
        return False
    drawn = drawn_latents(data, decoder)
    layouts.write(run, layouts.neighbour_map(decoder.rows, drawn, observe), decoder.identity())
    return True


def _plain(value: Any) -> Any:
    """Return a number, a list of numbers, or a text that is safe to look at."""
    if isinstance(value, list):
        return [_plain(each) for each in value[:10]]
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return safe_text(str(value), 100)
