"""Labelled text -> labelled activations: the rows that probes are fitted to and judged on.

    python_tasks    61 tasks on tokens of held-out Python source, labels from the parser
                    (ksparse.evals.probing.python_labels)
    text_tasks      a folder of tasks on whole texts
                    (ksparse.evals.probing.suites)

Half of a task's rows are for training. Rows of one document, or of the same text, are on one side,
and are one cluster for standard errors.
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

LEAST = 20  # rows of each label in each half
_TOKENS_PER_ROW = 200  # of Python source from which rows are drawn, for each row of a task
_PER_FILE = 2_048  # tokens of one file


@dataclass(frozen=True)
class TaskRows:
    """The s rows of a task: x[m, d] raw activations, owner[m] the row that each is of, and for each
    row label, cluster, train."""

    name: str
    x: Tensor
    owner: Tensor
    label: Tensor
    cluster: Tensor
    train: Tensor
    unseen: tuple[int, ...] = ()
    """Tokens that each text that is too long has lost."""

    def half(self, train: bool) -> TaskRows:
        """Return the rows of the training or of the test half, numbered anew."""
        chosen = self.train == train
        number = torch.where(chosen, chosen.long().cumsum(0) - 1, -1)
        here = number[self.owner] >= 0
        return TaskRows(
            self.name,
            self.x[here],
            number[self.owner[here]],
            self.label[chosen],
            self.cluster[chosen],
            self.train[chosen],
        )


@dataclass(frozen=True)
class ProbeTasks:
    """The tasks of a suite, the rows of each made when it is asked for, and why others are left
    out."""

    suite: str
    names: tuple[str, ...]
    rows: Callable[[str], TaskRows]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()


def read(lm: LM, acts: ActsConfig, options: EvalConfig, observe: Progress) -> ProbeTasks:
    """Return the tasks of the suite that the options name."""
    if options.suite:
        return text_tasks(lm, acts, options)
    return python_tasks(lm, acts, options, observe)


# ---- texts ---------------------------------------------------------------------------------------


def text_tasks(lm: LM, acts: ActsConfig, options: EvalConfig) -> ProbeTasks:
    """Return the tasks of a folder; a row is a text, and its activations are those of its last
    token, or of all of them."""
    found = {task.name: task for task in folder.read(Path(options.suite))}

    def rows(name: str) -> TaskRows:
        task = found[name]
        chosen, train = _halves(task.texts, task.labels, options.probe_rows)
        texts = [task.texts[i] for i in chosen]
        x, owner, unseen = _activations(lm, acts, texts, options)
        label, cluster, side = (
            torch.tensor(column, device=x.device)
            for column in ([task.labels[i] for i in chosen], [_key(text) for text in texts], train)
        )
        return TaskRows(name, x, owner, label, cluster, side, unseen)

    return ProbeTasks(Path(options.suite).name, tuple(found), rows, {})


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big")


def _halves(
    texts: tuple[str, ...], labels: tuple[int, ...], most: int
) -> tuple[list[int], list[bool]]:
    """Return which rows are used, as balanced as the task is, and which of them are for training:
    every other text of a label."""
    share = min(1.0, most / len(texts))
    chosen, train = [], []
    for label in (0, 1):
        mine = sorted(
            (i for i, own in enumerate(labels) if own == label), key=lambda i: _key(texts[i])
        )
        mine = mine[: round(share * len(mine))]
        number = {text: rank for rank, text in enumerate(dict.fromkeys(texts[i] for i in mine))}
        chosen += mine
        train += [number[texts[i]] % 2 == 0 for i in mine]
    first = {
        texts[i]: side for i, side in zip(reversed(chosen), reversed(train))
    }  # a text of both labels is on one side
    return chosen, [first[texts[i]] for i in chosen]


@torch.inference_mode()
def _activations(
    lm: LM, acts: ActsConfig, texts: list[str], options: EvalConfig
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return x[m, d], the text that each is of, and the tokens that each text longer than
    `probe_tokens` loses; texts of like length run together, padded behind their end."""
    head = (
        [lm.tokenizer.bos_token_id]
        if acts.bos == "auto" and lm.tokenizer.bos_token_id is not None
        else []
    )
    room = min(options.probe_tokens, lm.context or options.probe_tokens) - len(head)
    ids = lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [head + (own[-room:] or [_filler(lm)]) for own in ids]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    xs, owners = [], []
    for group in (order[at : at + acts.lm_batch] for at in range(0, len(order), acts.lm_batch)):
        longest = max(len(tokens[i]) for i in group)
        batch = torch.tensor(
            [tokens[i] + [tokens[i][-1]] * (longest - len(tokens[i])) for i in group],
            device=lm.device,
        )
        lengths = torch.tensor([len(tokens[i]) for i in group], device=lm.device)
        place = torch.arange(longest, device=lm.device)
        wanted = place == lengths[:, None] - 1
        if options.position != "last":  # not the first position, where there is another
            wanted = (place < lengths[:, None]) & ((place > 0) | (lengths[:, None] == 1))
        x = lm.acts(
            batch, torch.ones_like(batch, dtype=torch.bool)
        )  # what follows a token does not reach it
        xs.append(x[wanted])
        owners.append(torch.tensor(group, device=lm.device)[wanted.nonzero()[:, 0]])
    x, owner = torch.cat(xs), torch.cat(owners)
    by_row = owner.argsort(stable=True)
    return x[by_row], owner[by_row], tuple(len(own) - room for own in ids if len(own) > room)


