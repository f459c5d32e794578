"""What stands in the column of a text source: texts, conversations, or token ids.

A source is a local file or folder (.txt, .jsonl, .parquet, also compressed) or a data set on the
Hugging Face Hub. Each reader yields (name, value), the name being 'FILE:ROW'; rows that hold null
are skipped and reported. Anything else that is not what was asked for is an InputError that names
file and row.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm.chat import Conversation
from ksparse.storage import hub, rows

SUFFIXES = (".txt", ".jsonl", ".parquet")
TOOLS, MASK = "tools", "attention_mask"
"""Columns that are read beside messages and token ids, where there are such."""
_log = logging.getLogger("ksparse")
_Value = TypeVar("_Value")


class RowReport:
    """Warns about rows that are not used as they are: names the first, then counts all."""

    def __init__(self, source: str, what: str):
        self.source, self.what, self.count = source, what, 0

    def add(self, name: str) -> None:
        """Count the row `name`."""
        self.count += 1
        if self.count == 1:
            warn_once(f"text {self.source}: {name} holds {self.what}, like all others of this kind")

    def finish(self) -> None:
        """Tell the number of all rows, if it is more than the one that was named."""
        if self.count > 1:
            warn_once(f"text {self.source}: {self.count:,} texts in all hold {self.what}")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the same one once only."""
    _log.warning("%s", message)


def read_texts(acts: ActsConfig, nulls: RowReport) -> Iterator[tuple[str, str | Iterable[str]]]:
    """Yield the texts of a source; those of a .txt file as chunks, to be read one after another."""
    column = acts.column
    if not is_local(acts.text):
        found = (
            (number, rows.read_text(row, column, where)) for number, where, row in _hub_rows(acts)
        )
        yield from _without_nulls(found, f"text {acts.text!r}", acts.text, column, nulls)
        return
    for file in _text_files(Path(acts.text)):
        suffix = _known_suffix(file)
        if suffix == ".txt":
            for number, chunks in enumerate(rows.documents(file)):
                yield f"{file.name}:{number}", chunks
            continue
        texts = (
            enumerate(rows.parquet(file, column))
            if suffix == ".parquet"
            else (
                (number, rows.read_text(row, column, where))
                for number, where, row in _file_rows(file, ())
            )
        )
        yield from _without_nulls(texts, str(file), file.name, column, nulls)


def read_conversations(acts: ActsConfig, nulls: RowReport) -> Iterator[tuple[str, Conversation]]:
    """Yield the conversations of a source, with the tools in the column `tools` if there is one."""
    yield from _read_column(acts, TOOLS, conversation_of, nulls)


def read_token_ids(acts: ActsConfig, nulls: RowReport) -> Iterator[tuple[str, list[int]]]:
    """Yield the token ids of a source, without those that its column `attention_mask` leaves
    out."""
    yield from _read_column(acts, MASK, token_ids_of, nulls)


def _read_column(
    acts: ActsConfig,
    beside: str,
    read: Callable[[Any, str, str], _Value | None],
    nulls: RowReport,
) -> Iterator[tuple[str, _Value]]:
    """Yield (name, value) of the rows of every file, as `read(row, column, where)` finds it."""
    column = acts.column
    if not is_local(acts.text):
        values = ((number, read(row, column, where)) for number, where, row in _hub_rows(acts))
        yield from _without_nulls(values, f"text {acts.text!r}", acts.text, column, nulls)
        return
    for file in _text_files(Path(acts.text)):
        if _known_suffix(file) == ".txt":
            what = "conversations" if acts.chat != "none" else "lists of token ids"
            raise InputError(
                f"text {file} is text without columns; {what} are read from .jsonl, .parquet or a "
                "data set on the Hub"
            )
        found = (
            (number, read(row, column, where))
            for number, where, row in _file_rows(file, (column, beside))
        )
        yield from _without_nulls(found, str(file), file.name, column, nulls)


# ---- rows


def conversation_of(row: Any, column: str, where: str) -> Conversation | None:
    """Return the conversation in a column of a row; None for null or an empty list.

    Args:
        row: a row of a file; anything but a mapping is refused.
        column: the column of the messages.
        where: file and line, for messages.

    Raises:
        InputError: the column is missing, or holds something other than messages.

    Example:
        >>> row = {"messages": [{"role": "user", "content": "hi"}]}
        >>> conversation_of(row, "messages", "a.jsonl, line 1").messages[0]["role"]
        'user'
    """
    messages = _cell(row, column, where, "messages")
    if messages is None:
        return None
    if not isinstance(messages, (list, tuple)):
        raise _no_messages(where, column, messages)
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _no_messages(f"{where}, message {number}", column, message)
        content = message.get("content")
        if not (content is None or isinstance(content, (str, list, tuple))):
            raise InputError(
                f"{where}, message {number}: 'content' is {rows.shown(content)!r}, of type "
                f"{type(content).__name__}; expected text, or a list of parts"
            )
    return (
        Conversation([dict(message) for message in messages], _tools(row, where), where)
        if messages
        else None
    )


def _no_messages(where: str, column: str, found: Any) -> InputError:
    return InputError(
        f"{where}: the column {column!r} holds {rows.shown(found)!r}; expected a list of messages, "
        "each with 'role' (such as user or assistant) and 'content'. Rename other keys, such as "
        "'from' and 'value'"
    )


