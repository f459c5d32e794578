"""Turn labelled text into labelled activations: the rows that probes are trained and tested on.

    python_tasks   61 tasks on tokens of held-out Python source (`python_labels`)
    text_tasks     a folder of tasks on whole texts (`suites`)

Half of a task's rows are for training. Rows of the same document or the same text are in the same
half, and form one cluster for standard errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ksparse import pylm
from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals.base import Progress
from ksparse.evals.probing.suites import folder
from ksparse.lm.model import LM

LEAST = 20
"""Rows of each label that a built-in task needs in each half."""
_TOKENS_PER_ROW = 200  # tokens of Python source to draw from, for each row of a task
_TOKENS_PER_FILE = 2_048


@dataclass(frozen=True)
class TaskRows:
    """The s rows of a task, with m raw activations between them.

    Attributes:
        name: The task's name.
        x: Raw activations [m, d].
        owner: The row that each activation belongs to, [m].
        label: 0 or 1 for each row, [s].
        cluster: The document or text of each row, [s].
        train: Whether each row is in the training half, [s].
        cut: For each text that was too long, how many tokens it lost.
    """

    name: str
    x: Tensor
    owner: Tensor
    label: Tensor
    cluster: Tensor
    train: Tensor
    cut: tuple[int, ...] = ()

    def half(self, train: bool) -> TaskRows:
        """Return the training or the test half, its rows renumbered from 0."""
        chosen = self.train == train
        number = torch.where(chosen, chosen.long().cumsum(0) - 1, -1)
        kept = number[self.owner] >= 0
        return TaskRows(
            self.name,
            self.x[kept],
            number[self.owner[kept]],
            self.label[chosen],
            self.cluster[chosen],
            self.train[chosen],
        )


@dataclass(frozen=True)
class ProbeTasks:
    """The tasks of a suite.

    Attributes:
        suite: The suite's name.
        names: The tasks' names.
        rows: Computes the rows of a task.
        left_out: Why each unusable task is left out.
        notes: Sentences for the result.
    """

    suite: str
    names: tuple[str, ...]
    rows: Callable[[str], TaskRows]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()


def read(lm: LM, acts: ActsConfig, options: EvalConfig, observe: Progress) -> ProbeTasks:
    """Return the tasks of the suite that the options name, by default the built-in one."""
    if options.suite:
        return text_tasks(lm, acts, options)
    return python_tasks(lm, acts, options, observe)


# ---- texts ---------------------------------------------------------------------------------------


def text_tasks(lm: LM, acts: ActsConfig, options: EvalConfig) -> ProbeTasks:
    """Return the tasks of a suite's folder.

    A row is a text. Its activations are that of the last token, or those of all tokens where
    `options.position` pools them.
    """
    texts_of = {task.name: task for task in folder.read(Path(options.suite))}

    def rows(name: str) -> TaskRows:
        task = texts_of[name]
        chosen, train = _split_halves(task.texts, task.labels, options.probe_rows)
        texts = [task.texts[i] for i in chosen]
        x, owner, cut = _text_activations(lm, acts, texts, options)
        label, cluster, side = (
            torch.tensor(column, device=x.device)
            for column in ([task.labels[i] for i in chosen], [_key(text) for text in texts], train)
        )
        return TaskRows(name, x, owner, label, cluster, side, cut)

    return ProbeTasks(Path(options.suite).name, tuple(texts_of), rows, {})


def _key(text: str) -> int:
    """Return 56 bits of a text's hash."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big")


def _split_halves(
    texts: tuple[str, ...], labels: tuple[int, ...], limit: int
) -> tuple[list[int], list[bool]]:
    """Choose at most `limit` rows, in order of a hash, and say which are for training.

    The task's balance is kept. Every other text of a label is for training.
    """
    share = min(1.0, limit / len(texts))
    chosen, train = [], []
    for label in (0, 1):
        rows = [i for i, other in enumerate(labels) if other == label]
        rows = sorted(rows, key=lambda i: _key(texts[i]))[: round(share * len(rows))]
        number = {text: rank for rank, text in enumerate(dict.fromkeys(texts[i] for i in rows))}
        chosen += rows
        train += [number[texts[i]] % 2 == 0 for i in rows]
    # A text with both labels goes where its first row went.
    side = {texts[i]: half for i, half in zip(reversed(chosen), reversed(train))}
    return chosen, [side[texts[i]] for i in chosen]


