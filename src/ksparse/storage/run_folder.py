"""Where the files of a run are, and how to read them. Needs no torch.

    recipe.toml                  the recipe
    environment.json             versions, commit, hardware
    metrics.jsonl                a line every few steps
    curve.jsonl                  the held-out loss at log-spaced steps, if the recipe measures it
    alarms.jsonl                 warnings raised during training, if there were any
    checkpoints/step-N/          sae.safetensors and sae.json: the autoencoder;
                                 optim.safetensors and state.json: what resuming needs
    evals/NAME.json              a result: estimates with standard errors, and the options
    evals/NAME-CHECKSUM.safetensors   arrays of a result, named in it
    report.html, figures/

`docs/formats.md` describes every field.
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

_RESULT_KEYS: dict[str, jsonio.Types] = {
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
_RESULT_TABLES: dict[str, dict[str, jsonio.Types]] = {
    "window": {"before": int, "after": int},
    "bands": {"count": int, "each": int},
    "density_histogram": {"edges": list, "counts": list},
}
"""Types of what reports and pages read from a result, besides its numbers."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which need not exist yet.

    Args:
        path: the folder.

    Example:
        >>> run = RunFolder(Path("runs/demo"))
        >>> run.metrics()[-1]["step"], run.recipe().sae.n_latents
        (8, 4096)
        >>> run.eval("stats")["n_tokens"] > 0
        True
    """

    path: Path

    def file(self, *names: str) -> Path:
        """Return a path in the run's folder; raise InputError if a link leads out of it."""
        return atomic.inside(self.path, *names)

    @property
    def recipe_file(self) -> Path:
        """The recipe."""
        return self.file("recipe.toml")

    @property
    def metrics_file(self) -> Path:
        """Metrics of training, as JSON lines."""
        return self.file("metrics.jsonl")

    @property
    def curve_file(self) -> Path:
        """The held-out loss during training, as JSON lines."""
        return self.file("curve.jsonl")

    @property
    def report_file(self) -> Path:
        """The report."""
        return self.file("report.html")

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def exists(self) -> bool:
        """Return whether the folder holds a run: whether it has a recipe."""
        return self.recipe_file.is_file()

    def recipe(self) -> config.Recipe:
        """Read the recipe; raise InputError if there is none."""
        if not self.exists():
            raise InputError(
                f"{self.path} is not a run: it has no recipe.toml. `ksparse train --out "
                f"{self.path}` makes one"
            )
        return config.load_recipe(self.recipe_file)

    def has_results(self) -> bool:
        """Return whether the run has a result: a checkpoint, a metric or an evaluation.

        Until then its recipe may be replaced.
        """
        trained = bool(self.checkpoints() or self.metrics())
        return trained or bool(list(self.file("evals").glob("*.json")))

    @property
    def environment_file(self) -> Path:
        """Versions, commit and hardware."""
        return self.file("environment.json")

    def environment(self) -> dict[str, Any]:
        """Return versions, commit and hardware; empty if they were not recorded."""
        file = self.environment_file
        return jsonio.read_table(file) if file.is_file() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics in the order of steps.

        Steps that were repeated after an interruption have several lines; the last one counts.
        """
        return _read_by_step(self.metrics_file)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        _append(self.metrics_file, row)

    def curve(self) -> list[dict[str, Any]]:
        """Return the held-out losses in the order of steps."""
        return _read_by_step(self.curve_file)

    def append_curve(self, row: dict[str, Any]) -> None:
        """Append a line to curve.jsonl."""
        _append(self.curve_file, row)

    @property
    def alarms_file(self) -> Path:
        """Warnings raised during training, as JSON lines."""
        return self.file("alarms.jsonl")

    def alarms(self) -> list[dict[str, Any]]:
        """Return the warnings raised during training, in order."""
        return _read_rows(self.alarms_file)

    def append_alarm(self, row: dict[str, Any]) -> None:
        """Append a line to alarms.jsonl."""
        _append(self.alarms_file, row)

    def drop_lines_after(self, step: int) -> None:
        """Remove the lines of metrics, curve and alarms after a step.

        A resumed run repeats these steps; its files then look like those of an uninterrupted run.
        """
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
        """Return the folder of the checkpoint of a step, which need not exist."""
        return self.file("checkpoints", f"step-{step:08d}")

    def checkpoints(self) -> list[Path]:
        """Return the folders of all checkpoints, oldest first. They may be damaged."""
        return [
            path
            for path in sorted(self.file("checkpoints").glob("step-*"))
            if path.name[5:].isdecimal()
            and path.name.isascii()
            and self.file("checkpoints", path.name).is_dir()
        ]

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """Find the newest checkpoint whose checksums match.

        Returns:
            Its folder, None if there is none, and what is wrong with the newer checkpoints.

        Raises:
            InputError: if it was trained with another recipe than the run has now.
        """
        damage = []
        for path in reversed(self.checkpoints()):
            try:
                manifest = checksums.verify(path)
                if manifest.get("step", int(path.name[5:])) != int(path.name[5:]):
                    raise CorruptError(
                        f"{path} is that of step {manifest['step']}, under another name; name it "
                        "as it was"
                    )
            except CorruptError as error:
                damage.append(str(error))
                continue
            self._check_recipe(path, manifest.get("recipe"))
            return path, damage
        return None, damage

    def _check_recipe(self, path: Path, trained: Any) -> None:
        """Raise InputError if a checkpoint's recipe differs in a key that both recipes have.

        Checkpoints of older versions have no recipe.
        """
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
        """Return the file of an evaluation's result, which need not exist."""
        return self.file("evals", f"{name}.json")

    def eval(self, name: str) -> dict[str, Any] | None:
        """Read the result of an evaluation.

        Args:
            name: the evaluation, such as "stats".

        Returns:
            The result, or None if the evaluation has not been run.

        Raises:
            CorruptError: if the file is damaged, or is the result of another evaluation.
        """
        file = self.eval_file(name)
        if not file.is_file():
            return None
        result = jsonio.read_table(file)
        present = {key: types for key, types in _RESULT_KEYS.items() if result.get(key) is not None}
        jsonio.check_keys(file, result, present)
        for key in set(present) & set(_RESULT_TABLES):
            jsonio.check_keys(file, result[key], _RESULT_TABLES[key], under=f"{key}.")
        if result.get("name", name) != name:
            raise CorruptError(
                f"{file} is a result of {result['name']!r}, under another name; run the evaluation "
                "again"
            )
        return result

    def arrays_file(self, name: str, result: dict[str, Any] | None = None) -> Path | None:
        """Return the file with the arrays of a result.

        Args:
            name: the evaluation.
            result: its result, if it has been read already.

        Returns:
            The file, or None if the result has no arrays.

        Raises:
            CorruptError: if the file is missing or damaged.
        """
        result = self.eval(name) if result is None else result
        if result is None:
            return None
        file = self._arrays_path(name, result)
        expected = result.get("arrays_sha256")
        if not file.is_file():
            if "arrays" in result:
                raise CorruptError(
                    f"{file} is missing, though {name}.json names it; {self._how_to_rewrite(name)}"
                )
            return None
        if expected and atomic.sha256(file) != expected:
            raise CorruptError(
                f"{file} is damaged or of another result than {name}.json; "
                f"{self._how_to_rewrite(name)}"
            )
        return file

    def _arrays_path(self, name: str, result: dict[str, Any]) -> Path:
        """Return the path of a result's arrays: NAME.safetensors in older results, which do not
        name them."""
        file_name = result.get("arrays", f"{name}.safetensors")
        return self.file("evals", checksums.plain_name(file_name, self.eval_file(name)))

    def _how_to_rewrite(self, name: str) -> str:
        folder = self.name if self.path.is_absolute() else str(self.path)
        return f"{shlex.join(['ksparse', 'eval', folder, name])} writes both again"

    @contextmanager
    def lock_evals(self, wait: float = 60.0) -> Iterator[None]:
        """Lock the results against other processes; at the end remove arrays that none refers to.

        Args:
            wait: seconds to wait for another process that is writing results.
        """
        folder = self.file("evals")
        with atomic.locked(folder, wait=wait, advice="try again when that has written its results"):
            try:
                yield
            finally:
                atomic.remove_leftovers(folder)
                for file in folder.glob("*.safetensors"):
                    if file.is_file() and not self._is_referenced(file):
                        file.unlink(missing_ok=True)

    def _is_referenced(self, file: Path) -> bool:
        """Return whether a result refers to a file of arrays; True if the result is damaged."""
        with_checksum = re.fullmatch(r"(.+)-[0-9a-f]{16}", file.stem)
        name = with_checksum[1] if with_checksum else file.stem
        try:
            result = self.eval(name)
            if result is None:
                return not with_checksum
            return self._arrays_path(name, result).name == file.name
        except InputError:
            return True

    # ---- one process at a time

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder, so that no other process trains in it."""
        return atomic.locked(self.path, advice="wait for it, or give another --out")

    def remove_leftovers(self) -> None:
        """Remove temporary files that killed processes left."""
        for names in ((), ("checkpoints",), ("evals",), ("figures",)):
            atomic.remove_leftovers(self.file(*names))


def _read_by_step(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines in the order of steps, the last line of each step."""
    rows = {row["step"]: row for row in _read_rows(file)}
    return [rows[step] for step in sorted(rows)]


