"""Layouts: a place in two dimensions for every latent, by the direction of its decoder row.

pca     the first two principal components of the rows, computed when a page asks for them
umap    UMAP by cosine, computed once by `ksparse view RUN --map umap` and kept in the run's folder

Rows are scaled to norm 1. Latents that are dead have no place (NaN).
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import CorruptError, InputError
from ksparse.progress import Progress, no_progress
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder

FORMAT = 1
"""The version of map-umap.json that is read and written."""
NEIGHBOURS, MIN_DIST, SEED = 15, 0.1, 0
"""Options of UMAP: neighbours of each latent, least distance of points, seed."""
_BLOCK = 8_192  # rows that are in memory a second time


@dataclass(frozen=True)
class Layout:
    """Where the latents are.

    Args:
        places: [n, 2] as float32; NaN for latents without a place.
        made: how it was made, for the page: variance shares of PCA, options of UMAP.
    """

    places: np.ndarray
    made: dict[str, Any] = field(default_factory=dict)


def principal(rows: np.ndarray, drawn: np.ndarray) -> Layout:
    """Place latents by the first two principal components of their rows.

    The covariance [d, d] is summed over blocks of rows, so no second copy of them is needed. The
    sign of each component is fixed, so that a map looks the same each time.

    Args:
        rows: [n, d], of norm 1.
        drawn: which latents have a place and count, [n] as bool.

    Example:
        >>> layout = principal(np.eye(4, 3, dtype=np.float32), np.array([True] * 3 + [False]))
        >>> layout.places.shape, bool(np.isnan(layout.places[3]).all()), layout.made["shares"]
        ((4, 2), True, [0.5, 0.5])
    """
    from scipy.linalg import eigh

    n, d = rows.shape
    places = np.full((n, 2), np.nan, np.float32)
    count = int(drawn.sum())
    if not count:
        return Layout(places, {"shares": [0.0, 0.0]})
    total, gram = np.zeros(d), np.zeros((d, d))
    for first in range(0, n, _BLOCK):
        part = rows[first : first + _BLOCK][drawn[first : first + _BLOCK]]
        total += part.sum(0, dtype=np.float64)
        gram += part.T @ part
    mean = total / count
    covariance = gram / count - np.outer(mean, mean)
    kept = min(2, d)
    sizes, axes = eigh(covariance, subset_by_index=(d - kept, d - 1))
    sizes, axes = sizes[::-1], axes[:, ::-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(kept)])
    places[drawn] = 0
    places[drawn, :kept] = (rows @ axes.astype(np.float32) - (mean @ axes))[drawn]
    variance = float(np.trace(covariance))
    shares = [float(size / variance) if variance > 0 else 0.0 for size in sizes]
    return Layout(places, {"shares": [round(max(0.0, share), 6) for share in shares]})


def neighbour_map(rows: np.ndarray, drawn: np.ndarray, observe: Progress = no_progress) -> Layout:
    """Place latents by UMAP with cosine distances, started from their principal components.

    Args:
        rows: [n, d], of norm 1.
        drawn: which latents have a place, [n] as bool.
        observe: called as "neighbours" and "layout" get on.

    Raises:
        InputError: umap-learn is not installed, or fewer than 5 latents are drawn.
    """
    count = int(drawn.sum())
    if count < 5:
        raise InputError(
            f"UMAP needs 5 latents that fire at least; this run has {count:,}. The map by PCA "
            "needs none"
        )
    observe("starting UMAP", 0, 1)  # it is compiled as it starts
    try:
        umap = importlib.import_module("umap")
    except ModuleNotFoundError:
        raise InputError(
            "--map umap needs the package umap-learn: pip install 'ksparse[umap]'; the map by PCA "
            "needs nothing"
        ) from None
    start = principal(rows, drawn).places[drawn]
    # From 10 across, as UMAP scales its own start.
    start = 10 * (start - start.min(0)) / max(float(np.ptp(start, axis=0).max()), 1e-9)
    observe("neighbours", 0, count)
    options = {"n_neighbors": min(NEIGHBOURS, count - 1), "min_dist": MIN_DIST}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        found = umap.UMAP(
            n_components=2,
            metric="cosine",
            init=start,
            random_state=SEED,
            n_jobs=1,
            low_memory=True,
            tqdm_kwds={
                "file": _Epochs(observe),
                "bar_format": "{n_fmt}/{total_fmt} ",
                "disable": False,  # though UMAP itself prints nothing
            },
            **options,
        ).fit_transform(rows[drawn])
    places = np.full((len(rows), 2), np.nan, np.float32)
    places[drawn] = found
    made = options | {"umap_learn": importlib.metadata.version("umap-learn"), "seed": SEED}
    return Layout(places, made)


class _Epochs:
    """A file to which UMAP's progress bar is written; passes on what it says."""

    def __init__(self, observe: Progress):
        self.observe = observe

    def write(self, text: str) -> None:
        if counts := re.search(r"(\d+)/(\d+) ", text):
            self.observe("layout", int(counts[1]), int(counts[2]))

    def flush(self) -> None:
        """Do nothing; every line was passed on."""


# ---- the file of a layout ------------------------------------------------------------------------


def file_of(run: RunFolder) -> Path:
    """Return the file of the layout by UMAP, which need not exist."""
    return run.file("map-umap.json")


def write(run: RunFolder, layout: Layout, decoder: str) -> None:
    """Keep a layout in the run's folder.

    Args:
        run: the run.
        layout: the layout.
        decoder: what tells the SAE's decoder from others (`Decoder.identity`).
    """
    packed = base64.b64encode(np.ascontiguousarray(layout.places, "<f4").tobytes()).decode()
    table = {"format": FORMAT, "decoder": decoder, "made": layout.made, "float32": packed}
    jsonio.write_json(file_of(run), table, sealed=True)


def read(run: RunFolder, n: int, decoder: str) -> Layout | None:
    """Read the layout by UMAP; None if there is none, or it is of another decoder.

    Raises:
        CorruptError: if the file is damaged.
    """
    file = file_of(run)
    if not file.is_file():
        return None
    table = jsonio.read_numbered(file, FORMAT, {"decoder": str, "made": dict, "float32": str})
    if table["decoder"] != decoder:
        return None
    try:
        numbers = np.frombuffer(base64.b64decode(table["float32"], validate=True), "<f4")
    except ValueError:
        numbers = np.zeros(0, np.float32)
    if numbers.size != 2 * n or np.isinf(numbers).any():
        raise CorruptError(
            f"{file} does not have a place for each of the run's {n:,} latents; remove it, and "
            "write it again with `ksparse view RUN --map umap`"
        )
    return Layout(numbers.reshape(n, 2).astype(np.float32), table["made"])
