"""A run's files -> pieces of JSON, of which a page loads what it shows. docs/formats.md has each
piece's fields.

    overview      what the run is, what it lacks, the first rows of the table
    columns/KEY   one number of every latent, for sorting, filtering and the map
    glosses/I     a few words on each latent of a block
    latents/I     everything on the latents of a block
    near/I        their nearest latents by decoder direction
    tasks         the probe tasks and their best latents
    tokens        the tokens that some latent fires on most
    tokens/I      for the tokens of a block, the latents that fire on them most

Every string in a piece is made safe to look at (`report.tokens`).
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
from ksparse.viewer.run_data import RunData, number
from ksparse.viewer.weights import Decoder

GLOSSES, TOKENS = 256, 512
"""Latents in a block of glosses; tokens in a block of the index."""
LACKS = {
    "stats": "density, values, histograms, text that each latent fires on, latents that fire "
    "together",
    "n2g": "patterns that predict a latent, with precision and recall",
    "ablation": "what taking a latent out does to the LM’s predictions",
    "probes": "which latent is best at which probe task",
}
"""What pages lack without an evaluation."""


class Resources:
    """The pieces of one run, by name; `block` latents are in a piece of details."""

    def __init__(self, run: RunFolder, block: int):
        self.run, self.block, self.reading, self.decoder = run, block, RunData(run), Decoder(run)
        self.n = self.reading.n
        self.columns, self.index = Columns(self.reading, self.decoder), Index(self.reading)
        self.details = Details(self.reading, self.columns, self.index)
        self._single: dict[str, Callable[[], dict[str, Any]]] = {
            "overview": self.overview,
            "tasks": lambda: {"tasks": self.index.tasks},
            "tokens": self.index.tokens,
        }
        self._blocks: dict[str, tuple[int, int, Callable[[int, int], dict[str, Any]]]] = {
            "glosses": (GLOSSES, self.n, self.glosses),
            "latents": (block, self.n, self.details.piece),
            "near": (block, self.n, self.near),
            "tokens": (TOKENS, len(self.reading.source.vocabulary), self.index.latents_of),
        }
        self._strip: tuple[int, list[list[tuple[int, float]]]] = (-1, [])

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a piece by its name, or None if there is none of that name."""
        if name in self._single:
            return self._single[name]()
        kind, _, which = name.partition("/")
        if kind == "columns":
            return self.columns.piece(which) if which in self.columns.all else None
        if kind not in self._blocks or not re.fullmatch("0|[1-9][0-9]{0,11}", which):
            return None
        size, total, make = self._blocks[kind]
        first = int(which) * size
        return make(first, min(first + size, total)) if first < total else None

    def names(self) -> Iterator[str]:
        """Yield the name of every piece."""
        yield from self._single
        yield from (f"columns/{key}" for key in self.columns.all)
        for kind, (size, total, _) in self._blocks.items():
            yield from (f"{kind}/{i}" for i in range(-(-total // size)))

    def overview(self) -> dict[str, Any]:
        source, recipe, weights = (
            self.reading.source,
            self.reading.source.recipe,
            bool(self.run.checkpoints()),
        )
        return {
            "name": safe_text(self.run.name),
            "summary": safe_text(summarize(source)),
            "n": self.n,
            "k": recipe.sae.k,
            "lm": safe_text(recipe.acts.lm),
            "site": safe_text(recipe.acts.site),
            "block": self.block,
            "gloss_block": GLOSSES,
            "token_block": TOKENS,
            "columns": [
                {
                    "key": column.key,
                    "label": column.label,
                    "kind": column.kind,
                    "reading": column.reading,
                }
                for column in self.columns.all.values()
            ],
            "lacks": self.lacks(),
            "serve": safe_text(source.command("view")),
            "first": self.columns.first_rows,
            "has": {
                "tasks": source.result("probes") is not None,
                "tokens": self.reading.fires_on is not None,
                "weights": weights,
                "report": self.run.report_file.is_file(),
            },
        }

    def lacks(self) -> list[dict[str, str]]:
        """Return what is not in the run, and the command that adds it."""
        found = [(name, what) for name, what in LACKS.items() if not self.reading.has(name)]
        if self.reading.has("stats") and self.reading.fires_on is None:
            found.append(
                (
                    "stats",
                    "histograms, examples by size, the tokens that each latent fires on, latents "
                    "that fire together",
                )
            )
        source = self.reading.source
        damaged = {
            name: f"{what} (its result is damaged and left out)"
            for name, what in found
            if name in source.left_out
        }
        return [
            {"adds": damaged.get(name, what), "command": safe_text(source.command("eval", name))}
            for name, what in found
        ]

    def glosses(self, first: int, last: int) -> dict[str, Any]:
        return {"glosses": [self.reading.gloss(i) for i in range(first, last)]}

    def near(self, first: int, last: int) -> dict[str, Any]:
        return {
            "near": {
                str(i): [
                    [other, number(cosine), self.reading.gloss(other)]
                    for other, cosine in self._nearest(i)
                ]
                for i in range(first, last)
            }
        }

    def _nearest(self, latent: int) -> list[tuple[int, float]]:
        """Return the nearest latents of one; where all will be asked for, those of a whole strip
        are found at once."""
        if not self.run.checkpoints():
            return []
        if self.block == 1:
            return self.decoder.nearest(latent, latent + 1)[0]
        strip = latent // GLOSSES
        if self._strip[0] != strip:
            self._strip = (
                strip,
                self.decoder.nearest(strip * GLOSSES, min(self.n, (strip + 1) * GLOSSES)),
            )
        return self._strip[1][latent - strip * GLOSSES]
