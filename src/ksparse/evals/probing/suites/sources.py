"""Where rows come from: a data set on the Hugging Face Hub, or a folder that stands in its place.

LOCAL/OWNER__NAME/ replaces the data set OWNER/NAME. In it, the rows of a configuration and a split
are in
    CONFIG.SPLIT.EXT, CONFIG/SPLIT.EXT          with a configuration
    SPLIT.EXT, data/SPLIT.EXT                   without one
or in several such files, SPLIT-00000-of-00002.EXT …; EXT is jsonl, jsonl.gz, csv, tsv or parquet.

On the Hub, the repository is read first as it is, then as the Hub's own conversion to parquet
(branch refs/convert/parquet), because many of these repositories hold a script, which `datasets` no
longer runs. Code from a repository is never run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ksparse.errors import InputError
from ksparse.storage import rows

CONVERTED = "refs/convert/parquet"
EXTENSIONS = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")
_PURPOSE = "reading data sets of the Hugging Face Hub"


@dataclass(frozen=True)
class DatasetPart:
    """One configuration ('': the only one) and split of a data set."""

    config: str = ""
    split: str = "train"


@dataclass(frozen=True)
class DatasetSource:
    """A data set: all of its `parts` are read, a same number of rows from each.

    converted: the folder of its only configuration on the branch refs/convert/parquet.
    by_hand: how to get it where the Hub does not have it; {place} is where to put it.
    path: read this file or folder, whatever its layout.
    """

    repo: str
    parts: tuple[DatasetPart, ...] = (DatasetPart(),)
    revision: str = "main"
    converted: str = "default"
    by_hand: str = ""
    path: str = ""

    def __str__(self) -> str:
        configs = " ".join(dict.fromkeys(part.config for part in self.parts if part.config))
        return f"{self.repo} {configs}".strip()

    @property
    def splits(self) -> str:
        """Return the names of the splits that are read."""
        return " and ".join(dict.fromkeys(part.split for part in self.parts))


class Opened(NamedTuple):
    """A source that can be read: the commit (or 'local'), and (configuration, row) after row."""

    revision: str
    rows: Iterator[tuple[str, dict[str, Any]]]


def opened(source: DatasetSource, local: Path | None, limit: int) -> Opened:
    """Open a source, here or on the Hub, and read at most `limit` rows of it; raise InputError if
    it cannot be read."""
    each = max(1, limit // len(source.parts))
    if is_local(source, local):
        parts = [(part.config, _local(source, part, local)) for part in source.parts]
        return Opened("local", _joined(parts, each))
    if source.by_hand:
        raise InputError(source.by_hand.format(place=folder_of(source, local)))
    return _hub(source, each)


def is_local(source: DatasetSource, local: Path | None) -> bool:
    """Return whether a folder stands in for the data set."""
    return bool(source.path) or (local is not None and folder_of(source, local).is_dir())


def folder_of(source: DatasetSource, local: Path | None) -> Path:
    """Return the folder that can stand in for the data set; LOCAL where none was named."""
    return (local or Path("LOCAL")) / source.repo.replace("/", "__")


def check_hub() -> None:
    """Raise InputError unless data sets of the Hub can be read at all."""
    rows.extra("datasets", "datasets", _PURPOSE)


def _joined(
    parts: Sequence[tuple[str, Iterable[dict[str, Any]]]], each: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    for config, group in parts:
        for row in islice(group, each):
            yield config, row


# ---- the Hub -------------------------------------------------------------------------------------


def _hub(source: DatasetSource, each: int) -> Opened:
    datasets = rows.extra("datasets", "datasets", _PURPOSE)
    reasons = []
    for asked, load in ((source.revision, _as_it_is), (CONVERTED, _as_converted)):
        revision = _commit(source.repo, asked)
        try:
            parts = [
                (part.config, _begun(load(datasets, source, part, revision)))
                for part in source.parts
            ]
        except Exception as error:  # whatever it is, this way of reading it does not work
            reasons.append(f"{asked}: {in_short(error)}")
        else:
            return Opened(revision, _joined(parts, each))
    raise InputError(
        f"{source.repo} cannot be read from the Hub ({'; '.join(reasons)}); put its rows into "
        f"{folder_of(source, None)} "
        "and name that folder with --local"
    )


def _as_it_is(datasets: Any, source: DatasetSource, part: DatasetPart, revision: str) -> Any:
    return datasets.load_dataset(
        source.repo, part.config or None, split=part.split, streaming=True, revision=revision
    )


def _as_converted(datasets: Any, source: DatasetSource, part: DatasetPart, revision: str) -> Any:
    folder = f"{source.repo}@{revision}/{part.config or source.converted}/{part.split}"
    files = f"hf://datasets/{folder}/*.parquet"
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def _begun(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Read the first row now, because a stream that cannot be read fails only then."""
    rest = iter(rows)
    first = next(rest, None)
    if first is None:
        raise InputError("no row in it")
    return chain([first], rest)


