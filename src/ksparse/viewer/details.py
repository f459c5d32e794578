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
"""Patterns shown of a latent at most."""
BEFORE_EFFECT = 16
"""Tokens shown before the position of an ablation."""
BEFORE_SHORT, AFTER_SHORT = 8, 4
"""Tokens shown before and after the marked one of an example in a table."""


class Details:
    """Reads the rows of a block of latents from each array.

    Args:
        data: the run's files.
        columns: the run's columns.
        index: the run's index of tasks.
    """

    def __init__(self, data: RunData, columns: Columns, index: Index):
        self.data, self.columns, self.index = data, columns, index

    def resource(self, first: int, last: int) -> dict[str, Any]:
        """Return the details of latents `first` to `last - 1`.

        Token strings are listed once, and referred to by their place in the list.
        """
        strings = Strings(self.data.token)
        entries: dict[int, dict[str, Any]] = {
            i: {"values": {}, "gloss": self.data.gloss(i)} for i in range(first, last)
        }
        for column in self.columns.measured:
            values = self.columns.values(column.key)[first:last].tolist()
            for i, value in enumerate(values, first):
                entries[i]["values"][column.key] = number(value)
        if self.data.stats is not None:
            self._add_examples(entries, self.data.stats, first, last, strings)
            self._add_counts(entries, self.data.stats, first, last, strings)
            self._add_logits(entries, self.data.stats, first, last, strings)
        for i, entry in entries.items():
            entry |= {
                "patterns": self._describe_patterns(i),
                "effect": self._describe_effect(i, strings),
                "tasks": self.index.tasks_of.get(i, []),
            }
        return {
            "strings": strings.listed,
            "latents": {str(i): entry for i, entry in entries.items()},
        }

    # ---- examples

    def _add_examples(
        self,
        entries: dict[int, dict[str, Any]],
        stats: Arrays,
        first: int,
        last: int,
        strings: Strings,
    ) -> None:
        for sample in ("top", "band", "random"):
            # Results with examples = 0, and old ones without bands, lack these arrays.
            if f"{sample}_context" not in stats.names:
                continue
            context, position, value, acts = self._read_sample(stats, sample, first, last)
            for row, entry in enumerate(entries.values()):
                columns = (context[row].tolist(), position[row].tolist(), value[row].tolist())
                entry[sample] = [
                    self._make_example(c, p, a, strings) | {"v": number(v), "place": place}
                    for place, (c, p, v, a) in enumerate(zip(*columns, acts[row]))
                    if c >= 0
                ]

    def _read_sample(self, stats: Arrays, sample: str, first: int, last: int) -> list[np.ndarray]:
        """Return contexts, positions, values and windows of some latents' examples."""
        before, after = self._window
        names = ("context", "position", "value", "acts")
        arrays = [stats.rows(f"{sample}_{name}", first, last) for name in names]
        if arrays[-1].shape[2:] != (before + 1 + after,):
            raise CorruptError(
                f"{stats.file}: '{sample}_acts' has windows of {arrays[-1].shape[-1]} tokens, the "
                f"result says {before + 1 + after}; run the evaluation again"
            )
        return arrays

    def shortest(self, first: int, last: int) -> list[dict[str, Any] | None]:
        """Return a few tokens around the strongest activation of latents `first` to `last - 1`.

        None stands for a latent without examples.
        """
        stats = self.data.stats
        if stats is None or "top_context" not in stats.names:
            return [None] * (last - first)
        examples: list[dict[str, Any] | None] = []
        for contexts, positions, _, acts in zip(*self._read_sample(stats, "top", first, last)):
            if not len(contexts) or contexts[0] < 0:
                examples.append(None)
                continue
            strings = Strings(self.data.token)
            reach = (BEFORE_SHORT, AFTER_SHORT)
            example = self._make_example(
                int(contexts[0]), int(positions[0]), acts[0], strings, reach
            )
            texts = [strings.listed[i] for i in example["t"]]
            examples.append({"t": texts} | {key: example[key] for key in ("a", "at", "borders")})
        return examples

    @cached_property
    def _window(self) -> tuple[int, int]:
        window = (self.data.source.result("stats") or {}).get("window") or {}
        return int(window.get("before", 0)), int(window.get("after", 0))

    @cached_property
    def _contexts(self) -> np.ndarray:
        return self.data.arrays("stats").tensor("contexts")

    def _make_example(
        self,
        context: int,
        position: int,
        acts: np.ndarray,
        strings: Strings,
        reach: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Return tokens t, the latent's values a on them, and the place `at` of the chosen one.

        Args:
            context: the context.
            position: the place of the chosen token in it.
            acts: the latent's values on the whole window around it.
            strings: takes the tokens.
            reach: tokens before and after the chosen one that are shown; None shows the window.
        """
        if context >= len(self._contexts):
            raise CorruptError(
                f"{self.data.arrays('stats').file} has no context {context}; "
                "run the evaluation again"
            )
        before, _ = self._window
        tokens = self._contexts[context].tolist()
        ahead, behind = map(min, reach or self._window, self._window)
        window = range(max(0, position - ahead), min(len(tokens), position + behind + 1))
        places = self._cut_at_words([p for p in window if tokens[p] >= 0], tokens, position)
        return {
            "c": context,
            "from": places[0] if places else 0,
            "at": places.index(position) if position in places else -1,
            "borders": [i for i, p in enumerate(places) if tokens[p] in self._separators],
            "t": [strings.number(tokens[p]) for p in places],
            "a": [
                number(act, 4) or 0 if act else 0
                for act in acts[[p - position + before for p in places]].tolist()
            ],
        }

    @cached_property
    def _separators(self) -> set[int]:
        """The tokens that stand between documents."""
        policy = (self.data.source.result("stats") or {}).get("policy") or {}
        ids = (policy.get("bos_token"), policy.get("separator_token"))
        return {token for token in ids if isinstance(token, int)}

    def _cut_at_words(self, places: list[int], tokens: list[int], position: int) -> list[int]:
        """Leave out what of a word is cut by the ends of a window; its own token stays."""
        vocabulary = self.data.source.vocabulary

        def continues(place: int) -> bool:
            """Return whether a token goes on with the word of the token before it."""
            if not 0 < place < len(tokens):
                return False
            last, text = (
                vocabulary[token] if 0 <= token < len(vocabulary) else ""
                for token in tokens[place - 1 : place + 1]
            )
            return last[-1:].isalnum() and text[:1].isalnum()

        first, last = 0, len(places)
        while first < last and places[first] < position and continues(places[first]):
            first += 1
        while last > first and places[last - 1] > position and continues(places[last - 1] + 1):
            last -= 1
        # A text without spaces is one word: then the window stays as it is.
        kept = places[first:last]
        return kept if 2 * len(kept) >= len(places) else places

    @property
    def n_contexts(self) -> int:
        """Number of contexts that examples are taken from."""
        stats = self.data.stats
        return len(self._contexts) if stats is not None and "contexts" in stats.names else 0

    def contexts(self, first: int, last: int) -> dict[str, Any]:
        """Return the whole texts of contexts `first` to `last - 1`, as numbers of strings."""
        strings, texts = Strings(self.data.token), []
        for row in self._contexts[first:last].tolist():
            tokens = [token for token in row if token >= 0]
            borders = [i for i, token in enumerate(tokens) if token in self._separators]
            texts.append({"t": [strings.number(token) for token in tokens], "borders": borders})
        return {"strings": strings.listed, "contexts": texts}

    def _add_logits(
        self,
        entries: dict[int, dict[str, Any]],
        stats: Arrays,
        first: int,
        last: int,
        strings: Strings,
    ) -> None:
        """Add the tokens that each decoder row raises and lowers, which old results lack."""
        if self.data.raises is None:
            return
        described = (self.data.source.result("stats") or {}).get("direct_logits") or {}
        columns = {
            name: stats.rows(f"logits_{name}", first, last).tolist()
            for name in ("up_token", "up_value", "down_token", "down_value", "histogram")
        }
        for row, entry in enumerate(entries.values()):
            up, down = (
                [
                    [strings.number(token), number(value)]
                    for token, value in zip(
                        columns[f"{end}_token"][row], columns[f"{end}_value"][row]
                    )
                    if token >= 0
                ]
                for end in ("up", "down")
            )
            entry["logits"] = {
                "raises": up,
                "lowers": down,
                "histogram": columns["histogram"][row],
                "blocks_left_out": described.get("blocks_left_out"),
            }

    def _add_counts(
        self,
        entries: dict[int, dict[str, Any]],
        stats: Arrays,
        first: int,
        last: int,
        strings: Strings,
    ) -> None:
        """Add histogram, tokens and coactive latents, which old results lack."""
        if self.data.fires_on is None:
            return
        result = self.data.source.result("stats") or {}
        bands = result.get("bands") or {}
        histogram, *together = (
            stats.rows(name, first, last).tolist()
            for name in ("histogram", "together_latent", "together_phi", "together_count")
        )
        for row, (i, entry) in enumerate(entries.items()):
            tokens = zip(*(column[i].tolist() for column in self.data.fires_on))
            entry |= {
                "histogram": histogram[row],
                "bands": bands,
                "on_mass": result.get("on_share_of") == "mass",
                "on": [
                    [strings.number(token), number(share)] for token, share in tokens if token >= 0
                ],
                "together": [
                    [other, number(phi), both, self.data.gloss(other)]
                    for other, phi, both in zip(*(column[row] for column in together))
                    if 0 <= other < self.data.n
                ],
            }

    # ---- what evaluations found

    @cached_property
    def _explanations(self) -> findings.Explanations | None:
        return findings.explanations(self.data.source)

    def _describe_patterns(self, latent: int) -> dict[str, Any] | None:
        explanation = self._explanations.find(latent, PATTERNS) if self._explanations else None
        if explanation is None or not explanation.patterns:
            return None
        return {
            "count": explanation.count,
            "shown": [
                {
                    "parts": [[part.text, part.sign] for part in pattern.parts],
                    "value": number(pattern.value),
                    "support": pattern.support,
                }
                for pattern in explanation.patterns
            ],
        }

    @cached_property
    def _ablated(self) -> tuple[Arrays | None, dict[int, int]]:
        """The ablation's arrays, and the row of each ablated latent."""
        arrays = self.data.source.arrays("ablation") if self.data.has("ablation") else None
        needed = {"context_tokens", "position", "value", "kl", "loss_difference"}
        if arrays is None or not needed <= set(arrays.names):
            return None, {}
        return arrays, {latent: row for row, latent in enumerate(arrays.tensor("latent").tolist())}

    def _describe_effect(self, latent: int, strings: Strings) -> dict[str, Any] | None:
        """Return what ablating a latent does, token by token from where it is strongest."""
        arrays, rows = self._ablated
        if arrays is None or latent not in rows:
            return None
        row = rows[latent]
        tokens, kl, loss, position, value = (
            arrays.row(name, row).tolist()
            for name in ("context_tokens", "kl", "loss_difference", "position", "value")
        )
        window = range(max(0, position - BEFORE_EFFECT), min(len(tokens), position + len(kl)))
        places = [p for p in window if tokens[p] >= 0]
        return {
            "value": number(value),
            "at": places.index(position) if position in places else -1,
            "t": [strings.number(tokens[p]) for p in places],
            "kl": [number(step) for step in kl],
            "loss": [number(step) for step in loss],
            "up": _moved_tokens(arrays, "up", row, strings),
            "down": _moved_tokens(arrays, "down", row, strings),
        }


def _moved_tokens(
    arrays: Arrays, direction: str, row: int, strings: Strings
) -> list[list[list[Any]]]:
    """Return [token, change of its logit] of the tokens moved most, for each prediction."""
    steps = zip(*(arrays.row(f"{direction}_{name}", row).tolist() for name in ("tokens", "values")))
    return [
        [
            [strings.number(token), number(change)]
            for token, change in zip(*step)
            if token >= 0 and change
        ]
        for step in steps
    ]


class Strings:
    """The strings of tokens, each listed once.

    Args:
        token: return a token's string by its id.
    """

    def __init__(self, token: Callable[[int], str]):
        self.listed: list[str] = []
        self._token = token
        self._numbers: dict[int, int] = {}

    def number(self, token: int) -> int:
        """Return a token's place in the list, and add its string if it is new."""
        if token not in self._numbers:
            self._numbers[token] = len(self.listed)
            self.listed.append(self._token(token))
        return self._numbers[token]
