"""Activations that anybody made, indexed where they are, and read as shards are.

    manifest.json    `kind` "tensors": the files beside it with their rows, types and sums

`write_index` reads each file once: its width, that each number is finite, its SHA-256, and a sum
for each block of rows. A file that is altered later is refused, and the sums name the rows.

Rows are held out by document: a hash of its number, as for text. Where no file has document
numbers, a file of one vLLM request is a document; otherwise 64 rows in a row count as one, so that
neighbours are on one side.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.data.tensor_files import READERS, FileRows, open_table
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.pylm.text import SPLITS
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.stores import Store, is_remote, join, open_store

FORMAT = 1
KIND = "tensors"
BLOCK = 64
"""Rows that count as one document where nothing says which document they are of."""
_SUMS = 256  # blocks of a file whose sums are kept
_CHUNK = 2**26  # bytes checked at a time
_OPEN = 128  # files held open
_DOCUMENTS = {
    "column": "document numbers",
    "request": "a file of one vLLM request",
    "block": "nothing",
}
Progress = Callable[[int, int], None]


# ---- indexing ------------------------------------------------------------------------------------


def write_index(
    source: Path | str,
    out: Path | None = None,
    *,
    key: str = "",
    layer: int = -1,
    progress: Progress = lambda done, total: None,
) -> Path | str:
    """Index the tensors of a folder or of one file, without copying them.

    Args:
        source: a folder with files of `tensor_files.READERS`, or one such file. Of a folder in an
            object store each file is read once, and the index is put beside them.
        out: folder for the index, with links to the files; by default the folder itself, and for
            one file the folder FILE.index beside it.
        key: name of the activations in each file; by default the only tensor that can be them.
        layer: which one of a tensor [rows, layers, d]; -1: it has no layers.
        progress: called with the bytes read so far, and all.

    Returns:
        The folder to give as `acts.shards`.

    Raises:
        InputError: there is no such file, or one of them is damaged, of another width, or beside
            what it should be; the message names the file and, where it is one, the row.
        NonFiniteError: an activation is NaN or infinite in float32.
    """
    here, names = _files_of(source)
    index = here
    if out or (not here.is_remote and open_store(source).path.is_file()):
        index = open_store(out or f"{source}.index")
    _check_free(index, here)
    entries: list[dict[str, Any]] = []
    total, done = sum(here.size(name) for name in names), 0
    for name in names:
        file = join(here.place, name)
        with here.reading(name) as copy:
            entry = _describe(copy, key, layer, functools.partial(_add_to, progress, done, total))
        if entries:
            _check_alike(entry, entries[0], file, join(here.place, names[0]))
        entries.append(entry)
        done += entry["bytes"]
    with atomic.translate_oserrors(index.disk):
        if index is not here:
            index.path.mkdir(parents=True, exist_ok=True)
            for name in names if index.path.resolve() != here.path.resolve() else []:
                _link(index.path / name, here.path / name)
        manifest = {
            "format": FORMAT,
            "kind": KIND,
            "key": key,
            "layer": layer,
            "rows": sum(entry["rows"] for entry in entries),
            "d_model": entries[0]["d_model"],
            "documents": entries[0]["documents"],
            "files": [{name: entry[name] for name in _ENTRY} for entry in entries],
        }
        with index.writing(checksums.MANIFEST) as file:
            jsonio.write_json(file, manifest, sealed=True)
    return index.place


def _check_alike(
    entry: dict[str, Any], first: dict[str, Any], file: Path | str, first_file: Path | str
) -> None:
    """Raise InputError unless a file is like the first one in what all of a set must be alike."""
    if entry["d_model"] != first["d_model"]:
        raise InputError(
            f"{file}: its activations have the width {entry['d_model']}, those of {first_file} "
            f"{first['d_model']}; index them apart"
        )
    if entry["documents"] != first["documents"]:
        raise InputError(
            f"{file} and {first_file} differ in what says which document a row is of "
            f"({_DOCUMENTS[entry['documents']]}; {_DOCUMENTS[first['documents']]}); give all of "
            "them document numbers, or none"
        )


def _add_to(progress: Progress, before: int, total: int, new: float) -> None:
    progress(before + int(new), total)


def _files_of(where: Path | str) -> tuple[Store, list[str]]:
    """Return the folder of the files to index, and their names."""
    endings = ", ".join(READERS)
    if is_remote(where):
        store = open_store(where)
        names = sorted(name for name in store.names() if Path(name).suffix in READERS)
        if not names:
            raise InputError(
                f"{where} is no folder with files of activations; files whose names end in "
                f"{endings} are read, not those in folders below it"
            )
        return store, names
    source = open_store(where).path
    if source.is_file():
        if source.suffix not in READERS:
            raise InputError(f"{source} has an ending that is not read; there are {endings}")
        return open_store(source.parent), [source.name]
    if not source.is_dir():
        raise InputError(f"{source} does not exist; give a folder or a file of activations")
    names = sorted(
        file.name for file in source.iterdir() if file.suffix in READERS and file.is_file()
    )
    if not names:
        raise InputError(
            f"{source} has no file of activations; files whose names end in {endings} are read, "
            "not those in folders below it"
        )
    return open_store(source), names


def _check_free(index: Store, files: Store) -> None:
    """Raise InputError where an index would replace a manifest of another kind, or cannot have
    links to its files."""
    if index is not files and (index.is_remote or files.is_remote):
        raise InputError(
            f"the index of {files} cannot be in {index}: it has links to the files, which an "
            "object store lacks; leave out --out"
        )
    if not index.has(checksums.MANIFEST) or is_index(index.place):
        return
    raise InputError(
        f"{join(index.place, checksums.MANIFEST)} is there already, and is no index of tensors; "
        "shards of `ksparse shard` are given as --acts.shards as they are; for others, give --out"
    )


def _link(link: Path, file: Path) -> None:
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise InputError(f"{link} is there already; give another --out")
    link.symlink_to(file.resolve())


def _describe(
    file: Path, key: str, layer: int, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Read a file once; return its entry in the manifest, and its width."""
    table = open_table(file, key, layer)
    rows, width = table.x.shape
    for at in _chunks(table):
        x = table.floats(at)
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            raise NonFiniteError(
                f"{file}, row {at.start + int(bad.nonzero()[0]):,}: an activation is NaN or "
                "infinite in float32; leave such rows out"
            )
        progress(at.stop / rows * file.stat().st_size)
    request = "request" if table.is_request else "block"
    return {
        "file": checksums.plain_name(file.name, file.parent),
        "rows": rows,
        "dtype": table.dtype,
        "tokens": table.has_tokens,
        "bytes": file.stat().st_size,
        "sha256": atomic.sha256(file),
        **_sums(table),
        "d_model": width,
        "documents": "column" if table.documents is not None else request,
    }


