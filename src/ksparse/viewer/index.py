"""What latents are searched by: probe tasks, and tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ksparse.report import findings
from ksparse.report.tokens import safe_text
from ksparse.viewer.run_data import RunData, number

OF_TOKEN = 50
"""Latents listed of a token."""


class Index:
    """From tasks and tokens to latents."""

    def __init__(self, reading: RunData):
        self.reading = reading

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """The probe tasks with their losses and their best latents."""
        found = (self.reading.source.result("probes") or {}).get("tasks")
        found = (
            {str(name): task for name, task in found.items() if isinstance(task, dict)}
            if isinstance(found, dict)
            else {}
        )
        return [
            self._task(task, found[task.name].get("best_latents") or [])
            for task in findings.tasks(self.reading.source)
        ]

    def _task(self, task: findings.ProbeTask, listed: list[Any]) -> dict[str, Any]:
        best = dict.fromkeys(
            [task.latent, *(entry.get("latent") for entry in listed if isinstance(entry, dict))]
        )
        return {
            "name": safe_text(task.name),
            "gain": number(task.gain),
            "positive": task.positive,
            "losses": {
                key: None if loss is None else [number(loss.value), number(loss.se)]
                for key, loss in task.losses.items()
            },
            "best": [
                [latent, self.reading.gloss(latent)]
                for latent in best
                if isinstance(latent, int) and 0 <= latent < self.reading.n
            ],
        }

    @cached_property
    def tasks_of(self) -> dict[int, list[dict[str, Any]]]:
        """The tasks that each latent is among the best of, with its place among them."""
        found: dict[int, list[dict[str, Any]]] = {}
        for task in self.tasks:
            for place, (latent, _) in enumerate(task["best"], 1):
                found.setdefault(latent, []).append(
                    {
                        "name": task["name"],
                        "place": place,
                        "gain": task["gain"] if place == 1 else None,
                    }
                )
        return {
            latent: sorted(tasks, key=lambda task: task["place"]) for latent, tasks in found.items()
        }

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token, latent and share of all that latents fire on most, by token, the largest share
        first."""
        if self.reading.fires_on is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)
        token, share = self.reading.fires_on
        latent, place = np.nonzero(token >= 0)
        token, share = token[latent, place], share[latent, place]
        order = np.lexsort((latent, -share, token))
        return token[order], latent[order], share[order]

    def tokens(self) -> dict[str, Any]:
        """Return the tokens that some latent fires on most: their numbers and strings."""
        there = np.unique(self._by_token[0]).tolist()
        return {"numbers": there, "strings": [self.reading.token(which) for which in there]}

    def latents_of(self, first: int, last: int) -> dict[str, Any]:
        """Return the latents that fire most on each of the tokens first to last - 1."""
        found: dict[str, list[Any]] = {}
        rows = slice(*np.searchsorted(self._by_token[0], [first, last]).tolist())
        for token, latent, share in zip(*(column[rows].tolist() for column in self._by_token)):
            listed = found.setdefault(str(token), [])
            if len(listed) < OF_TOKEN:
                listed.append([latent, number(share), self.reading.gloss(latent)])
        return {"tokens": found}
