"""A run's files, read once each, when a section first needs them."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ksparse.config import Recipe
from ksparse.errors import CorruptError
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder, Subject

log = logging.getLogger("ksparse")


class DamagedResult(CorruptError):
    """A result that cannot be read; the page is written without it."""

    def __init__(self, evaluation: str, message: str):
        super().__init__(message)
        self.evaluation = evaluation


SPLITS = {
    "held-out": "held-out text, which training never saw",
    "validation": "validation text, which training never saw",
    "train": "text that it was trained on",
}
"""What each split of a run's text is to the run."""


@dataclass(frozen=True)
class Number:
    """A value of a result, and its standard error if it has one."""

    value: float
    se: float | None = None


@dataclass
class RunSource:
    """What the sections read of a run.

    A result that is missing or damaged is None, never an error.

    Args:
        run: the run folder.
    """

    run: RunFolder
    left_out: dict[str, str] = field(default_factory=dict)
    """The command that writes each damaged result again, by the result's name."""
    _results: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    _arrays: dict[str, Arrays | None] = field(default_factory=dict)

    @cached_property
    def subject(self) -> Subject:
        """What the results are of: the SAE, and the LM, site and text."""
        return self.run.subject()

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe; None where the SAE was not trained here."""
        return None if self.subject.judged else self.run.recipe()

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware, as the run recorded them."""
        return self.run.environment()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return self.run.metrics()

    @property
    def activation(self) -> str:
        """The activation's name: "TopK" for TopKConfig."""
        return self.subject.activation_name

    @property
    def uniform_density(self) -> float:
        """The density of each latent if all fired equally often: k / n, or the measured L0 / n
        where there is no k."""
        l0 = self.number("stats", "l0")
        return (self.subject.k or (l0.value if l0 else 1)) / self.subject.n_latents

    @property
    def tokens_trained(self) -> int:
        """The tokens that the run was trained on, by its metrics."""
        last = self.metrics[-1].get("tokens") if self.metrics else None
        return int(last) if is_number(last) else 0

    @cached_property
    def vocabulary(self) -> list[str]:
        """The string of each token id; empty if no evaluation wrote it."""
        file = self.run.eval_file("vocabulary")
        try:
            return jsonio.read_strings(file) if file.is_file() else []
        except CorruptError as error:
            self.leave_out("vocabulary", str(error))
            return []

    def result(self, name: str) -> dict[str, Any] | None:
        """Return one evaluation's JSON; None if it was not run or its files are damaged."""
        if name not in self._results:
            self._results[name], self._arrays[name] = None, None
            try:
                self._read(name)
            except CorruptError as error:
                self.leave_out(name, str(error))
        return self._results[name]

    def _read(self, name: str) -> None:
        """Read a result and check its arrays; read again if both were replaced meanwhile."""
        result = self.run.eval(name)
        try:
            file = self.run.arrays_file(name, result)
        except CorruptError:
            if self.run.eval(name) != result:
                return self._read(name)
            raise
        self._results[name], self._arrays[name] = result, Arrays(file, name) if file else None

    def names_read(self) -> list[str]:
        """Return the names of the results read so far."""
        return [name for name, result in self._results.items() if result is not None]

    def do_without(self, names: Iterable[str]) -> None:
        """Treat these results as missing."""
        for name in names:
            self._results[name], self._arrays[name] = None, None

    def leave_out(self, name: str, reason: str) -> None:
        """Continue without a damaged result, and log a warning."""
        self.do_without([name])
        self.left_out[name] = self.command("eval", "stats" if name == "vocabulary" else name)
        log.warning(
            "the result of %s is left out: %s. To write it again: %s",
            name,
            reason,
            self.left_out[name],
        )

    def describe_text(self, name: str) -> str:
        """Return what the text of a result is to training: "held-out text, which …"."""
        result, judged = self.result(name) or {}, self.subject.judged
        if judged and not judged.held_out:
            text = result.get("text", self.subject.acts.text)
            return f"text of {text}, of which training may have seen a part"
        if result.get("text") not in (None, self.subject.acts.text):
            return f"text of {result['text']}, which is not what it was trained on"
        return SPLITS.get(split_of(result), "text of an unknown split")

    def describe_text_briefly(self, name: str) -> str:
        """Return the same in two to five words: "held-out text"."""
        words = self.describe_text(name)
        if words in SPLITS.values():
            return words.partition(",")[0]
        return "another text" if self.recipe else "the text"

    def number(self, name: str, key: str) -> Number | None:
        """Return a number of a result; None if it is missing or null."""
        return number((self.result(name) or {}).get(key))

    def arrays(self, name: str) -> Arrays | None:
        """Return the arrays of a result; None if it has none."""
        self.result(name)
        return self._arrays[name]

    @property
    def place(self) -> str:
        """The run's folder as a command names it: relative, so that a page reveals no machine."""
        return self.run.name if self.run.path.is_absolute() else str(self.run.path)

    def command(self, verb: str, *words: str) -> str:
        """Return a command line about this run, quoted for a shell."""
        return shlex.join(["ksparse", verb, self.place, *words])


@dataclass(frozen=True)
class Arrays:
    """A safetensors file of which only the rows that are shown are read."""

    file: Path
    evaluation: str = ""

    def damaged(self, problem: str) -> DamagedResult:
        """Return the error that says what is wrong with the arrays."""
        return DamagedResult(self.evaluation, f"{self.file}{problem}; run the evaluation again")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="np") as tensors:
                return tuple(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise self.damaged(f" is not a readable safetensors file: {error}") from None

    def tensor(self, name: str) -> np.ndarray:
        """Return a whole tensor."""
        return self._rows(name, slice(None))

    def row(self, name: str, index: int) -> np.ndarray:
        """Return one row of a tensor, without reading the others."""
        return self._rows(name, slice(index, index + 1))[0]

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Return rows `first` to `last - 1`, without reading the others."""
        rows = self._rows(name, slice(first, last)) if 0 <= first < last else self.tensor(name)[:0]
        if len(rows) != last - first:
            raise self.damaged(f": '{name}' has no rows {first} to {last}")
        return rows

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="np") as tensors:
                if rows == slice(None):  # an empty tensor has no slices
                    return tensors.get_tensor(name)
                return tensors.get_slice(name)[rows]
        except (SafetensorError, IndexError, OSError) as error:
            raise self.damaged(f" has no readable '{name}': {error}") from None


def split_of(result: dict[str, Any]) -> str:
    """Return the split that a result is of; old results that do not say are held-out."""
    policy = result.get("policy")
    return str(policy.get("split", "held-out")) if isinstance(policy, dict) else "held-out"


def number(entry: Any) -> Number | None:
    """Return a number of JSON, plain or {"value", "se"}; None if it is missing or null."""
    value, se = (entry.get("value"), entry.get("se")) if isinstance(entry, dict) else (entry, None)
    return Number(value, se if is_number(se) else None) if is_number(value) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from JSON is a number in the range of a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max
