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

A folder of results of somebody else's autoencoder (`ksparse eval SAE --out DIR`) has the same
`evals/` and pages, and instead of recipe and checkpoints

    subject.json                 which autoencoder was judged, and on which LM, site and text

`docs/formats.md` describes every field.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse import config, html
from ksparse.config import ActsConfig, Recipe
from ksparse.errors import CorruptError, InputError
from ksparse.lookup import function_of
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
    "on_share_of": str,
    "direct_logits": dict,
    "act_bin": (int, float),
    "density_histogram": dict,
    "suite": str,
    "tasks": (dict, list),
}
_RESULT_TABLES: dict[str, dict[str, jsonio.Types]] = {
    "window": {"before": int, "after": int},
    "bands": {"count": int, "each": int},
    "direct_logits": {"blocks_left_out": int, "capped": bool},
    "density_histogram": {"edges": list, "counts": list},
}
"""Types of what reports and pages read from a result, besides its numbers."""
_SUBJECT_FORMAT = 1
_SPEED_ONLY = (
    "lm_batch",
    "mix",
    "store",
    "shards",
    "shard_window",
)  # keys of acts that change no result
_JUDGED_KEYS: dict[str, jsonio.Types] = {
    "source": str,
    "local": bool,
    "subfolder": str,
    "revision": str,
    "format": str,
    "weights_sha256": str,
    "step": (int, type(None)),
    "held_out": bool,
    "forced": bool,
}
_SHAPE_KEYS: dict[str, jsonio.Types] = {
    "d_model": int,
    "n_latents": int,
    "k": (int, type(None)),
    "activation": str,
    "normalize": str,
}


@dataclass(frozen=True)
class Judged:
    """Where an autoencoder that was judged is, and what tells it from others.

    Args:
        source: what `ksparse.load` takes. A local path is relative to the folder of results.
        local: whether `source` is a path.
        subfolder: folder of the SAE inside `source`.
        revision: revision of the Hub repository; "" for the newest.
        format: name of its format.
        weights_sha256: checksum of its weights as loaded, whatever the format.
        step: the step of its training, if it says so.
        held_out: whether it is known that training did not see the text of the results.
        forced: whether it was judged though its metadata contradict the LM, site or contexts.
    """

    source: str
    local: bool
    subfolder: str
    revision: str
    format: str
    weights_sha256: str
    step: int | None = None
    held_out: bool = False
    forced: bool = False


