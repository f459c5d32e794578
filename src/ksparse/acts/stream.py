"""Batches of raw activations in a mixed order, and a cursor from which to go on exactly.

Live: the text is taken in blocks of `mix` kept activations. A block's activations are computed,
permuted by a permutation that is a function of (seed, block), and dealt out as batches. The cursor
is where the block's text begins and how many batches of it are out: to go on, the block is computed
again. No buffer is saved, none is lost, and every kept activation of the text is used exactly once
an epoch: a context that crosses the end of a block is computed in both.

From shards: batch s holds the activations numbered s·b … s·b + b - 1 of a permutation of all rows,
a new one each epoch.

On a mesh the order of the data is the same. Each process runs the LM on its share of a block's
contexts, the block is put together, and each takes its part of every batch; of shards it reads only
that part.

Ahead: either of them, computed by a thread of its own while training uses what is there. The same
batches with the same cursors.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ksparse.acts.lm import LM
from ksparse.acts.order import permutation
from ksparse.acts.shards import Shards
from ksparse.acts.text import Context, Corpus, Place
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.mesh import ALONE, Mesh
from ksparse.recipe import Acts

Cursor = dict[str, Any]  # JSON


class Batch(NamedTuple):
    """Raw activations x[b, d], the document of each [b], and the cursor after them; on a mesh, the
    rows of this process's part."""

    x: Tensor
    documents: Tensor
    cursor: Cursor


class Stream(Protocol):
    """What training reads from."""

    d_model: int
    halt: threading.Event
    """Set by another thread to have the batch that is being made given up, by raising Halted."""

    def batches(self, cursor: Cursor | None = None) -> Generator[Batch, None, None]:
        """Yield batches for ever, from the cursor on. To be closed when no more are wanted."""

    def sample(self, rows: int) -> Tensor:
        """Return some raw activations [<= rows, d] without moving any cursor."""

    def document_names(self, documents: Tensor) -> list[str]:
        """Name documents, for messages."""

    def mixing(self) -> float | None:
        """Return the share of neighbours in a context that came into the same batch, in the newest
        block."""


class Halted(Exception):
    """A batch was given up because nobody waits for it any more."""


class Block(NamedTuple):
    """Kept activations x[rows, d] as `acts.store` has them, in the order of the text, their
    documents, their contexts, and where the text goes on."""

    x: Tensor
    documents: Tensor
    contexts: Tensor
    next: tuple[Place, int]


