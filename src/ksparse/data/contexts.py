"""Cut a text into contexts: rows of `acts.context` tokens that the LM reads.

- borders = 'pack': documents follow one another, with a separator between them (BOS, otherwise EOS,
  otherwise nothing). borders = 'split': each context belongs to one document and is padded at its
  end.
- bos = 'auto': position 0 is the tokenizer's BOS, if it has one. A document that brings its own BOS
  or separator gets no second one.
- shuffle_tokens: the text tokens of each context are put in another order.
- chat = 'template': documents are conversations, rendered by the tokenizer's chat template; what
  the template writes, and contents of roles that are not asked for, are not used (`lm.chat`). Each
  conversation brings its own marks, so a separator is put between two only if it is BOS.
- keep = 'text': activations are not used at position 0, whether or not it is BOS (in a model
  without BOS the first token takes its role), at BOS, EOS and separators, and at padding.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ksparse.config import ActsConfig
from ksparse.data.documents import Document, documents
from ksparse.data.permutation import permutation
from ksparse.errors import InputError
from ksparse.lm.chat import ChatTemplate, Conversation, EncodedChat
from ksparse.lm.tokens import TokenBatch, without_bos
from ksparse.pylm.text import SPLITS

_TOKENIZED_TOGETHER = 32
"""Documents given to the tokenizer in one call."""
_LEAST_TOKENS = 3
"""Tokens of the shortest context with borders = 'split': fewer predict nothing from text."""
_MAX_UNKEPT = 1000
"""Conversations in a row without a token to keep, before the roles are given up."""
_log = logging.getLogger("ksparse")


class TextCursor(NamedTuple):
    """Where a context begins in a text that is read again and again."""

    epoch: int = 0
    """How often the text has been read."""
    index: int = 0  # type: ignore[assignment]  # hides the method of a tuple
    """The number of the document."""
    offset: int = 0
    """The number of the token in the document, its separator included."""


class Context(NamedTuple):
    """One row of tokens."""

    tokens: list[int]
    documents: list[int]
    """The document of each token; -1 for padding."""
    start: TextCursor
    next: TextCursor
    """Where the next context begins."""
    kept: list[bool] | None = None
    """Of a conversation: which tokens are contents of a role that is kept."""


class _Tokens(NamedTuple):
    """A document as token ids, without BOS and separators."""

    index: int  # type: ignore[assignment]  # hides the method of a tuple
    ids: list[int]
    kept: list[bool] | None


class Corpus:
    """One split of a text as contexts of tokens, from any position on, epoch after epoch.

    Args:
        acts: The source and how it is cut.
        tokenizer: Of the transformers library.
        split: 'train', 'validation' or 'held-out'.
        per_document: Use at most this many tokens of each document, so that a short evaluation sees
            many documents.

    Attributes:
        names: The name of each document read so far, by its index.
    """

    def __init__(
        self, acts: ActsConfig, tokenizer: Any, split: str, *, per_document: int | None = None
    ):
        if split not in SPLITS:
            raise InputError(f"split {split!r} does not exist; there are {', '.join(SPLITS)}")
        self.acts, self.split, self.per_document = acts, split, per_document
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id if acts.bos == "auto" else None
        # compared with None, since 0 is an id
        ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
        self.chat = (
            ChatTemplate(tokenizer, acts.roles, owner=acts.tokenizer or acts.lm)
            if acts.chat != "none"
            else None
        )
        self.separator = ends[0] if ends else None
        if self.chat and tokenizer.bos_token_id is None:
            self.separator = None  # the template itself ends what it writes
        self.pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
        )
        self.special = set(ends)
        self._is_told = False
        self._unkept = 0  # conversations in a row without a token to keep
        self.names: dict[int, str] = {}
        self._cut: dict[int, int] = {}  # tokens left out, by document: a second epoch adds none

    @property
    def cut_documents(self) -> int:
        """The number of documents so far with more than `per_document` tokens."""
        return len(self._cut)

    @property
    def cut_tokens(self) -> int:
        """The number of tokens of these documents that are left out."""
        return sum(self._cut.values())

    def policy(self) -> dict[str, Any]:
        """Return what decides which activations are used; saved with every number that depends on
        it."""
        return {
            "context": self.acts.context,
            "bos_token": self.bos,
            "separator_token": self.separator,
            "borders": self.acts.borders,
            "keep": self.acts.keep,
            "split": self.split,
            "tokens_per_document": self.per_document,
            **({"shuffle_tokens": True} if self.acts.shuffle_tokens else {}),
            **({"pretokenized": True} if self.acts.pretokenized else {}),
            **(
                {
                    "chat": self.acts.chat,
                    "chat_template": self.chat.digest,
                    "roles": list(self.acts.roles),
                }
                if self.chat
                else {}
            ),
        }

    def contexts(self, start: TextCursor = TextCursor()) -> Iterator[Context]:
        """Yield contexts forever; where the text ends, the next epoch begins.

        Raises:
            InputError: The split has not a single context.
        """
        cut = self._pack if self.acts.borders == "pack" else self._split
        while True:
            is_empty = True
            for context in cut(start):
                if context.kept is not None and not any(context.kept):
                    continue  # a long question or system prompt: the LM need not read it
                is_empty = False
                yield self._shuffled(context) if self.acts.shuffle_tokens else context
            if is_empty and start == TextCursor(epoch=start.epoch):
                raise InputError(self._describe_empty())
            start = TextCursor(epoch=start.epoch + 1)

    def batch(self, contexts: list[Context]) -> TokenBatch:
        """Stack contexts into tensors, with masks of padding (by position, not by id) and of the
        activations that are used."""
        tokens = torch.tensor([context.tokens for context in contexts])
        owners = torch.tensor([context.documents for context in contexts])
        attention = owners >= 0
        keep = attention.clone()
        if self.chat:
            keep &= torch.tensor([context.kept for context in contexts])
        if self.acts.keep == "text":
            keep[:, 0] = False
            for special in self.special:
                keep &= tokens != special
        return TokenBatch(tokens, attention, keep, owners)

    def _shuffled(self, context: Context) -> Context:
        """Return a context with its text tokens in another order, a function of where it begins.

        Each token takes its document along, and whether it is kept. BOS, separators and padding
        stay where they are.
        """
        places = [
            at
            for at, (token, owner) in enumerate(zip(context.tokens, context.documents))
            if owner >= 0 and token not in self.special
        ]
        order = permutation(np.arange(len(places)), len(places), context.start[1:])
        sources = list(range(len(context.tokens)))
        for at, source in zip(places, order.tolist()):
            sources[at] = places[source]
        return context._replace(
            tokens=[context.tokens[source] for source in sources],
            documents=[context.documents[source] for source in sources],
            kept=context.kept and [context.kept[source] for source in sources],
        )

    def _tokenize(self, start: int) -> Iterator[_Tokens]:
        """Yield the documents from number `start` on, without BOS or separator."""
        source, packed = documents(self.acts, self.split, start), self.acts.borders == "pack"
        while group := list(itertools.islice(source, _TOKENIZED_TOGETHER)):
            for document, (all_ids, kept) in zip(group, self._encode(group)):
                self.names[document.index] = document.name
                ids = without_bos(all_ids, self.separator if packed else self.bos)
                first, last = len(all_ids) - len(ids), len(all_ids)
                if packed and ids and ids[-1] == self.separator:
                    last -= 1  # the next document's separator follows
                if self.per_document is not None and last - first > self.per_document:
                    self._cut[document.index] = last - first - self.per_document
                    last = first + self.per_document
                yield _Tokens(document.index, all_ids[first:last], kept and kept[first:last])

    def _encode(self, group: list[Document]) -> Iterator[tuple[list[int], list[bool] | None]]:
        """Yield the ids of documents, and of conversations which of them are kept."""
        if self.chat:
            conversations = [document.chat for document in group if document.chat]
            found = self.chat.encode(conversations)
            self._tell_share(found)
            for chat, encoded in zip(conversations, found):
                self._check_roles(chat, encoded)
                yield encoded
        elif self.acts.pretokenized:
            for document in group:
                yield self._own_ids(document), None
        else:
            rows = self.tokenizer(
                [document.text for document in group], add_special_tokens=False, verbose=False
            )["input_ids"]
            for ids in rows:
                yield ids, None

    def _tell_share(self, found: list[EncodedChat]) -> None:
        """Log once how conversations are read and how much of them is kept."""
        if not self._is_told:
            self._is_told = True
            total = sum(len(chat.ids) for chat in found)
            kept = sum(sum(chat.kept) for chat in found)
            _log.info(
                "text %s: conversations are rendered by the tokenizer's chat template; tokens of "
                "%s are kept, %.0f %% of the first %d conversations",
                self.acts.text,
                ", ".join(self.acts.roles) or "all roles",
                100 * kept / max(1, total),
                len(found),
            )

    def _check_roles(self, chat: Conversation, encoded: EncodedChat) -> None:
        """Raise InputError where nothing is kept of many conversations in a row."""
        self._unkept = 0 if any(encoded.kept) else self._unkept + 1
        if self._unkept >= _MAX_UNKEPT:
            roles = dict.fromkeys(str(message["role"]) for message in chat.messages)
            raise InputError(
                f"{chat.where}: this and the {_MAX_UNKEPT - 1:,} conversations before it have no "
                f"token to keep; acts.roles is {list(self.acts.roles)}, its roles are "
                f"{', '.join(roles)}. Name these with --acts.roles"
            )

    def _own_ids(self, document: Document) -> list[int]:
        """Return the ids of a pretokenized document, without padding at its ends.

        Raises:
            InputError: An id is none of the tokenizer's.
        """
        ids = document.ids or []
        if ids and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
            wrong = next(i for i in ids if not 0 <= i < len(self.tokenizer))
            raise InputError(
                f"text {self.acts.text!r}, {document.name}: the token id {wrong} is none of the "
                f"{len(self.tokenizer):,} of the tokenizer of {self.acts.tokenizer or self.acts.lm}"
                "; the ids were made by another: give it with --acts.tokenizer, or the text itself"
            )
        pad, first, last = self.tokenizer.pad_token_id, 0, len(ids)
        while last > first and ids[last - 1] == pad:
            last -= 1
        while first < last and ids[first] == pad:
            first += 1
        return ids[first:last]

    def _pack(self, start: TextCursor) -> Iterator[Context]:
        head = [] if self.bos is None else [self.bos]
        tokens: list[int] = []
        owners: list[int] = []
        kept: list[bool] = []
        began = start
        for index, ids, marks in self._tokenize(start.index):
            if not ids:
                continue  # otherwise two separators would follow one another
            if self.separator is not None:
                ids, marks = [self.separator, *ids], marks and [False, *marks]
            at = start.offset if index == start.index else 0
            while at < len(ids):
                if not tokens:
                    began = TextCursor(start.epoch, index, at)
                    if head and at == 0 and ids[0] == self.separator:
                        at = 1  # the context's own BOS replaces the separator
                    tokens, owners = [*head], [index] * len(head)
                    kept = [False] * len(head)
                end = min(len(ids), at + self.acts.context - len(tokens))
                tokens, owners = tokens + ids[at:end], owners + [index] * (end - at)
                if marks is not None:
                    kept = kept + marks[at:end]
                at = end
                if len(tokens) == self.acts.context:
                    after = TextCursor(start.epoch, index, at)
                    yield Context(tokens, owners, began, after, kept if self.chat else None)
                    tokens, owners = [], []

    def _split(self, start: TextCursor) -> Iterator[Context]:
        head = [] if self.bos is None else [self.bos]
        room = self.acts.context - len(head)
        for index, ids, marks in self._tokenize(start.index):
            for at in range(start.offset if index == start.index else 0, len(ids), room):
                tokens = head + ids[at : at + room]
                if len(tokens) >= _LEAST_TOKENS:
                    padding = self.acts.context - len(tokens)
                    yield Context(
                        tokens + [self.pad] * padding,
                        [index] * len(tokens) + [-1] * padding,
                        TextCursor(start.epoch, index, at),
                        TextCursor(start.epoch, index, at + room),
                        None
                        if marks is None
                        else [False] * len(head) + marks[at : at + room] + [False] * padding,
                    )

    def _describe_empty(self) -> str:
        """Say why the split has no context."""
        total = sum(
            1 for split in SPLITS for _ in itertools.islice(documents(self.acts, split), 1000)
        )
        if not total:
            return f"text {self.acts.text!r} is empty: no document in it"
        cut = more = ""
        if self._cut:
            cut = f"; only the first {self.per_document:,} tokens of each are used"
            more = "or evaluate more of each document with a larger --per-document, "
        return (
            f"text {self.acts.text!r} has no {self.acts.context}-token context in its split "
            f"{self.split!r} ({total if total < 1000 else 'many'} documents in all, divided by a "
            f"hash of each: 85 % train, 5 % validation, 10 % held-out{cut}); give more text, "
            f"{more}or a smaller --acts.context"
        )