def _commit(repo: str, revision: str) -> str:
    """Return the commit that a branch of a data set is at now, or the branch where that cannot be
    found out."""
    try:
        return (
            importlib.import_module("huggingface_hub")
            .HfApi()
            .dataset_info(repo, revision=revision, timeout=30)
            .sha
            or revision
        )
    except Exception:  # no package, no network, no such repository: reading it will say
        return revision


def in_short(error: BaseException) -> str:
    """Return an error as one line; ksparse's own are sentences already."""
    if isinstance(error, InputError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# ---- files ---------------------------------------------------------------------------------------


def _local(
    source: DatasetSource, part: DatasetPart, local: Path | None
) -> Iterator[dict[str, Any]]:
    files = (
        _everything(Path(source.path)) if source.path else _files(folder_of(source, local), part)
    )
    return chain.from_iterable(map(_read, files))


def _everything(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.name.endswith((*EXTENSIONS, ".txt", ".txt.gz", ".txt.xz"))
    )
    if not files:
        raise InputError(
            f"{path} holds no text; expected files ending in .txt, {', '.join(EXTENSIONS)}"
        )
    return files


def _files(folder: Path, part: DatasetPart) -> list[Path]:
    """Return the files of a part, all of one place: the first that has any."""
    places = (
        [(folder, f"{part.config}.{part.split}"), (folder / part.config, part.split)]
        if part.config
        else [(folder, part.split), (folder / "data", part.split)]
    )
    for place, stem in places:
        names = sorted(place.iterdir()) if place.is_dir() else []
        if files := [
            file
            for file in names
            if any(_is_named(file.name, stem, extension) for extension in EXTENSIONS)
        ]:
            return files
    wanted = " or ".join(str(place / f"{stem}.EXT") for place, stem in places)
    raise InputError(
        f"no rows in {folder}: expected {wanted}, EXT one of "
        f"{', '.join(extension[1:] for extension in EXTENSIONS)}"
    )


def _is_named(name: str, stem: str, extension: str) -> bool:
    own = name.removesuffix(extension)
    return name.endswith(extension) and (own == stem or own.startswith(f"{stem}-"))


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file; say which one cannot be read, and where."""
    name = file.name.removesuffix(file.suffix) if file.suffix in rows.COMPRESSIONS else file.name
    if name.endswith(".parquet"):
        yield from rows.parquet(file)
    elif name.endswith((".csv", ".tsv")):
        yield from rows.table(file, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith(".txt"):
        yield from ({"text": rows.joined(chunks, file)} for chunks in rows.documents(file))
    elif name.endswith(".jsonl"):
        for number, row in rows.jsonl(file):
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: {rows.columns(row)} instead of a row")
            yield row
    else:
        raise InputError(f"{file} is of no known kind; expected .txt, {', '.join(EXTENSIONS)}")
