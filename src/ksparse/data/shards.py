"""Activations on disk: written once, read by many runs.

    acts/<hash>/manifest.json        what they are (LM, site, text, policy), and the rows and
                                     SHA-256 sum of each shard
    acts/<hash>/00000.safetensors    x[rows, d], document[rows], context[rows], position[rows]; in
                                     the order of the text
    acts/<hash>/documents.json       the documents' names

The hash is over what the activations are, so another LM or text lands in another folder. The
manifest is replaced after each shard; a killed writer goes on after the last one. safetensors
accepts almost any altered bit, hence the sums.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ksparse.config import ActsConfig
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


def facts(acts: ActsConfig, corpus: Corpus, dtype: str) -> dict[str, Any]:
    """Return what the activations depend on."""
    own = {
        key: value
        for key, value in asdict(acts).items()
        if key not in ("normalize", "mix", "shards", "lm_batch", "store")
    }
    return {"format": FORMAT, "acts": own, "policy": corpus.policy(), "dtype": dtype}


def write(
    lm: LM,
    corpus: Corpus,
    parent: Path,
    *,
    rows: int,
    dtype: str = "float32",
    shard_rows: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write `rows` activations as shards under `parent`; return their folder. Goes on where a
    killed writer stopped."""
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
    progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Write the same `rows` activations at several sites, a folder each, from one pass over the
    text; else like `write`."""
    probe = torch.zeros(
        2, 3, dtype=torch.long
    )  # not 1 x 1, so that a table of positions does not pass for activations
    widths = {
        site: x.shape[-1]
        for site, x in lm.acts_at(sites, probe, torch.ones_like(probe, dtype=torch.bool)).items()
    }
    about = {
        site: facts(dataclasses.replace(corpus.acts, site=site), corpus, dtype)
        | {"rows": rows, "d_model": widths[site]}
        for site in sites
    }
    folders = {site: Path(parent) / jsonio.digest(about[site]) for site in sites}
    shard_rows = shard_rows or max(1, 256_000_000 // (4 * sum(widths.values())))
    with atomic.translate_oserrors(Path(parent)):
        manifests = {site: _begun(folders[site], about[site], corpus) for site in sites}
        while not all(manifest["complete"] for manifest in manifests.values()):
            behind = min(manifests.values(), key=lambda manifest: len(manifest["shards"]))
            number, done = len(behind["shards"]), sum(shard["rows"] for shard in behind["shards"])
            progress(done)
            tensors, place, contexts = _shard(
                lm, corpus, sites, behind, min(shard_rows, rows - done), getattr(torch, dtype)
            )
            for site, x in zip(sites, tensors.pop("x")):
                if (
                    len(manifests[site]["shards"]) == number
                ):  # a killed writer may have written it for some
                    _add(
                        folders[site],
                        manifests[site],
                        {"x": x, **tensors},
                        corpus,
                        place,
                        contexts,
                        done,
                    )
        progress(rows)
    return [folders[site] for site in sites]


def _begun(folder: Path, about: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """Return a folder's manifest, or one to begin with; the first shard makes the folder."""
    atomic.remove_leftovers(folder)
    corpus.names.update(
        enumerate(jsonio.read_strings(folder / NAMES)) if (folder / NAMES).is_file() else ()
    )
    return (
        _manifest(folder)
        if (folder / checksums.MANIFEST).is_file()
        else {**about, "shards": [], "place": list(TextCursor()), "contexts": 0, "complete": False}
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder of shards, finished or not."""
    file = folder / checksums.MANIFEST
    found = jsonio.read_table(
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
    jsonio.check_format(file, found["format"], FORMAT)
    for entry in found["shards"]:
        wanted = {"file": str, "rows": int, "sha256": str}
        if not isinstance(entry, dict) or {key: type(entry.get(key)) for key in wanted} != wanted:
            raise CorruptError(
                f"{file}: {str(entry)[:80]!r} is no shard; expected its file, rows and sha256"
            )
    counts = {"rows": found["rows"], "d_model": found["d_model"]}
    counts |= {f"rows of {entry['file'][:40]!r}": entry["rows"] for entry in found["shards"]}
    for name, count in counts.items():
        if not 1 <= count < 2**40:
            raise CorruptError(f"{file}: {name} is {count}; expected a number of at least 1")
    if found["dtype"] not in DTYPES:
        raise CorruptError(
            f"{file}: 'dtype' is {found['dtype'][:40]!r}; expected {', '.join(DTYPES)}"
        )
    place, contexts = found["place"], found["contexts"]
    numbers = [*place, contexts]
    if len(numbers) != 4 or not all(type(number) is int and number >= 0 for number in numbers):
        raise CorruptError(
            f"{file}: 'place' is {str(place)[:80]} and 'contexts' {contexts}; "
            "expected three numbers and one, none below 0"
        )
    written = sum(entry["rows"] for entry in found["shards"])
    if found["complete"] != (written >= found["rows"]):
        raise CorruptError(
            f"{file} says {'complete' if found['complete'] else 'not complete'}, "
            f"with {written:,} of {found['rows']:,} rows in its shards"
        )
    return found


def _add(
    folder: Path,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    corpus: Corpus,
    place: TextCursor,
    contexts: int,
    done: int,
) -> None:
    """Write one shard, and the manifest that has it, in place."""
    name = f"{len(manifest['shards']):05d}.safetensors"
    with atomic.atomic_file(folder / name) as tmp:
        save_file(tensors, tmp)
        rows = len(tensors["x"])
        entry = {"file": name, "rows": rows, "sha256": atomic.sha256(tmp)}
    last = max(corpus.names)
    jsonio.write_json(folder / NAMES, [corpus.names.get(i, "") for i in range(last + 1)])
    manifest |= {
        "shards": [*manifest["shards"], entry],
        "place": list(place),
        "contexts": contexts,
        "complete": done + rows >= manifest["rows"],
        "names_sha256": atomic.sha256(folder / NAMES),
    }
    jsonio.write_json(folder / checksums.MANIFEST, manifest, sealed=True)


def _shard(
    lm: LM,
    corpus: Corpus,
    sites: Sequence[str],
    manifest: dict[str, Any],
    rows: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], TextCursor, int]:
    """Compute whole contexts until there are at least `rows` activations; `x` is a list of them by
    site."""
    parts: list[tuple[Tensor, ...]] = []
    have, number, group, place = 0, manifest["contexts"], [], TextCursor(*manifest["place"])
    for context in corpus.contexts(place):
        group.append(context)
        if len(group) < corpus.acts.lm_batch and have + len(group) * corpus.acts.context < rows:
            continue
        contexts = corpus.batch(group)
        keep = contexts.keep
        found = [
            x.cpu()[keep].to(dtype)
            for x in lm.acts_at(sites, contexts.tokens, contexts.attention).values()
        ]
        for site, x in zip(sites, found):
            if not torch.isfinite(x).all():  # also those that are too large for float16
                bad = int(contexts.documents[keep][~torch.isfinite(x).all(1)][0])
                raise NonFiniteError(
                    f"activations at {site} are NaN or infinite in document {corpus.names[bad]!r}, "
                    f"as {str(dtype).removeprefix('torch.')}"
                )
        numbers = torch.arange(number, number + len(group))[:, None].expand_as(keep)[keep]
        positions = torch.arange(keep.shape[1]).expand_as(keep)[keep]
        parts.append((*found, contexts.documents[keep].int(), numbers.int(), positions.int()))
        have, number, place, group = have + len(numbers), number + len(group), group[-1].next, []
        if have >= rows:
            break
    columns = [torch.cat(column) for column in zip(*parts)]
    table = dict(zip(("document", "context", "position"), columns[-3:]))
    return {"x": columns[:-3], **table}, place, number


class Shards:
    """A folder of shards as one table of rows, memory-mapped. Sums are checked when it is
    opened."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder} is no folder of shards; `ksparse shard` writes one")
        self.manifest = _manifest(self.folder)
        if not self.manifest["complete"]:
            raise InputError(
                f"{folder} is not complete; run the same `ksparse shard` again to finish it"
            )
        checksums.check_file(self.folder, NAMES, self.manifest.get("names_sha256", ""))
        self.names = jsonio.read_strings(self.folder / NAMES)
        self.d_model: int = self.manifest["d_model"]
        checked = [
            (checksums.check_file(self.folder, entry["file"], entry["sha256"]), entry["rows"])
            for entry in self.manifest["shards"]
        ]
        self.parts = [
            _ShardFile(file, rows, self.manifest, len(self.names)) for file, rows in checked
        ]
        self.ends = np.cumsum([len(part.document) for part in self.parts])
        self.rows = int(self.ends[-1])

    def read(self, rows: np.ndarray) -> Tensor:
        """Return activations x[len(rows), d] as float32."""
        out = torch.empty(len(rows), self.d_model)
        for part, at, local in self._located(rows):
            taken = torch.from_numpy(np.ascontiguousarray(part.x[local]))
            out[torch.from_numpy(at)] = (
                taken.view(torch.bfloat16) if taken.dtype == torch.uint16 else taken
            ).float()
        return out

    def documents(self, rows: np.ndarray) -> np.ndarray:
        return self._column(rows, "document")

    def contexts(self, rows: np.ndarray) -> np.ndarray:
        return self._column(rows, "context")

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        out = np.empty(len(rows), np.int64)
        for part, at, local in self._located(rows):
            out[at] = getattr(part, name)[local]
        return out

    def _located(self, rows: np.ndarray):
        which = np.searchsorted(self.ends, rows, side="right")
        for i in np.unique(which):
            at = np.flatnonzero(which == i)
            yield self.parts[i], at, rows[at] - (self.ends[i] - len(self.parts[i].document))

    def check_fits(self, acts: ActsConfig) -> None:
        """Raise InputError unless the shards hold what a recipe asks for."""
        ours = {key: value for key, value in asdict(acts).items() if key in self.manifest["acts"]}
        wrong = [
            f"acts.{key}: the shards have {theirs!r}, the recipe {ours.get(key)!r}"
            for key, theirs in self.manifest["acts"].items()
            if ours.get(key) != theirs
        ]
        if self.manifest["policy"].get("split") != "train":
            wrong.append(
                f"the shards are of the split {self.manifest['policy'].get('split')!r}, training "
                "needs 'train'"
            )
        if wrong:
            raise InputError(
                f"the shards in {self.folder} are of other activations: {'; '.join(wrong)}"
            )


