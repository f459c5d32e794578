"""Held-out text in batches, with what the LM and an SAE compute on each batch.

Quantities are computed when first read and then kept for the life of the batch, so metrics and
SAEs share one run of the LM. Letters in shapes: b contexts of t tokens, m kept activations, p
predictions whose loss is measured, v tokens of vocabulary, d = d_model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksparse import progress
from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Context, Corpus
from ksparse.errors import InputError, NonFiniteError
from ksparse.evals.losses import Compared, compare, cross_entropy
from ksparse.evals.statistics import count_of
from ksparse.limits import LOGITS_BYTES
from ksparse.lm.head import LogitRows, Logits
from ksparse.lm.model import LM, CachedRun
from ksparse.lm.provenance import acts_to_read
from ksparse.lm.tokens import TokenBatch
from ksparse.planning.evaluation import MEAN_BATCHES, READING_MEAN
from ksparse.sae.model import SAE, Code
from ksparse.sae.normalization import Normalized


class Memo:
    """Keeps values that do not depend on the SAE, for all metrics and SAEs to share."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the value under a key, calling `make` for it the first time."""
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]


class HeldOutBatch(Memo):
    """A batch of contexts and what the LM computes on it, without any SAE."""

    def __init__(self, lm: LM, corpus: Corpus, contexts: TokenBatch):
        super().__init__()
        self.lm, self.corpus, self.contexts = lm, corpus, contexts
        self._clean_losses: Tensor | None = None
        self._waiting: list[weakref.ref[SAEBatch]] = []
        self._spliced: weakref.WeakKeyDictionary[SAEBatch, SplicedLosses] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def keep(self) -> Tensor:
        """Mask [b, t] of the positions whose activations are evaluated and replaced."""
        return self.contexts.keep

    @property
    def documents(self) -> Tensor:
        """The document of each kept activation, [m]."""
        return self.contexts.documents[self.keep]

    @cached_property
    def cached_run(self) -> CachedRun:
        """A run of the unchanged LM through all its layers."""
        return self.lm.run_with_cache(self.contexts.tokens, self.contexts.attention)

    @cached_property
    def x(self) -> Tensor:
        """The kept raw activations [m, d].

        Raises:
            NonFiniteError: if one of them is NaN or infinite; the message names its document.
        """
        if "cached_run" in self.__dict__:  # the full run has the activations: no need for another
            activations = self.cached_run.x
        else:
            activations = self.lm.acts(self.contexts.tokens, self.contexts.attention)
        x = activations[self.keep]
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            document = int(self.documents[bad][0])
            raise NonFiniteError(
                f"activations at {self.lm.options.site} are NaN or infinite in document "
                f"{self.corpus.names[document]!r}"
            )
        return x

    def _predict(self, rows: Tensor) -> Logits:
        """Return the LM's logits with other activations in place of the kept ones: raw rows [m, d],
        or one [d] for all positions."""

        def replace(x: Tensor) -> Tensor:
            x = x.clone()
            x[self.keep] = rows.expand(int(self.keep.sum()), -1)
            return x

        return self.lm.predict_patched(self.cached_run, replace)

    @cached_property
    def predicted(self) -> Tensor:
        """Mask [b, t - 1] of the p predictions whose loss is measured.

        These are the positions whose own activation is kept and whose next token is text.
        """
        return self.keep[:, :-1] & self.keep[:, 1:]

    @property
    def predicted_documents(self) -> Tensor:
        """The document of each measured prediction, [p]."""
        return self.contexts.documents[:, :-1][self.predicted]

    @cached_property
    def _scored(self) -> Tensor:
        """`predicted` as a mask [b, t] of positions that have logits."""
        return torch.nn.functional.pad(self.predicted, (0, 1))

    @cached_property
    def _targets(self) -> Tensor:
        """The next token of each measured prediction, [p]."""
        return self.contexts.tokens[:, 1:][self.predicted]

    @property
    def clean_losses(self) -> Tensor:
        """Losses [p] of the unchanged LM, in nats."""
        if self._clean_losses is None and self._waiting:
            self._splice_all()
        if self._clean_losses is None:
            self._clean_losses = self._losses(self.cached_run.predictions)
        return self._clean_losses

    @cached_property
    def zero_losses(self) -> Tensor:
        """Losses [p] with zeros in place of the kept activations."""
        return self.losses_with(torch.zeros(self.lm.d_model, device=self.lm.device))

    def losses_with(self, rows: Tensor) -> Tensor:
        """Return the losses [p] with other activations.

        Args:
            rows: raw activations [m, d], or one [d] for all positions.
        """
        return self._losses(self._predict(rows))

    def splice(self, batch: SAEBatch) -> SplicedLosses:
        """Return the losses with an SAE's reconstructions, and the KL to the unchanged LM.

        They are computed for all SAEs of this batch together, because the logits of the unchanged
        LM, which each needs, cost more than all else.
        """
        if batch not in self._spliced:
            self._splice_all()
        return self._spliced[batch]

    def add(self, batch: SAEBatch) -> None:
        """Compute the spliced losses of an SAE together with those of the others, when asked."""
        self._waiting.append(weakref.ref(batch))  # a batch and its SAEs must not keep each other

    def _splice_all(self) -> None:
        """Compute the spliced losses of all SAEs that wait for theirs, and the clean losses."""
        waiting = [batch for reference in self._waiting if (batch := reference())]
        self._waiting = []
        group: list[tuple[SAEBatch, LogitRows]] = []
        while waiting:
            batch = waiting.pop(0)
            rows = batch.inputs.restore(batch.recon)
            group.append((batch, self._predict(rows).at(self._scored)))
            held = sum(changed.nbytes for _, changed in group)
            # A quarter of the bytes that are left to logits; whole logits are not kept twice.
            if not waiting or not self.lm.head_runs_alone or held > LOGITS_BYTES // 4:
                self._splice_group(group)
                group = []

    def _splice_group(self, group: list[tuple[SAEBatch, LogitRows]]) -> None:
        before, targets = self.cached_run.predictions.at(self._scored), self._targets
        found: list[list[Compared]] = [[] for _ in group]
        for rows in before.slices():
            clean = before[rows]
            for (_, changed), parts in zip(group, found, strict=True):
                parts.append(compare(clean, changed[rows], targets[rows]))
        nothing = torch.zeros(0, dtype=torch.float64)
        for (batch, _), parts in zip(group, found, strict=True):
            clean_losses, losses, kl = (
                torch.cat([nothing, *(part[column] for part in parts)]) for column in range(3)
            )
            self._clean_losses = clean_losses
            self._spliced[batch] = SplicedLosses(losses, kl)

    def _losses(self, predictions: Logits) -> Tensor:
        logits, targets = predictions.at(self._scored), self._targets
        nothing = torch.zeros(0, dtype=torch.float64)
        return torch.cat(
            [nothing, *(cross_entropy(logits[rows], targets[rows]) for rows in logits.slices())]
        )


