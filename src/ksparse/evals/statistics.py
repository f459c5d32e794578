"""Values with standard errors, and the result of an evaluation.

Numbers are ratios of float64 sums over documents, divided once at the end. Tokens of one document
are not independent, so standard errors treat documents as clusters.

A new number keeps in memory what each cluster adds to its error (`Estimate`). The difference of two
numbers of the same documents is therefore paired: what moves both alike is not in its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse import display

BASELINES: dict[str, dict[str, tuple[str, ...]]] = {
    "downstream": {"ce_spliced": ("ce_clean", "ce_zero", "ce_mean")},
    "own_loss": {"loss_spliced": ("loss_clean", "loss_zero", "loss_mean")},
    "probes": {"probe_loss": ("channel_loss", "random_sae_loss", "prior_loss")},
    "n2g": {"recall": ("shuffled_recall",), "precision": ("shuffled_precision",)},
    "explained_loss": {"ce_n2g": ("ce_clean", "ce_bigram", "ce_unigram", "ce_bias")},
    "ablation": {"ablation_sparsity": ("channel_sparsity",), "kl": ("channel_kl",)},
    "refinement": {"nmse_refined": ("nmse_raw",), "ce_delta_refined": ("ce_delta_raw",)},
}
"""{evaluation: {number: the numbers that it is shown beside}}, those that a result has."""
Value = dict[str, float | None]
"""{"value": …, "se": …}: a number and its standard error, each None where it is not defined."""


class Estimate(Value):
    """{"value", "se"}, with the deviation of each cluster that the standard error is made of.

    se^2 = m / (m - 1) sum of u_i^2 over m clusters, where u_i is the first-order change of the
    value by cluster i (linearization: Cochran 1977, section 6.3). It compares and serializes as a
    plain dict; files have no deviations.

    Args:
        value: the number.
        clusters: the id of each cluster, [m], in any order and each once.
        deviations: u_i, [m]; they add up to 0.
    """

    def __init__(self, value: float, clusters: np.ndarray, deviations: np.ndarray):
        m = len(clusters)
        se = math.sqrt(float((deviations**2).sum()) * m / (m - 1)) if m > 1 else None
        super().__init__(value=value, se=se)
        self.clusters, self.deviations = clusters, deviations

    def affine(self, scale: float, shift: float) -> Estimate:
        """Return scale x value + shift."""
        assert self["value"] is not None
        return Estimate(scale * self["value"] + shift, self.clusters, scale * self.deviations)

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the difference, paired by cluster; one that only one of them has counts as 0 in
        the other."""
        assert self["value"] is not None and other["value"] is not None
        clusters = np.union1d(self.clusters, other.clusters)
        deviations = np.zeros(len(clusters))
        deviations[np.searchsorted(clusters, self.clusters)] += self.deviations
        deviations[np.searchsorted(clusters, other.clusters)] -= other.deviations
        return Estimate(self["value"] - other["value"], clusters, deviations)


def difference(one: Value, other: Value) -> dict[str, float | bool | None]:
    """Return one - other with its standard error, and whether that is of paired clusters.

    Numbers without clusters (read from a file, or of the latents of each SAE) are taken as
    independent.

    Example:
        >>> import numpy as np
        >>> tokens = np.array([10.0, 10.0, 10.0])
        >>> one, other = ratio(np.array([11.0, 21.0, 31.0]), tokens), ratio(10 * tokens / 5, tokens)
        >>> difference(one, other) == {"value": one["value"] - 2, "se": one["se"], "paired": True}
        True
        >>> difference({"value": 3.0, "se": 0.3}, {"value": 1.0, "se": 0.4})
        {'value': 2.0, 'se': 0.5, 'paired': False}
    """
    if isinstance(one, Estimate) and isinstance(other, Estimate):
        return {**(one - other), "paired": True}
    if one["value"] is None or other["value"] is None:
        return {**no_value(), "paired": False}
    known = one["se"] is not None and other["se"] is not None
    se = math.hypot(one["se"] or 0.0, other["se"] or 0.0) if known else None
    return {"value": one["value"] - other["value"], "se": se, "paired": False}


