"""Activations on disk: written once, read by many runs.

    acts/<hash>/manifest.json        LM, site, text and policy; each shard's rows and SHA-256
    acts/<hash>/00000.safetensors    x[rows, d], document[rows], context[rows], position[rows],
                                     in the order of the text
    acts/<hash>/documents.json       the documents' names

The hash is over what the activations depend on, so another LM or text goes into another folder. The
manifest is replaced after each shard; a writer that was killed continues after the last one. The
checksums are needed because safetensors accepts almost any altered bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ksparse.config import LATER_ACTS, ActsConfig, plain
from ksparse.data.batch_size import choose_lm_batch
from ksparse.data.contexts import Corpus, TextCursor
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.lm.model import LM
from ksparse.storage import atomic, checksums, jsonio

FORMAT = 1
NAMES = "documents.json"
DTYPES = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
"""Precisions of x: safetensors' code, and the numpy type that holds its bits."""
_SHARD_BYTES = 256_000_000
_MAX_COUNT = 2**40
Progress = Callable[[int], None]
"""Called with the number of rows computed so far, after each pass of the LM."""


def facts(acts: ActsConfig, corpus: Corpus, dtype: str) -> dict[str, Any]:
    """Return what the activations depend on."""
    options = {
        key: value
        for key, value in plain(dataclasses.asdict(acts)).items()
        if key not in ("normalize", "mix", "shards", "lm_batch", "store")
        # Later keys are left out at their defaults, so that older folders keep their names.
        and not (key in LATER_ACTS and value == plain(getattr(ActsConfig, key)))
    }
    return {"format": FORMAT, "acts": options, "policy": corpus.policy(), "dtype": dtype}


# ---- writing


def write(
    lm: LM,
    corpus: Corpus,
    parent: Path,
    *,
    rows: int,
    dtype: str = "float32",
    shard_rows: int = 0,
    progress: Progress = lambda done: None,
) -> Path:
    """Write activations at the LM's site as shards; continue where a killed writer stopped.

    Args:
        lm: The LM.
        corpus: The text.
        parent: The folder in which the folder of shards is made.
        rows: The least number of activations.
        dtype: A key of DTYPES.
        shard_rows: Rows of a shard; about 256 MB if 0.
        progress: Called with the number of rows computed so far, after each pass of the LM.

    Returns:
        The folder of shards.

    Raises:
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
    )[0]


def write_sites(
    lm: LM,
    corpus: Corpus,
    parent: Path,
    sites: Sequence[str],
    *,
    rows: int,
    dtype: str = "float32",
    shard_rows: int = 0,
    progress: Progress = lambda done: None,
) -> list[Path]:
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
    folders = {site: Path(parent) / jsonio.digest(contents[site]) for site in sites}
    shard_rows = shard_rows or max(1, _SHARD_BYTES // (4 * sum(widths.values())))
    with atomic.translate_oserrors(Path(parent)):
        manifests = {site: _open_manifest(folders[site], contents[site], corpus) for site in sites}
        complete = all(manifest["complete"] for manifest in manifests.values())
        lm_batch = 0 if complete else choose_lm_batch(lm, corpus, sites)
        while here := _furthest_behind(manifests):
            last = manifests[here[0]]
            done = sum(shard["rows"] for shard in last["shards"])
            progress(done)
            tensors, place, contexts = _compute_shard(
                lm,
                corpus,
                here,
                last,
                min(shard_rows, rows - done),
                getattr(torch, dtype),
                lm_batch,
                functools.partial(_add_to, progress, done, rows),
            )
            position = {"place": list(place), "contexts": contexts}
            for site, x in zip(here, tensors.pop("x")):
                _add_shard(folders[site], manifests[site], {"x": x, **tensors}, corpus, position)
        progress(rows)
    return [folders[site] for site in sites]


def _furthest_behind(manifests: dict[str, dict[str, Any]]) -> list[str]:
    """Return the sites that are to be read next: of those that are not complete the ones that have
    come least far. A killed writer, or one of a single site, may have written more of some."""
    todo = [site for site, manifest in manifests.items() if not manifest["complete"]]
    least = min((_place(manifests[site]) for site in todo), default=())
    return [site for site in todo if _place(manifests[site]) == least]


def _place(manifest: dict[str, Any]) -> tuple[int, ...]:
    """Return how far a set has been written: rows, contexts, and the place in the text."""
    rows = sum(shard["rows"] for shard in manifest["shards"])
    return rows, manifest["contexts"], *manifest["place"]


def _add_to(progress: Progress, before: int, most: int, new: int) -> None:
    progress(min(most, before + new))


def _open_manifest(folder: Path, contents: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """Return a folder's manifest, or an empty one; the first shard creates the folder."""
    atomic.remove_leftovers(folder)
    if (folder / NAMES).is_file():
        corpus.names.update(enumerate(jsonio.read_strings(folder / NAMES)))
    if (folder / checksums.MANIFEST).is_file():
        return _read_manifest(folder)
    return {**contents, "shards": [], "place": list(TextCursor()), "contexts": 0, "complete": False}