def _read_rows(file: Path) -> list[dict[str, Any]]:
    return jsonio.read_lines(file, step=int) if file.is_file() else []


def _append(file: Path, row: dict[str, Any]) -> None:
    atomic.unshare(file)
    with atomic.translate_oserrors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


def shard_file(stem: str, index: int, count: int) -> str:
    """Return the name of a file with one shard of the latents.

    Args:
        stem: what the file holds, such as "sae".
        index: index of the shard.
        count: number of shards; a single one has a plain name.

    Example:
        >>> shard_file("sae", 0, 1), shard_file("sae", 2, 4)
        ('sae.safetensors', 'sae.2-of-4.safetensors')
    """
    return f"{stem}.safetensors" if count == 1 else f"{stem}.{index}-of-{count}.safetensors"


def shard_files(folder: Path, stem: str) -> list[Path]:
    """Return the files with the tensors of `stem`, one for each shard, in the order of latents."""
    first = min(folder.glob(f"{stem}.0-of-*.safetensors"), default=None)
    if first is None:
        return [folder / shard_file(stem, 0, 1)]
    count = first.name.removesuffix(".safetensors").rpartition("-of-")[2]
    if not count.isdecimal() or int(count) > 100_000:
        raise CorruptError(
            f"{first} is not named as a slice of an autoencoder; the folder was not written by "
            "ksparse or is damaged"
        )
    return [folder / shard_file(stem, index, int(count)) for index in range(int(count))]


def open_run(path: Path | str) -> RunFolder:
    """Open the run in a folder.

    Args:
        path: the folder.

    Returns:
        The run, whose methods read its recipe, metrics, checkpoints and results.

    Raises:
        InputError: if the folder has no recipe, or one that cannot be read.

    Example:
        >>> import ksparse
        >>> run = ksparse.open_run("runs/demo")
        >>> run.recipe().sae.k
        32
        >>> sorted(run.eval("stats")["l0"])
        ['se', 'value']
    """
    run = RunFolder(Path(path))
    run.recipe()
    return run
