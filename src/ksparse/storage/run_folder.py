"""Where a run's files are and how to read them. Needs no torch.

    recipe.toml               what was asked
    environment.json          versions, commit, hardware
    metrics.jsonl             a line every few steps
    curve.jsonl               the held-out loss at log-spaced points, where the recipe asks for it
    alarms.jsonl              what called for attention while it trained, if anything did
    checkpoints/step-N/       sae.safetensors, sae.json: the autoencoder; optim.safetensors,
                              state.json: to go on
    evals/NAME.json           a result: values with standard errors, and the options they came from
    evals/NAME-SUM.safetensors   its arrays, which it names
    report.html, figures/

`docs/formats.md` has every field.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse import config
from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic, checksums, jsonio

_OF_A_RESULT: dict[str, jsonio.Types] = {
    "name": str,
    "options": dict,
    "lm": str,
    "site": str,
    "checkpoint": int,
    "policy": dict,
    "text": str,
    "n_tokens": int,
    "n_documents": int,
    "notes": list,
    "seconds": (int, float),
    "arrays": str,
    "arrays_sha256": str,
    "window": dict,
    "bands": dict,
    "act_bin": (int, float),
    "density_histogram": dict,
    "suite": str,
    "tasks": (dict, list),
}
_IN_A_RESULT: dict[str, dict[str, jsonio.Types]] = {
    "window": {"before": int, "after": int},
    "bands": {"count": int, "each": int},
    "density_histogram": {"edges": list, "counts": list},
}
"""What pages read of a result beside numbers, which are shown where they are numbers."""


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    def file(self, *names: str) -> Path:
        """Return a path of the run, there or not; raise InputError where a link leads out of it."""
        return atomic.inside(self.path, *names)

    @property
    def recipe_file(self) -> Path:
        return self.file("recipe.toml")

    @property
    def metrics_file(self) -> Path:
        return self.file("metrics.jsonl")

    @property
    def curve_file(self) -> Path:
        return self.file("curve.jsonl")

    @property
    def report_file(self) -> Path:
        return self.file("report.html")

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def exists(self) -> bool:
        return self.recipe_file.is_file()

    def recipe(self) -> config.Recipe:
        if not self.exists():
            raise InputError(
                f"{self.path} is not a run: it has no recipe.toml. `ksparse train --out "
                f"{self.path}` makes one"
            )
        return config.load_recipe(self.recipe_file)

    def begun(self) -> bool:
        """Return whether a step was taken, or judged: before, another recipe may take this one's
        place."""
        trained = bool(self.checkpoints() or self.metrics())
        return trained or bool(list(self.file("evals").glob("*.json")))

    @property
    def environment_file(self) -> Path:
        return self.file("environment.json")

    def environment(self) -> dict[str, Any]:
        file = self.environment_file
        return jsonio.read_table(file) if file.is_file() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics by step. After an interruption steps were run again; the last line of
        each counts."""
        return _lines(self.metrics_file)

    def append_metrics(self, row: dict[str, Any]) -> None:
        _append(self.metrics_file, row)

    def curve(self) -> list[dict[str, Any]]:
        """Return the points of the held-out loss by step."""
        return _lines(self.curve_file)

    def append_curve(self, row: dict[str, Any]) -> None:
        _append(self.curve_file, row)

    @property
    def alarms_file(self) -> Path:
        return self.file("alarms.jsonl")

    def alarms(self) -> list[dict[str, Any]]:
        """Return what called for attention, in order."""
        return _rows(self.alarms_file)

    def append_alarm(self, row: dict[str, Any]) -> None:
        _append(self.alarms_file, row)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be run again, so that the files of a resumed run read
        like any other's."""
        for file, read in (
            (self.metrics_file, self.metrics),
            (self.curve_file, self.curve),
            (self.alarms_file, self.alarms),
        ):
            if file.is_file():
                rows = [row for row in read() if row["step"] <= step]
                atomic.write_text(
                    file, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
                )

    # ---- checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.file("checkpoints", f"step-{step:08d}")

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints there are, oldest first; each was committed whole, which does not
        prove it intact."""
        found = sorted(self.file("checkpoints").glob("step-*"))
        return [
            path
            for path in found
            if path.name[5:].isdecimal()
            and path.name.isascii()
            and self.file("checkpoints", path.name).is_dir()
        ]

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint whose sums are right, and what was wrong with the newer
        ones; raise InputError if it is of another recipe."""
        wrong = []
        for path in reversed(self.checkpoints()):
            try:
                manifest = checksums.verify(path)
                if manifest.get("step", int(path.name[5:])) != int(path.name[5:]):
                    raise CorruptError(
                        f"{path} is that of step {manifest['step']}, under another name; name it "
                        "as it was"
                    )
            except CorruptError as error:
                wrong.append(str(error))
                continue
            self._check_recipe(path, manifest.get("recipe"))
            return path, wrong
        return None, wrong

    def _check_recipe(self, path: Path, trained: Any) -> None:
        """Raise InputError unless a checkpoint is of this run's recipe, in all keys that both have
        (checkpoints of older versions say nothing)."""
        if self.exists() and isinstance(trained, dict):
            ours, theirs = config.flat(self.recipe().fingerprint()), config.flat(trained)
            changed = config.differences(
                {key: theirs[key] for key in theirs if key in ours},
                {key: ours[key] for key in ours if key in theirs},
            )
            if changed:
                raise InputError(
                    f"{path} was trained with another recipe than {self.recipe_file} has now: "
                    f"{'; '.join(changed)}. Put back what was there"
                )

    # ---- evals

    def eval_file(self, name: str) -> Path:
        return self.file("evals", f"{name}.json")

    def eval(self, name: str) -> dict[str, Any] | None:
        """Return one result, or None if that evaluation has not been run."""
        file = self.eval_file(name)
        if not file.is_file():
            return None
        found = jsonio.read_table(file)
        said = {key: kind for key, kind in _OF_A_RESULT.items() if found.get(key) is not None}
        jsonio.check_keys(file, found, said)
        for key in set(said) & set(_IN_A_RESULT):
            jsonio.check_keys(file, found[key], _IN_A_RESULT[key], under=f"{key}.")
        if found.get("name", name) != name:
            raise CorruptError(
                f"{file} is a result of {found['name']!r}, under another name; run the evaluation "
                "again"
            )
        return found

    def arrays_file(self, name: str, result: dict[str, Any] | None = None) -> Path | None:
        """Return the arrays that a result was written with, None where it has none.

        Raise CorruptError if they are missing or damaged. result: if it has been read already.
        """
        result = self.eval(name) if result is None else result
        if result is None:
            return None
        file = self._arrays_of(name, result)
        expected = result.get("arrays_sha256")
        if not file.is_file():
            if "arrays" in result:
                raise CorruptError(
                    f"{file} is missing, though {name}.json names it; {self._again(name)}"
                )
            return None
        if expected and atomic.sha256(file) != expected:
            raise CorruptError(
                f"{file} is damaged or of another result than {name}.json; {self._again(name)}"
            )
        return file

    def _arrays_of(self, name: str, result: dict[str, Any]) -> Path:
        """Return where the arrays of a result are: NAME.safetensors, before their sum was in the
        name."""
        named = result.get("arrays", f"{name}.safetensors")
        return self.file("evals", checksums.plain_name(named, self.eval_file(name)))

    def _again(self, name: str) -> str:
        place = self.name if self.path.is_absolute() else str(self.path)
        return f"{shlex.join(['ksparse', 'eval', place, name])} writes both again"

    @contextmanager
    def writing_evals(self, wait: float = 60.0) -> Iterator[None]:
        """Keep other processes from writing results; at the end remove what no result needs."""
        folder = self.file("evals")
        with atomic.locked(folder, wait=wait, advice="try again when that has written its results"):
            try:
                yield
            finally:
                atomic.remove_leftovers(folder)
                for file in folder.glob("*.safetensors"):
                    if file.is_file() and not self._in_use(file):
                        file.unlink(missing_ok=True)

    def _in_use(self, file: Path) -> bool:
        """Return whether a result names these arrays, or cannot be asked."""
        named_by_sum = re.fullmatch(r"(.+)-[0-9a-f]{16}", file.stem)
        name = named_by_sum[1] if named_by_sum else file.stem
        try:
            result = self.eval(name)
            if result is None:
                return not named_by_sum
            return self._arrays_of(name, result).name == file.name
        except InputError:
            return True

    # ---- one process at a time

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training in this folder."""
        return atomic.locked(self.path, advice="wait for it, or give another --out")

    def remove_leftovers(self) -> None:
        """Remove what killed processes left; what living ones are writing stays."""
        for names in ((), ("checkpoints",), ("evals",), ("figures",)):
            atomic.remove_leftovers(self.file(*names))


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines by step, the last of each step."""
    rows = {row["step"]: row for row in _rows(file)}
    return [rows[step] for step in sorted(rows)]


