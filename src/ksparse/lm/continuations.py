"""Run the end of a context many times, each time with another activation at one position.

Ablation experiments change a single position of a context thousands of times. A `Branch` computes
what precedes that position once. `CachedBranch` keeps its keys and values, `PatchedBranch` runs the
whole context again; `choose_branch` takes the cached one where it gives the same logits.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksparse.lm import agreement
from ksparse.lm.hooks import skipped

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM

LM = Any  # ksparse.lm.model.LM, which imports this module
_log = logging.getLogger("ksparse")


class Branch(ABC):
    """Many continuations of c contexts from one position on; `LM.branch_from` returns one."""

    logits: Tensor
    """[c, length, v] of the unchanged LM, in its own precision, as are all logits here."""
    x: Tensor
    """[c, d] in float32: the unchanged raw activations at the position."""
    row_bytes: int
    """Approximate memory of one continuation."""

    @abstractmethod
    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int): ...

    @abstractmethod
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        """Continue contexts with other activations at the position.

        The result equals that of `LM.run_patched` with the same edit, up to rounding.

        Args:
            rows: indices [r] of the contexts; they may repeat and be in any order.
            x: raw activations [r, d] in float32, in place of the site's.

        Returns:
            Logits [r, length, v].
        """


class CachedBranch(Branch):
    """Continues from cached keys and values of the tokens before the position."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        self.lm, self.tokens = lm, tokens[:, at : at + length]
        self.past = _run_past(lm.model, tokens[:, :at]) if at else None
        self.skipped_layers = {
            number
            for block in lm.skippable
            for module in block.modules()
            if isinstance(number := getattr(module, "layer_idx", None), int)
        }
        all_rows = torch.arange(len(tokens), device=tokens.device)
        run = lm.run_after(
            self._select_past(all_rows, frozenset()), self.tokens, torch.ones_like(self.tokens)
        )
        self.logits, self.x, self.prefix = run.logits, run.x[:, 0], run.prefix
        layers = [] if self.past is None else self.past.layers
        self.row_bytes = 4 * self.logits[0].numel() + sum(
            part[0].numel() * part.element_size()
            for number, layer in enumerate(layers)
            if number not in self.skipped_layers
            for part in (layer.keys, layer.values)
        )

    @torch.inference_mode()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        rows = rows.to(self.tokens.device)
        prefix, past = _select(self.prefix, rows), self._select_past(rows, self.skipped_layers)
        with ExitStack() as changes:
            for block in self.lm.skippable if prefix is not None else ():
                changes.enter_context(skipped(block, prefix))
            changes.enter_context(self.lm.hooked(lambda old: _put(old, 0, x)))
            tokens = self.tokens[rows]
            return self.lm.forward(tokens, torch.ones_like(tokens), past).logits

    def _select_past(self, rows: Tensor, unused: frozenset[int] | set[int]) -> Any:
        """Return a cache for some of the contexts. A run replaces tensors in it, not in the
        original.

        Layers in `unused` belong to skipped blocks: only their length is read, so their rows are
        not gathered.
        """
        if self.past is None:
            return None
        past = copy.copy(self.past)
        past.layers = [copy.copy(layer) for layer in self.past.layers]
        for number, layer in enumerate(past.layers):
            if number not in unused:
                layer.batch_select_indices(rows)
        return past


class PatchedBranch(Branch):
    """Runs the whole context of each continuation: slower, but as right as `LM.run_patched`."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        tokens = tokens[:, : at + length]
        self.lm, self.at = lm, at
        self.run = lm.run_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.logits, self.x = self.run.logits[:, at:], self.run.x[:, at]
        self.row_bytes = 4 * self.run.logits[0].numel()

    @torch.inference_mode()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        rows = rows.to(self.run.tokens.device)
        run = self.run._replace(
            tokens=self.run.tokens[rows],
            attention=self.run.attention[rows],
            prefix=_select(self.run.prefix, rows),
        )
        return self.lm.run_patched(run, lambda old: _put(old, self.at, x))[:, self.at :]


def choose_branch(lm: LM, tokens: Tensor, attention: Tensor, at: int, length: int) -> type[Branch]:
    """Return CachedBranch if it gives what `LM.run_patched` gives, else PatchedBranch, with a
    warning.

    They are compared at position `at` and as deep as the first contexts go: sliding windows only
    matter once they are full.
    """
    text = int(attention[:2].long().cumprod(1).sum(1).min())
    for position in sorted({at, text - length}):
        if reason := _cache_disagreement(lm, tokens[:2], position, length):
            _log.warning(
                "%s at %s: continuing from cached keys and values does not give what the whole "
                "context gives (%s); whole contexts are run instead, which is slower",
                lm.options.lm,
                lm.options.site,
                reason,
            )
            return PatchedBranch
    return CachedBranch


def _cache_disagreement(lm: LM, tokens: Tensor, at: int, length: int) -> str:
    """Describe how a cached branch differs from a patched one, unchanged and with the activation
    halved; '' if it does not."""
    rows = torch.arange(len(tokens), device=tokens.device).flip(0)
    slow = PatchedBranch(lm, tokens, at, length)
    halves = slow.x[rows] / 2
    expected = torch.cat([slow.logits, slow(rows, halves)]).float()
    try:
        fast = CachedBranch(lm, tokens, at, length)
        logits = torch.cat([fast.logits, fast(rows, halves)]).float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture's own code may fail on a cache in any way
        return agreement.describe_error(error)
    return agreement.difference(lm, logits, expected)


def _run_past(model: CausalLM, tokens: Tensor) -> Any:
    """Return the keys and values of contexts tokens[c, at] as a cache.

    Raises:
        TypeError: The cache is of a kind that a later run may change in place.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    # The base model has no head, whose logits are not needed.
    past = model.base_model(input_ids=tokens, use_cache=True).past_key_values
    layers = getattr(past, "layers", [])
    if not layers or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    ):
        raise TypeError(
            f"its cache is a {type(past).__name__} of "
            f"{', '.join(sorted({type(layer).__name__ for layer in layers})) or 'nothing'}"
        )
    return past


def _put(old: Tensor, position: int, x: Tensor) -> Tensor:
    """Return old[b, t, d] with x[b, d] at one position."""
    new = old.clone()
    new[:, position] = x.to(old)
    return new


def _select(output: Any, rows: Tensor) -> Any:
    """Return some rows of a block's output."""
    if isinstance(output, (tuple, list)):
        make = getattr(output, "_make", tuple)  # of a named tuple
        return make(_select(part, rows) for part in output)
    return output[rows] if isinstance(output, Tensor) else output