def _compute_shard(
    lm: LM,
    corpus: Corpus,
    sites: Sequence[str],
    manifest: dict[str, Any],
    rows: int,
    dtype: torch.dtype,
    lm_batch: int,
    progress: Progress,
) -> tuple[dict[str, Any], TextCursor, int]:
    """Compute whole contexts until there are at least `rows` activations; `progress` is called with
    their number after each pass of the LM.

    Returns:
        The columns, `x` being a list by site; where the text continues; and the number of contexts
        so far.
    """
    parts: list[tuple[Tensor, ...]] = []
    count, number, group, place = 0, manifest["contexts"], [], TextCursor(*manifest["place"])
    for context in corpus.contexts(place):
        group.append(context)
        if len(group) < lm_batch and count + len(group) * corpus.acts.context < rows:
            continue
        contexts = corpus.batch(group)
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
        count, number, place, group = count + len(numbers), number + len(group), group[-1].next, []
        progress(count)
        if count >= rows:
            break
    columns = [torch.cat(column) for column in zip(*parts)]
    table = dict(zip(("document", "context", "position"), columns[-3:]))
    return {"x": columns[:-3], **table}, place, number


def _check_finite(x: Tensor, site: str, corpus: Corpus, documents: Tensor) -> None:
    bad = ~torch.isfinite(x).all(1)  # also those too large for float16
    if bad.any():
        raise NonFiniteError(
            f"activations at {site} are NaN or infinite in document "
            f"{corpus.names[int(documents[bad][0])]!r}, as {str(x.dtype).removeprefix('torch.')}"
        )


def _add_shard(
    folder: Path,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    corpus: Corpus,
    position: dict[str, Any],
) -> None:
    """Write one shard, then the manifest that includes it; update `manifest` in place."""
    name = f"{len(manifest['shards']):05d}.safetensors"
    with atomic.atomic_file(folder / name) as tmp:
        save_file(tensors, tmp)
        entry = {"file": name, "rows": len(tensors["x"]), "sha256": atomic.sha256(tmp)}
    last = max(corpus.names)
    jsonio.write_json(folder / NAMES, [corpus.names.get(i, "") for i in range(last + 1)])
    shards = [*manifest["shards"], entry]
    manifest |= {
        "shards": shards,
        **position,
        "complete": sum(shard["rows"] for shard in shards) >= manifest["rows"],
        "names_sha256": atomic.sha256(folder / NAMES),
    }
    jsonio.write_json(folder / checksums.MANIFEST, manifest, sealed=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder of shards, complete or not."""
    file = folder / checksums.MANIFEST
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
    _check_counts(file, manifest)
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


def _check_counts(file: Path, manifest: dict[str, Any]) -> None:
    counts = {"rows": manifest["rows"], "d_model": manifest["d_model"]}
    counts |= {f"rows of {entry['file'][:40]!r}": entry["rows"] for entry in manifest["shards"]}
    for name, count in counts.items():
        if not 1 <= count < _MAX_COUNT:
            raise CorruptError(f"{file}: {name} is {count}; expected a number of at least 1")


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
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder} is no folder of shards; `ksparse shard` writes one")
        self.manifest = _read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise InputError(
                f"{folder} is not complete; run the same `ksparse shard` again to finish it"
            )
        checksums.check_file(self.folder, NAMES, self.manifest.get("names_sha256", ""))
        self.names = jsonio.read_strings(self.folder / NAMES)
        self.d_model: int = self.manifest["d_model"]
        files = [
            (checksums.check_file(self.folder, entry["file"], entry["sha256"]), entry["rows"])
            for entry in self.manifest["shards"]
        ]
        self.parts = [
            _ShardFile(file, rows, self.manifest, len(self.names)) for file, rows in files
        ]
        self.ends = np.cumsum([len(part.document) for part in self.parts])
        self.rows = int(self.ends[-1])

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

    def _locate(self, rows: np.ndarray) -> Iterator[tuple[_ShardFile, np.ndarray, np.ndarray]]:
        """Yield (file, positions in `rows`, rows in the file) for each file that has some."""
        which = np.searchsorted(self.ends, rows, side="right")
        for i in np.unique(which):
            at = np.flatnonzero(which == i)
            yield self.parts[i], at, rows[at] - (self.ends[i] - len(self.parts[i].document))

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
            if recipe.get(key) != value
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


class _ShardFile:
    """The columns of one safetensors file, memory-mapped.

    A safetensors file is the header's length, a JSON table of offsets, and the data.
    """

    x: np.ndarray
    document: np.ndarray
    context: np.ndarray
    position: np.ndarray

    def __init__(self, file: Path, rows: int, manifest: dict[str, Any], names: int):
        """Map the file; check each column's type, shape and range against the manifest."""
        try:
            safe_open(file, "np")  # checks that all the header names is within the file
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"{file} is truncated or damaged: {error}") from None
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
                    f"{file}: column {name!r} is {entry['dtype']} of shape {entry['shape']}, "
                    f"the manifest speaks of {code} of shape {shape}"
                )
            offset = 8 + length + entry["data_offsets"][0]
            column = np.memmap(file, dtype, "r", offset, tuple(shape))
            if name in ends and not 0 <= column.min() <= column.max() < ends[name]:
                raise CorruptError(
                    f"{file}: column {name!r} has numbers from {column.min()} to "
                    f"{column.max()}; expected 0 to {ends[name] - 1:,}"
                )
            setattr(self, name, column)
