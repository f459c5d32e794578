"""A causal LM of the transformers library, read and changed at one site by plain forward hooks."""

from __future__ import annotations

import copy
import functools
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse import pylm
from ksparse.acts.text import Contexts, token_strings
from ksparse.errors import InputError
from ksparse.recipe import Acts

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn")
BEFORE_MLP = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")  # Gemma 2 has the first and the last
ALIASES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_log = logging.getLogger("ksparse")


class Watched(NamedTuple):
    """An unchanged run of the LM: logits[b, t, v], the site's x[b, t, d] as float32, and what `LM.replay` starts from."""

    logits: Tensor
    x: Tensor
    tokens: Tensor
    attention: Tensor
    prefix: Any


class LM:
    """A causal LM and a site in it.

    lm("text") returns the activations x[t, d] of the text's tokens. On batches of contexts, `acts` reads the site and stops
    there, `watch` runs the whole LM, and `replay` runs it again, from the site on, with other activations there. `fork` runs
    the rest of a context many times, with another activation at one position.
    """

    def __init__(self, name: str = "pylm/1.9m", site: str = "resid_post.3", *, acts: Acts | None = None, device: str = "cpu",
                 trust_remote_code: bool = False):
        """name: a Hub name, a folder, or pylm. `acts` holds the other options; name and site are taken from it if given."""
        self.options = acts or Acts(lm=name, site=site)
        self.device = torch.device(device)
        folder = find_model(self.options.lm)
        common = {"revision": self.options.revision, "trust_remote_code": trust_remote_code} if not Path(folder).exists() else {
            "trust_remote_code": trust_remote_code}
        self.model = _load_model(folder, getattr(torch, self.options.lm_dtype), common).to(self.device).eval().requires_grad_(False)
        self.tokenizer = _load_tokenizer(self.options.tokenizer or folder, common)
        self.folder = Path(folder) if Path(folder).exists() else None
        self.vocab = self.model.get_input_embeddings().weight.shape[0]
        self._check_tokenizer()
        self.module, self.at = resolve(self.model, self.options.site)
        self._before = _blocks_before(self.model, self.module, self.at)
        self._forks: dict[str, type[Fork]] = {}  # by site: what `fork` has found to be right
        self.d_model = self._width()

    def __call__(self, text: str) -> Tensor:
        """Return x[t, d], the raw activations of the text's tokens; BOS is put before it and its own row left out."""
        tokens = self.tokenize(text)
        lead = int(self._bos is not None)
        return self.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, lead:]

    def tokens(self, text: str) -> list[str]:
        """Return the strings of the text's tokens, one for each row of lm(text)."""
        return token_strings(self.tokenizer, self.tokenize(text)[0, int(self._bos is not None) :].tolist())

    def tokenize(self, text: str) -> Tensor:
        """Return ids [1, t] with BOS first, as in training."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(f"the text {text!r} has no token")
        return torch.tensor([([] if self._bos is None else [self._bos]) + ids], device=self.device)

    @property
    def _bos(self) -> int | None:
        return self.tokenizer.bos_token_id if self.options.bos == "auto" else None

    def acts(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Return the raw activations x[b, t, d] at the site as float32; what comes after the site is not computed."""
        return self.acts_at((self.options.site,), tokens, attention)[self.options.site]

    @torch.inference_mode()
    def acts_at(self, sites: Sequence[str], tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Return the raw activations x[b, t, d] at several sites as float32, from one pass that ends when all have been seen."""
        seen: dict[str, Tensor] = {}

        def take(site: str, x: Tensor) -> None:
            seen.setdefault(site, x.clone() if len(sites) > 1 else x)  # blocks may add to it in place
            if len(seen) == len(set(sites)):
                raise _Stop

        with ExitStack() as hooks:
            for site in set(sites):
                hooks.enter_context(self._hooked(functools.partial(take, site), site))
            try:
                self._forward(tokens, attention)
            except _Stop:
                pass
        return {site: self._checked(site, seen, tokens).float() for site in sites}

    def _checked(self, site: str, seen: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """Return what was seen at a site; raise InputError if that was nothing, or no activations."""
        if site not in seen:
            raise InputError(f"site {site!r} was not reached in a forward pass of {self.options.lm}; "
                             f"choose another:\n{describe_sites(self.model)}")
        x = seen[site]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 3 or x.shape[:2] != tokens.shape:
            found = f"a tensor of shape {list(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(f"site {site!r} of {self.options.lm} gives {found}, not activations [contexts, tokens, width]; "
                             f"choose another:\n{describe_sites(self.model)}")
        return x

    @torch.inference_mode()
    def watch(self, tokens: Tensor, attention: Tensor) -> Watched:
        """Run the LM unchanged."""
        return self._watch(tokens, attention)

    def _watch(self, tokens: Tensor, attention: Tensor, past: Any = None) -> Watched:
        seen: list[Tensor] = []
        prefix: list[Any] = []
        with ExitStack() as hooks:
            if self._before:
                last = self._before[-1].register_forward_hook(lambda module, args, output: prefix.append(output))
                hooks.callback(last.remove)
            hooks.enter_context(self._hooked(seen.append))
            logits = self._forward(tokens, attention, past).logits
        return Watched(logits, seen[0].float(), tokens, attention, prefix[0] if prefix else None)

    @torch.inference_mode()
    def replay(self, watched: Watched, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Return logits[b, t, v] with the site's x[b, t, d] (float32) mapped by `edit`; blocks before the site are not run again."""
        with ExitStack() as changes:
            for block in self._before if watched.prefix is not None else ():
                changes.enter_context(_passing(block, watched.prefix))
            changes.enter_context(self._hooked(lambda x: edit(x.float()).to(x.dtype)))
            return self._forward(watched.tokens, watched.attention).logits

    @torch.inference_mode()
    def fork(self, tokens: Tensor, attention: Tensor, at: int, length: int) -> Fork:
        """Return a `Fork` of contexts tokens[c, t] at position `at`, whose logits are those of positions at .. at + length - 1.

        All positions before at + length must be attended (padding may follow). What comes before `at` is computed once and kept as
        keys and values. The first fork at a site is compared with `replay`; where the LM's cache does not give the same, a warning
        is logged and forks replay whole contexts instead.
        """
        end = at + length
        if at < 0 or length < 1 or end > tokens.shape[1]:
            raise InputError(f"positions {at} to {end - 1} cannot be forked: the contexts have positions 0 to {tokens.shape[1] - 1}")
        if not bool(attention[:, :end].all()):
            raise InputError(f"positions {at} to {end - 1} cannot be forked: some context has padding before position {end}")
        if self.options.site not in self._forks:
            self._forks[self.options.site] = self._fork_kind(tokens.to(self.device), attention, at, length)
        return self._forks[self.options.site](self, tokens.to(self.device), at, length)

    def _fork_kind(self, tokens: Tensor, attention: Tensor, at: int, length: int) -> type[Fork]:
        """Return the fork that is right: the cached one if it gives what `replay` gives, at `at` and as deep as the first contexts go."""
        text = int(attention[:2].long().cumprod(1).sum(1).min())  # deep, because sliding windows only count once they are full
        for place in sorted({at, text - length}):
            why = _disagreement(self, tokens[:2], place, length)
            if why:
                _log.warning("%s at %s: continuing from cached keys and values does not give what the whole context gives (%s); "
                             "whole contexts are run instead, which is slower", self.options.lm, self.options.site, why)
                return _ReplayedFork
        return _CachedFork

    @property
    def context(self) -> int | None:
        """The longest context the LM takes, if its config says."""
        found = [getattr(self.model.config, name, None) for name in ("max_position_embeddings", "n_positions")]
        return next((length for length in found if isinstance(length, int) and length > 0), None)

    def on_device(self, contexts: Contexts) -> Contexts:
        return Contexts(*(field.to(self.device) for field in contexts))

    def _forward(self, tokens: Tensor, attention: Tensor, past: Any = None) -> Any:
        mask = None if bool(attention.all()) else attention.long()
        cache = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        return self.model(input_ids=tokens.to(self.device), attention_mask=mask, **cache)

    def _hooked(self, change: Callable[[Tensor], Tensor | None], site: str = "") -> AbstractContextManager[None]:
        module, at = resolve(self.model, site) if site and site != self.options.site else (self.module, self.at)
        return hooked(module, at, change)

    def _width(self) -> int:
        tokens = torch.zeros(2, 3, dtype=torch.long)  # not 1 x 1, so that a table of positions does not pass for activations
        return self.acts(tokens, torch.ones_like(tokens, dtype=torch.bool)).shape[-1]

    def _check_tokenizer(self) -> None:
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        used = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if i is not None]
        if max([largest, *used]) >= self.vocab:
            raise InputError(f"the tokenizer of {self.options.tokenizer or self.options.lm} gives ids up to {max([largest, *used])}, "
                             f"the model has {self.vocab} embeddings; give the model's own with --acts.tokenizer")


