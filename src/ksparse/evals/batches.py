"""TODO ksparse.evals.batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.errors import InputError, NonFiniteError
from ksparse.lm.model import LM, CachedRun
from ksparse.lm.provenance import read_with
from ksparse.lm.tokens import TokenBatch
from ksparse.sae.model import SAE, Code
from ksparse.sae.normalization import Normalized

_FOR_MEAN = 16  # batches


class _Memo:
    """Holds what does not depend on the SAE, made for the first that asks."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what was made under this key, or make it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class HeldOutBatch(_Memo):
    """A batch of contexts and what the LM makes of it, each computed when it is first asked for."""

    def __init__(self, lm: LM, corpus: Corpus, contexts: TokenBatch):
        super().__init__()
        self.lm, self.corpus, self.contexts = lm, corpus, contexts

    @property
    def keep(self) -> Tensor:
        """[b, t]: where the activation is looked at and replaced."""
        return self.contexts.keep

    @property
    def documents(self) -> Tensor:
        """The document of each kept activation, [m]."""
        return self.contexts.documents[self.keep]

    @cached_property
    def watched(self) -> CachedRun:
        """The unchanged LM's whole run."""
        return self.lm.watch(self.contexts.tokens, self.contexts.attention)

    @property
    def logits(self) -> Tensor:
        """[b, t, v] of the unchanged LM."""
        return self.watched.logits

    @cached_property
    def x(self) -> Tensor:
        """Kept raw activations [m, d]."""
        whole = (
            "watched" in self.__dict__
        )  # the whole run has been asked for, so that the site need not be read again
        x = (
            self.watched.x if whole else self.lm.acts(self.contexts.tokens, self.contexts.attention)
        )[self.keep]
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            document = int(self.documents[bad][0])
            raise NonFiniteError(
                f"activations at {self.lm.options.site} are NaN or infinite in document "
                f"{self.corpus.names[document]!r}"
            )
        return x

    def spliced(self, rows: Tensor) -> Tensor:
        """Return logits [b, t, v] of the LM with rows[m, d] (or [d]) in place of the kept
        activations."""

        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[self.keep] = rows.expand(int(self.keep.sum()), -1)
            return x

        return self.lm.replay(self.watched, put)

    @cached_property
    def predicted(self) -> Tensor:
        """[b, t - 1]: whose loss is measured: the activation is kept and the next token is text."""
        return self.keep[:, :-1] & self.keep[:, 1:]

    @cached_property
    def clean(self) -> Tensor:
        """Log-probabilities [p, v] of the unchanged LM."""
        return self.log_probs(self.logits)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return log-probabilities [p, v] at the positions whose loss is measured."""
        return logits[:, :-1][self.predicted].float().log_softmax(-1)

    def losses(self, log_probs: Tensor) -> Tensor:
        """Return the loss of each measured position, [p], in nats."""
        return -log_probs.gather(1, self.contexts.tokens[:, 1:][self.predicted][:, None]).squeeze(1)

    @property
    def predicted_documents(self) -> Tensor:
        """The document of each measured position, [p]."""
        return self.contexts.documents[:, :-1][self.predicted]


class SplicedLosses(NamedTuple):
    """Of each measured position: the loss, and KL(unchanged || spliced), [p], in nats."""

    losses: Tensor
    kl: Tensor


class SAEBatch:
    """A batch as one SAE sees it."""

    def __init__(self, sae: SAE, held_out: HeldOutBatch):
        self.sae, self.held_out = sae, held_out

    @cached_property
    def code(self) -> Code:
        """Codes of the kept activations, [m, k]."""
        return self.sae.encode(self.held_out.x)

    @cached_property
    def inputs(self) -> Normalized:
        """The kept activations as the SAE's inputs, [m, d]."""
        return self.sae.normalize(self.held_out.x)

    @cached_property
    def recon(self) -> Tensor:
        """Reconstructions of the inputs, [m, d]."""
        return self.sae.decode_normalized(self.code)

    @cached_property
    def spliced(self) -> SplicedLosses:
        """What the LM loses with reconstructions in place of the kept activations."""
        clean, log_probs = (
            self.held_out.clean,
            self.held_out.log_probs(self.held_out.spliced(self.inputs.restore(self.recon))),
        )
        return SplicedLosses(
            self.held_out.losses(log_probs), (clean.exp() * (clean - log_probs)).sum(-1)
        )

    def losses_with(self, recon: Tensor) -> Tensor:
        """Return the losses [p] of the LM with recon[m, d], of the inputs, in place of the kept
        activations."""
        return self.held_out.losses(
            self.held_out.log_probs(self.held_out.spliced(self.inputs.restore(recon)))
        )

    @cached_property
    def code_grid(self) -> Code:
        """Codes of whole contexts, [b, t, k]; where nothing is kept, values of 0 and indices of
        -1."""
        shape = (*self.held_out.keep.shape, self.code.values.shape[1])
        values, indices = self.code.values.new_zeros(shape), self.code.indices.new_full(shape, -1)
        values[self.held_out.keep], indices[self.held_out.keep] = self.code
        return Code(values, indices)