@dataclass(frozen=True)
class Subject:
    """What the results in a folder are results of.

    Args:
        acts: the LM, site, text, contexts and positions.
        n_latents: number of latents.
        k: active latents per token; None where the activation has no k, or it is not known.
        activation: kind of the activation.
        normalize: input normalisation.
        d_model: width of the activations; 0 where only a recipe is there.
        judged: which SAE was judged; None for a run, whose SAE is its newest checkpoint.
    """

    acts: ActsConfig
    n_latents: int
    k: int | None
    activation: str
    normalize: str
    d_model: int = 0
    judged: Judged | None = None

    @staticmethod
    def of_recipe(recipe: Recipe) -> Subject:
        """Return the subject of a run."""
        sae, acts = recipe.sae, recipe.acts
        return Subject(acts, sae.n_latents, sae.k, sae.activation.kind, acts.normalize)

    @property
    def activation_name(self) -> str:
        """The activation's name: "TopK" for "topk"."""
        return config.ACTIVATION_CONFIGS[self.activation].__name__.removesuffix("Config")

    @property
    def bound(self) -> str:
        """How many latents are active, in words, as far as that is known."""
        if self.k is None:
            return "as many of them active as its weights leave"
        return config.ACTIVATION_CONFIGS[self.activation].BOUND.format(k=self.k)


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

    def __fspath__(self) -> str:
        """Return the folder, so that a run can be given wherever a path is."""
        return os.fspath(self.path)

    def describe(self) -> dict[str, Any]:
        """Return what is in the folder, in words, for `repr` and notebooks; never raises."""
        try:
            subject = self.subject()
            evals = sorted(
                file.stem for file in self.file("evals").glob("*.json") if file.stem != "vocabulary"
            )
            trained = self.metrics_file.is_file() and jsonio.read_last_line(self.metrics_file)
            words = {
                "LM": f"{subject.acts.lm} at {subject.acts.site}",
                "latents": subject.n_latents,
                "k": subject.k,
                "tokens": trained.get("tokens") if trained else None,
                "checkpoints": len(self.checkpoints()) or None,
                "results": ", ".join(evals) or None,
            }
        except (InputError, OSError) as error:
            words = {"problem": str(error)}
        return {key: value for key, value in words.items() if value is not None}

    def __repr__(self) -> str:
        words = "".join(f", {key}={value!r}" for key, value in self.describe().items())
        return f"RunFolder({str(self.path)!r}{words})"

    def _repr_html_(self) -> str:
        return html.table(f"Run {self.path}", self.describe())

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
            if not self.is_judged():
                require_one(self.path)
            raise InputError(
                f"{self.path} holds results of an SAE, not a run: it has no recipe.toml"
                if self.is_judged()
                else f"{self.path} is not a run: it has no recipe.toml. `ksparse train --out "
                f"{self.path}` makes one; `ksparse eval SAE --out DIR` judges any other SAE"
            )
        written = (self.environment_file, self.metrics_file)
        if any(file.is_file() for file in written) or self.checkpoints():
            return config.load_recipe_of_run(self.recipe_file)
        return config.load_recipe(self.recipe_file)  # put there by hand

    # ---- results of an SAE that was not trained here

    @property
    def subject_file(self) -> Path:
        """What was judged, in a folder of results without a run."""
        return self.file("subject.json")

    def is_judged(self) -> bool:
        """Return whether the folder holds results of an SAE that lies elsewhere."""
        return self.subject_file.is_file()

    def keeps_results(self) -> bool:
        """Return whether results may be written here: into a run, or beside subject.json."""
        return self.exists() or self.is_judged()

    def has_weights(self) -> bool:
        """Return whether there is an SAE to load."""
        return self.is_judged() or bool(self.checkpoints())

    def subject(self) -> Subject:
        """Return what the results are results of.

        Raises:
            InputError: the folder has neither subject.json nor a recipe.
            CorruptError: subject.json is damaged.
        """
        if not self.is_judged():
            return Subject.of_recipe(self.recipe())
        file = self.subject_file
        table = jsonio.read_numbered(file, _SUBJECT_FORMAT, {"sae": dict, "acts": dict})
        sae = table["sae"]
        jsonio.check_keys(file, sae, _JUDGED_KEYS | _SHAPE_KEYS, under="sae.")
        if sae["activation"] not in config.ACTIVATION_CONFIGS:
            raise CorruptError(f"{file}: 'sae.activation' is {sae['activation'][:80]!r}")
        try:
            acts = config.from_dict({"acts": table["acts"]}).acts
        except InputError as error:
            raise CorruptError(f"{file}: {error}") from None
        return Subject(
            acts=acts,
            **{key: sae[key] for key in _SHAPE_KEYS},
            judged=Judged(**{key: sae[key] for key in _JUDGED_KEYS}),
        )

    def check_subject(self, subject: Subject) -> None:
        """Raise InputError unless results of an SAE may be written into this folder.

        They may if it is new, or has results of the same SAE on the same LM, site, text, contexts
        and positions.
        """
        if not self.is_judged():
            if self.exists():
                raise InputError(
                    f"{self.path} is a run, which keeps only results of its own SAE; give a new "
                    "folder with --out"
                )
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise InputError(
                    f"{self.path} holds other files; give a new folder with --out, or one that "
                    "`ksparse eval --out` made"
                )
            return
        there, new = (_identity(each) for each in (self.subject(), subject))
        different = [key for key in there if there[key] != new.get(key)]
        if different:
            words = "; ".join(
                f"{key} is {str(there[key])[:200]!r} there and {str(new.get(key))[:200]!r} now"
                for key in different[:4]
            )
            raise InputError(
                f"{self.path} holds results of something else: {words}. Give another folder with "
                "--out"
            )

    def write_subject(self, subject: Subject) -> None:
        """Write subject.json into a new folder; one that is there already is kept."""
        if self.is_judged():
            return
        assert subject.judged is not None
        sae = {key: getattr(subject, key) for key in _SHAPE_KEYS}
        self.path.mkdir(parents=True, exist_ok=True)
        jsonio.write_json(
            self.subject_file,
            {
                "format": _SUBJECT_FORMAT,
                "sae": dataclasses.asdict(subject.judged) | sae,
                "acts": dataclasses.asdict(subject.acts),
            },
            sealed=True,
        )

    def relative_source(self, path: Path | str) -> str:
        """Return a path as `Judged.source` has it: relative to this folder."""
        return Path(os.path.relpath(path, self.path)).as_posix()

    def source_of(self, judged: Judged) -> str:
        """Return where a judged SAE lies, as `ksparse.load` takes it."""
        return os.path.normpath(self.path / judged.source) if judged.local else judged.source

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

    # ---- figures

    def figures(self) -> dict[str, Any]:
        """Draw the figures of the report as matplotlib figures, by name (`ksparse.report`)."""
        found: dict[str, Any] = function_of("RunFolder.figures")(self)
        return found

    def figure(self, name: str) -> Any:
        """Draw one figure of the report, such as "nmse", as a matplotlib figure."""
        return function_of("RunFolder.figure")(self, name)

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


def _identity(subject: Subject) -> dict[str, Any]:
    """Return what makes two results comparable: the SAE by its weights, and what it was read on."""
    acts = {key: value for key, value in dataclasses.asdict(subject.acts).items()}
    weights = subject.judged.weights_sha256 if subject.judged else None
    return {"the SAE": weights} | {key: acts[key] for key in acts if key not in _SPEED_ONLY}


def runs_in(folder: Path | str) -> list[RunFolder]:
    """Return the runs in a folder, such as those of several sites, by name."""
    try:
        names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    except OSError:
        return []
    runs = (RunFolder(Path(folder) / name) for name in names if not name.startswith("."))
    return [run for run in runs if run.exists()]


def require_one(folder: Path | str) -> None:
    """Raise InputError for a folder that holds runs, where one run is needed."""
    if runs := runs_in(folder):
        raise InputError(
            f"{folder} holds {len(runs)} run{'s' * (len(runs) > 1)}, and one is needed here: give "
            f"its own folder, such as {runs[0].path}; to `ksparse eval` and `compare` all of them, "
            f"as {folder}/*/"
        )


def open_run(path: Path | str) -> RunFolder:
    """Open the run in a folder, or the results of an SAE that was judged into one.

    Args:
        path: the folder.

    Returns:
        The run, whose methods read its recipe, metrics, checkpoints and results. A folder of
        results (`ksparse eval SAE --out DIR`) has results alone.

    Raises:
        InputError: if the folder has neither a recipe nor results, or one that cannot be read.

    Example:
        >>> import ksparse
        >>> run = ksparse.open_run("runs/demo")
        >>> run.recipe().sae.k
        32
        >>> sorted(run.eval("stats")["l0"])
        ['se', 'value']
    """
    run = RunFolder(Path(path))
    run.subject()
    return run