class _ShardFile:
    """The arrays of one safetensors file, memory-mapped: the header is a length and a JSON table of
    offsets."""

    x: np.ndarray
    document: np.ndarray
    context: np.ndarray
    position: np.ndarray

    def __init__(self, file: Path, rows: int, manifest: dict[str, Any], names: int):
        """Map a file of so many rows, each column of the type, shape and range of the manifest."""
        try:
            safe_open(
                file, "np"
            )  # reads the header, and sees to it that all it names is within the file
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"{file} is truncated or damaged: {error}") from None
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        ends = {"document": names, "context": manifest["contexts"], "position": 2**31}
        for name in ("x", *ends):
            code, kind = DTYPES[manifest["dtype"]] if name == "x" else ("I32", np.int32)
            shape = [rows, manifest["d_model"]] if name == "x" else [rows]
            entry = header.get(name, {"dtype": "nothing", "shape": "none"})
            if entry["dtype"] != code or entry["shape"] != shape:
                found = f"{entry['dtype']} of shape {entry['shape']}"
                raise CorruptError(
                    f"{file}: column {name!r} is {found}, "
                    f"the manifest speaks of {code} of shape {shape}"
                )
            column = np.memmap(file, kind, "r", 8 + length + entry["data_offsets"][0], tuple(shape))
            if name in ends and not 0 <= column.min() <= column.max() < ends[name]:
                raise CorruptError(
                    f"{file}: column {name!r} has numbers from {column.min()} to "
                    f"{column.max()}; expected 0 to {ends[name] - 1:,}"
                )
            setattr(self, name, column)
