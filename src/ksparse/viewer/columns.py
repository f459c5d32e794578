"""One number of every latent after another: what tables are sorted by and maps are drawn from."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.report.source import Arrays
from ksparse.viewer.run_data import RunData, number
from ksparse.viewer.weights import Decoder

ROWS = 50
"""Rows of a table's page."""


@dataclass(frozen=True)
class Column:
    """A number of every latent; NaN where it was not measured."""

    key: str
    label: str
    kind: str
    """percent, or number."""
    reading: str
    eval: str
    array: str
    """Its name among the evaluation's arrays."""


COLUMNS = (
    Column(
        "density",
        "Density",
        "percent",
        "Share of held-out tokens on which it fires",
        "stats",
        "density",
    ),
    Column("mean_act", "Mean", "number", "Mean value where it fires", "stats", "mean_act"),
    Column("max_act", "Max", "number", "Largest value on held-out text", "stats", "max_act"),
    Column(
        "cosine",
        "Enc–dec",
        "number",
        "Cosine of what it reads and what it writes",
        "stats",
        "cosine",
    ),
    Column(
        "f1", "F1", "percent", "Harmonic mean of the patterns’ precision and recall", "n2g", "f1"
    ),
    Column(
        "precision",
        "Precision",
        "percent",
        "Share of the patterns’ predictions at which it fires",
        "n2g",
        "precision",
    ),
    Column(
        "recall",
        "Recall",
        "percent",
        "Share of its activations that the patterns catch",
        "n2g",
        "recall",
    ),
    Column(
        "effect",
        "Effect",
        "number",
        "KL in nats over the next predictions, when it is taken out where it is strongest",
        "ablation",
        "kl",
    ),
    Column(
        "sparsity",
        "Sparsity",
        "percent",
        "Share of the logits that taking it out changes",
        "ablation",
        "sparsity",
    ),
    Column(
        "gain",
        "Task gain",
        "number",
        "Nats that it says of its best probe task, on the training half",
        "probes",
        "best_gain",
    ),
)
PLANE = (
    Column(
        "pca_1", "Decoder PC 1", "number", "First principal component of the decoder’s rows", "", ""
    ),
    Column(
        "pca_2",
        "Decoder PC 2",
        "number",
        "Second principal component of the decoder’s rows",
        "",
        "",
    ),
)
LISTED = {"n2g": "scored", "ablation": "latent"}
"""Evaluations of some latents, and the array that lists them."""


class Columns:
    """The columns of a run, by key."""

    def __init__(self, reading: RunData, decoder: Decoder):
        self.reading, self.decoder = reading, decoder
        self.all = {column.key: column for column in COLUMNS if reading.has(column.eval)}
        if reading.source.run.checkpoints():
            self.all |= {column.key: column for column in PLANE}
        self._read: dict[str, np.ndarray] = {}

    @property
    def measured(self) -> list[Column]:
        """Those that come from evaluations."""
        return [column for column in self.all.values() if column.eval]

    def values(self, key: str) -> np.ndarray:
        """Return one number of every latent, [n] as float32; NaN where there is none."""
        if not self.all[key].eval:
            return self.decoder.plane[:, [column.key for column in PLANE].index(key)]
        if key not in self._read:
            self._read[key] = self._values(self.all[key])
        return self._read[key]

    def piece(self, key: str) -> dict[str, Any]:
        return {
            "float32": base64.b64encode(
                np.ascontiguousarray(self.values(key), "<f4").tobytes()
            ).decode()
        }

    @cached_property
    def first_rows(self) -> dict[str, Any]:
        """The top of the table in its first order: by effect, or else by density."""
        key = next((key for key in ("effect", "density") if key in self.all), None)
        values = self.values(key) if key else np.zeros(self.reading.n)
        order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:ROWS]
        return {
            "sort": key,
            "latents": order.tolist(),
            "glosses": [self.reading.gloss(latent) for latent in order.tolist()],
            "values": {
                column.key: [number(value) for value in self.values(column.key)[order].tolist()]
                for column in self.measured
            },
        }

    def _values(self, column: Column) -> np.ndarray:
        arrays, n = self.reading.arrays(column.eval), self.reading.n
        found = (
            np.nansum(arrays.whole("kl"), axis=1)
            if column.key == "effect"
            else arrays.whole(column.array)
        )
        latents = arrays.whole(LISTED[column.eval]) if column.eval in LISTED else np.arange(n)
        if found.shape != latents.shape or (
            len(latents) and not 0 <= latents.min() <= latents.max() < n
        ):
            raise self._other(arrays, column.array, found)
        values = np.full(n, np.nan, np.float32)
        values[latents] = found
        return values

    def _other(self, arrays: Arrays, name: str, found: np.ndarray) -> CorruptError:
        return CorruptError(
            f"{arrays.file}: '{name}' has shape {list(found.shape)} and is not about the run's "
            f"{self.reading.n:,} latents; "
            "run the evaluation again"
        )
