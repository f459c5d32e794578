"""How many contexts to give the LM in one pass, by measurement (`acts.lm_batch = 0`).

Small passes stay in a processor's cache, large ones fill an accelerator; which is faster depends on
the LM and the machine. The choice changes activations by rounding only. It is made once for a run
and kept in the stream's cursor, so that a resumed run has the same bits.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence

import torch

from ksparse.data.contexts import Context, Corpus
from ksparse.lm.model import LM

SIZES = (4, 8, 16, 32, 64)
"""Contexts in a pass that are tried on a CPU."""
SIZES_ON_DEVICE = (16, 64, 256)
"""The same on an accelerator."""
_ROUNDS = 2
_GAIN = 0.97  # a larger size must take less than this share of the time, as it needs more memory
_log = logging.getLogger("ksparse")


def choose_lm_batch(lm: LM, corpus: Corpus, sites: Sequence[str] = ()) -> int:
    """Return the number of contexts in a pass: `acts.lm_batch`, or if that is 0 the fastest.

    Sizes are timed in turn on the first contexts of the text, each by its best time for a context;
    a size that does not fit into memory ends the trial.

    Args:
        lm: The LM, at its site.
        corpus: The text; its `acts.lm_batch` is what was asked for.
        sites: The sites that a pass reads; by default that of the LM.

    Example:
        >>> import dataclasses
        >>> import ksparse
        >>> from ksparse.config import ActsConfig
        >>> acts = ActsConfig(lm="pylm/0.3m", site="resid_post.1", lm_batch=0)
        >>> lm = ksparse.LM(acts=acts)
        >>> choose_lm_batch(lm, Corpus(acts, lm.tokenizer, "train")) in SIZES
        True
    """
    if corpus.acts.lm_batch:
        return corpus.acts.lm_batch
    sizes: tuple[int, ...] = SIZES if lm.device.type == "cpu" else SIZES_ON_DEVICE
    contexts = list(itertools.islice(corpus.contexts(), sizes[-1]))
    best: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for size in sizes:
            try:
                seconds = _seconds(lm, corpus, contexts[:size], sites) / size
            except torch.OutOfMemoryError:
                best.pop(size, None)
                sizes = tuple(smaller for smaller in sizes if smaller < size) or sizes[:1]
                break
            best[size] = min(best.get(size, seconds), seconds)
    chosen = fastest(best) if best else sizes[0]
    tokens = corpus.acts.context / best[chosen] if best else 0
    _log.info("%d contexts in a pass of the LM: %s tokens/s", chosen, f"{tokens:,.0f}")
    return chosen


def fastest(seconds: dict[int, float]) -> int:
    """Return the size with the least time for a context; of sizes about as fast, the smallest.

    Args:
        seconds: time for a context, by size.

    Example:
        >>> fastest({8: 1.0, 16: 0.99, 32: 0.5})
        32
        >>> fastest({8: 1.0, 16: 0.99})
        8
    """
    least = min(seconds.values())
    return min(size for size, time in seconds.items() if time * _GAIN <= least)


def _seconds(lm: LM, corpus: Corpus, contexts: list[Context], sites: Sequence[str]) -> float:
    batch = corpus.batch(contexts)
    began = time.perf_counter()
    found = lm.acts_at(sites or (lm.options.site,), batch.tokens, batch.attention)
    for x in found.values():
        x[0, 0, 0].item()  # waits for an accelerator
    return time.perf_counter() - began