def _tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Return the descriptions of tools in a row, which may be written as JSON; None without."""
    tools = row.get(TOOLS)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: the column {TOOLS!r} is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(
            f"{where}: the column {TOOLS!r} holds {rows.shown(tools)!r}; expected a list of "
            "descriptions of tools, or null"
        )
    return [dict(tool) for tool in tools]


def token_ids_of(row: Any, column: str, where: str) -> list[int] | None:
    """Return the token ids in a column of a row, without those whose `attention_mask` is 0; None
    for null.

    Args:
        row: a row of a file; anything but a mapping is refused.
        column: the column of the ids.
        where: file and line, for messages.

    Raises:
        InputError: the column is missing, or holds something other than ids.

    Example:
        >>> row = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}
        >>> token_ids_of(row, "input_ids", "a.jsonl, line 1")
        [5, 6]
    """
    ids = _cell(row, column, where, "token ids")
    if ids is None:
        return None
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
        raise InputError(
            f"{where}: the column {column!r} holds {rows.shown(ids)!r}; expected a list of token "
            "ids, which are whole numbers. For text leave out acts.pretokenized"
        )
    mask = row.get(MASK)
    if mask is None:
        return list(ids)
    if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
        raise InputError(
            f"{where}: the column {MASK!r} must be a list as long as {column!r}, {len(ids):,}; it "
            f"is {rows.shown(mask)!r}"
        )
    return [i for i, used in zip(ids, mask) if used]


def _cell(row: Any, column: str, where: str, what: str) -> Any:
    if isinstance(row, Mapping) and column in row:
        return row[column]
    raise InputError(
        f"{where}: no {what} in the column {column!r}; there are {rows.columns(row)}. Name it with "
        "--acts.text-field"
    )


def _without_nulls(
    values: Iterable[tuple[int, _Value | None]],
    source: str,
    name: str,
    column: str,
    nulls: RowReport,
) -> Iterator[tuple[str, _Value]]:
    """Yield ('NAME:ROW', value) of (row, value); raise InputError where no row has a value."""
    row, is_empty = -1, True
    for row, value in values:
        if value is None:
            nulls.add(f"{name}:{row}")
        else:
            is_empty = False
            yield f"{name}:{row}", value
    if is_empty and row >= 0:
        raise InputError(
            f"{source}: the column {column!r} is null in every row; "
            "name another with --acts.text-field"
        )


# ---- files and data sets


def is_local(source: str) -> bool:
    """Return whether a source is a file or folder, or can be nothing else."""
    path = Path(source)
    try:
        exists = path.exists()
    except OSError as error:  # a name of thousands of characters
        raise InputError(
            f"text {source[:60]!r} cannot be looked up: {error.strerror or error}"
        ) from None
    has_suffix = path.suffix in (*SUFFIXES, *rows.COMPRESSIONS)
    return exists or has_suffix or hub.is_plainly_local(source)


def _file_rows(file: Path, only: tuple[str, ...]) -> Iterator[tuple[int, str, Any]]:
    """Yield (number from 0, where, row) of a .jsonl or .parquet file."""
    if _known_suffix(file) == ".parquet":
        for number, row in enumerate(rows.parquet(file, only=only)):
            yield number, f"{file}, row {number}", row
    else:
        for number, row in rows.jsonl(file):
            yield number - 1, f"{file}, line {number}", row


def _text_files(path: Path) -> list[Path]:
    """Return the file, or the text files in a folder in order; raise InputError for none."""
    if not path.exists():
        raise InputError(
            f"text {path} does not exist; give a file or folder of {', '.join(SUFFIXES)}, a Hub "
            "data set, or 'pylm'"
        )
    try:
        files = (
            sorted(file for file in path.rglob("*") if _suffix(file)) if path.is_dir() else [path]
        )
    except OSError as error:
        raise InputError(f"folder {path} cannot be read: {error.strerror or error}") from None
    if not files:
        raise InputError(
            f"folder {path} holds no text: expected files ending in {', '.join(SUFFIXES)} "
            f"(also with {', '.join(rows.COMPRESSIONS)})"
        )
    return files


def _suffix(file: Path) -> str | None:
    """Return the suffix of a text file, without that of a compression; None for other files."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in rows.COMPRESSIONS]
    return suffixes[-1] if file.is_file() and suffixes and suffixes[-1] in SUFFIXES else None


def _known_suffix(file: Path) -> str:
    suffix = _suffix(file)
    if suffix is None:
        raise InputError(
            f"text {file} is of no known kind; expected a name ending in {', '.join(SUFFIXES)} "
            f"(also with {', '.join(rows.COMPRESSIONS)})"
        )
    return suffix


def _hub_rows(acts: ActsConfig) -> Iterator[tuple[int, str, Any]]:
    """Yield (number from 0, where, row) of a data set on the Hub."""
    absence = hub.absence(acts.text)
    datasets = rows.import_extra("datasets", "datasets", f"the data set {acts.text!r}{absence}")
    try:
        dataset = datasets.load_dataset(
            acts.text, acts.text_config or None, split=acts.text_split, streaming=True
        )
    except Exception as error:  # of any kind: the user has named something that cannot be read
        raise InputError(
            f"text {acts.text!r} is neither a file here nor a data set that can be "
            f"read ({_summary(error)}){absence}"
        ) from error
    number, following = 0, iter(dataset)
    while True:
        try:
            row = next(following)
        except StopIteration:
            return
        except Exception as error:  # a connection that breaks, a damaged file of the data set
            raise InputError(
                f"text {acts.text!r} cannot be read after row {max(0, number - 1):,} "
                f"({_summary(error)})"
            ) from error
        yield number, f"{acts.text}, row {number}", row
        number += 1


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
