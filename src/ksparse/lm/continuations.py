"""TODO ksparse.lm.continuations."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksparse.lm import agreement

if TYPE_CHECKING:
    from ksparse.lm.loading import CausalLM


from ksparse.lm.hooks import _passing

LM = Any  # ksparse.lm.model.LM, which imports this module

# ---- continuations -------------------------------------------------------------------------------


class Branch(ABC):
    """Many continuations of c contexts from one position on, made by `LM.branch_from`.

    fork(rows[r], x[r, d]) -> logits[r, length, v]: context rows[i] with the raw activation x[i]
    (float32) in place of the site's at that position; all others as they are. Rows may repeat and
    be in any order. Equal to `LM.run_patched` with that edit up to rounding.
    """

    logits: Tensor
    """[c, length, v] of the unchanged LM, in its own precision, as all logits here."""
    x: Tensor
    """The unchanged raw activations at the position, [c, d] as float32."""
    row_bytes: int
    """About how much memory one continuation takes."""

    @abstractmethod
    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int): ...

    @abstractmethod
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor: ...


class CachedBranch(Branch):
    """Continues from the keys and values of what comes before the position."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        self.lm, self.tokens = lm, tokens[:, at : at + length]
        self.past = _past(lm.model, tokens[:, :at]) if at else None
        self.unread = {
            number
            for block in lm._before
            for module in block.modules()
            if isinstance(number := getattr(module, "layer_idx", None), int)
        }
        everyone = torch.arange(len(tokens), device=tokens.device)
        cached = lm._run_with_cache(
            self.tokens, torch.ones_like(self.tokens), self._past_of(everyone, frozenset())
        )
        self.logits, self.x, self.prefix = cached.logits, cached.x[:, 0], cached.prefix
        read = (
            [layer for i, layer in enumerate(self.past.layers) if i not in self.unread]
            if self.past is not None
            else []
        )
        self.row_bytes = 4 * self.logits[0].numel() + sum(
            part[0].numel() * part.element_size()
            for layer in read
            for part in (layer.keys, layer.values)
        )

    @torch.inference_mode()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        rows = rows.to(self.tokens.device)
        prefix, past = _take(self.prefix, rows), self._past_of(rows, self.unread)

        def put(old: Tensor) -> Tensor:
            new = old.clone()
            new[:, 0] = x.to(old)
            return new

        with ExitStack() as changes:
            for block in self.lm._before if prefix is not None else ():
                changes.enter_context(_passing(block, prefix))
            changes.enter_context(self.lm._hooked(put))
            tokens = self.tokens[rows]
            return self.lm._forward(tokens, torch.ones_like(tokens), past).logits

    def _past_of(self, rows: Tensor, unread: frozenset[int] | set[int]) -> Any:
        """Return a cache of rows of the contexts; a run replaces its tensors, and leaves those of
        the original."""
        if self.past is None:
            return None
        past = copy.copy(self.past)
        past.layers = [copy.copy(layer) for layer in self.past.layers]
        for number, layer in enumerate(past.layers):
            if (
                number not in unread
            ):  # those of the blocks that are passed: only their length is asked for
                layer.batch_select_indices(rows)
        return past


class PatchedBranch(Branch):
    """Runs each continuation's whole context: slower, and right wherever `LM.run_patched` is."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        tokens = tokens[:, : at + length]
        self.lm, self.at, self.cached = (
            lm,
            at,
            lm.run_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool)),
        )
        self.logits, self.x = self.cached.logits[:, at:], self.cached.x[:, at]
        self.row_bytes = 4 * self.cached.logits[0].numel()

    @torch.inference_mode()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        rows = rows.to(self.cached.tokens.device)

        def put(old: Tensor) -> Tensor:
            new = old.clone()
            new[:, self.at] = x.to(old)
            return new

        part = self.cached._replace(
            tokens=self.cached.tokens[rows],
            attention=self.cached.attention[rows],
            prefix=_take(self.cached.prefix, rows),
        )
        return self.lm.run_patched(part, put)[:, self.at :]


def _past(model: CausalLM, tokens: Tensor) -> Any:
    """Return the keys and values of contexts tokens[c, at] as a cache; raise TypeError for one that
    may be changed in place."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    past = model.base_model(
        input_ids=tokens, use_cache=True
    ).past_key_values  # without the head: nobody asks for these logits
    layers = getattr(past, "layers", [])
    if not layers or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    ):
        raise TypeError(
            f"its cache is a {type(past).__name__} of "
            f"{', '.join(sorted({type(layer).__name__ for layer in layers})) or 'nothing'}"
        )
    return past


def _take(output: Any, rows: Tensor) -> Any:
    """Return rows of what a block gives."""
    if isinstance(output, tuple):
        return tuple(_take(part, rows) for part in output)
    return output[rows] if isinstance(output, Tensor) else output


def _disagreement(lm: LM, tokens: Tensor, at: int, length: int) -> str:
    """Return how a cached fork fails to give what `LM.run_patched` gives, unchanged and with half the
    activation; '' if it does."""
    rows = torch.arange(len(tokens), device=tokens.device).flip(0)
    slow = PatchedBranch(lm, tokens, at, length)
    halves = slow.x[rows] / 2
    expected = torch.cat([slow.logits, slow(rows, halves)]).float()
    try:
        fast = CachedBranch(lm, tokens, at, length)
        given = torch.cat([fast.logits, fast(rows, halves)]).float()
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever an architecture's own code does with a cache that it does not expect
        return (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )
    return agreement.difference(lm, given, expected)