_ENTRY: dict[str, jsonio.Types] = {
    "file": str,
    "rows": int,
    "dtype": str,
    "tokens": bool,
    "bytes": int,
    "sha256": str,
    "sums": str,
    "content": str,
}


def _chunks(table: FileRows) -> Iterator[slice]:
    rows, width = table.x.shape
    size = max(1, _CHUNK // (width * 4))
    for first in range(0, rows, size):
        yield slice(first, min(rows, first + size))


def _block_of(rows: int) -> int:
    """Return how many rows a sum is of."""
    return -(-rows // _SUMS)


def _sums(table: FileRows) -> dict[str, str]:
    """Return what locates a change: a sum of each block of rows, 8 hex digits each, and one of all
    rows in any order."""
    rows, size = len(table.x), _block_of(len(table.x))
    blocks, content = [], np.uint64(0)
    with np.errstate(over="ignore"):
        for first in range(0, rows, size):
            hashes = _hashes(table.x[first : first + size])
            placed = _mix(hashes + np.arange(len(hashes), dtype=np.uint64)).sum(dtype=np.uint64)
            blocks.append(f"{int(placed) & 0xFFFFFFFF:08x}")
            content += hashes.sum(dtype=np.uint64)
    return {"sums": "".join(blocks), "content": f"{int(content):016x}"}


def _hashes(x: np.ndarray) -> np.ndarray:
    """Return a hash of the bits of each row of x[m, d], uint64."""
    bits = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").astype(np.uint64)
    with np.errstate(over="ignore"):
        weights = _mix(np.arange(x.shape[1], dtype=np.uint64)) | np.uint64(1)
        return _mix((bits * weights).sum(1, dtype=np.uint64))


# ---- reading -------------------------------------------------------------------------------------


def is_index(folder: Path | str) -> bool:
    """Return whether a folder has an index of tensors, and not shards that ksparse wrote."""
    store = open_store(folder)
    if not store.has(checksums.MANIFEST):
        return False
    with store.reading(checksums.MANIFEST) as file:
        table = jsonio.read_json(file)
    return isinstance(table, dict) and table.get("kind") == KIND


class Tensors:
    """Indexed files as one table of the rows of a split; sums are verified on opening.

    Args:
        folder: what `write_index` returned.
        split: 'train', 'validation' or 'held-out': 85, 5 and 10 % of the documents.

    Attributes:
        rows: the number of activations of the split.
        d_model: their width.
        manifest: the content of manifest.json.
        policy: what decides which activations are used, for the SAE's metadata.

    Raises:
        InputError: the folder has no index, or the split no row.
        CorruptError: a file is not what it was when it was indexed.
    """

    def __init__(self, folder: Path | str, split: str = "train"):
        self.store, self.split = open_store(folder), split
        self.folder = self.store.place
        self.manifest = _read_manifest(self.store)
        self.d_model: int = self.manifest["d_model"]
        self.files: list[str] = [entry["file"] for entry in self.manifest["files"]]
        self._tables: OrderedDict[int, FileRows] = OrderedDict()
        if not self.store.is_remote:  # of others each file is verified when it is fetched
            self._verify()
        elif self.manifest["documents"] == "column":  # all are needed to divide the rows
            self._fetch(range(len(self.files)))
        self.ends = np.cumsum([entry["rows"] for entry in self.manifest["files"]])
        self.chosen = self._choose()
        self.rows = len(self.chosen)
        self.policy = {"split": split, "tensors": jsonio.digest(self.manifest)}
        if not self.rows:
            raise InputError(
                f"{folder} has no {split} rows: its {self.ends[-1]:,} rows are of too few "
                "documents, which are divided by a hash of each: 85 % train, 5 % validation, "
                "10 % held-out; give more"
            )

    def _verify(self) -> None:
        entries = self.manifest["files"]
        folder = self.store.path
        for number, entry in enumerate(entries):
            file = folder / checksums.plain_name(entry["file"], folder / checksums.MANIFEST)
            if not file.is_file():
                raise CorruptError(
                    f"{file} is missing, though {checksums.MANIFEST} lists it; bring it back, or "
                    f"index the folder again: {self._again()}"
                )
            sha256 = atomic.sha256(file)
            if sha256 == entry["sha256"]:
                self._table(number)  # checks its shape
                continue
            raise CorruptError(
                f"{file} has changed since it was indexed: {self._change(number, sha256)}; "
                f"bring the old one back, or index the folder again: {self._again()}"
            )

    def _again(self) -> str:
        return f"ksparse shard --from {self.folder}"

    def _change(self, number: int, sha256: str) -> str:
        """Say in what a file differs from its entry."""
        entry = self.manifest["files"][number]
        for other in self.manifest["files"]:
            if other["sha256"] == sha256:
                return f"it has the content that {other['file']} had, so the order is another"
        size = self.store.size(entry["file"])
        if size != entry["bytes"]:
            return f"it has {size:,} bytes, {entry['bytes']:,} then"
        try:
            table = self._open(number)
            found = _sums(table)
        except InputError as error:
            return str(error)
        old, new = entry["sums"], found["sums"]
        changed = [i // 8 for i in range(0, len(old), 8) if old[i : i + 8] != new[i : i + 8]]
        if len(table.x) != entry["rows"] or not changed:
            return "not in its activations, but beside them"
        block = _block_of(entry["rows"])
        first, last = changed[0] * block, min(entry["rows"], (changed[-1] + 1) * block) - 1
        where = f"somewhere in rows {first:,} to {last:,}"
        if found["content"] == entry["content"]:
            return f"its rows are in another order, {where}"
        return f"its activations are others, {where}"

    def _open(self, number: int) -> FileRows:
        name, manifest = self.files[number], self.manifest
        file = self.store.path / name
        if self.store.is_remote:
            file = self.store.fetch(name, manifest["files"][number]["sha256"])
        with self.store.naming(file, name):
            return open_table(file, manifest["key"], manifest["layer"])

    @property
    def counts(self) -> np.ndarray:
        """How many rows of the split each file has."""
        return np.diff(np.searchsorted(self.chosen, self.ends), prepend=0)

    def use(self, numbers: Sequence[int], soon: Sequence[int]) -> None:
        """Begin to fetch the files with some numbers, which are read soon, where they are in an
        object store; `numbers` are those that are read now."""
        entries = self.manifest["files"]
        self.store.check_room(sum(entries[i]["bytes"] for i in {*numbers, *soon}))
        self.store.prefetch({entries[i]["file"]: entries[i]["sha256"] for i in soon})

    def _fetch(self, numbers: Sequence[int]) -> None:
        """Bring files of an object store here, some at the same time."""
        if self.store.is_remote:
            entries = [self.manifest["files"][i] for i in numbers]
            self.store.check_room(sum(entry["bytes"] for entry in entries))
            lacking = [self.manifest["files"][i] for i in numbers if i not in self._tables]
            self.store.fetch_all({entry["file"]: entry["sha256"] for entry in lacking})

    def _table(self, number: int) -> FileRows:
        """Return an open file; those that were not used for longest are closed."""
        table = self._tables.pop(number, None)
        if table is None:
            table = self._open(number)
            if table.x.shape != (self.manifest["files"][number]["rows"], self.d_model):
                raise CorruptError(
                    f"{join(self.folder, self.files[number])} has activations of the shape "
                    f"{list(table.x.shape)}, not as indexed: {self._again()}"
                )
        self._tables[number] = table
        if len(self._tables) > _OPEN:
            # What was read into memory stays there: to read it again would take longer.
            mapped = (n for n, each in self._tables.items() if isinstance(each.x, np.memmap))
            self._tables.pop(next(mapped, -1), None)
        return table

    def _choose(self) -> np.ndarray:
        """Return the numbers of the rows of the split, rising."""
        parts = []
        for number, end in enumerate(self.ends):
            first = end - self.manifest["files"][number]["rows"]
            local = np.arange(end - first)
            side = _mix(self._keys(number, local)) % np.uint64(100)
            inside = SPLITS[self.split]
            keep = (side >= inside.start) & (side < inside.stop)
            parts.append((first + local[keep]).astype(np.int64))
        return np.concatenate(parts)

    def _keys(self, number: int, local: np.ndarray) -> np.ndarray:
        """Return what the document of each row of a file is known by, as uint64."""
        kind = self.manifest["documents"]
        if kind == "column":
            documents = self._table(number).documents
            assert documents is not None
            return np.asarray(documents[local]).astype(np.uint64)
        name = np.uint64(int.from_bytes(hashlib.sha256(self.files[number].encode()).digest()[:8]))
        if kind == "request":
            return np.full(len(local), name)
        return name + (local // BLOCK).astype(np.uint64)

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the activations x[m, d] of rows[m] of the split, in float32."""
        out = torch.empty(len(rows), self.d_model)
        for number, at, local in self._locate(rows):
            out[torch.from_numpy(at)] = self._table(number).floats(local)
        return out

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the document number of each of rows[m]: its own, or one that `names` knows."""
        out = np.empty(len(rows), np.int64)
        for number, at, local in self._locate(rows):
            if self.manifest["documents"] == "column":
                out[at] = self._keys(number, local).astype(np.int64)
            else:
                out[at] = self._starts[number]
                if self.manifest["documents"] == "block":
                    out[at] += local // BLOCK
        return out

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The first document of each file, where documents are files or blocks."""
        is_block = self.manifest["documents"] == "block"
        counts = [-(-e["rows"] // BLOCK) if is_block else 1 for e in self.manifest["files"]]
        return np.concatenate([[0], np.cumsum(counts)[:-1]])

    def contexts(self, rows: np.ndarray) -> np.ndarray:
        """Return what stands for the context of each of rows[m]: its document."""
        return self.documents(rows)

    def describe(self, row: int) -> str:
        """Return the file and row of a row of the split, for messages."""
        number, _, local = next(self._locate(np.array([row])))
        return f"{join(self.folder, self.files[number])}, row {int(local[0]):,}"

    def document_names(self, documents: list[int]) -> list[str]:
        """Return the names of documents."""
        if self.manifest["documents"] == "column":
            return [f"document {number}" for number in documents]
        which = np.searchsorted(self._starts, documents, side="right") - 1
        names = []
        for number, file in zip(documents, which):
            name, block = self.files[file], number - int(self._starts[file])
            is_block = self.manifest["documents"] == "block"
            names.append(f"{name}, rows from {block * BLOCK:,}" if is_block else name)
        return names

    def _locate(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (file, positions in `rows`, rows in the file) for each file that has some."""
        whole = self.chosen[rows]
        which = np.searchsorted(self.ends, whole, side="right")
        numbers = np.unique(which).tolist()
        self._fetch(numbers)
        for number in numbers:
            at = np.flatnonzero(which == number)
            first = self.ends[number] - self.manifest["files"][number]["rows"]
            yield number, at, whole[at] - first

    def check_fits(self, acts: ActsConfig) -> None:
        """Do nothing: a recipe says nothing about them that could be wrong."""


def _mix(keys: np.ndarray) -> np.ndarray:
    """Return a hash of each of keys[m], uint64 (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = keys ^ (keys >> np.uint64(31))
        return mixed


def _read_manifest(store: Store) -> dict[str, Any]:
    if not is_index(store.place):
        raise InputError(
            f"{store} has no index of tensors; `ksparse shard --from {store}` writes one"
        )
    with store.reading(checksums.MANIFEST) as file:
        return _check_manifest(file)


def _check_manifest(file: Path) -> dict[str, Any]:
    manifest = jsonio.read_table(
        file, format=int, key=str, layer=int, rows=int, d_model=int, documents=str, files=list
    )
    jsonio.check_format(file, manifest["format"], FORMAT)
    for entry in manifest["files"]:
        if not isinstance(entry, dict):
            raise CorruptError(f"{file}: {str(entry)[:80]!r} is no entry of a file")
        jsonio.check_keys(file, entry, _ENTRY, "files.")
    counts = [entry["rows"] for entry in manifest["files"]]
    if (
        min([*counts, manifest["d_model"]], default=0) < 1
        or not counts
        or sum(counts) != manifest["rows"]
        or manifest["documents"] not in _DOCUMENTS
    ):
        raise CorruptError(
            f"{file}: rows {manifest['rows']} and d_model {manifest['d_model']} do not fit its "
            f"{len(counts)} files, or 'documents' is none of {', '.join(_DOCUMENTS)}"
        )
    return manifest
