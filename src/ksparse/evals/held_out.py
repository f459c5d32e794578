"""One pass over held-out text that feeds every evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ksparse.acts.lm import LM, Watched
from ksparse.acts.text import Contexts, Corpus
from ksparse.errors import InputError, NonFiniteError
from ksparse.evals.options import EvalOptions
from ksparse.recipe import Acts
from ksparse.sae.model import SAE, Code


class Seen:
    """A batch of contexts and what the LM and the SAE make of them, each computed when it is first asked for."""

    def __init__(self, sae: SAE, lm: LM, corpus: Corpus, contexts: Contexts):
        self.sae, self.lm, self.corpus, self.contexts = sae, lm, corpus, contexts

    @property
    def keep(self) -> Tensor:
        """[b, t]: where the activation is looked at and replaced."""
        return self.contexts.keep

    @cached_property
    def watched(self) -> Watched:
        """The unchanged LM's whole run."""
        return self.lm.watch(self.contexts.tokens, self.contexts.attention)

    @property
    def logits(self) -> Tensor:
        """[b, t, v] of the unchanged LM."""
        return self.watched.logits

    @cached_property
    def x(self) -> Tensor:
        """Kept raw activations [m, d]."""
        whole = "watched" in self.__dict__  # the whole run has been asked for, so that the site need not be read again
        x = (self.watched.x if whole else self.lm.acts(self.contexts.tokens, self.contexts.attention))[self.keep]
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            document = self.documents[bad][0].item()
            raise NonFiniteError(f"activations at {self.lm.options.site} are NaN or infinite in document {self.corpus.names[document]!r}")
        return x

    @property
    def documents(self) -> Tensor:
        """The document of each kept activation, [m]."""
        return self.contexts.documents[self.keep]

    @cached_property
    def code(self) -> Code:
        """Codes of the kept activations, [m, k]."""
        return self.sae.encode(self.x)

    def spliced(self, rows: Tensor) -> Tensor:
        """Return logits [b, t, v] of the LM with rows[m, d] (or [d]) in place of the kept activations."""
        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[self.keep] = rows.expand(int(self.keep.sum()), -1)
            return x

        return self.lm.replay(self.watched, put)


class HeldOut:
    """The held-out text of an SAE, as batches."""

    def __init__(self, sae: SAE, lm: LM, options: EvalOptions):
        if lm.d_model != sae.shape.d_model:
            raise InputError(f"the SAE is for d_model = {sae.shape.d_model}, {lm.options.lm} has {lm.d_model} at {lm.options.site}; "
                             f"the SAE was trained on {sae.metadata.get('acts', {}).get('lm', 'an unknown LM')}"
                             f" at {sae.metadata.get('acts', {}).get('site', 'an unknown site')}")
        self.sae, self.lm, self.options = sae, lm, options
        self.acts = acts_of(sae, lm, options)
        self.corpus = Corpus(self.acts, lm.tokenizer, options.split, per_document=options.per_document)

    def __iter__(self) -> Iterator[Seen]:
        """Yield batches until there are enough tokens, or the text ends."""
        kept, group = 0, []
        for context in self.corpus.contexts():
            if context.start.epoch:
                break
            group.append(context)
            if len(group) == self.acts.lm_batch:
                seen, group = self._seen(group), []
                yield seen
                kept += int(seen.keep.sum())
            if kept >= self.options.tokens:
                return
        if group:
            yield self._seen(group)

    def _seen(self, group: list) -> Seen:
        return Seen(self.sae, self.lm, self.corpus, self.lm.on_device(self.corpus.batch(group)))


def acts_of(sae: SAE, lm: LM, options: EvalOptions) -> Acts:
    """Return the activations to evaluate on: the text and policy the SAE was trained with, on the given LM."""
    own = sae.metadata.get("acts")
    acts = Acts(**own) if own else lm.options
    acts = dataclasses.replace(acts, lm=lm.options.lm, site=lm.options.site, lm_batch=lm.options.lm_batch)
    return dataclasses.replace(acts, text=options.text) if options.text else acts
