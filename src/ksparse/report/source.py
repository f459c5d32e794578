"""A run's files, read once and only when a section asks for them."""

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
from ksparse.storage.run_folder import RunFolder

log = logging.getLogger("ksparse")


class DamagedResult(CorruptError):
    """What an evaluation left cannot be read; the others can do without."""

    def __init__(self, evaluation: str, says: str):
        super().__init__(says)
        self.evaluation = evaluation


SPLITS = {
    "held-out": "held-out text, which training never saw",
    "validation": "validation text, which training never saw",
    "train": "text that it was trained on",
}
"""What the sides of a run's text are to it."""


@dataclass(frozen=True)
class Number:
    """A value of a result with its standard error, if it has one."""

    value: float
    se: float | None = None


@dataclass
class RunSource:
    """What the sections read. A result that is not there is None, never an error; so is a damaged
    one."""

    run: RunFolder
    left_out: dict[str, str] = field(default_factory=dict)
    """{damaged result: the command that writes it again}."""
    _results: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    _arrays: dict[str, Arrays | None] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        return self.run.recipe()

    @cached_property
    def environment(self) -> dict[str, Any]:
        return self.run.environment()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return self.run.metrics()

    @cached_property
    def vocabulary(self) -> list[str]:
        """Return the string of each token id, or nothing if no evaluation wrote it."""
        file = self.run.eval_file("vocabulary")
        try:
            return jsonio.read_strings(file) if file.is_file() else []
        except CorruptError as error:
            self.leave_out("vocabulary", str(error))
            return []

    def result(self, name: str) -> dict[str, Any] | None:
        """Return one evaluation's JSON; None if it was not run, or if what it left is damaged."""
        if name not in self._results:
            self._results[name], self._arrays[name] = None, None
            try:
                self._read(name)
            except CorruptError as error:
                self.leave_out(name, str(error))
        return self._results[name]

    def _read(self, name: str) -> None:
        """Read a result and check its arrays; again if both have been replaced meanwhile."""
        result = self.run.eval(name)
        try:
            file = self.run.arrays_file(name, result)
        except CorruptError:
            if self.run.eval(name) != result:
                return self._read(name)
            raise
        self._results[name], self._arrays[name] = result, Arrays(file, name) if file else None

    def read(self) -> list[str]:
        """Return the results that were read so far."""
        return [name for name, result in self._results.items() if result is not None]

    def do_without(self, names: Iterable[str]) -> None:
        """Read these results no more."""
        for name in names:
            self._results[name], self._arrays[name] = None, None

    def leave_out(self, name: str, why: str) -> None:
        """Go on without a damaged result, and say so."""
        self.do_without([name])
        self.left_out[name] = self.command("eval", "stats" if name == "vocabulary" else name)
        log.warning(
            "the result of %s is left out: %s. To write it again: %s",
            name,
            why,
            self.left_out[name],
        )

    def text_of(self, name: str) -> str:
        """Say which text a result is of, as far as training is concerned."""
        result = self.result(name) or {}
        if result.get("text") not in (None, self.recipe.acts.text):
            return f"text of {result['text']}, which is not what it was trained on"
        return SPLITS.get(split_of(result), "text of an unknown side")

    def brief_text_of(self, name: str) -> str:
        """Return the same in two or three words."""
        words = self.text_of(name)
        return words.partition(",")[0] if words in SPLITS.values() else "another text"

    def number(self, name: str, key: str) -> Number | None:
        """Return a number of a result: plain or {"value", "se"}; None if it is missing or null."""
        return number((self.result(name) or {}).get(key))

    def arrays(self, name: str) -> Arrays | None:
        """Return the arrays of a result, or None if there are none."""
        self.result(name)
        return self._arrays[name]

    @property
    def place(self) -> str:
        """Return the run's folder as a command would name it: relative, so that a page tells
        nothing of a machine."""
        return self.run.name if self.run.path.is_absolute() else str(self.run.path)

    def command(self, verb: str, *words: str) -> str:
        """Return a command line about this run, quoted for a shell."""
        return shlex.join(["ksparse", verb, self.place, *words])


@dataclass(frozen=True)
class Arrays:
    """A safetensors file, of which a section reads the rows it shows."""

    file: Path
    evaluation: str = ""

    def damaged(self, what: str) -> DamagedResult:
        """Return the error that says what is wrong with the arrays."""
        return DamagedResult(self.evaluation, f"{self.file}{what}; run the evaluation again")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors there are."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="np") as tensors:
                return tuple(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise self.damaged(f" is no readable safetensors file: {error}") from None

    def whole(self, name: str) -> np.ndarray:
        return self._rows(name, slice(None))

    def row(self, name: str, index: int) -> np.ndarray:
        """Return one row of a tensor, without reading the others."""
        return self._rows(name, slice(index, index + 1))[0]

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Return the rows first to last, last not among them, without reading the others."""
        found = self._rows(name, slice(first, last)) if 0 <= first < last else self.whole(name)[:0]
        if len(found) != last - first:
            raise self.damaged(f": '{name}' has no rows {first} to {last}")
        return found

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="np") as tensors:
                return (
                    tensors.get_tensor(name)
                    if rows == slice(None)
                    else tensors.get_slice(name)[rows]
                )  # no slice of an empty one
        except (SafetensorError, IndexError, OSError) as error:
            raise self.damaged(f" has no readable '{name}': {error}") from None


def split_of(result: dict[str, Any]) -> str:
    """Return the side of the text that a result is of; older ones are of the held-out one where
    they do not say."""
    policy = result.get("policy")
    return str(policy.get("split", "held-out")) if isinstance(policy, dict) else "held-out"


def number(found: Any) -> Number | None:
    """Return a number as JSON has it, plain or {"value", "se"}; None if it is missing or null."""
    value, se = (found.get("value"), found.get("se")) if isinstance(found, dict) else (found, None)
    return Number(value, se if is_number(se) else None) if is_number(value) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from JSON is a number that a float can be, which not every integer
    is."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max