# ---- continuations -----------------------------------------------------------------------------------------------


class Fork(ABC):
    """Many continuations of c contexts from one position on, made by `LM.fork`.

    fork(rows[r], x[r, d]) -> logits[r, length, v]: context rows[i] with the raw activation x[i] (float32) in place of the site's at
    that position; all others as they are. Rows may repeat and be in any order. Equal to `LM.replay` with that edit up to rounding.
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


class _CachedFork(Fork):
    """Continues from the keys and values of what comes before the position."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        self.lm, self.tokens = lm, tokens[:, at : at + length]
        self.past = _past(lm.model, tokens[:, :at]) if at else None
        self.unread = {number for block in lm._before for module in block.modules()
                       if isinstance(number := getattr(module, "layer_idx", None), int)}
        everyone = torch.arange(len(tokens), device=tokens.device)
        watched = lm._watch(self.tokens, torch.ones_like(self.tokens), self._past_of(everyone, frozenset()))
        self.logits, self.x, self.prefix = watched.logits, watched.x[:, 0], watched.prefix
        read = [layer for i, layer in enumerate(self.past.layers) if i not in self.unread] if at else []
        self.row_bytes = (4 * self.logits[0].numel()
                          + sum(part[0].numel() * part.element_size() for layer in read for part in (layer.keys, layer.values)))

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
        """Return a cache of rows of the contexts; a run replaces its tensors, and leaves those of the original."""
        if self.past is None:
            return None
        past = copy.copy(self.past)
        past.layers = [copy.copy(layer) for layer in self.past.layers]
        for number, layer in enumerate(past.layers):
            if number not in unread:  # those of the blocks that are passed: only their length is asked for
                layer.batch_select_indices(rows)
        return past