class SplicedLosses(NamedTuple):
    """Losses [p] with reconstructions spliced in, and KL(unchanged || spliced) [p], in nats.

    Float64 on the CPU, as all losses here.
    """

    losses: Tensor
    kl: Tensor


class SAEBatch:
    """A held-out batch as one SAE encodes and reconstructs it."""

    def __init__(self, sae: SAE, held_out: HeldOutBatch):
        self.sae, self.held_out = sae, held_out
        held_out.add(self)

    @cached_property
    def code(self) -> Code:
        """Codes of the kept activations, [m, k]."""
        return self.sae.encode(self.held_out.x)

    @cached_property
    def inputs(self) -> Normalized:
        """The kept activations as the SAE's normalized inputs, [m, d]."""
        return self.sae.normalize(self.held_out.x)

    @cached_property
    def recon(self) -> Tensor:
        """Reconstructions of the normalized inputs, [m, d]."""
        return self.sae.decode_normalized(self.code)

    @cached_property
    def spliced(self) -> SplicedLosses:
        """The LM's losses with reconstructions in place of the kept activations."""
        return self.held_out.splice(self)

    def losses_with(self, recon: Tensor) -> Tensor:
        """Return the losses [p] with other reconstructions [m, d] of the normalized inputs."""
        return self.held_out.losses_with(self.inputs.restore(recon))

    @cached_property
    def code_grid(self) -> Code:
        """Codes by position, [b, t, k]: values of 0 and indices of -1 where nothing is kept."""
        keep = self.held_out.keep
        shape = (*keep.shape, self.code.values.shape[1])
        values, indices = self.code.values.new_zeros(shape), self.code.indices.new_full(shape, -1)
        values[keep], indices[keep] = self.code
        return Code(values, indices)