def no_value() -> Value:
    """Return the value of a quantity that is not defined, such as a mean of nothing."""
    return {"value": None, "se": None}


class DocumentTotals(np.ndarray):
    """Totals of documents, [documents] or [documents, d], that know their documents.

    Arithmetic keeps them, so a ratio of such arrays can be paired with another.
    """

    documents: np.ndarray | None = None
    """The id of each row's document."""

    def __array_finalize__(self, source: Any) -> None:
        self.documents = getattr(source, "documents", None)


class DocumentSums:
    """Float64 sums of named columns, one row for each document.

    Example:
        >>> import torch
        >>> sums = DocumentSums()
        >>> sums.add(torch.tensor([3, 3, 8]), loss=torch.tensor([1.0, 2.0, 4.0]))
        >>> sums["loss"].tolist()
        [3.0, 4.0]
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._sums: dict[str, np.ndarray] = {}

    def add(self, documents: Tensor, **columns: Tensor) -> None:
        """Add the values of tokens to the sums of their documents.

        Args:
            documents: the document of each token, [m].
            columns: values by name, [m] or [m, d].
        """
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
        sums = self._sums.get(name, np.zeros((0, *shape)))
        if len(sums) < len(self._rows):
            sums = np.concatenate([sums, np.zeros((2 * len(self._rows) - len(sums), *shape))])
        self._sums[name] = sums

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the sums of a column, [documents] or [documents, d]."""
        totals = self._sums[name][: len(self._rows)].view(DocumentTotals)
        totals.documents = np.fromiter(self._rows, np.int64, len(self._rows))
        return totals

    def __len__(self) -> int:
        return len(self._rows)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Value:
    """Return sum(numerators) / sum(denominators) with its standard error.

    The error is the linearized one of a ratio of cluster totals (Cochran 1977, section 6.3).

    Args:
        numerators: totals by document, [documents], of `DocumentSums` or arithmetic on these.
        denominators: totals by document, [documents]. Plain arrays are of documents 0, 1, ….

    Example:
        >>> import numpy as np
        >>> ratio(np.array([3.0]), np.array([2.0]))
        {'value': 1.5, 'se': None}
    """
    total = float(denominators.sum())
    if not total:
        return no_value()
    value, documents = float(numerators.sum()) / total, getattr(numerators, "documents", None)
    if documents is None or len(documents) != len(numerators):
        documents = np.arange(len(numerators))
    deviations = np.asarray(numerators - value * denominators) / total
    return Estimate(value, documents, deviations)


def share(count: int, of: int) -> Value:
    """Return count / of for `of` independent items, with the binomial standard error."""
    value = count / of
    return {"value": value, "se": math.sqrt(value * (1 - value) / of)}


class Clustered:
    """Values of rows and the cluster of each row: rows of one cluster are not independent.

    Args:
        clusters: the cluster (a document or a text) of each row, [m].
        values: the value of each row, [m].
    """

    def __init__(self, clusters: Tensor, values: Tensor):
        self.clusters, self.values = clusters.cpu().numpy(), values.cpu().double().numpy()

    def __sub__(self, other: Clustered) -> Clustered:
        """Return the paired differences of values on the same rows."""
        return Clustered(
            torch.from_numpy(self.clusters), torch.from_numpy(self.values - other.values)
        )

    @staticmethod
    def mean(parts: Sequence[Clustered]) -> Value:
        """Return the mean of the parts' means, with its standard error.

        A cluster may have rows in several parts: its deviations are added before they are squared.
        """
        if not parts:
            return no_value()
        means = [part.values.mean() for part in parts]
        deviations = np.concatenate(
            [
                (part.values - mean) / len(part.values) / len(parts)
                for part, mean in zip(parts, means)
            ]
        )
        clusters, inverse = np.unique(
            np.concatenate([part.clusters for part in parts]), return_inverse=True
        )
        return Estimate(float(np.mean(means)), clusters, np.bincount(inverse, deviations))


