"""The runs that a server shows, by name. Each is opened when a page first asks for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ksparse.errors import InputError
from ksparse.report.tokens import safe_text
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.labels import Labels
from ksparse.viewer.live import Live, LoadedLM
from ksparse.viewer.resources import Resources
from ksparse.viewer.run_data import number, quote_value


class FreshResources:
    """The resources of a run, read again when a result or a checkpoint changes.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder):
        self.run, self._lock = run, threading.Lock()
        self._cached: tuple[list[tuple[str, int]], Resources] | None = None

    def current(self) -> Resources:
        """Return the resources of the files as they are now."""
        results, maps = (self.run.path / "evals").glob("*.*"), self.run.path.glob("map-*.json")
        files = sorted([*results, *maps, *self.run.checkpoints()])
        stamp = [(file.name, file.stat().st_mtime_ns) for file in files if file.exists()]
        with self._lock:
            if self._cached is None or stamp != self._cached[0]:
                self._cached = stamp, Resources(self.run, block=1)
            return self._cached[1]


class ShownRun:
    """What is shown of one run.

    Args:
        name: its name here, safe to look at.
        run: the run folder.
        live: what needs the LM.
    """

    def __init__(self, name: str, run: RunFolder, live: Live):
        self.name, self.run, self.live = name, run, live
        self.resources = FreshResources(run)

    @cached_property
    def labels(self) -> Labels:
        """The labels of its latents."""
        return Labels(self.run, self.run.subject().n_latents)

    def resource(self, name: str) -> dict[str, Any] | None:
        """Return a resource by its name; None if there is none of that name."""
        if name == "labels":
            return {"latents": self.labels.all()}
        if name == "example":
            return {"text": self.resources.current().data.example}
        resource = self.resources.current().get(name)
        if resource is None or name != "overview":
            return resource
        return resource | {"live": True, "name": self.name}  # no other run here has this name


class Runs:
    """Several runs, or one.

    Args:
        runs: the run folders.
        trust_remote_code: let code that comes with the LM run.

    Raises:
        InputError: a run is given twice.
    """

    def __init__(self, runs: RunFolder | Sequence[RunFolder], *, trust_remote_code: bool = False):
        listed, loaded = [runs] if isinstance(runs, RunFolder) else list(runs), LoadedLM()
        self.shown = {
            name: ShownRun(name, run, Live(run, trust_remote_code=trust_remote_code, loaded=loaded))
            for name, run in zip(name_runs(listed), listed)
        }

    def get(self, name: Any = None) -> ShownRun:
        """Return a run by its name; without one, the first.

        Raises:
            InputError: there is no run of that name.
        """
        if name is None:
            return next(iter(self.shown.values()))
        if not isinstance(name, str) or name not in self.shown:
            raise InputError(
                f"there is no run {quote_value(name)} here; there are {', '.join(self.shown)}"
            )
        return self.shown[name]

    def find(self, path: str) -> tuple[ShownRun | None, str]:
        """Return the run and the rest of the path of a resource: run/NAME/REST, or REST of the
        first run."""
        if not path.startswith("run/"):
            return self.get(), path
        name, _, rest = path.removeprefix("run/").partition("/")
        return self.shown.get(name), rest

    def resource(self, path: str) -> dict[str, Any] | None:
        """Return a resource by its path; None if there is none there."""
        if path == "runs":
            return {"runs": [self._describe(shown) for shown in self.shown.values()]}
        shown, rest = self.find(path)
        if shown is None:
            return None
        group, _, key = rest.partition("/")
        if group != "nearest":
            return shown.resource(rest)
        latent, _, other = key.partition("/")
        if other not in self.shown or not latent.isascii() or not latent.isdecimal():
            return None
        return self.nearest(shown, int(latent[:12]), self.shown[other])

    def _describe(self, shown: ShownRun) -> dict[str, Any]:
        subject = shown.run.subject()
        return {
            "name": shown.name,
            "n": subject.n_latents,
            "lm": safe_text(subject.acts.lm),
            "site": safe_text(subject.acts.site),
        }

    def nearest(self, shown: ShownRun, latent: int, other: ShownRun) -> dict[str, Any] | None:
        """Return the latents of another run that are nearest to one by decoder direction.

        Returns:
            `near` [[latent, cosine, gloss]], or `why` there is nothing to compare; None if the run
            has no such latent.
        """
        here, there = shown.resources.current(), other.resources.current()
        if latent >= here.n:
            return None
        if why := why_not_comparable(shown, other):
            return {"why": why}
        rows, others = here.decoder.rows, there.decoder
        if rows.shape[1] != others.rows.shape[1]:
            return {
                "why": f"{shown.name} has directions of {rows.shape[1]} components, {other.name} "
                f"of {others.rows.shape[1]}"
            }
        return {
            "near": [
                [number_there, number(cosine), there.data.gloss(number_there)]
                for number_there, cosine in others.nearest_to(rows[latent])
            ]
        }


def name_runs(runs: Sequence[RunFolder]) -> list[str]:
    """Return a name of each run, safe to look at: its folder's, with a number where it is taken.

    Raises:
        InputError: a run is given twice.

    Example:
        >>> from pathlib import Path
        >>> from ksparse.storage.run_folder import RunFolder
        >>> name_runs([RunFolder(Path(path)) for path in ("a/k32", "b/k32", "b/k64")])
        ['k32', 'k32 (2)', 'k64']
    """
    places = [run.path.resolve() for run in runs]
    if len(set(places)) < len(places):
        twice = next(path for path in places if places.count(path) > 1)
        raise InputError(f"{twice} is given twice; give each run once")
    names: list[str] = []
    for run in runs:
        plain = name = safe_text(run.name).replace("/", "∕")
        count = 1
        while name in names:
            count += 1
            name = f"{plain} ({count})"
        names.append(name)
    return names


def why_not_comparable(shown: ShownRun, other: ShownRun) -> str:
    """Return why the decoders of two runs have no directions in common; "" if they may have."""
    from ksparse.lm.provenance import short_name

    here, there = (each.run.subject().acts for each in (shown, other))
    of_lm, at_site = (
        f"{shown.name} is {word} {safe_text(of)}, {other.name} {word} {safe_text(of_other)}; "
        f"only directions of one {what} can be compared"
        for what, word, of, of_other in (
            ("LM", "of", f"{here.lm} ({here.revision})", f"{there.lm} ({there.revision})"),
            ("site", "at", here.site, there.site),
        )
    )
    if (short_name(here.lm), here.revision) != (short_name(there.lm), there.revision):
        return of_lm
    if here.site != there.site:
        return at_site
    for each in (shown, other):
        if not each.run.has_weights():
            return f"{each.name} has no weights to compare"
    return ""
