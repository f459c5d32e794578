"""Read and change activations in a forward pass.

A `Site` is a place in a model; `hooked(site, change)` passes its activations through a function
inside a `with` block. The rest are the parts this is built from: observing a module's input or
output, replacing a module's `forward`, and skipping a block by returning a recorded output.

Some passes only probe what a model is (`ksparse.lm.sites` confirms aliases that way). Hooks that
were not registered by the probe itself must ignore them; `probing()` tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor | None]
_Key = TypeVar("_Key", int, str)
_probing: ContextVar[bool] = ContextVar("probing", default=False)


class ModuleEnd(NamedTuple):
    """A module's input ('in') or output ('out')."""

    module: nn.Module
    at: str


class Site(NamedTuple):
    """A place where activations are read and changed.

    x = scale * (input or output of `module`) + sum of factor * (value at another end).
    """

    module: nn.Module
    at: str
    """'in' or 'out'."""
    scale: float = 1.0
    others: tuple[tuple[ModuleEnd, float], ...] = ()
    reader: nn.Module | None = None
    """The first module that reads x, where x is a sum that no module returns."""
    shaped_like: ModuleEnd | None = None
    """An end with the shape of x, where the other ends give [contexts * tokens, width]."""

    @property
    def place(self) -> ModuleEnd:
        """The module end at which x itself occurs."""
        return (
            ModuleEnd(self.module, self.at) if self.reader is None else ModuleEnd(self.reader, "in")
        )


class StopForward(Exception):
    """Leaves a forward pass once everything needed has been read."""


@contextmanager
def hooked(site: Site, change: Change) -> Iterator[None]:
    """Pass a site's x through `change` in every forward pass inside a `with` block.

    Where `change` returns None, x stays as it is.
    """
    other_values: dict[int, Tensor] = {}
    shaped = len(site.others)

    def replace(tensor: Any) -> Any:
        if site.shaped_like is None:
            return replace_shaped(tensor)
        new = replace_shaped(tensor.view_as(other_values[shaped]))
        return None if new is None else new.view_as(tensor)

    def replace_shaped(tensor: Any) -> Any:
        if not site.others and site.scale == 1:
            return change(tensor)
        remainder = sum(
            (
                factor * other_values[number].view_as(tensor)
                for number, (_, factor) in enumerate(site.others)
            ),
            start=torch.zeros_like(tensor),
        )
        x = site.scale * tensor + remainder
        if (new := change(x)) is None:
            return None
        solved = (new - remainder) / site.scale
        result = torch.where(new == x, tensor, solved)  # what is unchanged stays so bit for bit
        # `where` would cut the gradient at unchanged elements.
        return result.detach() + (solved - solved.detach()) if solved.requires_grad else result

    with ExitStack() as hooks:
        ends = [end for end, _ in site.others]
        ends += [] if site.shaped_like is None else [site.shaped_like]
        for number, end in enumerate(ends):
            hooks.enter_context(observed(end, functools.partial(store_copy, other_values, number)))
        hooks.enter_context(_changed(ModuleEnd(site.module, site.at), replace))
        yield


def store_copy(values: dict[_Key, Tensor], key: _Key, x: Tensor) -> None:
    """Store a copy of x under a key; returns None, so that as a `Change` it leaves x as it is."""
    values[key] = x.clone()


@contextmanager
def observed(end: ModuleEnd, observe: Callable[[Any], Any]) -> Iterator[None]:
    """Call `observe` with the value at a module end, after all other hooks have changed it."""
    if end.at == "out":
        with _changed(end, lambda x: observe(x) and None):
            yield
        return
    forward = end.module.forward

    def observing(*args: Any, **kwargs: Any) -> Any:
        observe(args[0] if args else kwargs.get(hidden_states_key(args, kwargs)))
        return forward(*args, **kwargs)

    with replaced_forward(end.module, observing):
        yield


@contextmanager
def _changed(end: ModuleEnd, change: Callable[[Any], Any]) -> Iterator[None]:
    """Pass the hidden states at a module end through `change`, except in others' probing passes."""
    registered_by_probe = _probing.get()

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        if probing() and not registered_by_probe:
            return None
        new = change(hidden_states(output))
        return None if new is None else _with_hidden_states(output, new)

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if probing() and not registered_by_probe:
            return None
        key = hidden_states_key(args, kwargs)
        new = change(args[0] if args else kwargs.get(key))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, key: new})

    handle = (
        end.module.register_forward_hook(on_output)
        if end.at == "out"
        else end.module.register_forward_pre_hook(on_input, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` inside a `with` block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def skipped(block: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Make a block return `output` without computing anything, inside a `with` block."""
    return replaced_forward(block, lambda *args, **kwargs: copy_output(output))


def copy_output(output: Any) -> Any:
    """Return a block's output with a copy of its hidden states: later blocks may add in place."""
    if isinstance(output, (tuple, list)) and output:
        return _with_hidden_states(output, copy_output(output[0]))
    return output.clone() if isinstance(output, Tensor) else output


def hidden_states(output: Any) -> Any:
    """Return the hidden states of a module's output: the output, or the first item of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _with_hidden_states(output: Any, new: Any) -> Any:
    """Return a module's output with other hidden states."""
    if isinstance(output, list):
        return [new, *output[1:]]
    if not isinstance(output, tuple):
        return new
    items = (new, *output[1:])
    return output._make(items) if hasattr(output, "_make") else items


def hidden_states_key(args: Any, kwargs: Mapping[str, Any]) -> str:
    """Return the keyword under which a module takes its hidden states, if not by position."""
    names = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
    ]
    return "hidden_states" if args or "hidden_states" in kwargs or not names else names[0]


def not_activations(x: Any, shape: Sequence[int] | None = None) -> str:
    """Describe a value that is not activations [contexts, tokens, width]; '' for one that is.

    Args:
        x: The value found at a site.
        shape: The expected (contexts, tokens), if known.
    """
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    if x.is_floating_point() and x.ndim == 3 and (shape is None or x.shape[:2] == tuple(shape)):
        return ""
    return f"a tensor of shape {list(x.shape)}, {x.dtype}"


def probing() -> bool:
    """Return whether the running forward pass is a probe, which other hooks must ignore."""
    return _probing.get()


@contextmanager
def probing_passes() -> Iterator[None]:
    """Mark forward passes inside a `with` block as probes."""
    token = _probing.set(True)
    try:
        yield
    finally:
        _probing.reset(token)