def check_plain(value: Any, where: str = "the result") -> None:
    """Check that a value is JSON in plain Python types.

    A number of numpy or torch looks and compares like a plain one, but does not serialize like one.

    Args:
        value: the value, checked recursively.
        where: what to call it in the error.

    Raises:
        TypeError: naming the first item of another type.
    """
    if type(value) in (dict, Estimate):
        for key, item in value.items():
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            check_plain(item, f"{where}[{number}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__name__}, not a plain value"
        )


def count_of(number: int | None, things: str) -> str:
    """Return a number with what it counts; "" for none.

    Example:
        >>> count_of(1_200, "tokens"), count_of(1, "documents"), count_of(None, "tokens")
        ('1,200 tokens', '1 document', '')
    """
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}" if number else ""


class Result(dict[str, Any]):
    """The result of one evaluation: a dict that is saved as JSON, with tensors beside it.

    The dict itself is what `evals/NAME.json` holds, so `result["nmse"]["value"]` reads the same
    from a new result and from a saved one. The two attributes go into files of their own and are
    empty in most results.

    Args:
        values: the JSON object, in plain Python types alone.
        arrays: tensors by name, for the safetensors file beside the JSON.
        files: other JSON files by name, such as the vocabulary.

    Raises:
        TypeError: if `values` holds anything but plain values.
    """

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

    def numbers(self) -> dict[str, Value]:
        """Return the numbers that have a standard error, by key."""
        return {
            key: value
            for key, value in self.items()
            if isinstance(value, dict) and set(value) == {"value", "se"}
        }

    def to_frame(self) -> Any:
        """Return the numbers as a pandas DataFrame: evaluation, number, value, se.

        Raises:
            InputError: if pandas is not installed.
        """
        return display.to_frame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `to_frame`."""
        name = self.get("name")
        return [{"evaluation": name, "number": key, **v} for key, v in self.numbers().items()]

    def table(self) -> display.Table:
        """Return the numbers, value ± standard error, each beside its baselines."""
        words = (count_of(self.get(f"n_{what}"), what) for what in ("tokens", "documents"))
        place = f"{self['lm']} at {self['site']}" if self.get("lm") else ""
        rows = self._rows_beside_baselines()
        width = 3 if any(row[2] for row in rows) else 2
        return display.Table(
            " · ".join(part for part in (str(self.get("name")), place, *words) if part),
            ("number", "value ± se", "beside it")[:width],
            [row[:width] for row in rows],
            [f"note: {note}" for note in self.get("notes", ())],
        )

    def _rows_beside_baselines(self) -> list[tuple[str, str, str]]:
        """Return each number's name, the number, and its baselines."""
        numbers = self.numbers()
        baselines = BASELINES.get(str(self.get("name")).partition("-")[0], {})
        beside = {key: [k for k in keys if k in numbers] for key, keys in baselines.items()}
        shown = {key for keys in beside.values() for key in keys}
        return [
            (
                key,
                display.format_estimate(value),
                ", ".join(
                    f"{k} {display.format_estimate(numbers[k])}" for k in beside.get(key, ())
                ),
            )
            for key, value in numbers.items()
            if key not in shown
        ]

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()


class Results(dict[str, Result]):
    """Results of several evaluations of one SAE, by name.

    Example:
        >>> Results(stats=Result({"name": "stats", "l0": {"value": 32.0, "se": 0.5}}))
        stats
          number  value ± se
          l0      32.0000 ± 0.5000
    """

    def to_frame(self) -> Any:
        """Return the numbers of all as a pandas DataFrame: evaluation, number, value, se.

        Raises:
            InputError: if pandas is not installed.
        """
        return display.to_frame([row for result in self.values() for row in result.rows()])

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.values()))

    def _repr_html_(self) -> str:
        return "".join(result.table().html() for result in self.values())
