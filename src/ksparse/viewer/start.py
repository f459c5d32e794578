"""What the start page shows: latents worth a look, searches that find something, what to run next.

Nothing is measured here. Each list of latents takes an order from an evaluation's result:

best explained      the highest F1 of its patterns (`n2g`); without it, the highest detection score
                    (`explain`)
best at a task      the largest gain over the baselines at a probe task, where it is more than
                    two standard errors of the latent's loss (`probes`)
strongest effect    the largest KL when it is ablated where it is strongest (`ablation`)
most surprising     strong, rare, and of no token in particular (`stats`): among latents whose
                    largest value is in the top quarter and that fire no more often than the
                    average latent, those with the largest share of their activation mass outside
                    the tokens that they fire on most. What they respond to must be looked for in
                    the text around the token.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np

from ksparse.report import findings
from ksparse.report.tables import format_percent, format_significant
from ksparse.report.tokens import safe_text
from ksparse.viewer.columns import Columns
from ksparse.viewer.details import Details
from ksparse.viewer.index import Index
from ksparse.viewer.run_data import RunData

LATENTS = 3
"""Latents in a list."""
STRONG = 0.75
"""Quantile of the live latents' largest values from which a latent is strong."""
QUERIES = 3
"""Example searches."""
LONGEST_QUERY = 40
"""Characters of an example search at most."""
WORD = re.compile(r"\W*([^\W\d_]{4,24})\W*")
"""Tokens that are offered as an example search: whole words."""
MORE_TEXT = 10
"""How many times the evaluation's text a longer one has."""

Chosen = list[tuple[int, str]]
"""Latents, and what is said of each."""


class Start:
    """The start page of a run.

    Args:
        data: the run's files.
        columns: the run's columns.
        index: the run's index of tasks and tokens.
        details: the run's examples.
    """

    def __init__(self, data: RunData, columns: Columns, index: Index, details: Details):
        self.data, self.columns, self.index, self.details = data, columns, index, details

    @cached_property
    def worth_a_look(self) -> list[dict[str, Any]]:
        """Lists of latents with a title, what it means, and the column that sorts the table so."""
        text = self.data.text or "the text"
        fires_on = self.data.fires_on
        most = 0 if fires_on is None else fires_on[0].shape[1]
        lists = (
            ("Best explained", *self._best_explained()),
            (
                "Best at a task",
                "They answer a yes-or-no question about a text better than channels and latents "
                "of an untrained SAE do.",
                "gain",
                self._best_at_tasks(),
            ),
            (
                "Strongest effect",
                "Ablated where they are strongest, they change the LM’s predictions most.",
                "effect",
                self._largest("effect", lambda value: f"KL {format_significant(value, 2)} nats"),
            ),
            (
                "Most surprising",
                f"Strong and rare on {text}, but of no token in particular: the share of their "
                f"activation mass outside the {most} tokens that they fire on most.",
                None,
                self._most_surprising(),
            ),
        )
        return [
            {
                "title": title,
                "reading": reading,
                "sort": sort,
                "latents": [{"latent": i, "said": said} | self.describe(i) for i, said in chosen],
            }
            for title, reading, sort, chosen in lists
            if chosen
        ]

    def describe(self, latent: int) -> dict[str, Any]:
        """Return what is shown of a latent in a list: its tokens, and one example or None."""
        return {
            "gloss": self.data.gloss(latent),
            "raises": self.data.raised(latent),
            "example": self.details.shortest(latent, latent + 1)[0],
        }

    @cached_property
    def queries(self) -> list[str]:
        """Searches that find something in this run: a probe task, then tokens of many latents."""
        tasks = [
            safe_text(task.name)
            for task in findings.tasks(self.data.source)
            if task.is_clear and len(safe_text(task.name)) <= LONGEST_QUERY
        ]
        queries = tasks[:1]
        for token in self.index.commonest_tokens():
            if len(queries) == QUERIES:
                break
            word = WORD.fullmatch(self.data.token(token))
            if word and word[1].lower() not in {query.lower() for query in queries}:
                queries.append(word[1])
        return queries

    def describe_missing(self, missing: list[dict[str, str]]) -> dict[str, Any] | None:
        """Return one box for all that the run lacks, with one command; None if it lacks nothing.

        Args:
            missing: `name` and what it `adds` of each evaluation that is missing.
        """
        if not missing:
            return None
        names = [entry["name"] for entry in missing]
        evaluated = any(self.data.has(name) for name in ("stats", "n2g", "ablation", "probes"))
        return {
            "evaluated": evaluated,
            "adds": [entry["adds"] for entry in missing],
            "command": safe_text(self.data.source.command("eval", *(names if evaluated else ()))),
        }

    def command_for_more_text(self) -> str | None:
        """Return the command that looks for latents on a longer text; None without `stats`."""
        result = self.data.source.result("stats") or {}
        tokens = (result.get("options") or {}).get("tokens") or result.get("n_tokens")
        if not isinstance(tokens, int) or not self.data.has("stats"):
            return None
        command = self.data.source.command("eval", "stats", "--tokens", str(MORE_TEXT * tokens))
        return safe_text(command)

    # ---- the lists

    def _best_explained(self) -> tuple[str, str, Chosen]:
        if "f1" in self.columns.all or "detection" not in self.columns.all:
            reading = "Patterns of tokens predict when they fire: the highest F1."
            chosen = self._largest("f1", lambda value: f"F1 {format_percent(value)}")
            return reading, "f1", chosen
        reading = "From its explanation a model finds the texts that it fires on."
        chosen = self._largest("detection", lambda value: f"detection {format_percent(value)}")
        return reading, "detection", chosen

    def _largest(self, key: str, write: Any) -> Chosen:
        """Return the latents with the largest values of a column, if these are above 0."""
        if key not in self.columns.all:
            return []
        values = np.nan_to_num(self.columns.values(key), nan=-np.inf)
        order = np.argsort(-values, kind="stable")[:LATENTS].tolist()
        return [(i, write(float(values[i]))) for i in order if 0 < values[i] < np.inf]

    def _best_at_tasks(self) -> Chosen:
        chosen: dict[int, str] = {}
        for task in findings.tasks(self.data.source):  # the largest gain first
            is_known = task.latent is not None and 0 <= task.latent < self.data.n
            if task.latent is not None and is_known and task.is_clear and len(chosen) < LATENTS:
                said = f"{safe_text(task.name, LONGEST_QUERY)} · {task.gain:+.3f} nats"
                chosen.setdefault(task.latent, said)
        return list(chosen.items())

    def _most_surprising(self) -> Chosen:
        if self.data.fires_on is None:
            return []
        token, share = self.data.fires_on
        elsewhere = 1 - np.where(token >= 0, share, 0).sum(1)
        density, largest = self.columns.values("density"), self.columns.values("max_act")
        live = density > 0
        if not live.any():
            return []
        strong = largest >= np.quantile(largest[live], STRONG)
        candidates = np.flatnonzero(live & strong & (density <= density.mean()) & (elsewhere > 0))
        order = candidates[np.argsort(-elsewhere[candidates], kind="stable")][:LATENTS]
        return [
            (i, f"{format_percent(float(elsewhere[i]))} on other tokens") for i in order.tolist()
        ]