class HeldOut(_Memo):
    """The held-out text of an LM, as batches."""

    def __init__(self, lm: LM, acts: ActsConfig, options: EvalConfig):
        super().__init__()
        self.lm, self.acts, self.options = lm, acts, options
        self.corpus = Corpus(acts, lm.tokenizer, options.split, per_document=options.per_document)
        self.tokens, self.contexts = 0, 0  # of the last pass
        self.documents: set[int] = set()

    def __iter__(self) -> Iterator[HeldOutBatch]:
        """Yield batches until there are enough tokens, or the text ends."""
        self.tokens, self.contexts, self.documents = 0, 0, set()
        group: list = []
        for context in self.corpus.contexts():
            if context.start.epoch:
                break
            group.append(context)
            if len(group) == self.acts.lm_batch:
                yield self._batch(group)
                group = []
            if self.tokens >= self.options.tokens:
                return
        if group:
            yield self._batch(group)

    def _batch(self, group: list) -> HeldOutBatch:
        contexts = self.corpus.batch(group)
        self.tokens, self.contexts = (
            self.tokens + int(contexts.keep.sum()),
            self.contexts + len(group),
        )
        self.documents |= set(contexts.documents[contexts.keep].tolist())
        return HeldOutBatch(self.lm, self.corpus, self.lm.on_device(contexts))

    @cached_property
    def mean(self) -> Tensor:
        """The mean activation [d] of the first batches."""
        batches = (batch.x.cpu().double() for batch, _ in zip(self, range(_FOR_MEAN)))
        sums = [(x.sum(0), len(x)) for x in batches]
        if not sum(count for _, count in sums):
            raise self.nothing()
        total = sum((x for x, _ in sums), torch.zeros_like(sums[0][0]))
        return (total / sum(count for _, count in sums)).float().to(self.lm.device)

    def notes(self) -> list[str]:
        """Return what is to be said of the text of the last pass."""
        few = len(self.documents)
        notes = [f"only {few} documents: the standard errors are rough"] if few < 10 else []
        if self.corpus.cut_documents:
            notes.append(
                f"{self.corpus.cut_documents:,} of {max(few, self.corpus.cut_documents):,} "
                f"documents are longer than the limit of {self.options.per_document:,} tokens "
                f"(per_document); {self.corpus.cut_tokens:,} of their tokens were not seen"
            )
        return notes

    def nothing(self) -> InputError:
        return InputError(
            f"text {self.acts.text!r} has nothing to evaluate on in its split "
            f"{self.options.split!r}; "
            "give more text, or another with --text"
        )


def acts_of(sae: SAE, lm: LM, options: EvalConfig) -> ActsConfig:
    """Return the activations to evaluate on: the text and policy the SAE was trained with, on the
    given LM."""
    acts = read_with(sae.metadata, lm)
    return dataclasses.replace(acts, text=options.text) if options.text else acts
