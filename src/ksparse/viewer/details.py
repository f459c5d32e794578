"""Everything on a block of latents: examples, counts, and what evaluations found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.report import findings
from ksparse.report.source import Arrays
from ksparse.viewer.columns import Columns
from ksparse.viewer.index import Index
from ksparse.viewer.run_data import RunData, number

PATTERNS = 12
"""Patterns shown of a latent."""
BEFORE_EFFECT = 16
"""Tokens shown before the place of an ablation."""


class Details:
    """Reads the rows of a block of latents in each array."""

    def __init__(self, reading: RunData, columns: Columns, index: Index):
        self.reading, self.columns, self.index = reading, columns, index

    def piece(self, first: int, last: int) -> dict[str, Any]:
        """Return the details of latents first to last - 1; token strings are listed once, and named
        by their place in the list."""
        strings = Strings(self.reading.token)
        made: dict[int, dict[str, Any]] = {
            i: {"values": {}, "gloss": self.reading.gloss(i)} for i in range(first, last)
        }
        for column in self.columns.measured:
            for i, value in enumerate(self.columns.values(column.key)[first:last].tolist(), first):
                made[i]["values"][column.key] = number(value)
        if self.reading.stats is not None:
            self._add_examples(made, self.reading.stats, first, last, strings)
            self._add_counts(made, self.reading.stats, first, last, strings)
        for i, entry in made.items():
            entry |= {
                "patterns": self._patterns(i),
                "effect": self._effect(i, strings),
                "tasks": self.index.tasks_of.get(i, []),
            }
        return {"strings": strings.listed, "latents": {str(i): entry for i, entry in made.items()}}

    # ---- examples

    def _add_examples(
        self,
        made: dict[int, dict[str, Any]],
        stats: Arrays,
        first: int,
        last: int,
        strings: Strings,
    ) -> None:
        before, after = self._window
        for kind in ("top", "band", "random"):
            if (
                f"{kind}_context" not in stats.names
            ):  # text was none, or results are of before there were any
                continue
            context, position, value, acts = (
                stats.rows(f"{kind}_{name}", first, last)
                for name in ("context", "position", "value", "acts")
            )
            if acts.shape[2:] != (before + 1 + after,):
                raise CorruptError(
                    f"{stats.file}: '{kind}_acts' has windows of {acts.shape[-1]} tokens, the "
                    f"result says {before + 1 + after}; "
                    "run the evaluation again"
                )
            for row, entry in enumerate(made.values()):
                entry[kind] = [
                    self._example(c, p, a, strings) | {"v": number(v), "place": place}
                    for place, (c, p, v, a) in enumerate(
                        zip(
                            context[row].tolist(),
                            position[row].tolist(),
                            value[row].tolist(),
                            acts[row],
                        )
                    )
                    if c >= 0
                ]

    @cached_property
    def _window(self) -> tuple[int, int]:
        window = (self.reading.source.result("stats") or {}).get("window") or {}
        return int(window.get("before", 0)), int(window.get("after", 0))

    @cached_property
    def _contexts(self) -> np.ndarray:
        return self.reading.arrays("stats").whole("contexts")

    def _example(
        self, context: int, position: int, acts: np.ndarray, strings: Strings
    ) -> dict[str, Any]:
        """Return tokens t, values a of the latent on them, and at, the number of the one that the
        example is for."""
        if context >= len(self._contexts):
            raise CorruptError(
                f"{self.reading.arrays('stats').file} has no context {context}; "
                "run the evaluation again"
            )
        before, after = self._window
        row = self._contexts[context].tolist()
        places = [
            p
            for p in range(max(0, position - before), min(len(row), position + after + 1))
            if row[p] >= 0
        ]
        return {
            "at": places.index(position) if position in places else -1,
            "t": [strings.number(row[p]) for p in places],
            "a": [
                number(act, 4) or 0 if act else 0
                for act in acts[[p - position + before for p in places]].tolist()
            ],
        }

    def _add_counts(
        self,
        made: dict[int, dict[str, Any]],
        stats: Arrays,
        first: int,
        last: int,
        strings: Strings,
    ) -> None:
        """Add histogram, tokens and companions, which results of before there were any lack."""
        if self.reading.fires_on is None:
            return
        bands = (self.reading.source.result("stats") or {}).get("bands") or {}
        histogram, *together = (
            stats.rows(name, first, last).tolist()
            for name in ("histogram", "together_latent", "together_phi", "together_count")
        )
        for row, (i, entry) in enumerate(made.items()):
            on = zip(*(column[i].tolist() for column in self.reading.fires_on))
            entry |= {
                "histogram": histogram[row],
                "bands": bands,
                "on": [[strings.number(token), number(share)] for token, share in on if token >= 0],
                "together": [
                    [other, number(phi), both, self.reading.gloss(other)]
                    for other, phi, both in zip(*(column[row] for column in together))
                    if 0 <= other < self.reading.n
                ],
            }

    # ---- what evaluations found

    @cached_property
    def _explanations(self) -> findings.Explanations | None:
        return findings.explanations(self.reading.source)

    def _patterns(self, latent: int) -> dict[str, Any] | None:
        found = self._explanations.find(latent, PATTERNS) if self._explanations else None
        return (
            None
            if found is None or not found.patterns
            else {
                "count": found.count,
                "shown": [
                    {
                        "parts": [[part.text, part.sign] for part in each.parts],
                        "value": number(each.value),
                        "support": each.support,
                    }
                    for each in found.patterns
                ],
            }
        )

    @cached_property
    def _ablated(self) -> tuple[Arrays | None, dict[int, int]]:
        """The ablation's arrays, and the row of each latent that has one."""
        arrays = self.reading.source.arrays("ablation") if self.reading.has("ablation") else None
        if arrays is None or not {
            "context_tokens",
            "position",
            "value",
            "kl",
            "loss_difference",
        } <= set(arrays.names):
            return None, {}
        return arrays, {latent: row for row, latent in enumerate(arrays.whole("latent").tolist())}

    def _effect(self, latent: int, strings: Strings) -> dict[str, Any] | None:
        """Return what taking a latent out does, token by token from where it is strongest on."""
        arrays, rows = self._ablated
        if arrays is None or latent not in rows:
            return None
        tokens, kl, loss, position, value = (
            arrays.row(name, rows[latent]).tolist()
            for name in ("context_tokens", "kl", "loss_difference", "position", "value")
        )
        places = [
            p
            for p in range(max(0, position - BEFORE_EFFECT), min(len(tokens), position + len(kl)))
            if tokens[p] >= 0
        ]
        moved = {}
        for kind in ("up", "down"):
            steps = zip(
                *(
                    arrays.row(f"{kind}_{name}", rows[latent]).tolist()
                    for name in ("tokens", "values")
                )
            )
            moved[kind] = [
                [
                    [strings.number(token), number(change)]
                    for token, change in zip(*step)
                    if token >= 0 and change
                ]
                for step in steps
            ]
        return {
            "value": number(value),
            "at": places.index(position) if position in places else -1,
            "t": [strings.number(tokens[p]) for p in places],
            "kl": [number(each) for each in kl],
            "loss": [number(each) for each in loss],
            **moved,
        }


class Strings:
    """Strings of tokens, each listed once."""

    def __init__(self, token: Callable[[int], str]):
        self.listed: list[str] = []
        self._token = token
        self._numbers: dict[int, int] = {}

    def number(self, token: int) -> int:
        if token not in self._numbers:
            self._numbers[token] = len(self.listed)
            self.listed.append(self._token(token))
        return self._numbers[token]
