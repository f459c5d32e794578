"""Choose which texts of a source become the rows of a task, whatever order they come in.

A text's rank is a hash of (seed, task, text). A group is the texts made from one question. Its hash
decides which label it gives, and of its texts with that label the one of lowest rank is taken. For
each label the lowest ranks are taken, as evenly as possible from all strata.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ksparse.errors import InputError
from ksparse.evals.probing.suites.folder import LEAST


class LabelledText(NamedTuple):
    """A text with its label, 0 or 1.

    Attributes:
        text: The text.
        label: Its label.
        group: At most one text of a group is taken.
        stratum: Within a label, all strata become equally frequent.
    """

    text: str
    label: int
    group: str = ""
    stratum: str = ""


class TaskCandidate(NamedTuple):
    """A text that may be taken; its label is -1 if the source gives it both labels."""

    rank: int
    text: str
    label: int
    stratum: str


def stable_hash(*parts: str | int) -> int:
    """Return 64 bits of SHA-256 that depend on the parts alone."""
    data = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


class TaskSample:
    """The texts of one task collected so far, candidates[group][text], and the draw from them."""

    def __init__(self, name: str, rows: int, seed: int):
        self.name, self.rows, self.seed = name, rows, seed
        self.candidates: dict[str, dict[str, TaskCandidate]] = {}
        # Only running text gives more groups than this, and there a text has a single label.
        self.max_groups = max(40_000, 40 * rows)

    def add(self, texts: Iterable[LabelledText]) -> None:
        """Collect the texts that a template made from one row."""
        for labelled in texts:
            text = labelled.text.strip()
            if not text or any("\ud800" <= character <= "\udfff" for character in text):
                continue
            group = self.candidates.setdefault(labelled.group or text, {})
            known = group.get(text)
            label = labelled.label if known is None or known.label == labelled.label else -1
            rank = stable_hash(self.seed, self.name, text)
            group[text] = TaskCandidate(rank, text, label, labelled.stratum)
        if len(self.candidates) > self.max_groups:
            self._prune()

    def _prune(self) -> None:
        """Keep the groups that can still be taken: the lowest ranks of each label and stratum."""
        kept = {
            candidate.text
            for strata in self._by_label().values()
            for candidates in strata.values()
            for candidate in candidates[: self.rows]
        }
        self.candidates = {
            name: group for name, group in self.candidates.items() if not kept.isdisjoint(group)
        }

    def _one_per_group(self) -> Iterator[TaskCandidate]:
        """Yield the candidate that each group gives."""
        for name, group in self.candidates.items():
            usable = [candidate for candidate in group.values() if candidate.label >= 0]
            preferred = stable_hash(self.seed, self.name, "label", name) & 1
            if usable:
                yield min(
                    usable,
                    key=lambda candidate: (
                        candidate.label != preferred,
                        candidate.rank,
                        candidate.text,
                    ),
                )

    def _by_label(self) -> dict[int, dict[str, list[TaskCandidate]]]:
        """Return the candidates of each label and stratum, by rank; a text once."""
        by_label: dict[int, dict[str, list[TaskCandidate]]] = {
            0: defaultdict(list),
            1: defaultdict(list),
        }
        texts: set[str] = set()
        for candidate in sorted(self._one_per_group()):
            if candidate.text not in texts:  # the same text can be in two groups
                texts.add(candidate.text)
                by_label[candidate.label][candidate.stratum].append(candidate)
        return by_label

    def draw(self) -> list[LabelledText]:
        """Return at most `rows` texts, half of each label, in the order of their ranks.

        Raises:
            InputError: There are fewer than `LEAST` texts of a label.
        """
        by_label = self._by_label()
        available = {label: sum(map(len, strata.values())) for label, strata in by_label.items()}
        per_label = min(self.rows // 2, *available.values())
        if per_label < LEAST:
            raise InputError(
                f"too few texts: {available[1]} with the label 1 and {available[0]} with the label "
                "0; "
                f"at least {LEAST} of each are needed"
            )
        taken = [
            candidate
            for strata in by_label.values()
            for candidate in _take_in_turn(list(strata.values()), per_label)
        ]
        return [LabelledText(candidate.text, candidate.label) for candidate in sorted(taken)]


def _take_in_turn(strata: list[list[TaskCandidate]], number: int) -> list[TaskCandidate]:
    """Take `number` from the strata in turn; where one runs out, the others give more."""
    turns = sorted(
        (turn, candidate) for candidates in strata for turn, candidate in enumerate(candidates)
    )
    return [candidate for _, candidate in turns[:number]]
