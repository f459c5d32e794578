"""Columns: a number of every latent, by which tables are sorted and plots drawn."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.viewer.run_data import RunData, number

ROWS = 50
"""Rows on one page of the table."""


@dataclass(frozen=True)
class Column:
    """A number of every latent; NaN where it was not measured.

    Attributes:
        key: its name among the resources.
        label: its heading.
        kind: how to write it, "percent" or "number".
        reading: what it is; {text} stands for the text that the evaluation is of.
        eval: the evaluation that measures it.
        array: its name among the evaluation's arrays.
        unit: its unit, for the axes of plots; "" if it has none.
    """

    key: str
    label: str
    kind: str
    reading: str
    eval: str
    array: str
    unit: str = ""


COLUMNS = (
    Column(
        "density",
        "Density",
        "percent",
        "Share of tokens on which it fires, on {text}",
        "stats",
        "density",
        "of tokens",
    ),
    Column(
        "mean_act", "Mean", "number", "Mean value where it fires", "stats", "mean_act", "activation"
    ),
    Column("max_act", "Max", "number", "Largest value on {text}", "stats", "max_act", "activation"),
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
        "of predictions",
    ),
    Column(
        "recall",
        "Recall",
        "percent",
        "Share of its activations that the patterns catch",
        "n2g",
        "recall",
        "of activations",
    ),
    Column(
        "detection",
        "Detection",
        "percent",
        "Balanced accuracy with which a model finds its texts from its explanation; 50 % is chance",
        "explain",
        "detection",
    ),
    Column(
        "found_in",
        "In seeds",
        "percent",
        "Share of the other seeds with a partner of it, of decoder cosine 0.7 or more",
        "stability",
        "found_in",
    ),
    Column(
        "nearest",
        "Seed cosine",
        "number",
        "Largest decoder cosine with any latent of another seed, mean over the seeds",
        "stability",
        "nearest",
    ),
    Column(
        "token_rate",
        "By token",
        "percent",
        "Share of random contexts in which it fires if one of its favourite tokens is put there",
        "token_driven",
        "rate",
    ),
    Column(
        "effect",
        "Effect",
        "number",
        "KL in nats, summed over the next predictions, when it is ablated where it is strongest",
        "ablation",
        "kl",
        "nats",
    ),
    Column(
        "sparsity",
        "Sparsity",
        "percent",
        "Share of the logits that change when it is ablated",
        "ablation",
        "sparsity",
        "of logits",
    ),
    Column(
        "gain",
        "Task gain",
        "number",
        "Nats that it gains at its best probe task, on the training half",
        "probes",
        "best_gain",
        "nats",
    ),
)
LATENT_LISTS = {
    "token_driven": "latent",
    "explain": "latent",
    "n2g": "scored",
    "ablation": "latent",
}
"""Evaluations of only some latents, and the array that lists these."""


class Columns:
    """The columns of a run, by key.

    Args:
        data: the run's files.
    """

    def __init__(self, data: RunData):
        self.data = data
        self.all = {
            column.key: column
            for column in COLUMNS
            if data.has(column.eval) and (column.eval != "explain" or data.judged(column.key))
        }
        self._read: dict[str, np.ndarray] = {}

    @property
    def measured(self) -> list[Column]:
        """The columns that come from evaluations."""
        return list(self.all.values())

    def values(self, key: str) -> np.ndarray:
        """Return a number of every latent, [n] as float32; NaN where there is none."""
        if key not in self._read:
            self._read[key] = self._read_values(self.all[key])
        return self._read[key]

    def resource(self, key: str) -> dict[str, Any]:
        """Return a column as base64 of little-endian float32."""
        values = np.ascontiguousarray(self.values(key), "<f4")
        return {"float32": base64.b64encode(values.tobytes()).decode()}

    def describe(self) -> list[dict[str, str]]:
        """Return what each column is, for the overview."""
        text = self.data.text or "the text"
        return [
            {
                "key": column.key,
                "label": column.label,
                "kind": column.kind,
                "reading": column.reading.format(text=text),
                "unit": column.unit,
            }
            for column in self.all.values()
        ]

    @cached_property
    def first_rows(self) -> dict[str, Any]:
        """The top of the table in its first order: by largest value, or else by what there is."""
        keys = ("max_act", "effect", "f1", "gain")
        key = next((key for key in keys if key in self.all), None)
        values = self.values(key) if key else np.zeros(self.data.n)
        order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:ROWS]
        return {
            "sort": key,
            "latents": order.tolist(),
            "glosses": [self.data.gloss(latent) for latent in order.tolist()],
            "raises": [self.data.raised(latent) for latent in order.tolist()],
            "values": {
                column.key: [number(value) for value in self.values(column.key)[order].tolist()]
                for column in self.measured
            },
        }

    def _read_values(self, column: Column) -> np.ndarray:
        arrays, n = self.data.arrays(column.eval), self.data.n
        if column.key == "effect":
            measured = np.nansum(arrays.tensor("kl"), axis=1)
        else:
            measured = arrays.tensor(column.array)
        listed = LATENT_LISTS.get(column.eval)
        latents = arrays.tensor(listed) if listed else np.arange(n)
        if measured.shape != latents.shape or (
            len(latents) and not 0 <= latents.min() <= latents.max() < n
        ):
            raise CorruptError(
                f"{arrays.file}: '{column.array}' has shape {list(measured.shape)} and is not "
                f"about the run's {n:,} latents; run the evaluation again"
            )
        values = np.full(n, np.nan, np.float32)
        values[latents] = measured
        return values
