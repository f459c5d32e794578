"""A run's files -> pieces of JSON, of which a page loads what it shows. docs/formats.md has each piece's fields.

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

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.report import findings
from ksparse.report.page import summary
from ksparse.report.source import Arrays, Source
from ksparse.report.tokens import safe_text, token_of
from ksparse.runs import RunFolder
from ksparse.viewer.weights import Decoder

GLOSSES, TOKEN_BLOCK = 256, 512
"""Latents in a block of glosses; tokens in a block of the index."""
PATTERNS, ROWS, OF_TOKEN, GLOSS_TOKENS = 12, 50, 50, 3
"""Patterns shown of a latent; rows of the overview; latents listed of a token; tokens in a gloss."""
BEFORE_EFFECT = 16
"""Tokens shown before the place of an ablation."""
_LEAST_SHARE = 0.02  # of a latent's activations, for a token to be in its gloss

LACKS = {"stats": "density, values, histograms, text that each latent fires on, latents that fire together", "n2g": "patterns that predict a latent, with precision and recall",
         "ablation": "what taking a latent out does to the LM’s predictions", "probes": "which latent is best at which probe task"}
"""What the page lacks without an evaluation."""


@dataclass(frozen=True)
class Column:
    """A number of every latent; NaN where it was not measured."""

    key: str
    label: str
    kind: str
    """percent, or number."""
    reading: str
    eval: str


COLUMNS = (
    Column("density", "Density", "percent", "Share of held-out tokens on which it fires", "stats"),
    Column("mean_act", "Mean", "number", "Mean value where it fires", "stats"),
    Column("max_act", "Max", "number", "Largest value on held-out text", "stats"),
    Column("cosine", "Enc–dec", "number", "Cosine of what it reads and what it writes", "stats"),
    Column("f1", "F1", "percent", "Harmonic mean of the patterns’ precision and recall", "n2g"),
    Column("precision", "Precision", "percent", "Share of the patterns’ predictions at which it fires", "n2g"),
    Column("recall", "Recall", "percent", "Share of its activations that the patterns catch", "n2g"),
    Column("effect", "Effect", "number", "KL in nats over the next predictions, when it is taken out where it is strongest", "ablation"),
    Column("sparsity", "Sparsity", "percent", "Share of the logits that taking it out changes", "ablation"),
    Column("gain", "Task gain", "number", "Nats that it says of its best probe task, on the training half", "probes"),
)
PLANE = (Column("pca_1", "Decoder PC 1", "number", "First principal component of the decoder’s rows", ""),
         Column("pca_2", "Decoder PC 2", "number", "Second principal component of the decoder’s rows", ""))


class Pieces:
    """The pieces of one run. Files are read when a piece first needs them; `block` latents are in a piece of details."""

    def __init__(self, run: RunFolder, block: int):
        self.source, self.block = Source(run), block
        self.n = self.source.recipe.sae.n_latents
        self.decoder = Decoder(run)
        self._strip: tuple[int, list[list[tuple[int, float]]]] = (-1, [])
        self._made = {"overview": self.overview, "tasks": self.tasks, "tokens": self.tokens}
        self._blocks: dict[str, tuple[int, int, Callable[[int, int], dict[str, Any]]]] = {
            "glosses": (GLOSSES, self.n, self.glosses), "latents": (block, self.n, self.latents), "near": (block, self.n, self.near),
            "tokens": (TOKEN_BLOCK, len(self.source.vocabulary), self.latents_of_tokens)}

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a piece by its name, or None if there is none of that name."""
        if name in self._made:
            return self._made[name]()
        kind, _, which = name.partition("/")
        if kind == "columns":
            return self.column(which) if which in self.columns else None
        if kind not in self._blocks or not (which.isascii() and which.isdigit()) or which != str(int(which)):
            return None
        size, total, make = self._blocks[kind]
        first = int(which) * size
        return make(first, min(first + size, total)) if first < total else None

    def names(self) -> Iterator[str]:
        """Yield the name of every piece."""
        yield from self._made
        yield from (f"columns/{key}" for key in self.columns)
        for kind, (size, total, _) in self._blocks.items():
            yield from (f"{kind}/{i}" for i in range(-(-total // size)))

    # ---- over all latents

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The columns there are."""
        there = {column.key: column for column in COLUMNS if self._has(column.eval)}
        return there | ({column.key: column for column in PLANE} if self.source.run.checkpoints() else {})

    def overview(self) -> dict[str, Any]:
        source, recipe = self.source, self.source.recipe
        stats = source.result("stats") or {}
        return {
            "name": safe_text(source.run.name), "summary": safe_text(summary(source)), "n": self.n, "k": recipe.sae.k,
            "lm": safe_text(recipe.acts.lm), "site": safe_text(recipe.acts.site), "checkpoint": stats.get("checkpoint"),
            "block": self.block, "gloss_block": GLOSSES, "token_block": TOKEN_BLOCK,
            "columns": [{"key": c.key, "label": c.label, "kind": c.kind, "reading": c.reading} for c in self.columns.values()],
            "lacks": self.lacks(), "serve": safe_text(source.command("view")), "first": self.first_rows,
            "has": {"tasks": source.result("probes") is not None, "tokens": self._on is not None, "weights": bool(source.run.checkpoints()),
                    "report": source.run.report_file.is_file()}}

    def lacks(self) -> list[dict[str, str]]:
        """Return what is not in the run, and the command that adds it."""
        found = [(name, what) for name, what in LACKS.items() if not self._has(name)]
        if self._has("stats") and self._on is None:
            found.append(("stats", "histograms, examples by size, the tokens that each latent fires on, latents that fire together"))
        return [{"adds": what, "command": safe_text(self.source.command("eval", name))} for name, what in found]

    @cached_property
    def first_rows(self) -> dict[str, Any]:
        """Return the top of the table in its first order: by effect, or else by density."""
        key = next((key for key in ("effect", "density") if key in self.columns), None)
        values = self._values(key) if key else np.zeros(self.n)
        order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:ROWS]
        shown = [column for column in self.columns.values() if column.eval]
        return {"sort": key, "latents": order.tolist(), "glosses": [self._gloss(int(i)) for i in order],
                "values": {column.key: [_number(value) for value in self._values(column.key)[order]] for column in shown}}

    def column(self, key: str) -> dict[str, Any]:
        return {"float32": base64.b64encode(np.ascontiguousarray(self._values(key), "<f4").tobytes()).decode()}

    def _values(self, key: str) -> np.ndarray:
        """Return one number of every latent as float32, NaN where there is none."""
        if key in ("pca_1", "pca_2"):
            return self.decoder.plane[:, int(key[-1]) - 1]
        if key not in self._columns:
            self._columns[key] = self._read_column(key)
        return self._columns[key]

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {}

    def _read_column(self, key: str) -> np.ndarray:
        name = self.columns[key].eval
        arrays = self.source.arrays(name)
        if name == "stats":
            return self._whole(arrays, key)
        if name == "probes":
            return self._whole(arrays, "best_gain")
        values = np.full(self.n, np.nan, np.float32)
        at = arrays.whole("scored" if name == "n2g" else "latent")
        found = np.nansum(arrays.whole("kl"), axis=1) if key == "effect" else arrays.whole(key)
        if at.size and (at.min() < 0 or at.max() >= self.n or len(found) != len(at)):
            raise CorruptError(f"{arrays.file} speaks of other latents than the run's {self.n:,}; run the evaluation again")
        values[at] = found
        return values

    def _whole(self, arrays: Arrays, name: str) -> np.ndarray:
        found = arrays.whole(name)
        if found.shape != (self.n,):
            raise CorruptError(f"{arrays.file}: '{name}' has shape {list(found.shape)}, the run has {self.n:,} latents; run the evaluation again")
        return found.astype(np.float32)

    def _has(self, name: str) -> bool:
        """Tell whether an evaluation has been run and left its arrays; what needs none always is."""
        return not name or self.source.result(name) is not None and self.source.arrays(name) is not None

    # ---- a few words on a latent

    def glosses(self, first: int, last: int) -> dict[str, Any]:
        return {"glosses": [self._gloss(i) for i in range(first, last)]}

    @cached_property
    def _on(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The tokens that each latent fires on most, and its share of activations on each; None in results of before there were any."""
        if not self._has("stats") or "on_token" not in self._stats.names:
            return None
        return self._stats.whole("on_token"), self._stats.whole("on_share")

    def _gloss(self, latent: int) -> list[list[Any]]:
        """Return [token, share] of the tokens it fires on most."""
        return [] if self._on is None else [[self._token(int(token)), round(float(share), 3)] for token, share in zip(self._on[0][latent], self._on[1][latent])
                                            if token >= 0 and share >= _LEAST_SHARE][:GLOSS_TOKENS]

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {}

    def _token(self, number: int) -> str:
        if number not in self._tokens:
            self._tokens[number] = token_of(self.source.vocabulary, number)
        return self._tokens[number]

    @cached_property
    def _stats(self) -> Arrays:
        return self.source.arrays("stats")

    # ---- everything on a latent

    def latents(self, first: int, last: int) -> dict[str, Any]:
        """Return the details of latents first to last - 1; token strings are listed once, and named by their place in the list."""
        strings = _Strings(self._token)
        made = {str(i): {"values": {}, "gloss": self._gloss(i)} for i in range(first, last)}
        for column in self.columns.values():
            if column.eval:
                for i, value in enumerate(self._values(column.key)[first:last], first):
                    made[str(i)]["values"][column.key] = _number(value)
        if self._has("stats"):
            self._add_examples(made, first, last, strings)
            self._add_counts(made, first, last, strings)
        self._add_findings(made, strings)
        return {"strings": strings.listed, "latents": made}

    def _add_examples(self, made: dict[str, Any], first: int, last: int, strings: _Strings) -> None:
        if "contexts" not in self._stats.names:
            return
        for kind in ("top", "band", "random"):
            if f"{kind}_context" not in self._stats.names:
                continue
            context, position, value, acts = (self._stats.rows(f"{kind}_{name}", first, last) for name in ("context", "position", "value", "acts"))
            if acts.shape[2:] != (self._before + 1 + self._after,):
                raise CorruptError(f"{self._stats.file}: '{kind}_acts' has windows of {acts.shape[-1]} tokens, the result says "
                                   f"{self._before + 1 + self._after}; run the evaluation again")
            for row, entry in enumerate(made.values()):
                entry[kind] = [self._example(int(c), int(p), float(v), a, strings) | {"place": place}
                               for place, (c, p, v, a) in enumerate(zip(context[row], position[row], value[row], acts[row])) if c >= 0]

    @cached_property
    def _window(self) -> dict[str, int]:
        return (self.source.result("stats") or {}).get("window") or {}

    @property
    def _before(self) -> int:
        return int(self._window.get("before", 0))

    @property
    def _after(self) -> int:
        return int(self._window.get("after", 0))

    @cached_property
    def _contexts(self) -> np.ndarray:
        return self._stats.whole("contexts")

    def _example(self, context: int, position: int, value: float, acts: np.ndarray, strings: _Strings) -> dict[str, Any]:
        """Return tokens t, values a of the latent on them, and the number of the one that the example is for."""
        if not 0 <= context < len(self._contexts):
            raise CorruptError(f"{self._stats.file} has no context {context}; run the evaluation again")
        row = self._contexts[context]
        places = [p for p in range(max(0, position - self._before), min(len(row), position + self._after + 1)) if row[p] >= 0]
        return {"v": _number(value), "at": places.index(position) if position in places else -1, "t": [strings.number(int(row[p])) for p in places],
                "a": [_number(act, 4) or 0 if act else 0 for act in acts[[p - position + self._before for p in places]].tolist()]}

    def _add_counts(self, made: dict[str, Any], first: int, last: int, strings: _Strings) -> None:
        """Add histogram, tokens and companions, which results of before there were any lack."""
        if self._on is None:
            return
        bands = (self.source.result("stats") or {}).get("bands") or {}
        histogram, other, phi, both = (self._stats.rows(name, first, last) for name in ("histogram", "together_latent", "together_phi", "together_count"))
        for row, (number, entry) in enumerate(made.items()):
            on = zip(self._on[0][int(number)].tolist(), self._on[1][int(number)].tolist())
            entry |= {"histogram": histogram[row].tolist(), "bands": bands, "on": [[strings.number(token), _number(share)] for token, share in on if token >= 0],
                      "together": [[int(i), _number(p), int(c), self._gloss(int(i))] for i, p, c in zip(other[row], phi[row], both[row]) if 0 <= i < self.n]}

    def _add_findings(self, made: dict[str, Any], strings: _Strings) -> None:
        for number, entry in made.items():
            found = self._explanations.of(int(number), PATTERNS) if self._explanations else None
            if found is not None:
                entry["patterns"] = {"count": found.count, "shown": [
                    {"parts": [[part.text, part.sign] for part in each.parts], "value": _number(each.value), "support": each.support} for each in found.patterns]}
            entry["effect"] = self._effect(int(number), strings)
            entry["tasks"] = self._tasks_of.get(int(number), [])

    @cached_property
    def _explanations(self) -> findings.Explanations | None:
        return findings.explanations(self.source)

    @cached_property
    def _ablated(self) -> tuple[Arrays, dict[int, int]] | None:
        """The ablation's arrays, and the row of each latent that has one."""
        if not self._has("ablation"):
            return None
        arrays = self.source.arrays("ablation")
        return arrays, {latent: row for row, latent in enumerate(arrays.whole("latent").tolist())}

    def _effect(self, latent: int, strings: _Strings) -> dict[str, Any] | None:
        """Return what taking a latent out does, token by token from where it is strongest on."""
        arrays, rows = self._ablated or (None, {})
        if latent not in rows or not {"context_tokens", "position", "value", "kl", "loss_difference"} <= set(arrays.names):
            return None
        at = rows[latent]
        tokens, kl, loss = (arrays.row(name, at) for name in ("context_tokens", "kl", "loss_difference"))
        position, value = int(arrays.row("position", at)), float(arrays.row("value", at))
        moved = {kind: (arrays.row(f"{kind}_tokens", at), arrays.row(f"{kind}_values", at)) for kind in ("up", "down")}
        places = [p for p in range(max(0, position - BEFORE_EFFECT), min(len(tokens), position + len(kl))) if tokens[p] >= 0]
        return {"value": _number(value), "at": places.index(position) if position in places else -1, "t": [strings.number(int(tokens[p])) for p in places],
                "kl": [_number(each) for each in kl], "loss": [_number(each) for each in loss],
                **{kind: [[[strings.number(int(token)), _number(change)] for token, change in zip(*step) if token >= 0 and change] for step in zip(*both)]
                   for kind, both in moved.items()}}

    # ---- nearest latents

    def near(self, first: int, last: int) -> dict[str, Any]:
        return {"near": {str(i): [[other, _number(cosine), self._gloss(other)] for other, cosine in self._nearest(i)] for i in range(first, last)}}

    def _nearest(self, latent: int) -> list[tuple[int, float]]:
        """Return the nearest latents of one; when all are asked for, those of a whole strip are found at once."""
        if not self.source.run.checkpoints():
            return []
        if self.block == 1:
            return self.decoder.nearest(latent, latent + 1)[0]
        strip = latent // GLOSSES
        if self._strip[0] != strip:
            self._strip = strip, self.decoder.nearest(strip * GLOSSES, min(self.n, (strip + 1) * GLOSSES))
        return self._strip[1][latent - strip * GLOSSES]

    # ---- what latents are searched by

    def tasks(self) -> dict[str, Any]:
        """Return the probe tasks with their losses and their best latents."""
        asked = (self.source.result("probes") or {}).get("tasks")
        asked = {str(name): task for name, task in asked.items() if isinstance(task, dict)} if isinstance(asked, dict) else {}
        shown = []
        for task in findings.tasks(self.source):
            best = [entry.get("latent") for entry in asked[task.name].get("best_latents") or [] if isinstance(entry, dict)]
            best = [latent for latent in dict.fromkeys([task.latent, *best]) if isinstance(latent, int) and 0 <= latent < self.n]
            losses = {key: None if number is None else [_number(number.value), _number(number.se)] for key, number in task.losses.items()}
            shown.append({"name": safe_text(task.name), "gain": _number(task.gain), "positive": task.positive, "losses": losses,
                          "best": [[latent, self._gloss(latent)] for latent in best]})
        return {"tasks": shown}

    @cached_property
    def _tasks_of(self) -> dict[int, list[dict[str, Any]]]:
        """The tasks that each latent is among the best of, with its place among them."""
        found: dict[int, list[dict[str, Any]]] = {}
        for task in self.tasks()["tasks"]:
            for place, (latent, _) in enumerate(task["best"], 1):
                found.setdefault(latent, []).append({"name": task["name"], "place": place, "gain": task["gain"] if place == 1 else None})
        return {latent: sorted(tasks, key=lambda task: task["place"]) for latent, tasks in found.items()}

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token, latent and share of all that `on` lists, by token, the largest share first."""
        if self._on is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)
        token, share = self._on
        latent, place = np.nonzero(token >= 0)
        token, share = token[latent, place], share[latent, place]
        order = np.lexsort((latent, -share, token))
        return token[order], latent[order], share[order]

    def tokens(self) -> dict[str, Any]:
        """Return the tokens that some latent fires on most: their numbers and strings."""
        there = np.unique(self._by_token[0]).tolist()
        return {"numbers": there, "strings": [self._token(number) for number in there]}

    def latents_of_tokens(self, first: int, last: int) -> dict[str, Any]:
        token, latent, share = self._by_token
        found: dict[str, list[Any]] = {}
        for at in range(*np.searchsorted(token, [first, last]).tolist()):
            listed = found.setdefault(str(token[at]), [])
            if len(listed) < OF_TOKEN:
                listed.append([int(latent[at]), _number(share[at]), self._gloss(int(latent[at]))])
        return {"tokens": found}


class _Strings:
    """Strings of tokens, each listed once."""

    def __init__(self, token: Callable[[int], str]):
        self.listed: list[str] = []
        self._token, self._numbers = token, {}

    def number(self, token: int) -> int:
        if token not in self._numbers:
            self._numbers[token] = len(self.listed)
            self.listed.append(self._token(token))
        return self._numbers[token]


def _number(value: Any, digits: int = 5) -> float | None:
    """Return a number for JSON, rounded; None for one that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")
