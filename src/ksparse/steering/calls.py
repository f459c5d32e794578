"""Follow the calls of a model, to know which positions an attached SAE may change.

An SAE is usually trained without the first position and without BOS, EOS and separators. A hook at
a site sees activations but no ids, so the ids and attention masks are read from the calls of the
modules around it. `generate` with a cache passes only the newest tokens: a call that continues
earlier ones has no first position to leave out.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ksparse.errors import InputError
from ksparse.lm.hooks import probing
from ksparse.sae.model import SAE

Positions = Literal["trained", "all"] | Tensor
_STATES = ("past_key_values", "cache_params", "state", "past", "mems", "cache", "past_states")
"""Names of the arguments in which models take their memory of earlier tokens."""
_log = logging.getLogger("ksparse")


class ModelCall(NamedTuple):
    """A running call of a model, or of a part of it that takes ids."""

    module_id: int
    ids: Tensor | None
    attention: Tensor | None
    continues: bool
    """Whether earlier tokens of the same contexts were in previous calls."""


class CallTracker:
    """Follows a model's calls and says which positions of each an SAE may change."""

    def __init__(self, sae: SAE, positions: Positions = "trained"):
        if not isinstance(positions, Tensor) and positions not in ("trained", "all"):
            raise InputError(
                f"positions is {positions!r}; it must be 'trained', 'all', or a mask of contexts "
                "and tokens"
            )
        if isinstance(positions, Tensor) and not bool(((positions == 0) | (positions == 1)).all()):
            raise InputError(
                "positions is a tensor with other values than True and False; it must be a mask of "
                "contexts and tokens"
            )
        policy = sae.metadata.get("policy") or {}
        self.positions = positions
        self.everywhere = not isinstance(positions, Tensor) and (
            positions == "all" or policy.get("keep", "all") == "all"
        )
        self.special = [
            token
            for name in ("bos_token", "separator_token")
            if (token := policy.get(name)) is not None
        ]
        self.context: int | None = policy.get("context")
        self.running: list[ModelCall] = []  # outermost first; the last one is the current call
        self.calls = self.reads = 0
        self.was_read = False  # whether the site was read in the current call

    @property
    def call(self) -> ModelCall | None:
        """The current call, if the model is running."""
        return self.running[-1] if self.running else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """[contexts, tokens] of the current call, where known."""
        return None if self.call is None or self.call.ids is None else tuple(self.call.ids.shape)

    @contextmanager
    def follow(self, model: nn.Module, module: nn.Module) -> Iterator[None]:
        """Record calls of every module that contains `module`: the outermost one, and calls within
        it that take ids."""
        names = [
            name for name, part in model.named_modules(remove_duplicate=False) if part is module
        ]
        containers = {
            model.get_submodule(".".join(path[:end]))
            for path in (name.split(".") for name in names)
            for end in range(len(path))
        }
        with ExitStack() as hooks:
            for part in containers:
                begin = part.register_forward_pre_hook(self._begin_call, with_kwargs=True)
                end = part.register_forward_hook(self._end_call, always_call=True)
                hooks.callback(begin.remove)
                hooks.callback(end.remove)
            yield

    def _begin_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if probing():
            return
        arguments = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        ids = arguments.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            ids = None
        if self.call is not None and ids is None:
            return
        attention = arguments.get("attention_mask")
        if not isinstance(attention, Tensor) or attention.ndim != 2:
            has_same_shape = ids is not None and ids.shape == self.shape
            attention = self.call.attention if self.call is not None and has_same_shape else None
        continues = _continues(arguments, ids, attention)
        continues |= self.call is not None and self.call.continues
        self.calls += self.call is None
        self.running.append(ModelCall(id(module), ids, attention, continues))
        self.was_read = False
        self._warn_of_length()

    def _end_call(self, module: nn.Module, args: Any, output: Any) -> None:
        module_ids = [call.module_id for call in self.running]
        if id(module) in module_ids:
            del self.running[module_ids.index(id(module)) :]

    def mark_read(self, site: str) -> None:
        """Count a read of the site; raise InputError for the second one in the same call."""
        if self.running and self.was_read:
            raise InputError(
                f"site {site!r} runs several times in one call of the model, so that it has no "
                "single activation of a token; choose another"
            )
        self.reads, self.was_read = self.reads + 1, True

    def _warn_of_length(self) -> None:
        """Warn once about positions beyond the context the SAE was trained on."""
        lengths = [
            part.shape[1]
            for call in self.running
            for part in (call.ids, call.attention)
            if part is not None
        ]
        length = max(lengths, default=0)
        if self.context is not None and length > self.context:
            _log.warning(
                "contexts of %s tokens are longer than the %s that this autoencoder was trained "
                "on; it has not seen the positions beyond",
                f"{length:,}",
                self.context,
            )
            self.context = None

    def positions_to_change(self, x: Tensor) -> Tensor:
        """Return the mask bool [b, t] of positions of x[b, t, d] that may be changed in the current
        call."""
        if isinstance(self.positions, Tensor):
            if self.positions.shape != x.shape[:-1]:
                raise InputError(
                    f"positions are of shape {list(self.positions.shape)}, the activations of "
                    f"{list(x.shape[:-1])}, apart from their width"
                )
            return self.positions.to(x.device).bool()
        keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if self.everywhere:
            return keep
        ids = attention = None
        if self.call is not None:
            ids, attention = self.call.ids, self.call.attention
        if self.call is None or not self.call.continues:
            attended = keep if attention is None else attention.to(x.device).bool()
            keep &= attended.long().cumsum(1) > 1  # the first attended: padding may precede it
        if ids is not None and ids.shape == keep.shape:
            for token in self.special:
                keep &= ids.to(x.device) != token
        return keep


def _continues(arguments: dict[str, Any], ids: Tensor | None, attention: Tensor | None) -> bool:
    """Return whether earlier tokens of the same contexts have been seen, judging by the mask, the
    positions, or a cache or state."""
    if ids is not None and attention is not None and attention.shape[1] > ids.shape[1]:
        return True
    numbers = arguments.get("position_ids", arguments.get("cache_position"))
    if (
        isinstance(numbers, Tensor)
        and numbers.numel()
        and not numbers.is_floating_point()
        and int(numbers.min()) > 0
    ):
        return True
    return any(holds_tokens(arguments.get(name)) for name in _STATES)


def holds_tokens(state: Any) -> bool:
    """Return whether a model's cache or state holds earlier tokens; one of unknown kind does."""
    if state is None:
        return False
    for name in ("get_seq_length", "has_previous_state"):
        if callable(method := getattr(state, name, None)):
            try:
                if method():
                    return True
            except ValueError:  # a cache whose layers are all of the other kind
                continue
    if hasattr(state, "get_seq_length") or hasattr(state, "has_previous_state"):
        return getattr(state, "has_previous_state", False) is True
    if isinstance(offset := getattr(state, "seqlen_offset", None), int):
        return offset > 0
    return not isinstance(state, (list, tuple, dict)) or any(part is not None for part in state)
