"""TODO ksparse.data.live."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.data.base import ActivationBatch, Cursor, StreamCancelled, _check_cursor
from ksparse.data.contexts import Context, Corpus, TextCursor
from ksparse.data.permutation import permutation
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import InputError, NonFiniteError
from ksparse.lm.model import LM


class ShuffleBuffer(NamedTuple):
    """Kept activations x[rows, d] as `acts.store` has them, in the order of the text, their
    documents, their contexts, and where the text goes on."""

    x: Tensor
    documents: Tensor
    contexts: Tensor
    next: tuple[TextCursor, int]


class LiveStream:
    """Activations of an LM on a text, as they are needed."""

    def __init__(
        self, lm: LM, corpus: Corpus, *, batch: int, seed: int, mesh: Mesh = SINGLE_PROCESS
    ):
        self.lm, self.corpus, self.batch, self.seed, self.mesh = lm, corpus, batch, seed, mesh
        self.d_model = lm.d_model
        self.per_block = max(1, corpus.acts.mix // batch)
        self._same_context_fraction: float | None = None
        self._newest: tuple[tuple[TextCursor, int], ShuffleBuffer] | None = None
        self._reading: tuple[TextCursor, Iterator[Context]] | None = (
            None  # the text from a place on, left open there
        )
        self._one = threading.Lock()  # a sample may be asked for while a thread computes
        self.halt = threading.Event()

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        cursor = cursor or {"block": 0, "place": list(TextCursor()), "skip": 0, "batch": 0}
        _check_cursor(cursor, "block")
        number, start, done = (
            cursor["block"],
            (TextCursor(*cursor["place"]), cursor["skip"]),
            cursor["batch"],
        )
        while True:
            block = self._block(start)
            rows = len(block.x)
            order = torch.from_numpy(permutation(np.arange(rows), rows, (self.seed, number)))
            self._measure_mixing(block, order)
            for i in range(done, self.per_block):
                chosen = order[i * self.batch : (i + 1) * self.batch][
                    self.mesh.batch_range(self.batch)
                ]
                after = {"block": number, "place": list(start[0]), "skip": start[1], "batch": i + 1}
                if i + 1 == self.per_block:
                    after = {
                        "block": number + 1,
                        "place": list(block.next[0]),
                        "skip": block.next[1],
                        "batch": 0,
                    }
                yield ActivationBatch(block.x[chosen].float(), block.documents[chosen], after)
            number, start, done = number + 1, block.next, 0
            del block  # so that two are never in memory

    def sample(self, rows: int) -> Tensor:
        block = self._block((TextCursor(), 0))
        order = permutation(np.arange(min(rows, len(block.x))), len(block.x), (self.seed, 0))
        return block.x[torch.from_numpy(order)].float()

    def document_names(self, documents: Tensor) -> list[str]:
        return [self.corpus.names.get(i, f"document {i}") for i in documents.unique().tolist()]

    def same_context_fraction(self) -> float | None:
        return self._same_context_fraction

    def _block(self, start: tuple[TextCursor, int]) -> ShuffleBuffer:
        """Compute the block that begins at a place of the text; the newest one is kept, since it is
        often asked for twice."""
        with self._one:
            if self._newest is None or self._newest[0] != start:
                self._newest = None
                self._newest = (start, self._compute(*start))
            return self._newest[1]

    def _compute(self, place: TextCursor, skip: int) -> ShuffleBuffer:
        wanted = self.batch * self.per_block
        groups, following = self._gather(place, skip, wanted)
        x = torch.empty(
            wanted,
            self.d_model,
            dtype=getattr(torch, self.corpus.acts.store),
            device=self.lm.device,
        )
        owners, numbers = (
            torch.empty(wanted, dtype=torch.long),
            torch.empty(wanted, dtype=torch.long),
        )
        borders, filled, seen = [0], 0, 0
        for number, group in enumerate(groups):
            if self.halt.is_set():
                raise StreamCancelled
            contexts = self.corpus.batch(group)
            ids = torch.arange(seen, seen + len(group))[:, None].expand_as(contexts.keep)
            seen += len(group)
            first = skip if number == 0 else 0
            part = slice(first, first + wanted - filled)
            docs, ids = contexts.documents[contexts.keep][part], ids[contexts.keep][part]
            at = slice(filled, filled + len(docs))
            owners[at], numbers[at] = docs, ids
            if self._whose(number, len(groups)) == self.mesh.rank:
                rows = self.lm.acts(contexts.tokens, contexts.attention)[contexts.keep][part]
                self._check_finite(rows, docs)
                x[at] = rows
            filled += len(docs)
            borders.append(filled)
        self._share(x, borders)
        return ShuffleBuffer(x, owners, numbers, following)

    def _whose(self, group: int, groups: int) -> int:
        """Return the process that runs the LM on one of a block's groups of contexts: runs of
        groups, as even as can be."""
        return group * self.mesh.size // groups

    def _share(self, x: Tensor, borders: list[int]) -> None:
        """Put a block together: each process gives the rows of its groups to all others."""
        groups = len(borders) - 1
        for rank in range(self.mesh.size if self.mesh.size > 1 else 0):
            own = [group for group in range(groups) if self._whose(group, groups) == rank]
            if own:
                self.mesh.broadcast(
                    "block", x[borders[own[0]] : borders[own[-1] + 1]].view(torch.uint8), rank
                )

    def _gather(
        self, place: TextCursor, skip: int, wanted: int
    ) -> tuple[list[list[Context]], tuple[TextCursor, int]]:
        """Take contexts until `wanted` activations are kept; return them grouped for the LM, and
        where the rest begins."""
        groups: list[list[Context]] = []
        source, self._reading = self._from(place), None
        have, barren, following = -skip, 0, (place, skip)
        while have < wanted:
            group: list[Context] = []
            while len(group) < self.corpus.acts.lm_batch and have < wanted:
                context = next(source)
                kept = int(self.corpus.batch([context]).keep.sum())
                barren = 0 if kept else barren + 1
                if barren > 10_000:
                    raise InputError(
                        f"text {self.corpus.acts.text!r} has only special tokens and padding: "
                        "nothing is kept"
                    )
                group.append(context)
                have += kept
                if have > wanted:
                    following = (context.start, kept - (have - wanted))
                elif have == wanted:
                    following = (context.next, 0)
            groups.append(group)
        self._reading = following[0], itertools.chain([context] if have > wanted else [], source)
        return groups, following

    def _from(self, place: TextCursor) -> Iterator[Context]:
        """Return the contexts from a place on: the open text if it is there, since finding a place
        means reading what is before it."""
        return (
            self._reading[1]
            if self._reading and self._reading[0] == place
            else self.corpus.contexts(place)
        )

    def _check_finite(self, rows: Tensor, documents: Tensor) -> None:
        bad = ~torch.isfinite(rows).all(1)
        if bad.any():
            name = self.document_names(documents[bad.cpu()][:1])[0]
            raise NonFiniteError(
                f"{int(bad.sum())} of {len(rows)} activations at {self.lm.options.site} are NaN or "
                "infinite, the first in document "
                f"{name!r}; leave that document out, or try --acts.lm-dtype float32"
            )

    def _measure_mixing(self, block: ShuffleBuffer, order: Tensor) -> None:
        batch_of = torch.empty(len(order), dtype=torch.long)
        batch_of[order] = torch.arange(len(order)) // self.batch
        neighbours = block.contexts[1:] == block.contexts[:-1]
        together = (batch_of[1:] == batch_of[:-1]) & neighbours
        self._same_context_fraction = together.sum().item() / max(1, neighbours.sum().item())


def _neighbours_in(rows: np.ndarray, contexts: np.ndarray) -> int:
    """Count the rows whose predecessor in the text, in the same context, is in the same batch."""
    order = np.argsort(rows)
    rows, contexts = rows[order], contexts[order]
    return int(((rows[1:] - rows[:-1] == 1) & (contexts[1:] == contexts[:-1])).sum())


def memory_bytes(acts: ActsConfig, batch: int, d_model: int) -> int:
    """Return what a live stream's block takes in memory."""
    return (
        max(1, acts.mix // batch) * batch * ((4 if acts.store == "float32" else 2) * d_model + 16)
    )


def blocks_for(tokens: int, batch: int, mix: int) -> int:
    return math.ceil(tokens / (max(1, mix // batch) * batch))