class LiveStream:
    """Activations of an LM on a text, as they are needed."""

    def __init__(self, lm: LM, corpus: Corpus, *, batch: int, seed: int, mesh: Mesh = ALONE):
        self.lm, self.corpus, self.batch, self.seed, self.mesh = lm, corpus, batch, seed, mesh
        self.d_model = lm.d_model
        self.per_block = max(1, corpus.acts.mix // batch)
        self._mixing: float | None = None
        self._newest: tuple[tuple[Place, int], Block] | None = None
        self._reading: tuple[Place, Iterator[Context]] | None = (
            None  # the text from a place on, left open there
        )
        self._one = threading.Lock()  # a sample may be asked for while a thread computes
        self.halt = threading.Event()

    def batches(self, cursor: Cursor | None = None) -> Generator[Batch, None, None]:
        cursor = cursor or {"block": 0, "place": list(Place()), "skip": 0, "batch": 0}
        _check_cursor(cursor, "block")
        number, start, done = (
            cursor["block"],
            (Place(*cursor["place"]), cursor["skip"]),
            cursor["batch"],
        )
        while True:
            block = self._block(start)
            rows = len(block.x)
            order = torch.from_numpy(permutation(np.arange(rows), rows, (self.seed, number)))
            self._measure_mixing(block, order)
            for i in range(done, self.per_block):
                chosen = order[i * self.batch : (i + 1) * self.batch][self.mesh.part(self.batch)]
                after = {"block": number, "place": list(start[0]), "skip": start[1], "batch": i + 1}
                if i + 1 == self.per_block:
                    after = {
                        "block": number + 1,
                        "place": list(block.next[0]),
                        "skip": block.next[1],
                        "batch": 0,
                    }
                yield Batch(block.x[chosen].float(), block.documents[chosen], after)
            number, start, done = number + 1, block.next, 0
            del block  # so that two are never in memory

    def sample(self, rows: int) -> Tensor:
        block = self._block((Place(), 0))
        order = permutation(np.arange(min(rows, len(block.x))), len(block.x), (self.seed, 0))
        return block.x[torch.from_numpy(order)].float()

    def document_names(self, documents: Tensor) -> list[str]:
        return [self.corpus.names.get(i, f"document {i}") for i in documents.unique().tolist()]

    def mixing(self) -> float | None:
        return self._mixing

    def _block(self, start: tuple[Place, int]) -> Block:
        """Compute the block that begins at a place of the text; the newest one is kept, since it is
        often asked for twice."""
        with self._one:
            if self._newest is None or self._newest[0] != start:
                self._newest = None
                self._newest = (start, self._compute(*start))
            return self._newest[1]

    def _compute(self, place: Place, skip: int) -> Block:
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
                raise Halted
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
        return Block(x, owners, numbers, following)

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
                self.mesh.spread(
                    "block", x[borders[own[0]] : borders[own[-1] + 1]].view(torch.uint8), rank
                )

    def _gather(
        self, place: Place, skip: int, wanted: int
    ) -> tuple[list[list[Context]], tuple[Place, int]]:
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

    def _from(self, place: Place) -> Iterator[Context]:
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

    def _measure_mixing(self, block: Block, order: Tensor) -> None:
        batch_of = torch.empty(len(order), dtype=torch.long)
        batch_of[order] = torch.arange(len(order)) // self.batch
        neighbours = block.contexts[1:] == block.contexts[:-1]
        together = (batch_of[1:] == batch_of[:-1]) & neighbours
        self._mixing = together.sum().item() / max(1, neighbours.sum().item())


class ShardStream:
    """Activations read back from disk."""

    def __init__(
        self,
        shards: Shards,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        mesh: Mesh = ALONE,
    ):
        self.shards, self.batch, self.seed, self.device, self.mesh = (
            shards,
            batch,
            seed,
            device,
            mesh,
        )
        self.d_model = shards.d_model
        self._mixing: float | None = None
        self.halt = threading.Event()

    def batches(self, cursor: Cursor | None = None) -> Generator[Batch, None, None]:
        _check_cursor(cursor or {"step": 0}, "step")
        step = cursor["step"] if cursor else 0
        while True:
            rows = self.rows(step)
            contexts = self.shards.contexts(rows)
            self._mixing = _neighbours_in(rows, contexts) / len(rows)
            rows = rows[self.mesh.part(len(rows))]
            x = self.shards.read(rows).to(self.device)
            documents = torch.from_numpy(self.shards.documents(rows))
            bad = ~torch.isfinite(x).all(1)
            if bad.any():
                raise NonFiniteError(
                    f"{int(bad.sum())} activations of {self.shards.folder} are NaN or infinite, "
                    "the first in "
                    f"document {self.document_names(documents[bad.cpu()][:1])[0]!r}"
                )
            yield Batch(x, documents, {"step": step + 1})
            step += 1

    def rows(self, step: int) -> np.ndarray:
        """Return the rows [b] of one batch: a function of seed and step alone."""
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        n = self.shards.rows
        epochs = range(index[0] // n, index[-1] // n + 1)
        return np.concatenate(
            [permutation(index[index // n == epoch] % n, n, (self.seed, epoch)) for epoch in epochs]
        )

    def sample(self, rows: int) -> Tensor:
        n = self.shards.rows
        return self.shards.read(permutation(np.arange(min(rows, n)), n, (self.seed, 0))).to(
            self.device
        )

    def document_names(self, documents: Tensor) -> list[str]:
        return [self.shards.names[i] for i in documents.unique().tolist()]

    def mixing(self) -> float | None:
        return self._mixing


def _check_cursor(cursor: Cursor, key: str) -> None:
    """Raise CorruptError for the cursor of another kind of stream."""
    if key not in cursor:
        raise CorruptError(
            f"the checkpoint's cursor has {', '.join(cursor)[:80]} and no {key!r}: "
            "it is not of these activations; use an older checkpoint"
        )


class Ahead:
    """Another stream whose batches a thread makes while those before are used: at most `depth` of
    them wait, each as it would have been.

    What goes wrong in the thread is raised where the batch is asked for. The thread ends when the
    iterator is closed, or with its error.
    """

    def __init__(self, stream: Stream, depth: int):
        self.stream, self.depth, self.d_model, self.halt = (
            stream,
            depth,
            stream.d_model,
            stream.halt,
        )
        self._mixing: float | None = None

    def batches(self, cursor: Cursor | None = None) -> Generator[Batch, None, None]:
        ready: queue.Queue[tuple[Batch, float | None] | BaseException] = queue.Queue(self.depth)
        thread = threading.Thread(
            target=self._fill, args=(ready, cursor), name="ksparse-stream", daemon=True
        )
        self.halt.clear()
        thread.start()
        try:
            while True:
                made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                batch, self._mixing = made
                yield batch
        finally:
            self.halt.set()
            while thread.is_alive():
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)  # makes room for what the thread is about to leave
            thread.join()
            self.halt.clear()

    def _fill(self, ready: queue.Queue, cursor: Cursor | None) -> None:
        try:
            for batch in self.stream.batches(cursor):
                ready.put((batch, self.stream.mixing()))
                if self.halt.is_set():
                    return
        except Halted:
            pass
        except BaseException as error:  # whatever it is, whoever asks for the batch is to have it
            ready.put(error)

    def sample(self, rows: int) -> Tensor:
        return self.stream.sample(rows)

    def document_names(self, documents: Tensor) -> list[str]:
        return self.stream.document_names(documents)

    def mixing(self) -> float | None:
        """Return that of the block of the batch that was given out last."""
        return self._mixing


def _neighbours_in(rows: np.ndarray, contexts: np.ndarray) -> int:
    """Count the rows whose predecessor in the text, in the same context, is in the same batch."""
    order = np.argsort(rows)
    rows, contexts = rows[order], contexts[order]
    return int(((rows[1:] - rows[:-1] == 1) & (contexts[1:] == contexts[:-1])).sum())


def memory_bytes(acts: Acts, batch: int, d_model: int) -> int:
    """Return what a live stream's block takes in memory."""
    return (
        max(1, acts.mix // batch) * batch * ((4 if acts.store == "float32" else 2) * d_model + 16)
    )


def blocks_for(tokens: int, batch: int, mix: int) -> int:
    return math.ceil(tokens / (max(1, mix // batch) * batch))
