"""Values with standard errors: ratios of float64 sums over documents, divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Value = dict[str, float | None]  # {"value": …, "se": …}


class DocumentSums:
    """Sums of named columns for each document."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._sums: dict[str, np.ndarray] = {}

    def add(self, documents: Tensor, **columns: Tensor) -> None:
        """Add columns [m] or [m, d] of tokens to the sums of their documents[m]."""
        ids, inverse = documents.cpu().unique(return_inverse=True)
        rows = torch.tensor([self._rows.setdefault(int(i), len(self._rows)) for i in ids])
        for name, column in columns.items():
            column = column.cpu().double()
            sums = torch.zeros(len(ids), *column.shape[1:], dtype=torch.float64).index_add_(
                0, inverse, column
            )
            self._grow(name, column.shape[1:])
            self._sums[name][rows.numpy()] += sums.numpy()

    def _grow(self, name: str, shape: tuple[int, ...]) -> None:
        have = self._sums.get(name, np.zeros((0, *shape)))
        if len(have) < len(self._rows):
            have = np.concatenate([have, np.zeros((2 * len(self._rows) - len(have), *shape))])
        self._sums[name] = have

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the sums [documents] or [documents, d] of a column."""
        return self._sums[name][: len(self._rows)]

    def __len__(self) -> int:
        return len(self._rows)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Value:
    """Return sum / sum over documents, with the linearised standard error of a ratio of cluster
    totals (Cochran 1977, 6.3)."""
    total = float(denominators.sum())
    if not total:
        return {"value": None, "se": None}
    value = float(numerators.sum()) / total
    m = len(numerators)
    spread = float(((numerators - value * denominators) ** 2).sum())
    return {"value": value, "se": math.sqrt(spread * m / (m - 1)) / abs(total) if m > 1 else None}


def share(count: int, of: int) -> Value:
    """Return a share of independent things, with its binomial standard error."""
    value = count / of
    return {"value": value, "se": math.sqrt(value * (1 - value) / of)}


class Clustered:
    """Values of rows, and the cluster (document, text) of each: rows of one cluster are not
    independent."""

    def __init__(self, clusters: Tensor, values: Tensor):
        self.clusters, self.values = clusters.cpu().numpy(), values.cpu().double().numpy()

    def __sub__(self, other: Clustered) -> Clustered:
        """Return the paired differences of values on the same rows."""
        return Clustered(
            torch.from_numpy(self.clusters), torch.from_numpy(self.values - other.values)
        )

    @staticmethod
    def mean(parts: Sequence[Clustered]) -> Value:
        """Return the mean of the parts' means; a cluster may have rows in several parts, and its
        deviations add up."""
        if not parts:
            return {"value": None, "se": None}
        means = [part.values.mean() for part in parts]
        deviations = np.concatenate(
            [
                (part.values - mean) / len(part.values) / len(parts)
                for part, mean in zip(parts, means)
            ]
        )
        _, inverse = np.unique(
            np.concatenate([part.clusters for part in parts]), return_inverse=True
        )
        sums = np.bincount(inverse, deviations)
        m = len(sums)
        return {
            "value": float(np.mean(means)),
            "se": math.sqrt((sums**2).sum() * m / (m - 1)) if m > 1 else None,
        }


def check_plain(value: Any, where: str = "the result") -> None:
    """Raise TypeError for what is not JSON as Python has it: a number of numpy or torch looks and
    compares like one, and is none elsewhere."""
    if type(value) is dict:
        for key, item in value.items():
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            check_plain(item, f"{where}[{number}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__name__}, not a plain value"
        )


class Result(dict[str, Any]):
    """A result as JSON, plain values alone; `arrays` holds what belongs into a safetensors file
    beside it, `files` other JSON files."""

    def __init__(
        self,
        values: dict[str, Any],
        arrays: dict[str, Tensor] | None = None,
        files: dict[str, Any] | None = None,
    ):
        super().__init__(values)
        check_plain(values)
        self.arrays = arrays or {}
        self.files = files or {}