@torch.inference_mode()
def _text_activations(
    lm: LM, acts: ActsConfig, texts: list[str], options: EvalConfig
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Run the LM on texts, those of similar length together, padded on the right.

    Returns:
        x[m, d]; the text of each activation [m]; and for each text longer than
        `options.probe_tokens`, how many tokens it lost.
    """
    head = (
        [lm.tokenizer.bos_token_id]
        if acts.bos == "auto" and lm.tokenizer.bos_token_id is not None
        else []
    )
    room = min(options.probe_tokens, lm.context or options.probe_tokens) - len(head)
    ids = lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [head + (text_ids[-room:] or [_filler_token(lm)]) for text_ids in ids]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    xs, owners = [], []
    for group in (order[at : at + acts.lm_batch] for at in range(0, len(order), acts.lm_batch)):
        longest = max(len(tokens[i]) for i in group)
        batch = torch.tensor(
            [tokens[i] + [tokens[i][-1]] * (longest - len(tokens[i])) for i in group],
            device=lm.device,
        )
        lengths = torch.tensor([len(tokens[i]) for i in group], device=lm.device)
        position = torch.arange(longest, device=lm.device)
        keep = position == lengths[:, None] - 1
        if options.position != "last":  # without the first position, unless it is the only one
            keep = (position < lengths[:, None]) & ((position > 0) | (lengths[:, None] == 1))
        # Padding needs no mask: the LM is causal, so later tokens do not change earlier ones.
        x = lm.acts(batch, torch.ones_like(batch, dtype=torch.bool))
        xs.append(x[keep])
        owners.append(torch.tensor(group, device=lm.device)[keep.nonzero()[:, 0]])
    x, owner = torch.cat(xs), torch.cat(owners)
    by_row = owner.argsort(stable=True)
    return (
        x[by_row],
        owner[by_row],
        tuple(len(text_ids) - room for text_ids in ids if len(text_ids) > room),
    )


def _filler_token(lm: LM) -> int:
    """Return a token for a text that has none."""
    return next(
        (i for i in (lm.tokenizer.unk_token_id, lm.tokenizer.eos_token_id) if i is not None), 0
    )


# ---- Python source -------------------------------------------------------------------------------


def check_options(options: EvalConfig) -> None:
    """Check that options fit the tasks, before anything is read.

    Raises:
        InputError: the built-in tasks cannot have this position or so few rows.
    """
    if options.suite:
        return
    if options.position != "last":
        raise InputError(
            f"position {options.position!r} is for tasks on texts; the built-in tasks are on "
            "tokens: leave it at 'last', "
            "or name a folder of texts with --suite"
        )
    if options.probe_rows < 4 * LEAST:
        raise InputError(
            f"probe_rows is {options.probe_rows}; a built-in task needs {LEAST} rows of each label "
            f"in each half: give at least {4 * LEAST}, or texts with --suite"
        )


def python_tasks(lm: LM, acts: ActsConfig, options: EvalConfig, observe: Progress) -> ProbeTasks:
    """Return the built-in tasks.

    A row is a token of a held-out file of the standard library, in contexts like those of training.
    """
    from ksparse.evals.probing.python_labels import TASKS

    pool = _TokenPool(lm, acts)
    _fill(pool, _TOKENS_PER_ROW * options.probe_rows, observe)
    labels, document = np.concatenate(pool.labels), np.concatenate(pool.documents)
    generator = np.random.default_rng(options.seed)
    chosen, left_out = {}, {}
    for column, task in enumerate(TASKS):
        drawn = _draw_balanced(labels[:, column], document, options.probe_rows, generator)
        if len(drawn) < 4 * LEAST:
            left_out[task.name] = (
                f"only {len(drawn) // 4} rows of the rarer label in a half of {len(document):,} "
                f"tokens; {LEAST} are needed"
            )
        else:
            chosen[task.name] = drawn
    if not chosen:
        raise InputError(
            f"no built-in task can be judged on {len(document):,} tokens: "
            f"{next(iter(left_out.values()))}; give more probe_rows than {options.probe_rows}"
        )
    needed = np.unique(np.concatenate(list(chosen.values())))
    x = pool.activations(needed, observe)

    def rows(name: str) -> TaskRows:
        tokens, column = chosen[name], next(i for i, task in enumerate(TASKS) if task.name == name)
        at = torch.from_numpy(np.searchsorted(needed, tokens)).to(x.device)
        label, cluster, train = (
            torch.from_numpy(array).to(x.device)
            for array in (
                labels[tokens, column].astype(np.int64),
                document[tokens],
                document[tokens] % 2 == 0,
            )
        )
        return TaskRows(
            name, x[at], torch.arange(len(tokens), device=x.device), label, cluster, train
        )

    notes = [
        f"{len(document):,} tokens of {len(pool.labels)} held-out files to draw rows from",
        *describe_cuts(pool.cut, len(pool.labels), "files", _TOKENS_PER_FILE, "end"),
    ]
    return ProbeTasks("python", tuple(chosen), rows, left_out, tuple(notes))


@dataclass(frozen=True)
class LabelledPython:
    """Tokens of held-out Python files with their exact labels.

    Attributes:
        tokens: Token ids [m].
        documents: The number of each token's file [m].
        x: Raw activations [m, d].
        labels: Of each built-in task 1, 0, or -1 outside its population, [m].
    """

    tokens: np.ndarray
    documents: np.ndarray
    x: Tensor
    labels: dict[str, np.ndarray]


def labelled_python(lm: LM, acts: ActsConfig, tokens: int, observe: Progress) -> LabelledPython:
    """Return the first tokens of held-out Python files, whole files, with the labels of all
    built-in tasks.

    Args:
        lm: The LM.
        acts: How contexts are made.
        tokens: The least number of tokens, if there are as many.
        observe: Called with what is being done, how much of it is done, and how much there is.
    """
    from ksparse.evals.probing.python_labels import TASKS

    pool = _TokenPool(lm, acts)
    _fill(pool, tokens, observe)
    labels, ids = np.concatenate(pool.labels), np.concatenate([np.array(t) for t in pool.tokens])
    return LabelledPython(
        ids,
        np.concatenate(pool.documents),
        pool.activations(np.arange(pool.size), observe),
        {task.name: labels[:, column] for column, task in enumerate(TASKS)},
    )


def _fill(pool: _TokenPool, target: int, observe: Progress) -> None:
    """Add held-out files to a pool until it has `target` tokens."""
    observe("labelling Python source", 0, target)
    for number, (_, source) in enumerate(pylm.documents("held-out")):
        pool.add(number, source)
        observe("labelling Python source", min(pool.size, target), target)
        if pool.size >= target:
            break


def describe_cuts(cut: Sequence[int], total: int, what: str, limit: int, end: str) -> list[str]:
    """Return a note on texts that were cut, if any were.

    Args:
        cut: How many tokens each of them lost.
        total: The number of texts.
        what: What they are called.
        limit: The longest text that is not cut, in tokens.
        end: The end that is lost: "beginning" or "end".
    """
    if not cut:
        return []
    return [
        f"{len(cut):,} of {total:,} {what} are longer than {limit:,} tokens and lose their "
        f"{end}: {sum(cut):,} tokens were not seen"
    ]


def _draw_balanced(
    labels: np.ndarray, document: np.ndarray, limit: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw equally many tokens of each label in each half, at most `limit` in all."""
    groups = [
        np.flatnonzero((labels == label) & (document % 2 == half))
        for half in (0, 1)
        for label in (0, 1)
    ]
    size = min(limit // 4, *map(len, groups))
    return np.sort(
        np.concatenate([generator.choice(group, size, replace=False) for group in groups])
    )


class _TokenPool:
    """Tokens of Python files, in contexts of one file each that begin with the LM's BOS, if any."""

    def __init__(self, lm: LM, acts: ActsConfig):
        self.lm, self.acts, self.size = lm, acts, 0
        bos = lm.tokenizer.bos_token_id if acts.bos == "auto" else None
        self.head = [] if bos is None else [bos]
        self.labels: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.tokens: list[list[int]] = []  # of each file
        self.cut: list[int] = []  # how many tokens each file that is too long lost

    def add(self, number: int, source: str) -> None:
        """Add a file, if Python can parse it."""
        from ksparse.evals.probing.python_labels import labels

        encoding = self.lm.tokenizer(
            source, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = (
            encoding["input_ids"][:_TOKENS_PER_FILE],
            encoding["offset_mapping"][:_TOKENS_PER_FILE],
        )
        try:
            file_labels = labels(source, offsets)
        except ValueError:
            return  # most likely a test of the parser itself
        if not self.head:
            # The first position of a context is not used as an activation.
            file_labels[:: self.acts.context] = -1
        if len(encoding["input_ids"]) > _TOKENS_PER_FILE:
            self.cut.append(len(encoding["input_ids"]) - _TOKENS_PER_FILE)
        self.labels.append(file_labels)
        self.documents.append(np.full(len(ids), number))
        self.tokens.append(ids)
        self.size += len(ids)

    def activations(self, needed: np.ndarray, observe: Progress) -> Tensor:
        """Return x[m, d] of the tokens numbered `needed`, in order."""
        xs = []
        observe("reading Python source", 0, self.size)
        for rows, number in self._batches():
            x = self.lm.acts(rows, torch.ones_like(rows, dtype=torch.bool))[:, len(self.head) :]
            keep = torch.from_numpy(np.isin(number, needed)).to(x.device)
            xs.append(x[keep].clone())
            observe("reading Python source", int(number.max()) + 1, self.size)
        return torch.cat(xs)

    def _batches(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield contexts [b, t] and the number of each token after BOS, -1 for padding.

        Numbers count the pool's tokens and only rise.
        """
        room, start = self.acts.context - len(self.head), 0
        group: list[tuple[list[int], int]] = []
        for ids in self.tokens:
            group += [
                (ids[first : first + room], start + first) for first in range(0, len(ids), room)
            ]
            start += len(ids)
            while len(group) >= self.acts.lm_batch:
                yield self._stack(group[: self.acts.lm_batch], room)
                group = group[self.acts.lm_batch :]
        if group:
            yield self._stack(group, room)

    def _stack(self, group: list[tuple[list[int], int]], room: int) -> tuple[Tensor, np.ndarray]:
        tokens = np.full((len(group), room), 0)
        number = np.full((len(group), room), -1)
        for i, (ids, first) in enumerate(group):
            tokens[i, : len(ids)], number[i, : len(ids)] = ids, np.arange(first, first + len(ids))
        head = np.tile(np.array(self.head, dtype=np.int64), (len(group), 1))
        return torch.from_numpy(np.concatenate([head, tokens], 1)).to(self.lm.device), number