class HeldOut(Memo):
    """The held-out text of an LM. Iterating over it starts a new `HeldOutPass`.

    Args:
        lm: the LM, with its site.
        acts: the text, and how it is cut into contexts.
        options: the split, and how many tokens to read.
    """

    has_text = True

    def __init__(self, lm: LM, acts: ActsConfig, options: EvalConfig):
        super().__init__()
        acts = dataclasses.replace(acts, lm_batch=acts.lm_batch or ActsConfig.lm_batch)
        self.lm, self.acts, self.options = lm, acts, options
        self.corpus = Corpus(acts, lm.tokenizer, options.split, per_document=options.per_document)
        self.d_model, self.device, self.vocab = lm.d_model, lm.device, lm.vocab
        self.context = acts.context

    def __iter__(self) -> Iterator[HeldOutBatch]:
        return iter(HeldOutPass(self))

    def start_pass(self) -> HeldOutPass:
        """Return a new pass over the text."""
        return HeldOutPass(self)

    def policy(self) -> dict[str, Any]:
        """Return what decides which activations are used."""
        return self.corpus.policy()

    def mean_activation(self) -> Tensor:
        """Return the mean raw activation [d] of the first batches; computed once.

        Raises:
            InputError: if the split has no text.
        """
        return self.once("mean activation", self._mean_activation)

    def _mean_activation(self) -> Tensor:
        total, count = torch.zeros(self.lm.d_model, dtype=torch.float64), 0
        batch_tokens = self.acts.lm_batch * self.acts.context
        batches = min(MEAN_BATCHES, math.ceil(self.options.tokens / batch_tokens))
        progress.report(READING_MEAN, 0, batches)
        for number, batch in enumerate(itertools.islice(self, MEAN_BATCHES), 1):
            total += batch.x.cpu().double().sum(0)
            count += len(batch.x)
            progress.report(READING_MEAN, min(number, batches), batches)
        progress.report(READING_MEAN, batches, batches)  # also where the text is shorter
        if not count:
            raise self.nothing()
        return (total / count).float().to(self.lm.device)

    def nothing(self) -> InputError:
        """Return the error for a split without text."""
        return InputError(
            f"text {self.acts.text!r} has nothing to evaluate on in its split "
            f"{self.options.split!r}; "
            "give more text, or another with --text"
        )


class HeldOutPass:
    """One pass over the held-out text, and how much of it has been read so far.

    Attributes:
        tokens: kept activations read.
        contexts: contexts read.
        documents: the documents that these activations come from.
    """

    def __init__(self, data: HeldOut):
        self.data = data
        self.tokens, self.contexts = 0, 0
        self.documents: set[int] = set()

    def __iter__(self) -> Iterator[HeldOutBatch]:
        """Yield batches until `options.tokens` activations are read, or the text ends.

        Contexts are whole: the last batch has as many of them as are needed, at least one.
        """
        data = self.data
        group: list[Context] = []
        for context in data.corpus.contexts():
            if context.start.epoch:
                break
            group.append(context)
            if len(group) == data.acts.lm_batch:
                yield self._batch(group)
                group = []
            if self.tokens >= data.options.tokens:
                return
        if group:
            yield self._batch(group)

    def _batch(self, group: list[Context]) -> HeldOutBatch:
        contexts = self.data.corpus.batch(group)
        read = self.tokens + contexts.keep.sum(1).cumsum(0)
        needed = int((read < self.data.options.tokens).sum()) + 1
        if needed < len(group):
            group = group[:needed]
            contexts = self.data.corpus.batch(group)
        self.tokens += int(contexts.keep.sum())
        self.contexts += len(group)
        self.documents |= set(contexts.documents[contexts.keep].tolist())
        return HeldOutBatch(self.data.lm, self.data.corpus, self.data.lm.on_device(contexts))

    def notes(self) -> list[str]:
        """Return remarks on the text that was read, for the results that come from it."""
        corpus, documents = self.data.corpus, len(self.documents)
        notes = []
        if documents < 10:
            few = count_of(documents, "documents")
            notes.append(f"only {few}: the standard errors are rough")
        if corpus.cut_documents:
            notes.append(
                f"{corpus.cut_documents:,} of {max(documents, corpus.cut_documents):,} "
                f"documents are longer than the limit of {self.data.options.per_document:,} tokens "
                f"(per_document); {corpus.cut_tokens:,} of their tokens were not seen"
            )
        return notes


def acts_of(sae: SAE, lm: LM, options: EvalConfig) -> ActsConfig:
    """Return the activations to evaluate an SAE on.

    They have the text, contexts and positions that the SAE was trained with, on the given LM;
    `options.text` replaces the text.
    """
    acts = acts_to_read(sae.metadata, lm)
    return dataclasses.replace(acts, text=options.text) if options.text else acts
