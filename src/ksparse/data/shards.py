"""Activations on disk: written once, read by many runs.

    acts/<hash>/manifest.json        LM, site, text and policy; each shard's rows and SHA-256
    acts/<hash>/00000.safetensors    x[rows, d], document[rows], context[rows], position[rows],
                                     in the order of the text
    acts/<hash>/documents.json       the documents' names

The hash is over what the activations depend on, so another LM or text goes into another folder. A
folder may be in an object store. One process writes it, or several do (`data.shard_sets`); those
that were killed continue after the last shard. The checksums are needed because safetensors accepts
almost any altered bit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ksparse.config import LATER_ACTS, ActsConfig, plain
from ksparse.data.batch_size import choose_lm_batch
from ksparse.data.contexts import Context, Corpus, TextCursor
from ksparse.data.shard_sets import (
    DTYPES,
    FORMAT,
    NAMES,
    Place,
    ProcessPart,
    ShardFile,
    ShardSet,
    read_ahead,
    read_manifest,
    shard_name,
)
from ksparse.errors import InputError, NonFiniteError
from ksparse.lm.model import LM
from ksparse.lm.tokens import TokenBatch
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.stores import join, open_store

_SHARD_BYTES = 256_000_000
_COLUMN_BYTES = 12  # of a row's document, context and position
_SECONDS_BETWEEN_COUNTS = 2.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_OF_SILENCE = 600.0
_log = logging.getLogger("ksparse")
Progress = Callable[[int], None]
"""Called with the number of rows computed so far, after each pass of the LM."""


def facts(acts: ActsConfig, corpus: Corpus, dtype: str) -> dict[str, Any]:
    """Return what the activations depend on."""
    options = {
        key: value
        for key, value in plain(dataclasses.asdict(acts)).items()
        if key not in ("normalize", "mix", "shards", "shard_window", "lm_batch", "store")
        # Later keys are left out at their defaults, so that older folders keep their names.
        and not (key in LATER_ACTS and value == plain(getattr(ActsConfig, key)))
    }
    return {"format": FORMAT, "acts": options, "policy": corpus.policy(), "dtype": dtype}


# ---- writing


def write(
    lm: LM,
    corpus: Corpus,
    parent: Path | str,
    *,
    rows: int,
    dtype: str = "float32",
    shard_rows: int = 0,
    progress: Progress = lambda done: None,
    part: ProcessPart = ProcessPart(),
) -> Path | str:
    """Write activations at the LM's site as shards; continue where a killed writer stopped.

    Args:
        lm: The LM.
        corpus: The text.
        parent: The folder in which the folder of shards is made; `s3://…` is an object store.
        rows: The least number of activations.
        dtype: A key of DTYPES.
        shard_rows: Rows of a shard; about 256 MB if 0.
        progress: Called with the number of rows computed so far, after each pass of the LM.
        part: Which shards this process computes, if several write the set; process 0 returns when
            it is complete.

    Returns:
        The folder of shards.

    Raises:
        InputError: Several processes cannot agree on how to cut the text, or the object store
            refuses access.
        NonFiniteError: An activation is NaN or infinite in `dtype`.
        DiskError: The disk is full or not writable.
    """
    return write_sites(
        lm,
        corpus,
        parent,
        (corpus.acts.site,),
        rows=rows,
        dtype=dtype,
        shard_rows=shard_rows,
        progress=progress,
        part=part,
    )[0]


def write_sites(
    lm: LM,
    corpus: Corpus,
    parent: Path | str,
    sites: Sequence[str],
    *,
    rows: int,
    dtype: str = "float32",
    shard_rows: int = 0,
    progress: Progress = lambda done: None,
    part: ProcessPart = ProcessPart(),
) -> list[Path | str]:
    """Write the same activations' rows at several sites, from one pass over the text.

    Otherwise like `write`; returns a folder for each site.
    """
    probe = torch.zeros(2, 3, dtype=torch.long)  # unlike [1, 1], no position table passes this
    widths = {
        site: x.shape[-1]
        for site, x in lm.acts_at(sites, probe, torch.ones_like(probe, dtype=torch.bool)).items()
    }
    contents = {
        site: facts(
            dataclasses.replace(corpus.acts, site=site, lm_dtype=lm.options.lm_dtype), corpus, dtype
        )
        | {"rows": rows, "d_model": widths[site]}
        for site in sites
    }
    folders = [join(parent, jsonio.digest(contents[site])) for site in sites]
    shard_rows = shard_rows or max(1, _SHARD_BYTES // (4 * sum(widths.values())))
    if shard_rows < 0:
        raise InputError(f"shard_rows is {shard_rows}; it is a number of activations, or 0")
    if part.size > 1 and not corpus.acts.lm_batch:
        raise InputError(
            f"acts.lm_batch is 0, and {part.size} processes write one set: each would measure "
            "another size, and cut the text otherwise; give a number, such as 64"
        )
    with atomic.translate_oserrors(open_store(parent).disk):
        sets = [
            ShardSet(open_store(folder), contents[site], corpus, begins=part.rank == 0)
            for site, folder in zip(sites, folders)
        ]
        unfinished = {site: each for site, each in zip(sites, sets) if not each.complete}
        if unfinished:
            harvest = _Harvest(lm, corpus, unfinished, rows, shard_rows, part, progress)
            harvest.run(getattr(torch, dtype), choose_lm_batch(lm, corpus, list(unfinished)))
        if part.rank == 0:
            for each in sets:
                each.tidy()
            progress(rows)
    return folders


class _Harvest:
    """The writing of unfinished sets, one for each site."""

    def __init__(
        self,
        lm: LM,
        corpus: Corpus,
        unfinished: dict[str, ShardSet],
        rows: int,
        shard_rows: int,
        part: ProcessPart,
        progress: Progress,
    ):
        self.lm, self.corpus, self.by_site = lm, corpus, unfinished
        self.sets = list(unfinished.values())
        self.rows, self.shard_rows, self.part, self.progress = rows, shard_rows, part, progress
        # The contexts from a place on, kept open: to reach it again, all before it is read.
        self._text: tuple[TextCursor, Iterator[Context]] | None = None
        self._counted_at = -math.inf
        self._shards = self._told = 0

    def run(self, dtype: torch.dtype, lm_batch: int) -> None:
        """Write this process's shards; in process 0 wait for the others, and finish the sets."""
        place = start = min(each.listed for each in self.sets)
        awaited: list[tuple[Place, Place]] = []
        while place.rows < self.rows:
            lacking = {site: each for site, each in self.by_site.items() if not each.lists(place)}
            ends = [each.after(place) for each in lacking.values()]
            start = place
            if len(set(ends)) == 1 and ends[0]:
                place = ends[0]
                continue
            self._tell(place)
            groups = self._groups(place, lm_batch)
            if self.part.has(place.number):
                place = self._write(place, groups, lacking, ends, dtype)
            else:
                end = self._skip(place, groups)
                awaited.append((place, end))
                place = end
        if self.part.rank == 0:
            self._await(awaited)
            ahead = read_ahead(self.corpus, start, place)
            for each in self.sets:
                each.finish(place, ahead)

    def _groups(self, place: Place, lm_batch: int) -> Iterator[tuple[list[Context], TokenBatch]]:
        """Yield whole contexts in groups for the LM, until they have the shard's activations."""
        if self._text is None or self._text[0] != place.text:
            self._text = place.text, self.corpus.contexts(place.text)
        rows, source = min(self.shard_rows, self.rows - place.rows), self._text[1]
        count, group = 0, []
        for context in source:
            group.append(context)
            if len(group) < lm_batch and count + len(group) * self.corpus.acts.context < rows:
                continue
            contexts = self.corpus.batch(group)
            count += int(contexts.keep.sum())
            self._text = context.next, source
            yield group, contexts
            if count >= rows:
                return
            group = []

    def _skip(self, place: Place, groups: Iterator[tuple[list[Context], TokenBatch]]) -> Place:
        """Return where another process's shard ends, which its tokens decide."""
        rows, number, text = place.rows, place.contexts, place.text
        for group, contexts in groups:
            rows, number = rows + int(contexts.keep.sum()), number + len(group)
            text = group[-1].next
        return Place(place.number + 1, rows, number, text)

    def _write(
        self,
        place: Place,
        groups: Iterator[tuple[list[Context], TokenBatch]],
        lacking: dict[str, ShardSet],
        ends: list[Place | None],
        dtype: torch.dtype,
    ) -> Place:
        """Compute a shard and write it for the sites that lack it; return where it ends."""
        tensors, contexts, text = _compute_shard(
            self.lm,
            self.corpus,
            list(lacking),
            place,
            groups,
            dtype,
            lambda new: self._tell(place, new),
        )
        end = Place(place.number + 1, place.rows + len(tensors["position"]), contexts, text)
        for each, known, x in zip(lacking.values(), ends, tensors.pop("x")):
            # A killed writer may have written this shard for some of the sites; one that cut the
            # text otherwise has written another.
            if known != end:
                with each.store.writing(shard_name(place.number)) as file:
                    save_file({"x": x, **tensors}, file)
                    sha256 = atomic.sha256(file)
                each.add(place, end, sha256)
        return end

    def _tell(self, place: Place, new: int = 0) -> None:
        """Report the rows of all processes: their whole shards, and what has been computed of those
        under way. The others are taken to be as far in theirs as this one."""
        if self.part.size == 1:
            self.progress(min(self.rows, place.rows + new))
        elif self.part.rank == 0:
            if time.monotonic() - self._counted_at > _SECONDS_BETWEEN_COUNTS:
                self._shards, self._counted_at = self.sets[0].count(), time.monotonic()
            rows = self._shards * self.shard_rows + new * self.part.size
            self._told = max(self._told, min(self.rows, rows))
            self.progress(self._told)

    def _await(self, shards: list[tuple[Place, Place]]) -> None:
        """Wait until other processes have written the shards between these places."""
        changed = time.monotonic()
        while shards:
            left = [ends for ends in shards if not all(each.has(*ends) for each in self.sets)]
            self._tell(shards[0][0])
            if len(left) < len(shards):
                changed = time.monotonic()
            elif time.monotonic() - changed > _SECONDS_OF_SILENCE:
                changed = time.monotonic()
                _log.warning(
                    "no other process has written a shard for %.0f minutes; the next that is "
                    "missing is %s. If its process has ended, start the same command again",
                    *(_SECONDS_OF_SILENCE / 60, shard_name(left[0][0].number)),
                )
            shards = left
            if shards:
                time.sleep(_SECONDS_BETWEEN_LOOKS)


