"""TODO ksparse.data.contexts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ksparse.config import ActsConfig
from ksparse.data.documents import documents
from ksparse.errors import InputError
from ksparse.lm.tokens import TokenBatch, without_bos
from ksparse.pylm.text import SPLITS


class TextCursor(NamedTuple):
    """Where the next context begins: the token `offset` (separator included) of document `index`,
    in pass `epoch`."""

    epoch: int = 0
    index: int = 0  # type: ignore[assignment]  # hides the method of a tuple
    offset: int = 0


class Context(NamedTuple):
    """One row: its tokens[t], the document of each (-1: padding), where it began, and where the
    next one begins."""

    tokens: list[int]
    documents: list[int]
    start: TextCursor
    next: TextCursor


class Corpus:
    """One split of a text as contexts of tokens, from any place on, again and again."""

    def __init__(
        self, acts: ActsConfig, tokenizer: Any, split: str, *, per_document: int | None = None
    ):
        """per_document: use so many tokens of each document, so that a short evaluation sees many.

        cut_documents and cut_tokens say how many documents that has cut so far, and how many of
        their tokens are never seen.
        """
        if split not in SPLITS:
            raise InputError(f"split {split!r} does not exist; there are {', '.join(SPLITS)}")
        self.acts, self.split, self.per_document = acts, split, per_document
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id if acts.bos == "auto" else None
        found = [
            i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None
        ]  # an id of 0 is an id
        self.separator = found[0] if found else None
        self.pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (found or [0])[0]
        )
        self.special = set(found)
        self.names: dict[int, str] = {}
        self._cut: dict[int, int] = {}  # tokens left out, by document: a second pass adds none

    @property
    def cut_documents(self) -> int:
        """Documents so far that have more than `per_document` tokens."""
        return len(self._cut)

    @property
    def cut_tokens(self) -> int:
        """Tokens of these documents that are left out."""
        return sum(self._cut.values())

    def policy(self) -> dict[str, Any]:
        """Return what decides which activations are used, to be saved with every number that
        depends on it."""
        return {
            "context": self.acts.context,
            "bos_token": self.bos,
            "separator_token": self.separator,
            "borders": self.acts.borders,
            "keep": self.acts.keep,
            "split": self.split,
            "tokens_per_document": self.per_document,
        }

    def contexts(self, start: TextCursor = TextCursor()) -> Iterator[Context]:
        """Yield contexts for ever, beginning anew with the next epoch where the text ends."""
        cut = self._packed if self.acts.borders == "pack" else self._split
        while True:
            found = False
            for context in cut(start):
                found = True
                yield context
            if not found and start == TextCursor(epoch=start.epoch):
                raise InputError(self._nothing())
            start = TextCursor(epoch=start.epoch + 1)

    def _nothing(self) -> str:
        total = sum(
            1 for split in SPLITS for _ in itertools.islice(documents(self.acts, split), 1000)
        )
        if not total:
            return f"text {self.acts.text!r} is empty: no document in it"
        return (
            f"text {self.acts.text!r} has no {self.acts.context}-token context in its split "
            f"{self.split!r} "
            f"({total if total < 1000 else 'many'} documents in all, divided by a hash of each: 85 "
            "% train, "
            "5 % validation, 10 % held-out); give more text, or a smaller --acts.context"
        )

    def _tokenized(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (index, ids) from document `start` on, without the border that each gets here."""
        source, packed = documents(self.acts, self.split, start), self.acts.borders == "pack"
        while group := list(itertools.islice(source, 32)):
            rows = self.tokenizer(
                [text for _, _, text in group], add_special_tokens=False, verbose=False
            )["input_ids"]
            for document, ids in zip(group, rows):
                self.names[document.index] = document.name
                ids = without_bos(ids, self.separator if packed else self.bos)
                if packed and ids and ids[-1] == self.separator:
                    ids = ids[:-1]  # the next document's separator does its work
                if self.per_document is not None and len(ids) > self.per_document:
                    self._cut[document.index] = len(ids) - self.per_document
                yield document.index, ids[: self.per_document]

    def _packed(self, start: TextCursor) -> Iterator[Context]:
        head = [] if self.bos is None else [self.bos]
        tokens: list[int] = []
        owners: list[int] = []
        began = start
        for index, ids in self._tokenized(start.index):
            if not ids:
                continue  # else two separators would follow one another
            ids = ids if self.separator is None else [self.separator, *ids]
            at = start.offset if index == start.index else 0
            while at < len(ids):
                if not tokens:
                    began = TextCursor(start.epoch, index, at)
                    if head and at == 0 and ids[0] == self.separator:
                        at = 1  # the context's own BOS does the separator's work
                    tokens, owners = [*head], [index] * len(head)
                taken = ids[at : at + self.acts.context - len(tokens)]
                tokens, owners, at = tokens + taken, owners + [index] * len(taken), at + len(taken)
                if len(tokens) == self.acts.context:
                    yield Context(tokens, owners, began, TextCursor(start.epoch, index, at))
                    tokens, owners = [], []

    def _split(self, start: TextCursor) -> Iterator[Context]:
        head = [] if self.bos is None else [self.bos]
        room = self.acts.context - len(head)
        for index, ids in self._tokenized(start.index):
            for at in range(start.offset if index == start.index else 0, len(ids), room):
                tokens = head + ids[at : at + room]
                if len(tokens) >= 3:  # fewer predict nothing from text
                    missing = self.acts.context - len(tokens)
                    owners = [index] * len(tokens) + [-1] * missing
                    yield Context(
                        tokens + [self.pad] * missing,
                        owners,
                        TextCursor(start.epoch, index, at),
                        TextCursor(start.epoch, index, at + room),
                    )

    def batch(self, contexts: list[Context]) -> TokenBatch:
        """Stack contexts into tensors, with the mask of padding (by place, not by id) and of what
        is kept."""
        tokens = torch.tensor([context.tokens for context in contexts])
        owners = torch.tensor([context.documents for context in contexts])
        attention = owners >= 0
        keep = attention.clone()
        if self.acts.keep == "text":
            keep[:, 0] = False
            for special in self.special:
                keep &= tokens != special
        return TokenBatch(tokens, attention, keep, owners)
