"""A set of shards while it is written, by one process or several that do not talk to each other.

    manifest.json        what the set is; `complete` once all of it is there
    00003.safetensors    a shard
    00003.json           written after it: its rows and checksum, where in the text it begins and
                         ends, and the names of its documents

Process r of W computes the shards r, r + W, … A shard is there if its entry (00003.json) is, and if
that begins where the shard before it ends. Process 0 puts the entries into the manifest when all of
them are there, and removes them. So it does not matter which processes were killed, how many
continue, or whether the folder can rename.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ksparse.data.contexts import Corpus, TextCursor
from ksparse.errors import CorruptError, InputError
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.stores import Store

FORMAT = 1
NAMES = "documents.json"
DTYPES = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
"""Precisions of x: safetensors' code, and the numpy type that holds its bits."""
_MAX_COUNT = 2**40
_ENTRY = re.compile(r"\d{5,}\.json")


class ProcessPart(NamedTuple):
    """Which shards a process computes: those whose number is `rank` modulo `size`."""

    rank: int = 0
    size: int = 1

    def has(self, number: int) -> bool:
        """Return whether a shard is this process's.

        Example:
            >>> [number for number in range(7) if ProcessPart(1, 3).has(number)]
            [1, 4]
        """
        return number % self.size == self.rank


class Place(NamedTuple):
    """Where a shard begins."""

    number: int = 0
    """The number of the shard."""
    rows: int = 0
    """Activations before it."""
    contexts: int = 0
    """Contexts before it."""
    text: TextCursor = TextCursor()

    def as_json(self) -> list[Any]:
        """Return the place as an entry has it."""
        return [self.number, self.rows, self.contexts, list(self.text)]


