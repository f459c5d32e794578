"""Resources: a run's files as small JSON objects, of which a page loads those that it shows.

overview      what the run is, what it lacks, latents worth a look, the first rows of the table
columns/KEY   a number of every latent, for sorting, filtering and plots
maps/LAYOUT   a place of every latent, and the dense regions
glosses/I     a few words on each latent of a block
examples/I    one short example of each latent of a block
latents/I     everything on the latents of a block
contexts/I    the whole texts of a block of contexts
near/I        their nearest latents by decoder direction
tasks         the probe tasks and their best latents
explained     explanations in words, by a model (`ksparse explain`), with their scores
tokens        the tokens that some latent fires on most
tokens/I      for the tokens of a block, the latents that fire on them most

docs/formats.md lists the fields of each. Every string in a resource is safe to look at
(`report.tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ksparse.report.page import summarize
from ksparse.report.tokens import safe_text
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.columns import Columns
from ksparse.viewer.details import Details
from ksparse.viewer.index import Index
from ksparse.viewer.maps import Maps
from ksparse.viewer.run_data import RunData, number
from ksparse.viewer.start import Start
from ksparse.viewer.weights import Decoder

GLOSS_BLOCK, EXAMPLE_BLOCK, TOKEN_BLOCK, CONTEXT_BLOCK = 256, 64, 512, 16
"""Latents in a block of glosses and of examples; tokens in a block of the index; contexts in a
block of texts."""
ADDED_BY = {
    "stats": "density, values, histograms, text that each latent fires on, latents that fire "
    "together",
    "n2g": "patterns that predict a latent, with precision and recall",
    "ablation": "how ablating a latent changes the LM’s predictions",
    "probes": "which latent is best at which probe task",
}
"""What each evaluation adds to the pages."""
ADDED_BY_NEW_STATS = (
    "histograms, examples by size, the tokens that each latent fires on, latents that fire together"
)
"""What `stats` adds where its result is of a version that did not record it."""


class Resources:
    """The resources of one run, by name.

    Args:
        run: the run folder.
        block: latents in one resource of details.
    """

    def __init__(self, run: RunFolder, block: int):
        self.run, self.block, self.data, self.decoder = run, block, RunData(run), Decoder(run)
        self.n = self.data.n
        self.columns, self.index = Columns(self.data), Index(self.data)
        self.details = Details(self.data, self.columns, self.index)
        self.maps = Maps(self.data, self.decoder)
        self.start = Start(self.data, self.columns, self.index, self.details)
        self._single: dict[str, Callable[[], dict[str, Any]]] = {
            "overview": self.overview,
            "tasks": lambda: {"tasks": self.index.tasks},
            "tokens": self.index.tokens,
            "explained": lambda: {"latents": self.data.explained},
        }
        self._blocks: dict[str, tuple[int, int, Callable[[int, int], dict[str, Any]]]] = {
            "glosses": (GLOSS_BLOCK, self.n, self.glosses),
            "examples": (EXAMPLE_BLOCK, self.n, self.examples),
            "latents": (block, self.n, self.details.resource),
            "near": (block, self.n, self.near),
            "contexts": (CONTEXT_BLOCK, self.details.n_contexts, self.details.contexts),
            "tokens": (TOKEN_BLOCK, len(self.data.source.vocabulary), self.index.latents_of),
        }
        self._nearest_block: tuple[int, list[list[tuple[int, float]]]] = (-1, [])

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a resource by its name; None if there is none of that name."""
        if name in self._single:
            return self._single[name]()
        group, _, key = name.partition("/")
        if group == "columns":
            return self.columns.resource(key) if key in self.columns.all else None
        if group == "maps":
            return self.maps.resource(key)
        if group not in self._blocks or not re.fullmatch("0|[1-9][0-9]{0,11}", key):
            return None
        size, total, make = self._blocks[group]
        first = int(key) * size
        return make(first, min(first + size, total)) if first < total else None

    def names(self) -> Iterator[str]:
        """Yield the name of every resource."""
        yield from self._single
        yield from (f"columns/{key}" for key in self.columns.all)
        yield from (f"maps/{name}" for name in self.maps.names())
        for group, (size, total, _) in self._blocks.items():
            yield from (f"{group}/{i}" for i in range(-(-total // size)))

    def overview(self) -> dict[str, Any]:
        """Return what the run is, what it lacks, what is worth a look, and the table's top."""
        lacks, first = self.list_missing(), self.columns.first_rows
        source, subject = self.data.source, self.data.source.subject
        return {
            "name": safe_text(self.run.name),
            "summary": safe_text(summarize(source)),
            "n": self.n,
            "k": subject.k,
            "lm": safe_text(subject.acts.lm),
            "site": safe_text(subject.acts.site),
            "text": self.data.text,
            "block": self.block,
            "gloss_block": GLOSS_BLOCK,
            "example_block": EXAMPLE_BLOCK,
            "token_block": TOKEN_BLOCK,
            "context_block": CONTEXT_BLOCK,
            "columns": self.columns.describe(),
            "lacks": lacks,
            "missing": self.start.describe_missing(lacks),
            "commands": {
                "more_text": self.start.command_for_more_text(),
                "examples": safe_text(source.command("eval", "stats", "--examples", "8")),
            },
            "serve": safe_text(source.command("view")),
            "queries": self.start.queries,
            "worth": self.start.worth_a_look,
            "first": first
            | {"examples": [self.details.shortest(i, i + 1)[0] for i in first["latents"]]},
            "maps": self.maps.names(),
            "has": {
                "tasks": source.result("probes") is not None,
                "tokens": self.data.fires_on is not None,
                "raises": self.data.raises is not None,
                "weights": self.run.has_weights(),
                "report": self.run.report_file.is_file(),
            },
        }

    def list_missing(self) -> list[dict[str, str]]:
        """Return what the run lacks, and the commands that add it."""
        missing = [(name, what) for name, what in ADDED_BY.items() if not self.data.has(name)]
        if self.data.has("stats") and self.data.fires_on is None:
            missing.append(("stats", ADDED_BY_NEW_STATS))
        source = self.data.source
        return [
            {
                "name": name,
                "adds": f"{what} (its result is damaged and left out)"
                if name in source.left_out
                else what,
                "command": safe_text(source.command("eval", name)),
            }
            for name, what in missing
        ]

    def glosses(self, first: int, last: int) -> dict[str, Any]:
        """Return the glosses of latents `first` to `last - 1`."""
        return {
            "glosses": [self.data.gloss(i) for i in range(first, last)],
            "raises": [self.data.raised(i) for i in range(first, last)],
        }

    def examples(self, first: int, last: int) -> dict[str, Any]:
        """Return a short example of each of latents `first` to `last - 1`."""
        return {"examples": self.details.shortest(first, last)}

    def near(self, first: int, last: int) -> dict[str, Any]:
        """Return the nearest latents of `first` to `last - 1` by decoder direction."""
        return {
            "near": {
                str(i): [
                    [other, number(cosine), self.data.gloss(other)]
                    for other, cosine in self._nearest(i)
                ]
                for i in range(first, last)
            }
        }

    def _nearest(self, latent: int) -> list[tuple[int, float]]:
        """Return the nearest latents of one.

        An export needs those of all latents, so they are then found for a whole block at once.
        """
        if not self.run.has_weights():
            return []
        if self.block == 1:
            return self.decoder.nearest(latent, latent + 1)[0]
        block, first = latent // GLOSS_BLOCK, latent // GLOSS_BLOCK * GLOSS_BLOCK
        if self._nearest_block[0] != block:
            last = min(self.n, first + GLOSS_BLOCK)
            self._nearest_block = block, self.decoder.nearest(first, last)
        return self._nearest_block[1][latent - first]