def _filler(lm: LM) -> int:
    return next(
        (i for i in (lm.tokenizer.unk_token_id, lm.tokenizer.eos_token_id) if i is not None), 0
    )


# ---- Python source -------------------------------------------------------------------------------


def python_tasks(lm: LM, acts: ActsConfig, options: EvalConfig, observe: Progress) -> ProbeTasks:
    """Return the built-in tasks; a row is a token of a held-out file of the standard library, in
    contexts like those of training."""
    from ksparse.evals.probing.python_labels import TASKS

    if options.position != "last":
        raise InputError(
            f"position {options.position!r} is for tasks on texts; the built-in tasks are on "
            "tokens: leave it at 'last', "
            "or name a folder of texts with --suite"
        )
    pool = _Pool(lm, acts)
    wanted = _TOKENS_PER_ROW * options.probe_rows
    for number, (_, source) in enumerate(pylm.documents("held-out")):
        pool.add(number, source)
        observe("labelling Python source", min(pool.size, wanted), wanted)
        if pool.size >= wanted:
            break
    labels, document = np.concatenate(pool.labels), np.concatenate(pool.documents)
    generator = np.random.default_rng(options.seed)
    chosen, left_out = {}, {}
    for column, task in enumerate(TASKS):
        drawn = _balanced(labels[:, column], document, options.probe_rows, generator)
        if len(drawn) < 4 * LEAST:
            left_out[task.name] = (
                f"only {len(drawn) // 4} rows of the rarer label in a half of {len(document):,} "
                f"tokens; {LEAST} are needed"
            )
        else:
            chosen[task.name] = drawn
    needed = np.unique(np.concatenate(list(chosen.values())))
    x = pool.activations(needed, observe)

    def rows(name: str) -> TaskRows:
        mine, column = chosen[name], next(i for i, task in enumerate(TASKS) if task.name == name)
        at = torch.from_numpy(np.searchsorted(needed, mine)).to(x.device)
        label, cluster, train = (
            torch.from_numpy(each).to(x.device)
            for each in (
                labels[mine, column].astype(np.int64),
                document[mine],
                document[mine] % 2 == 0,
            )
        )
        return TaskRows(
            name, x[at], torch.arange(len(mine), device=x.device), label, cluster, train
        )

    notes = [
        f"{len(document):,} tokens of {len(pool.labels)} held-out files to draw rows from",
        *lost(pool.unseen, len(pool.labels), "files", _PER_FILE, "end"),
    ]
    return ProbeTasks("python", tuple(chosen), rows, left_out, tuple(notes))