class ShardSet:
    """A set that is being written.

    Args:
        store: its folder.
        contents: what the manifest says of it.
        corpus: the text.
        begins: whether this process may write the manifest.
    """

    def __init__(self, store: Store, contents: dict[str, Any], corpus: Corpus, begins: bool):
        self.store, self.corpus = store, corpus
        store.clear()
        self.names: dict[int, str] = {}
        start = {"shards": [], "place": list(TextCursor()), "contexts": 0, "complete": False}
        self.manifest: dict[str, Any] = {**contents, **start}
        if store.has(checksums.MANIFEST):
            self.manifest = read_manifest(store)
        elif begins:
            self._write(checksums.MANIFEST, self.manifest)
        if self.manifest["shards"] and not self.manifest["complete"]:
            # An earlier version put each shard into the manifest at once.
            with store.reading(NAMES) as file:
                self.names.update(enumerate(jsonio.read_strings(file)))
        shards = self.manifest["shards"]
        self.listed = Place(
            len(shards),
            sum(shard["rows"] for shard in shards),
            self.manifest["contexts"],
            TextCursor(*self.manifest["place"]),
        )
        """Where the first shard begins that the manifest does not list."""
        self._entries: dict[int, dict[str, Any]] = {}

    @property
    def complete(self) -> bool:
        """Whether the manifest says that all shards are there."""
        return bool(self.manifest["complete"])

    def lists(self, start: Place) -> bool:
        """Return whether the manifest lists the shard that begins at a place.

        Raises:
            InputError: the shards that are there begin elsewhere.
        """
        if start.number == self.listed.number and start != self.listed:
            raise InputError(
                f"{self.store} was begun with its text cut into other shards: number "
                f"{start.number} begins at row {self.listed.rows:,} there and at "
                f"{start.rows:,} now; write its site alone, or remove it"
            )
        return start.number < self.listed.number

    def has(self, start: Place, end: Place) -> bool:
        """Return whether the shard between two places is there; one that ends elsewhere will be
        written again."""
        if self.lists(start) or self.after(start) == end:
            return True
        self._entries.pop(start.number, None)
        return False

    def after(self, start: Place) -> Place | None:
        """Return where the shard that begins at a place ends; None if it is not there."""
        if start.number not in self._entries:
            name = _entry_name(start.number)
            if not self.store.has(name):
                return None
            try:
                entry = self._read_entry(name)
            except CorruptError:
                return None  # half written, where files do not appear whole
            if entry["start"] != start.as_json():
                return None  # of a text that was cut otherwise: it is written again
            self._entries[start.number] = entry
        entry = self._entries[start.number]
        return Place(
            start.number + 1,
            start.rows + entry["rows"],
            entry["contexts"],
            TextCursor(*entry["place"]),
        )

    def _read_entry(self, name: str) -> dict[str, Any]:
        with self.store.reading(name) as file:
            return jsonio.read_table(
                file,
                file=str,
                rows=int,
                sha256=str,
                start=list,
                place=list,
                contexts=int,
                names=dict,
            )

    def add(self, start: Place, end: Place, sha256: str) -> None:
        """Write the entry of a shard that has been written."""
        entry = {
            "file": shard_name(start.number),
            "rows": end.rows - start.rows,
            "sha256": sha256,
            "start": start.as_json(),
            "place": list(end.text),
            "contexts": end.contexts,
            "names": _names_between(self.corpus.names, start.text, end.text),
        }
        self._write(_entry_name(start.number), entry)
        self._entries[start.number] = entry

    def count(self) -> int:
        """Return how many shards there are now, of all processes."""
        entries = sum(1 for name in self.store.names() if _ENTRY.fullmatch(name))
        return self.listed.number + entries

    def finish(self, end: Place, ahead: dict[int, str]) -> None:
        """Write the names of the documents and the manifest, and remove the entries.

        Args:
            end: where the last shard ends.
            ahead: what `read_ahead` returned for the last shard.
        """
        entries = [self._entries[number] for number in range(self.listed.number, end.number)]
        for entry in entries:
            self.names.update((int(index), name) for index, name in entry["names"].items())
        self.names |= ahead
        # Once the text has ended, all of its documents have been read.
        count = max(self.names if end.text.epoch else ahead) + 1
        with self.store.writing(NAMES) as file:
            jsonio.write_json(file, [self.names.get(index, "") for index in range(count)])
            names_sha256 = atomic.sha256(file)
        shards = [{key: entry[key] for key in ("file", "rows", "sha256")} for entry in entries]
        self.manifest |= {
            "shards": self.manifest["shards"] + shards,
            "place": list(end.text),
            "contexts": end.contexts,
            "complete": True,
            "names_sha256": names_sha256,
        }
        self._write(checksums.MANIFEST, self.manifest)
        self.tidy()

    def tidy(self) -> None:
        """Remove the entries of a complete set, which its manifest lists."""
        for name in sorted(self.store.names()):
            if _ENTRY.fullmatch(name):
                self.store.remove(name)

    def _write(self, name: str, table: dict[str, Any]) -> None:
        with self.store.writing(name) as file:
            jsonio.write_json(file, table, sealed=True)


def read_ahead(corpus: Corpus, start: Place, end: Place) -> dict[int, str]:
    """Return the names of the documents that are tokenized together with the last shard's: as many
    as if it were computed alone, whichever process asks."""
    names, corpus.names = corpus.names, {}
    deque(itertools.islice(corpus.contexts(start.text), end.contexts - start.contexts), maxlen=0)
    ahead, corpus.names = corpus.names, names | corpus.names
    return ahead


def shard_name(number: int) -> str:
    """Return the file of a shard."""
    return f"{number:05d}.safetensors"


def _entry_name(number: int) -> str:
    return f"{number:05d}.json"


def _names_between(names: dict[int, str], start: TextCursor, end: TextCursor) -> dict[str, str]:
    """Return the names of the documents from one place in the text to another; if the text ended in
    between, of all that have been read."""
    wraps = end.epoch > start.epoch
    return {
        str(index): name
        for index, name in sorted(names.items())
        if (start.index <= index and (wraps or index <= end.index))
        or (wraps and index <= end.index)
    }


