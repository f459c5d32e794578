"""Where rows come from: a data set on the Hugging Face Hub, or a local folder in its place.

LOCAL/OWNER__NAME/ replaces the data set OWNER/NAME. The rows of a configuration and split are in

    CONFIG.SPLIT.EXT or CONFIG/SPLIT.EXT   with a configuration
    SPLIT.EXT or data/SPLIT.EXT            without one

or in several such files, SPLIT-00000-of-00002.EXT and so on. EXT is jsonl, jsonl.gz, csv, tsv or
parquet.

On the Hub the repository is read as it is; if that fails, from the Hub's own conversion to parquet
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
    """One configuration ("" for the only one) and split of a data set."""

    config: str = ""
    split: str = "train"


@dataclass(frozen=True)
class DatasetSource:
    """A data set and what to read of it.

    Attributes:
        repo: The repository OWNER/NAME.
        parts: The parts to read, the same number of rows from each.
        revision: The branch or commit.
        converted: The folder of its only configuration on the branch refs/convert/parquet.
        by_hand: How to get data that the Hub does not have; {place} is where to put it.
        path: A file or folder to read instead, whatever its layout.
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
        """The names of the splits that are read."""
        return " and ".join(dict.fromkeys(part.split for part in self.parts))


class OpenSource(NamedTuple):
    """A source being read: its commit (or 'local'), and an iterator over (configuration, row)."""

    revision: str
    rows: Iterator[tuple[str, dict[str, Any]]]


def open_source(source: DatasetSource, local: Path | None, limit: int) -> OpenSource:
    """Open a source for reading.

    Args:
        source: The data set.
        local: A folder with local copies of data sets, preferred to the Hub.
        limit: The most rows to read in all, spread equally over the source's parts.

    Raises:
        InputError: The source cannot be read.
    """
    per_part = max(1, limit // len(source.parts))
    if is_local(source, local):
        parts = [(part.config, _read_local(source, part, local)) for part in source.parts]
        return OpenSource("local", _chain_parts(parts, per_part))
    if source.by_hand:
        raise InputError(source.by_hand.format(place=folder_of(source, local)))
    return _open_on_hub(source, per_part)


def is_local(source: DatasetSource, local: Path | None) -> bool:
    """Return whether the data set is read from a local file or folder."""
    return bool(source.path) or (local is not None and folder_of(source, local).is_dir())


def folder_of(source: DatasetSource, local: Path | None) -> Path:
    """Return the folder that can replace the data set, under `local` or a placeholder LOCAL."""
    return (local or Path("LOCAL")) / source.repo.replace("/", "__")


def check_hub() -> None:
    """Raise InputError unless the package that reads data sets of the Hub is installed."""
    rows.import_extra("datasets", "datasets", _PURPOSE)


def _chain_parts(
    parts: Sequence[tuple[str, Iterable[dict[str, Any]]]], per_part: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    for config, part in parts:
        for row in islice(part, per_part):
            yield config, row


# ---- the Hub -------------------------------------------------------------------------------------


def _open_on_hub(source: DatasetSource, per_part: int) -> OpenSource:
    datasets = rows.import_extra("datasets", "datasets", _PURPOSE)
    reasons = []
    for branch, load in ((source.revision, _load_original), (CONVERTED, _load_converted)):
        revision = _resolve_commit(source.repo, branch)
        try:
            parts = [
                (part.config, _check_first(load(datasets, source, part, revision)))
                for part in source.parts
            ]
        except Exception as error:  # any error means that this way of reading fails
            reasons.append(f"{branch}: {one_line(error)}")
        else:
            return OpenSource(revision, _chain_parts(parts, per_part))
    raise InputError(
        f"{source.repo} cannot be read from the Hub ({'; '.join(reasons)}); put its rows into "
        f"{folder_of(source, None)} "
        "and name that folder with --local"
    )


def _load_original(datasets: Any, source: DatasetSource, part: DatasetPart, revision: str) -> Any:
    return datasets.load_dataset(
        source.repo, part.config or None, split=part.split, streaming=True, revision=revision
    )


def _load_converted(datasets: Any, source: DatasetSource, part: DatasetPart, revision: str) -> Any:
    folder = f"{source.repo}@{revision}/{part.config or source.converted}/{part.split}"
    files = f"hf://datasets/{folder}/*.parquet"
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def _check_first(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Read the first row now: a stream that cannot be read fails only there."""
    remaining = iter(rows)
    first = next(remaining, None)
    if first is None:
        raise InputError("it holds no rows")
    return chain([first], remaining)


def _resolve_commit(repo: str, revision: str) -> str:
    """Return the commit that a branch of a data set points to, or the branch if that fails."""
    try:
        api = importlib.import_module("huggingface_hub").HfApi()
        return api.dataset_info(repo, revision=revision, timeout=30).sha or revision
    except Exception:  # no package, network or repository: reading it will raise a clear error
        return revision


def one_line(error: BaseException) -> str:
    """Return an error as one line; InputErrors are complete sentences already."""
    if isinstance(error, InputError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# ---- files ---------------------------------------------------------------------------------------


def _read_local(
    source: DatasetSource, part: DatasetPart, local: Path | None
) -> Iterator[dict[str, Any]]:
    files = (
        _all_files(Path(source.path))
        if source.path
        else _part_files(folder_of(source, local), part)
    )
    return chain.from_iterable(map(_read_file, files))


def _all_files(path: Path) -> list[Path]:
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


def _part_files(folder: Path, part: DatasetPart) -> list[Path]:
    """Return the files of a part, all from the first location that has any."""
    locations = (
        [(folder, f"{part.config}.{part.split}"), (folder / part.config, part.split)]
        if part.config
        else [(folder, part.split), (folder / "data", part.split)]
    )
    for parent, stem in locations:
        names = sorted(parent.iterdir()) if parent.is_dir() else []
        if files := [
            file
            for file in names
            if any(_is_named(file.name, stem, extension) for extension in EXTENSIONS)
        ]:
            return files
    expected = " or ".join(str(parent / f"{stem}.EXT") for parent, stem in locations)
    raise InputError(
        f"no rows in {folder}: expected {expected}, EXT one of "
        f"{', '.join(extension[1:] for extension in EXTENSIONS)}"
    )


def _is_named(name: str, stem: str, extension: str) -> bool:
    base = name.removesuffix(extension)
    return name.endswith(extension) and (base == stem or base.startswith(f"{stem}-"))


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file; an error names the file and line."""
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
        raise InputError(f"{file} has an unknown extension; expected .txt, {', '.join(EXTENSIONS)}")