def lost(unseen: Sequence[int], of: int, what: str, limit: int, where: str) -> list[str]:
    """Return a note on texts that were cut, if any were."""
    return (
        [
            f"{len(unseen):,} of {of:,} {what} are longer than {limit:,} tokens and lose their "
            f"{where}: {sum(unseen):,} tokens were not seen"
        ]
        if unseen
        else []
    )


def _balanced(
    labels: np.ndarray, document: np.ndarray, most: int, generator: np.random.Generator
) -> np.ndarray:
    """Return tokens, as many of each label in each half, at most `most` in all."""
    groups = [
        np.flatnonzero((labels == label) & (document % 2 == half))
        for half in (0, 1)
        for label in (0, 1)
    ]
    size = min(most // 4, *map(len, groups))
    return np.sort(
        np.concatenate([generator.choice(group, size, replace=False) for group in groups])
    )


class _Pool:
    """Tokens of Python files in contexts that each belong to one file: BOS, if the LM has one, and
    what follows."""

    def __init__(self, lm: LM, acts: ActsConfig):
        self.lm, self.acts, self.size = lm, acts, 0
        bos = lm.tokenizer.bos_token_id if acts.bos == "auto" else None
        self.head = [] if bos is None else [bos]
        self.labels: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.tokens: list[list[int]] = []  # one list for each file
        self.unseen: list[int] = []  # tokens of each file that is too long

    def add(self, number: int, source: str) -> None:
        """Add a file, if Python can parse it."""
        from ksparse.evals.probing.python_labels import labels

        found = self.lm.tokenizer(
            source, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = found["input_ids"][:_PER_FILE], found["offset_mapping"][:_PER_FILE]
        try:
            own = labels(source, offsets)
        except ValueError:
            return  # a test of the parser itself, most likely
        if not self.head:
            own[:: self.acts.context] = -1  # the first position of a context is no activation
        if len(found["input_ids"]) > _PER_FILE:
            self.unseen.append(len(found["input_ids"]) - _PER_FILE)
        self.labels.append(own)
        self.documents.append(np.full(len(ids), number))
        self.tokens.append(ids)
        self.size += len(ids)

    def activations(self, needed: np.ndarray, observe: Progress) -> Tensor:
        """Return x[m, d] of the tokens numbered `needed`, in order."""
        xs = []
        for rows, number in self._batches():
            x = self.lm.acts(rows, torch.ones_like(rows, dtype=torch.bool))[:, len(self.head) :]
            here = torch.from_numpy(np.isin(number, needed)).to(x.device)
            xs.append(x[here].clone())
            observe("reading Python source", int(number.max()) + 1, self.size)
        return torch.cat(xs)

    def _batches(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield contexts [b, t] and the number of each token after the head, -1 for padding, in the
        order of the numbers."""
        room, at = self.acts.context - len(self.head), 0
        group: list[tuple[list[int], int]] = []
        for ids in self.tokens:
            group += [(ids[first : first + room], at + first) for first in range(0, len(ids), room)]
            at += len(ids)
            while len(group) >= self.acts.lm_batch:
                yield self._stacked(group[: self.acts.lm_batch], room)
                group = group[self.acts.lm_batch :]
        if group:
            yield self._stacked(group, room)

    def _stacked(self, group: list[tuple[list[int], int]], room: int) -> tuple[Tensor, np.ndarray]:
        tokens = np.full((len(group), room), 0)
        number = np.full((len(group), room), -1)
        for i, (ids, first) in enumerate(group):
            tokens[i, : len(ids)], number[i, : len(ids)] = ids, np.arange(first, first + len(ids))
        head = np.tile(np.array(self.head, dtype=np.int64), (len(group), 1))
        return torch.from_numpy(np.concatenate([head, tokens], 1)).to(self.lm.device), number