def read_manifest(store: Store) -> dict[str, Any]:
    """Read and check the manifest of a set of shards, complete or not."""
    with store.reading(checksums.MANIFEST) as file:
        manifest = jsonio.read_table(
            file,
            format=int,
            acts=dict,
            policy=dict,
            dtype=str,
            rows=int,
            d_model=int,
            shards=list,
            place=list,
            contexts=int,
            complete=bool,
        )
        jsonio.check_format(file, manifest["format"], FORMAT)
        types = {"file": str, "rows": int, "sha256": str}
        for entry in manifest["shards"]:
            if not isinstance(entry, dict) or {key: type(entry.get(key)) for key in types} != types:
                raise CorruptError(
                    f"{file}: {str(entry)[:80]!r} is no shard; expected its file, rows and sha256"
                )
        _check_counts(str(file), manifest)
        if manifest["dtype"] not in DTYPES:
            raise CorruptError(
                f"{file}: 'dtype' is {manifest['dtype'][:40]!r}; expected {', '.join(DTYPES)}"
            )
        place, contexts = manifest["place"], manifest["contexts"]
        numbers = [*place, contexts]
        if len(numbers) != 4 or not all(type(number) is int and number >= 0 for number in numbers):
            raise CorruptError(
                f"{file}: 'place' is {str(place)[:80]} and 'contexts' {contexts}; "
                "expected three numbers and one, none below 0"
            )
        written = sum(entry["rows"] for entry in manifest["shards"])
        if manifest["complete"] != (written >= manifest["rows"]):
            raise CorruptError(
                f"{file} says {'complete' if manifest['complete'] else 'not complete'}, "
                f"with {written:,} of {manifest['rows']:,} rows in its shards"
            )
    return manifest


def _check_counts(file: str, manifest: dict[str, Any]) -> None:
    counts = {"rows": manifest["rows"], "d_model": manifest["d_model"]}
    counts |= {f"rows of {entry['file'][:40]!r}": entry["rows"] for entry in manifest["shards"]}
    for name, count in counts.items():
        if not 1 <= count < _MAX_COUNT:
            raise CorruptError(f"{file}: {name} is {count}; expected a number of at least 1")


class ShardFile:
    """The columns of one safetensors file, memory-mapped.

    A safetensors file is the header's length, a JSON table of offsets, and the data.
    """

    x: np.ndarray
    document: np.ndarray
    context: np.ndarray
    position: np.ndarray

    def __init__(self, file: Path, where: str, rows: int, manifest: dict[str, Any], names: int):
        """Map the file; check each column's type, shape and range against the manifest. Messages
        say where it is from."""
        try:
            safe_open(file, "np")  # checks that all the header names is within the file
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"{where} is truncated or damaged: {error}") from None
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        ends = {"document": names, "context": manifest["contexts"], "position": 2**31}
        for name in ("x", *ends):
            code, dtype = DTYPES[manifest["dtype"]] if name == "x" else ("I32", np.int32)
            shape = [rows, manifest["d_model"]] if name == "x" else [rows]
            entry = header.get(name, {"dtype": "nothing", "shape": "none"})
            if entry["dtype"] != code or entry["shape"] != shape:
                raise CorruptError(
                    f"{where}: column {name!r} is {entry['dtype']} of shape {entry['shape']}, "
                    f"the manifest speaks of {code} of shape {shape}"
                )
            offset = 8 + length + entry["data_offsets"][0]
            column = np.memmap(file, dtype, "r", offset, tuple(shape))
            if name in ends and not 0 <= column.min() <= column.max() < ends[name]:
                raise CorruptError(
                    f"{where}: column {name!r} has numbers from {column.min()} to "
                    f"{column.max()}; expected 0 to {ends[name] - 1:,}"
                )
            setattr(self, name, column)
