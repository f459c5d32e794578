"""Which texts of a source become the rows of a task: balanced, one of each group, by a hash and so
whatever their order.

A text's rank is a hash of (seed, task, text). Of each group (the texts made from one question) one
label is taken, decided by the group's own hash, and of its texts the one of lowest rank. Of each
label the lowest ranks are taken, as evenly as possible from each kind.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ksparse.errors import InputError
from ksparse.evals.probing.suites.folder import LEAST


class Pair(NamedTuple):
    """A text and its label; texts of one `group` exclude one another, `kind`s are to be equally
    frequent within a label."""

    text: str
    label: int
    group: str = ""
    kind: str = ""


class TaskCandidate(NamedTuple):
    """A text that may be taken; label -1: the source gives it both labels."""

    rank: int
    text: str
    label: int
    kind: str


def rank(*parts: str | int) -> int:
    """Return 64 bits that depend on nothing but the parts."""
    return int.from_bytes(
        hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()[:8],
        "big",
    )


class TaskSample:
    """The candidates of one task so far: candidates[group][text]."""

    def __init__(self, name: str, rows: int, seed: int):
        self.name, self.rows, self.seed = name, rows, seed
        self.candidates: dict[str, dict[str, TaskCandidate]] = {}
        self.room = max(
            40_000, 40 * rows
        )  # more than that comes only from running text, where a text has one label

    def add(self, pairs: Iterable[Pair]) -> None:
        """Take in what a template made of one row."""
        for pair in pairs:
            text = pair.text.strip()
            if not text or any("\ud800" <= character <= "\udfff" for character in text):
                continue
            group = self.candidates.setdefault(pair.group or text, {})
            known = group.get(text)
            label = pair.label if known is None or known.label == pair.label else -1
            group[text] = TaskCandidate(rank(self.seed, self.name, text), text, label, pair.kind)
        if len(self.candidates) > self.room:
            self._forget()

    def _forget(self) -> None:
        """Keep only the groups that could still be taken: the lowest ranks of each label and
        kind."""
        kept = {
            candidate.text
            for chosen in self._by_kind().values()
            for candidates in chosen.values()
            for candidate in candidates[: self.rows]
        }
        self.candidates = {
            name: group for name, group in self.candidates.items() if not kept.isdisjoint(group)
        }

    def _chosen(self) -> Iterator[TaskCandidate]:
        """Yield one candidate of each group."""
        for name, group in self.candidates.items():
            usable = [candidate for candidate in group.values() if candidate.label >= 0]
            wanted = rank(self.seed, self.name, "label", name) & 1
            if usable:
                yield min(
                    usable,
                    key=lambda candidate: (
                        candidate.label != wanted,
                        candidate.rank,
                        candidate.text,
                    ),
                )

    def _by_kind(self) -> dict[int, dict[str, list[TaskCandidate]]]:
        found: dict[int, dict[str, list[TaskCandidate]]] = {
            0: defaultdict(list),
            1: defaultdict(list),
        }
        seen: dict[str, int] = {}
        for candidate in sorted(self._chosen()):
            if candidate.text not in seen:  # the same text can be in two groups
                seen[candidate.text] = candidate.label
                found[candidate.label][candidate.kind].append(candidate)
        return found

    def draw(self) -> list[Pair]:
        """Return at most `rows` pairs, half of each label, in the order of their ranks; raise
        InputError if there are too few."""
        found = self._by_kind()
        available = {label: sum(map(len, kinds.values())) for label, kinds in found.items()}
        each = min(self.rows // 2, *available.values())
        if each < LEAST:
            raise InputError(
                f"too few texts: {available[1]} with the label 1 and {available[0]} with the label "
                "0; "
                f"at least {LEAST} of each are needed"
            )
        taken = [
            candidate
            for kinds in found.values()
            for candidate in _evenly(list(kinds.values()), each)
        ]
        return [Pair(candidate.text, candidate.label) for candidate in sorted(taken)]


def _evenly(kinds: list[list[TaskCandidate]], number: int) -> list[TaskCandidate]:
    """Take `number` from the kinds in turn; where one runs out, the others give more."""
    turns = sorted(
        (turn, candidate) for candidates in kinds for turn, candidate in enumerate(candidates)
    )
    return [candidate for _, candidate in turns[:number]]