class _ReplayedFork(Fork):
    """Runs each continuation's whole context: slower, and right wherever `LM.replay` is."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        tokens = tokens[:, : at + length]
        self.lm, self.at, self.watched = lm, at, lm.watch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.logits, self.x = self.watched.logits[:, at:], self.watched.x[:, at]
        self.row_bytes = 4 * self.watched.logits[0].numel()

    @torch.inference_mode()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        rows = rows.to(self.watched.tokens.device)

        def put(old: Tensor) -> Tensor:
            new = old.clone()
            new[:, self.at] = x.to(old)
            return new

        part = self.watched._replace(tokens=self.watched.tokens[rows], attention=self.watched.attention[rows],
                                     prefix=_take(self.watched.prefix, rows))
        return self.lm.replay(part, put)[:, self.at :]


def _past(model: nn.Module, tokens: Tensor) -> Any:
    """Return the keys and values of contexts tokens[c, at] as a cache; raise TypeError for one that may be changed in place."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    past = model.base_model(input_ids=tokens, use_cache=True).past_key_values  # without the head: nobody asks for these logits
    layers = getattr(past, "layers", [])
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise TypeError(f"its cache is a {type(past).__name__} of {', '.join(sorted({type(layer).__name__ for layer in layers})) or 'nothing'}")
    return past


def _take(output: Any, rows: Tensor) -> Any:
    """Return rows of what a block gives."""
    if isinstance(output, tuple):
        return tuple(_take(part, rows) for part in output)
    return output[rows] if isinstance(output, Tensor) else output


def _disagreement(lm: LM, tokens: Tensor, at: int, length: int) -> str:
    """Return how a cached fork fails to give what `LM.replay` gives, unchanged and with half the activation; '' if it does."""
    rows = torch.arange(len(tokens), device=tokens.device).flip(0)
    slow = _ReplayedFork(lm, tokens, at, length)
    halves = slow.x[rows] / 2
    expected = torch.cat([slow.logits, slow(rows, halves)]).float()
    try:
        fast = _CachedFork(lm, tokens, at, length)
        wrong = torch.cat([fast.logits, fast(rows, halves)]).float() - expected
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture's own code does with a cache that it does not expect
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    size = ((wrong - wrong.mean(-1, keepdim=True)).norm() / (expected - expected.mean(-1, keepdim=True)).norm()).item()
    limit = math.sqrt(torch.finfo(getattr(torch, lm.options.lm_dtype)).eps)  # far above rounding, far below the effect of another x
    return "" if size <= limit else f"relative difference of logits {size:.2g}"


