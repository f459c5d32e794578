"""The index by which latents are searched: probe tasks, and tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ksparse.report import findings
from ksparse.report.tokens import safe_text
from ksparse.viewer.run_data import RunData, number

LATENTS_PER_TOKEN = 50
"""Latents listed for a token at most."""


class Index:
    """From tasks and tokens to latents.

    Args:
        data: the run's files.
    """

    def __init__(self, data: RunData):
        self.data = data

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """The probe tasks with their losses and their best latents."""
        entries = (self.data.source.result("probes") or {}).get("tasks")
        best = (
            {
                str(name): entry.get("best_latents") or []
                for name, entry in entries.items()
                if isinstance(entry, dict)
            }
            if isinstance(entries, dict)
            else {}
        )
        return [self._describe(task, best[task.name]) for task in findings.tasks(self.data.source)]

    def _describe(self, task: findings.ProbeTask, listed: list[Any]) -> dict[str, Any]:
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
                [latent, self.data.gloss(latent)]
                for latent in best
                if isinstance(latent, int) and 0 <= latent < self.data.n
            ],
        }

    @cached_property
    def tasks_of(self) -> dict[int, list[dict[str, Any]]]:
        """The tasks that each latent is among the best of, with its place among them."""
        tasks: dict[int, list[dict[str, Any]]] = {}
        for task in self.tasks:
            for place, (latent, _) in enumerate(task["best"], 1):
                gain = task["gain"] if place == 1 else None
                entry = {"name": task["name"], "place": place, "gain": gain}
                tasks.setdefault(latent, []).append(entry)
        return {
            latent: sorted(entries, key=lambda entry: entry["place"])
            for latent, entries in tasks.items()
        }

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token, latent and share of activations, by token, then by share, the largest first."""
        if self.data.fires_on is None:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)
        token, share = self.data.fires_on
        latent, place = np.nonzero(token >= 0)
        token, share = token[latent, place], share[latent, place]
        order = np.lexsort((latent, -share, token))
        return token[order], latent[order], share[order]

    def tokens(self) -> dict[str, Any]:
        """Return ids and strings of the tokens that some latent fires on most."""
        token_ids = np.unique(self._by_token[0]).tolist()
        return {"numbers": token_ids, "strings": [self.data.token(i) for i in token_ids]}

    def commonest_tokens(self, most: int = 200) -> list[int]:
        """Return the tokens that hold the largest share of latents' activations, summed."""
        if self.data.fires_on is None:
            return []
        token, share = (column.ravel() for column in self.data.fires_on)
        total = np.bincount(token[token >= 0], weights=share[token >= 0])
        order = np.argsort(-total, kind="stable")[:most]
        return order[total[order] > 0].tolist()

    def latents_of(self, first: int, last: int) -> dict[str, Any]:
        """Return the latents that fire most on each of the tokens `first` to `last - 1`."""
        latents: dict[str, list[Any]] = {}
        rows = slice(*np.searchsorted(self._by_token[0], [first, last]).tolist())
        for token, latent, share in zip(*(column[rows].tolist() for column in self._by_token)):
            listed = latents.setdefault(str(token), [])
            if len(listed) < LATENTS_PER_TOKEN:
                listed.append([latent, number(share), self.data.gloss(latent)])
        return {"tokens": latents}