def _rows(file: Path) -> list[dict[str, Any]]:
    return jsonio.read_lines(file, step=int) if file.is_file() else []


def _append(file: Path, row: dict[str, Any]) -> None:
    atomic.unshare(file)
    with atomic.translate_oserrors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


def shard_file(stem: str, index: int, of: int) -> str:
    """Return the name of the file with slice `index` of `of` of the latents; the file of all where
    there is one slice."""
    return f"{stem}.safetensors" if of == 1 else f"{stem}.{index}-of-{of}.safetensors"


def shard_files(folder: Path, stem: str) -> list[Path]:
    """Return the files that hold the tensors of `stem`, in the order of their latents: one, or as
    many as there were slices."""
    first = min(folder.glob(f"{stem}.0-of-*.safetensors"), default=None)
    if first is None:
        return [folder / shard_file(stem, 0, 1)]
    of = first.name.removesuffix(".safetensors").rpartition("-of-")[2]
    if not of.isdecimal() or int(of) > 100_000:
        raise CorruptError(
            f"{first} is not named as a slice of an autoencoder; the folder was not written by "
            "ksparse or is damaged"
        )
    return [folder / shard_file(stem, index, int(of)) for index in range(int(of))]


def open_run(path: Path | str) -> RunFolder:
    """Return the run in a folder; raise InputError if there is none."""
    run = RunFolder(Path(path))
    run.recipe()
    return run
