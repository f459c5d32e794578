"""TODO ksparse.lm.hooks."""

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
    """Where activations are read and changed: x = scale * (what `module` takes or gives) + sum of
    factor * (another place's)."""

    module: nn.Module
    at: str
    scale: float = 1.0
    others: tuple[tuple[ModuleEnd, float], ...] = ()
    reader: nn.Module | None = None
    """The first module that takes x, where x is a sum that no module gives."""

    @property
    def place(self) -> ModuleEnd:
        """Where x lies as a whole."""
        return (
            ModuleEnd(self.module, self.at) if self.reader is None else ModuleEnd(self.reader, "in")
        )


# ---- reading and changing ------------------------------------------------------------------------


@contextmanager
def hooked(site: Site, change: Change) -> Iterator[None]:
    """Pass a site's x through `change` in each forward pass; where that returns None, x stays as it
    is."""
    held: dict[int, Tensor] = {}

    def put(tensor: Any) -> Any:
        if not site.others and site.scale == 1:
            return change(tensor)
        rest = sum(
            (factor * held[number] for number, (_, factor) in enumerate(site.others)),
            start=torch.zeros_like(tensor),
        )
        x = site.scale * tensor + rest
        if (new := change(x)) is None:
            return None
        moved = (new - rest) / site.scale
        put = torch.where(new == x, tensor, moved)  # what stays, stays bit for bit
        # a gradient goes through the change all the same
        return put.detach() + (moved - moved.detach()) if moved.requires_grad else put

    with ExitStack() as hooks:
        for number, (place, _) in enumerate(site.others):
            hooks.enter_context(_seen(place, functools.partial(_keep, held, number)))
        hooks.enter_context(_through(ModuleEnd(site.module, site.at), put))
        yield


def _keep(seen: dict[_Key, Tensor], key: _Key, x: Tensor) -> None:
    seen[key] = x.clone()


@contextmanager
def _through(place: ModuleEnd, change: Callable[[Any], Any]) -> Iterator[None]:
    """Pass the hidden states at a place through `change`, which sees whatever lies there, but for
    others' probes."""
    own = _probing.get()

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        if probing() and not own:
            return None
        rest = output[1:] if isinstance(output, tuple) else None
        new = change(hidden_states(output))
        return None if new is None else new if rest is None else (new, *rest)

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if probing() and not own:
            return None
        key = _key(args, kwargs)
        new = change(args[0] if args else kwargs.get(key))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, key: new})

    handle = (
        place.module.register_forward_hook(on_output)
        if place.at == "out"
        else place.module.register_forward_pre_hook(on_input, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _seen(place: ModuleEnd, take: Callable[[Any], Any]) -> Iterator[None]:
    """Show `take` what lies at a place after every hook of others has changed it."""
    if place.at == "out":
        with _through(place, lambda x: take(x) and None):
            yield
        return
    forward = place.module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        take(args[0] if args else kwargs.get(_key(args, kwargs)))
        return forward(*args, **kwargs)

    with replaced_forward(place.module, watched):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another `forward` inside a with block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def hidden_states(output: Any) -> Any:
    """Return the hidden states of what a module gives."""
    return output[0] if isinstance(output, tuple) and output else output


def _key(args: Any, kwargs: Mapping[str, Any]) -> str:
    """Return the name under which a module is given its hidden states, where it is by name."""
    named = [
        key
        for key, value in kwargs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
    ]
    return "hidden_states" if args or "hidden_states" in kwargs or not named else named[0]


def not_activations(x: Any, shape: Sequence[int] | None = None) -> str:
    """Return what is wrong with a tensor that should be activations [contexts, tokens, width]; ''
    if nothing is."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    if x.is_floating_point() and x.ndim == 3 and (shape is None or x.shape[:2] == tuple(shape)):
        return ""
    return f"a tensor of shape {list(x.shape)}, {x.dtype}"


class _Stop(Exception):
    """Leaves the forward pass once the site has been seen."""


def _copied(output: Any) -> Any:
    """Return what a block gives, with hidden states of its own: blocks after it may add to them in
    place."""
    if isinstance(output, tuple):
        return (_copied(output[0]), *output[1:])
    return output.clone() if isinstance(output, Tensor) else output


def _passing(block: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Make a block return `output` (a tensor or, in some models, a tuple that begins with it)
    without computing anything."""
    return replaced_forward(block, lambda *args, **kwargs: _copied(output))


def probing() -> bool:
    """Return whether the pass that is running only looks at what a model is; hooks of others have
    nothing to do with it."""
    return _probing.get()
