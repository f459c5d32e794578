"""Streams whose rows are drawn: a batch is a function of the seed and its step, so that nothing is
kept and every row is new."""

from __future__ import annotations

import threading
from collections.abc import Generator

import torch
from torch import Tensor

from ksparse.data.base import ActivationBatch, Cursor, check_cursor

HELD_OUT = -2
"""Number of the rows that are held out; batches have their step, from 1."""
SAMPLE = -1
"""Number of the rows for calibration."""


class GeneratedStream:
    """Batches of rows that a subclass draws.

    Args:
        d_model: Width of the rows.
        batch: Rows of a batch.
        seed: Seed of the rows.
        device: Where they are put.
    """

    NAME = "generated data"
    """What messages call the document that the rows are from."""

    def __init__(self, d_model: int, *, batch: int, seed: int, device: torch.device):
        self.d_model, self.batch, self.seed, self.device = d_model, batch, seed, device
        self.cancel = threading.Event()

    def rows(self, count: int, number: int) -> Tensor:
        """Return `count` rows [count, d], a function of the seed and a number."""
        raise NotImplementedError

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        """Yield batches without end, from the one after a cursor."""
        if cursor:
            check_cursor(cursor, "step")
        step = cursor["step"] if cursor else 0
        while True:
            step += 1
            yield ActivationBatch(
                self.rows(self.batch, step),
                torch.zeros(self.batch, dtype=torch.long),
                {"step": step},
            )

    def sample(self, rows: int) -> Tensor:
        """Return rows for calibration."""
        return self.rows(rows, SAMPLE)

    def document_names(self, documents: Tensor) -> list[str]:
        """Return a name for messages."""
        return [self.NAME]

    def same_context_fraction(self) -> float | None:
        """Return None: rows have no context to share."""
        return None