def _compute_shard(
    lm: LM,
    corpus: Corpus,
    sites: Sequence[str],
    place: Place,
    groups: Iterator[tuple[list[Context], TokenBatch]],
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[dict[str, Any], int, TextCursor]:
    """Compute the activations of the contexts of a shard, which begins at `place`; `progress` is
    called with their number after each pass of the LM.

    Returns:
        The columns, `x` being a list by site; the number of contexts so far; and where the text
        continues.
    """
    parts: list[tuple[Tensor, ...]] = []
    count, number, text = 0, place.contexts, place.text
    for group, contexts in groups:
        keep = contexts.keep
        acts = [
            x.cpu()[keep].to(dtype)
            for x in lm.acts_at(sites, contexts.tokens, contexts.attention).values()
        ]
        for site, x in zip(sites, acts):
            _check_finite(x, site, corpus, contexts.documents[keep])
        numbers = torch.arange(number, number + len(group))[:, None].expand_as(keep)[keep]
        positions = torch.arange(keep.shape[1]).expand_as(keep)[keep]
        parts.append((*acts, contexts.documents[keep].int(), numbers.int(), positions.int()))
        count, number, text = count + len(numbers), number + len(group), group[-1].next
        progress(count)
    columns = [torch.cat(column) for column in zip(*parts)]
    table = dict(zip(("document", "context", "position"), columns[-3:]))
    return {"x": columns[:-3], **table}, number, text


def _check_finite(x: Tensor, site: str, corpus: Corpus, documents: Tensor) -> None:
    bad = ~torch.isfinite(x).all(1)  # also those too large for float16
    if bad.any():
        raise NonFiniteError(
            f"activations at {site} are NaN or infinite in document "
            f"{corpus.names[int(documents[bad][0])]!r}, as {str(x.dtype).removeprefix('torch.')}"
        )


# ---- reading


class Shards:
    """A folder of shards as one table of rows, memory-mapped; checksums are verified on opening.

    Args:
        folder: What `write` returned.

    Attributes:
        rows: The number of activations.
        d_model: Their width.
        names: The documents' names, by index.
        manifest: The content of manifest.json.

    Raises:
        InputError: The folder has no complete set of shards.
        CorruptError: A file does not match the manifest.
    """

    def __init__(self, folder: Path | str):
        self.store = open_store(folder)
        self.folder = self.store.place
        if not self.store.names():
            raise InputError(f"{folder} is no folder of shards; `ksparse shard` writes one")
        self.manifest = read_manifest(self.store)
        if not self.manifest["complete"]:
            raise InputError(
                f"{folder} is not complete; run the same `ksparse shard` again to finish it"
            )
        with self.store.reading(NAMES) as file:
            checksums.check_file(file.parent, NAMES, self.manifest.get("names_sha256", ""))
            self.names = jsonio.read_strings(file)
        self.d_model: int = self.manifest["d_model"]
        counts = [entry["rows"] for entry in self.manifest["shards"]]
        self.ends = np.cumsum(counts)
        self.rows = int(self.ends[-1])
        self._parts: dict[int, ShardFile] = {}
        if not self.store.is_remote:
            self._open(range(len(counts)))

    @property
    def parts(self) -> list[ShardFile]:
        """The files, in order."""
        return self._open(range(len(self.ends)))

    def _open(self, numbers: Sequence[int]) -> list[ShardFile]:
        """Return files, verified and mapped; those in an object store are fetched first."""
        lacking = [number for number in numbers if number not in self._parts]
        if not lacking:
            return [self._parts[number] for number in numbers]
        entries = [self.manifest["shards"][number] for number in lacking]
        self.store.check_room(self._bytes(numbers))
        files = self.store.fetch_all(self._sums(lacking))
        for number, entry, file in zip(lacking, entries, files):
            self._parts[number] = ShardFile(
                file,
                f"{self.folder}/{entry['file']}",
                entry["rows"],
                self.manifest,
                len(self.names),
            )
        return [self._parts[number] for number in numbers]

    def _bytes(self, numbers: Sequence[int]) -> int:
        width = self.d_model * np.dtype(DTYPES[self.manifest["dtype"]][1]).itemsize + _COLUMN_BYTES
        return width * sum(int(self.manifest["shards"][number]["rows"]) for number in numbers)

    def _sums(self, numbers: Sequence[int]) -> dict[str, str]:
        entries = [self.manifest["shards"][number] for number in numbers]
        return {entry["file"]: entry["sha256"] for entry in entries}

    @property
    def counts(self) -> np.ndarray:
        """How many rows each file has."""
        return np.diff(self.ends, prepend=0)

    def use(self, numbers: Sequence[int], soon: Sequence[int]) -> None:
        """Let go of all files but those with these numbers, which are read now, and soon; begin to
        fetch the latter where they are in an object store."""
        wanted = {*numbers, *soon}
        self._parts = {number: part for number, part in self._parts.items() if number in wanted}
        self.store.check_room(self._bytes([*wanted]))
        self.store.prefetch(self._sums([number for number in soon if number not in self._parts]))

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the activations x[m, d] of rows[m] in float32."""
        out = torch.empty(len(rows), self.d_model)
        for part, at, local in self._locate(rows):
            values = torch.from_numpy(np.ascontiguousarray(part.x[local]))
            out[torch.from_numpy(at)] = (
                values.view(torch.bfloat16) if values.dtype == torch.uint16 else values
            ).float()
        return out

    def document_names(self, documents: list[int]) -> list[str]:
        """Return the names of documents."""
        return [self.names[i] for i in documents]

    def describe(self, row: int) -> str:
        """Return the name of a row's document, for messages."""
        return f"document {self.names[int(self.documents(np.array([row]))[0])]!r}"

    @property
    def policy(self) -> dict[str, Any]:
        """What decides which activations are in the shards."""
        policy: dict[str, Any] = self.manifest["policy"]
        return policy

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the document index of each of rows[m]."""
        return self._column(rows, "document")

    def contexts(self, rows: np.ndarray) -> np.ndarray:
        """Return the context number of each of rows[m]."""
        return self._column(rows, "context")

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        out = np.empty(len(rows), np.int64)
        for part, at, local in self._locate(rows):
            out[at] = getattr(part, name)[local]
        return out

    def _locate(self, rows: np.ndarray) -> Iterator[tuple[ShardFile, np.ndarray, np.ndarray]]:
        """Yield (file, positions in `rows`, rows in the file) for each file that has some."""
        which = np.searchsorted(self.ends, rows, side="right")
        numbers = np.unique(which).tolist()
        for number, part in zip(numbers, self._open(numbers)):
            at = np.flatnonzero(which == number)
            yield part, at, rows[at] - (self.ends[number] - len(part.document))

    def check_fits(self, acts: ActsConfig) -> None:
        """Raise InputError unless the shards hold the activations of a recipe."""
        recipe = plain(dataclasses.asdict(acts))
        if acts.lm_dtype == "auto":
            recipe["lm_dtype"] = self.manifest["acts"].get("lm_dtype")
        problems = [
            f"acts.{key}: the shards have {value!r}, the recipe {recipe.get(key)!r}"
            for key, value in (
                {key: plain(getattr(ActsConfig, key)) for key in LATER_ACTS} | self.manifest["acts"]
            ).items()
            if recipe.get(key) != value and key != "shard_window"
        ]
        if self.manifest["policy"].get("split") != "train":
            problems.append(
                f"the shards are of the split {self.manifest['policy'].get('split')!r}, training "
                "needs 'train'"
            )
        if problems:
            raise InputError(
                f"the shards in {self.folder} are of other activations: {'; '.join(problems)}"
            )