@contextmanager
def hooked(module: nn.Module, at: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Pass a module's hidden states ('in' or 'out') through `change` in each forward pass; where that returns None they stay as they are."""

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        rest = output[1:] if isinstance(output, tuple) else None
        new = change(_first(output))
        return None if new is None else new if rest is None else (new, *rest)

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = change(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = change(kwargs.get("hidden_states"))
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    handle = module.register_forward_hook(on_output) if at == "out" else module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Stop(Exception):
    """Leaves the forward pass once the site has been seen."""


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _passing(block: nn.Module, output: Any) -> Iterator[None]:
    """Make a block return `output` (a tensor or, in some models, a tuple that begins with it) without computing anything."""
    own = block.__dict__.get("forward")
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _blocks_before(model: nn.Module, site: nn.Module, at: str) -> list[nn.Module]:
    """Return the blocks whose work is done when the site is read: those before the site's own, and that one too if its output is the site."""
    blocks = _blocks(model)
    for i, block in enumerate(blocks):
        if block is site:
            return blocks[: i + 1] if at == "out" else blocks[:i]
        if any(module is site for module in block.modules()):
            return blocks[:i]
    return []


def resolve_device(name: str) -> str:
    """Return the device that a recipe asks for; auto takes an accelerator if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}; cpu always is") from None
    return name


# ---- sites -------------------------------------------------------------------------------------------------------


def resolve(model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """Return (module, 'in' | 'out') of a site: an alias such as resid_post.8, or a module's name, or NAME:in."""
    alias = re.fullmatch(rf"({'|'.join(ALIASES)})\.(-?\d+)", site)
    if alias:
        kind, number = alias[1], int(alias[2])
        blocks = _blocks(model)
        if -len(blocks) <= number < len(blocks):
            found = _in_block(blocks[number], kind)
            if found:
                return found
        raise InputError(f"site {site!r} does not exist; there are\n{describe_sites(model)}")
    name, _, at = site.partition(":")
    modules = dict(model.named_modules())
    if not name or name not in modules or at not in ("", "in", "out"):
        raise InputError(f"site {site!r} does not exist; there are\n{describe_sites(model)}")
    return modules[name], at or "out"


def sites_of(model: nn.Module, kinds: Sequence[str] = ("attn_out", "mlp_out", "resid_post")) -> list[str]:
    """Return the sites of these kinds that exist, block by block."""
    return [f"{kind}.{number}" for number, block in enumerate(_blocks(model)) for kind in kinds if _in_block(block, kind)]


def describe_sites(model: nn.Module) -> str:
    """List the sites of a model: the aliases that exist, and the modules' names with the block number as I."""
    blocks = _blocks(model)
    aliases = [f"{kind}.0 … {kind}.{len(blocks) - 1}" for kind in ALIASES if blocks and _in_block(blocks[0], kind)]
    names = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".I", name) for name, _ in model.named_modules() if name)
    return f"  {', '.join(aliases)}\n  {', '.join(names)}\n  (NAME is a module's output, NAME:in its input)"


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the longest list of modules of which each has attention and MLP."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [blocks for blocks in lists if _child(blocks[0], ATTENTION) is not None]
    return max(lists, key=len, default=[])


def _in_block(block: nn.Module, kind: str) -> tuple[nn.Module, str] | None:
    if kind in ("resid_pre", "resid_post"):
        return block, "in" if kind == "resid_pre" else "out"
    if kind == "resid_mid":
        parallel = getattr(block, "use_parallel_residual", False)
        module = None if parallel else _child(block, BEFORE_MLP)
        return None if module is None else (module, "in")
    module = _child(block, ATTENTION if kind == "attn_out" else MLP)
    return None if module is None else (module, "out")


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


# ---- loading -----------------------------------------------------------------------------------------------------


def find_model(name: str) -> str:
    """Return a folder or a Hub name; raise InputError for a path that is not there."""
    if name == "pylm" or name.startswith("pylm/"):
        try:
            return str(pylm.folder(name.partition("/")[2] or pylm.DEFAULT))
        except ValueError as error:
            raise InputError(str(error)) from None
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise InputError(f"model folder {name} does not exist; give a folder with config.json, a Hub name such as gpt2, or pylm")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model folder {name} has no config.json; it is not a Hugging Face model")
    return name


def _load_model(source: str, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model {source!r} cannot be loaded as a causal LM: {str(error).splitlines()[0]}") from error


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in (
            "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"folder {source} has no tokenizer; name one with --acts.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {source!r} cannot be loaded: {str(error).splitlines()[0]}; "
                         "name another with --acts.tokenizer") from error
