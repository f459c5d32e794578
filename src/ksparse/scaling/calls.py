"""Sweeps and their laws in Python: what `ksparse sweep` and `ksparse fit` do."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ksparse import display
from ksparse import progress as reports
from ksparse.config import keywords as words
from ksparse.config import recipe_of, to_toml
from ksparse.config.serialize import to_toml_value
from ksparse.errors import InputError, KsparseError
from ksparse.scaling.laws import survey
from ksparse.scaling.laws.survey import Survey
from ksparse.scaling.sweeps import grid as grids
from ksparse.scaling.sweeps.grid import Grid, SweepFolder
from ksparse.storage import atomic, jsonio

HELD_OUT = 8_192
"""Held-out activations on which a run's loss is measured, where a call does not say."""


def sweep(
    source: Path | str | None = None,
    out: Path | str | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    progress: bool = True,
    **keywords: Any,
) -> SweepFolder:
    """Train a grid of recipes on one stream, or go on with an unfinished sweep.

    Args:
        source: a sweep.toml, or the folder of a sweep to go on with; leave it out to give `grid`.
        out: the sweep's folder; by default that of `source`, or sweeps/NAME.
        grid: {key of a recipe: its values}, such as {"n_latents": [512, 1024], "k": [8, 16]};
            every combination is trained. Keys are those of `ksparse.train`.
        progress: show progress, as `ksparse.train` does.
        keywords: the other keys of the recipes, as in `ksparse.train`. `held_out`, the activations
            on which the loss is measured, is 8,192 by default.

    Returns:
        The sweep's folder, which has `to_frame()` and, after `ksparse.fit`, `figure("size")`.

    Raises:
        InputError: if neither or both of `source` and `grid` are given, there is no such file, or a
            point of the grid is no valid recipe.
        KsparseError: if a run fails, when the others have finished.

    Example:
        >>> import ksparse
        >>> sweep = ksparse.sweep(
        ...     grid={"n_latents": [64, 128], "k": [4]}, lm="pylm/0.3m", site="resid_post.1",
        ...     tokens=1024, batch=256, mix=512, held_out=256, out="sweeps/short",
        ... )
        >>> len(sweep.points())
        2
    """
    read, folder = _open(source, out, grid, keywords)
    from ksparse.scaling.sweeps import run as sweeping  # needs torch, which `fit` does not
    from ksparse.scaling.sweeps.launch import Launch

    with display.shown("training", progress) as bar:

        def observe(done: int, total: int, note: str) -> None:
            if bar:
                bar.note(note)

        failed = sweeping.sweep(read, folder, Launch(), observe=observe)
    if failed:
        name, why = next(iter(failed.items()))
        raise KsparseError(
            f"{len(failed)} of {len(read)} runs failed, the first {folder.run(name).path}: {why}. "
            "The same call goes on with them"
        )
    return folder


def _open(
    source: Path | str | None,
    out: Path | str | None,
    grid: Mapping[str, Sequence[Any]] | None,
    keywords: dict[str, Any],
) -> tuple[Grid, SweepFolder]:
    """Return the grid that the arguments of `sweep` describe, and its folder."""
    if grid is not None and source is None:
        folder = SweepFolder(Path(out or "sweeps/grid"))
        text = _format(grid, keywords)
        read = grids.grid_of(tomllib.loads(text), folder.file)
        atomic.write_text(folder.file, text)
        return read, folder
    if source is None or grid is not None:
        raise InputError(
            "a sweep needs a sweep.toml, its folder, or grid={…}, and one of them alone; such as "
            'grid={"n_latents": [512, 1024], "k": [8, 16]}'
        )
    if keywords:
        raise InputError(
            f"{source} says what to train; {next(iter(keywords))!r} can be given with grid={{…}}"
        )
    path = Path(source)
    if path.is_dir():
        return grids.read(atomic.inside(path, "sweep.toml")), SweepFolder(Path(out or path))
    return grids.read(path), SweepFolder(Path(out or f"sweeps/{path.stem}"))


def _format(grid: Mapping[str, Sequence[Any]], keywords: dict[str, Any]) -> str:
    """Return the sweep.toml of a grid and the keys that all its recipes share."""
    if not isinstance(grid, Mapping) or not all(
        isinstance(values, Sequence) and not isinstance(values, str) and len(values)
        for values in grid.values()
    ):
        raise InputError(
            f"grid is {grid!r:.80}; it must be a dictionary of lists, such as "
            '{"n_latents": [512, 1024], "k": [8, 16]}'
        )
    if both := [name for name in grid if name in keywords]:
        raise InputError(f"{both[0]!r} is in the grid and beside it; give it once")
    if "curve" not in keywords:
        keywords = {"held_out": HELD_OUT} | keywords
    lines = [
        f'"{words.key_of(name)}" = [{", ".join(to_toml_value(value) for value in values)}]'
        for name, values in grid.items()
    ]
    return to_toml(recipe_of(**keywords)) + "\n[grid]\n" + "\n".join(lines) + "\n"


def fit(
    sweep: SweepFolder | Path | str,
    *,
    form: str = "paper",
    draws: int = survey.laws.DRAWS,
    progress: bool = True,
) -> Survey:
    """Fit every scaling law that the runs of a sweep allow, and write them to its law.json.

    Args:
        sweep: what `ksparse.sweep` returned, or its folder.
        form: the form of the laws: "paper", "best" (the lowest AICc), or a name in law.json.
        draws: bootstrap samples for the intervals; 0: none.
        progress: show progress, as `ksparse.train` does.

    Returns:
        The laws by name, `laws["n"]`, each with `coefficients`, their 95 % intervals, and
        `predict(n=…, k=…)`; and why each other law could not be fitted.

    Raises:
        InputError: if the folder is not that of a sweep, or its runs allow no law.

    Example:
        >>> import ksparse
        >>> ksparse.fit("sweeps/none", progress=False)
        Traceback (most recent call last):
        ksparse.errors.InputError: sweeps/none holds no points.csv; `ksparse sweep` writes it as \
runs finish
    """
    folder = sweep.path if isinstance(sweep, SweepFolder) else Path(sweep)
    with display.shown("laws", progress) as bar:

        def observe(done: int, total: int, title: str) -> None:
            if bar:
                bar.note(title)
            reports.report("laws", done, total)

        found = survey.fit_sweep(folder, form=form, draws=draws, observe=observe)
    jsonio.write_json(folder / "law.json", found.to_dict(), sealed=True)
    return found
