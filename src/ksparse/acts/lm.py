"""A causal LM of the transformers library, read and changed at one site by plain forward hooks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse import files, pylm
from ksparse.acts import agreement
from ksparse.acts.sites import (
    blocks_before,
    describe_sites,
    hooked,
    not_activations,
    replaced_forward,
    resolve,
)
from ksparse.acts.text import Contexts, ids_of, token_strings, without_bos
from ksparse.errors import InputError
from ksparse.recipe import Acts
from ksparse.trust import code_is_trusted

if TYPE_CHECKING:

    class CausalLM(nn.Module):
        """What is used of transformers' models, whose own annotations hide most of it."""

        base_model: nn.Module
        config: Any
        dtype: torch.dtype

        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...
        def generate(self, tokens: Tensor, **options: Any) -> Any: ...


_log = logging.getLogger("ksparse")
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""What configurations call the longest context."""
MOST_LAYERS = 10_000
PARAMETERS_PER_BYTE = 16  # more than any quantisation packs


class Watched(NamedTuple):
    """An unchanged run of the LM: logits[b, t, v], the site's x[b, t, d] as float32, and what
    `LM.replay` starts from."""

    logits: Tensor
    x: Tensor
    tokens: Tensor
    attention: Tensor
    prefix: Any


class LM:
    """A causal LM and a site in it.

    lm("text") returns the activations x[t, d] of the text's tokens. On batches of contexts, `acts`
    reads the site and stops there, `watch` runs the whole LM, and `replay` runs it again, from the
    site on, with other activations there. `fork` runs the rest of a context many times, with
    another activation at one position.
    """

    def __init__(
        self,
        name: str = "pylm/1.9m",
        site: str = "resid_post.3",
        *,
        acts: Acts | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ):
        """name: a Hub name, a folder, or pylm. `acts` holds the other options; name and site are
        taken from it if given.

        trust_remote_code: let code that comes with the model run. Nothing else than this argument
        can.
        """
        self.options = acts or Acts(lm=name, site=site)
        self.device = torch.device(device)
        folder = find_model(self.options.lm)
        common = {"trust_remote_code": trust_remote_code or code_is_trusted()} | (
            {} if files.exists(Path(folder)) else {"revision": self.options.revision}
        )
        self.model = (
            load_model(folder, getattr(torch, self.options.lm_dtype), common)
            .to(self.device)
            .eval()
            .requires_grad_(False)
        )
        self.tokenizer = _load_tokenizer(self.options.tokenizer or folder, common)
        self.folder = Path(folder) if files.exists(Path(folder)) else None
        self.vocab = self.model.get_input_embeddings().weight.shape[0]
        self._check_tokenizer()
        if acts is not None:
            self.check_length(acts.context, "acts.context")
        self._told_of_length = False
        self._place(self.options.site)

    def _place(self, site: str) -> None:
        """Take a site, once passes that must agree on it do."""
        self.options = dataclasses.replace(self.options, site=site)
        self.site = resolve(self.model, site)
        self._before = blocks_before(self.model, self.site)
        self._fork: type[Fork] | None = None  # what `fork` has seen to be right
        self.refused = ""  # why activations at the site cannot be changed
        agreement.check(self)
        self.d_model = self._width()

    @property
    def module(self) -> nn.Module:
        """The module at whose input or output (`at`) the site's activations lie."""
        return self.site.place.module

    @property
    def at(self) -> str:
        """'in' or 'out'."""
        return self.site.place.at

    def at_site(self, site: str) -> LM:
        """Return the same LM at another site."""
        other = copy.copy(self)
        other._place(site)
        return other

    def __call__(self, text: str) -> Tensor:
        """Return x[t, d], the raw activations of the text's tokens; BOS is put before it and its
        own row left out."""
        tokens = self.tokenize(text)
        self.check_length(tokens.shape[1], "the text")
        if tokens.shape[1] > self.options.context and not self._told_of_length:
            self._told_of_length = True
            _log.warning(
                "a text of %s tokens is longer than acts.context, %s: an autoencoder that was "
                "trained on such contexts "
                "has not seen the positions behind them",
                f"{tokens.shape[1]:,}",
                self.options.context,
            )
        lead = int(self.bos is not None)
        return self.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, lead:]

    def tokens(self, text: str) -> list[str]:
        """Return the strings of the text's tokens, one for each row of lm(text)."""
        return token_strings(
            self.tokenizer, self.tokenize(text)[0, int(self.bos is not None) :].tolist()
        )

    def tokenize(self, text: str) -> Tensor:
        """Return ids [1, t] with BOS first, as in training; of a text that begins with BOS (a
        rendered chat), its own."""
        if not isinstance(text, str):
            raise InputError(
                f"a text is a str, got {type(text).__name__}; of several, take one at a time"
            )
        ids = without_bos(ids_of(self.tokenizer, text), self.bos)
        if not ids:
            raise InputError(f"the text {text!r} has no token")
        return torch.tensor([([] if self.bos is None else [self.bos]) + ids], device=self.device)

    @property
    def bos(self) -> int | None:
        """The token that each context begins with; None without one."""
        return self.tokenizer.bos_token_id if self.options.bos == "auto" else None

    def acts(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Return the raw activations x[b, t, d] at the site as float32; what comes after the site
        is not computed."""
        return self.acts_at((self.options.site,), tokens, attention)[self.options.site]

    @torch.inference_mode()
    def acts_at(self, sites: Sequence[str], tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Return the raw activations x[b, t, d] at several sites as float32, from one pass that
        ends when all have been seen."""
        seen: dict[str, Tensor] = {}

        def take(site: str, x: Tensor) -> None:
            seen.setdefault(
                site, x.clone() if len(sites) > 1 else x
            )  # blocks may add to it in place
            if len(seen) == len(set(sites)):
                raise _Stop

        with ExitStack() as hooks:
            for site in set(sites):
                hooks.enter_context(self._hooked(functools.partial(take, site), site))
            with suppress(_Stop):
                self._forward(tokens, attention)
        return {site: self._checked(site, seen, tokens).float() for site in sites}

    def _checked(self, site: str, seen: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """Return what was seen at a site; raise InputError if that was nothing, or no
        activations."""
        if site not in seen:
            raise InputError(
                f"site {site!r} was not reached in a forward pass of {self.options.lm}; "
                f"choose another:\n{describe_sites(self.model)}"
            )
        if wrong := not_activations(seen[site], tokens.shape):
            raise InputError(
                f"site {site!r} of {self.options.lm} gives {wrong}, not activations [contexts, "
                "tokens, width]; "
                f"choose another:\n{describe_sites(self.model)}"
            )
        return seen[site]

    @torch.inference_mode()
    def watch(self, tokens: Tensor, attention: Tensor) -> Watched:
        """Run the LM unchanged."""
        return self._watch(tokens, attention)

    def _watch(self, tokens: Tensor, attention: Tensor, past: Any = None) -> Watched:
        seen: list[Tensor] = []
        prefix: list[Any] = []
        with ExitStack() as hooks:
            if self._before:
                last = self._before[-1].register_forward_hook(
                    lambda module, args, output: prefix.append(_copied(output))
                )
                hooks.callback(last.remove)
            hooks.enter_context(self._hooked(lambda x: seen.append(x.to(torch.float32, copy=True))))
            logits = self._forward(tokens, attention, past).logits
        return Watched(logits, seen[0], tokens, attention, prefix[0] if prefix else None)

    @torch.inference_mode()
    def replay(self, watched: Watched, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Return logits[b, t, v] with the site's x[b, t, d] (float32) mapped by `edit`; blocks
        before the site are not run again."""
        self.check_changes()
        with ExitStack() as changes:
            for block in self._before if watched.prefix is not None else ():
                changes.enter_context(_passing(block, watched.prefix))
            changes.enter_context(self._hooked(lambda x: edit(x.float()).to(x.dtype)))
            return self._forward(watched.tokens, watched.attention).logits

    @torch.inference_mode()
    def fork(self, tokens: Tensor, attention: Tensor, at: int, length: int) -> Fork:
        """Return a `Fork` of contexts tokens[c, t] at position `at`, whose logits are those of
        positions at .. at + length - 1.

        All positions before at + length must be attended (padding may follow). What comes before
        `at` is computed once and kept as keys and values. The first fork at a site is compared with
        `replay`; where the LM's cache does not give the same, a warning is logged and forks replay
        whole contexts instead.
        """
        end = at + length
        if at < 0 or length < 1 or end > tokens.shape[1]:
            raise InputError(
                f"positions {at} to {end - 1} cannot be forked: the contexts have positions 0 to "
                f"{tokens.shape[1] - 1}"
            )
        if not bool(attention[:, :end].all()):
            raise InputError(
                f"positions {at} to {end - 1} cannot be forked: some context has padding before "
                f"position {end}"
            )
        self.check_changes()
        if self._fork is None:
            self._fork = self._fork_kind(tokens.to(self.device), attention, at, length)
        return self._fork(self, tokens.to(self.device), at, length)

    def _fork_kind(self, tokens: Tensor, attention: Tensor, at: int, length: int) -> type[Fork]:
        """Return the fork that is right: the cached one if it gives what `replay` gives, at `at`
        and as deep as the first contexts go."""
        text = int(
            attention[:2].long().cumprod(1).sum(1).min()
        )  # deep, because sliding windows only count once they are full
        for place in sorted({at, text - length}):
            why = _disagreement(self, tokens[:2], place, length)
            if why:
                _log.warning(
                    "%s at %s: continuing from cached keys and values does not give what the whole "
                    "context gives (%s); "
                    "whole contexts are run instead, which is slower",
                    self.options.lm,
                    self.options.site,
                    why,
                )
                return _ReplayedFork
        return _CachedFork

    def check_changes(self) -> None:
        """Raise InputError where activations at the site can be read but not changed."""
        if self.refused:
            raise InputError(
                f"activations at site {self.options.site!r} of {self.options.lm} can be read but "
                f"not changed: {self.refused}; "
                f"choose another:\n{describe_sites(self.model)}"
            )

    @property
    def context(self) -> int | None:
        """The longest context the LM takes, if its config says."""
        return longest_context(self.model.config)

    def check_length(self, tokens: int, what: str = "a context") -> None:
        """Raise InputError for a context longer than the LM takes: it would see positions it was
        never trained on, or fail."""
        check_length(tokens, self.context, self.options.lm, what)

    def on_device(self, contexts: Contexts) -> Contexts:
        return Contexts(*(field.to(self.device) for field in contexts))

    def _forward(self, tokens: Tensor, attention: Tensor, past: Any = None) -> Any:
        if past is None:
            self.check_length(tokens.shape[1])
        mask = None if bool(attention.all()) else attention.long()
        cache = (
            {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        )
        return self.model(input_ids=tokens.to(self.device), attention_mask=mask, **cache)

    def _hooked(
        self, change: Callable[[Tensor], Tensor | None], site: str = ""
    ) -> AbstractContextManager[None]:
        return hooked(
            resolve(self.model, site) if site and site != self.options.site else self.site, change
        )

    def _width(self) -> int:
        tokens = torch.zeros(
            2, 3, dtype=torch.long
        )  # not 1 x 1, so that a table of positions does not pass for activations
        return self.acts(tokens, torch.ones_like(tokens, dtype=torch.bool)).shape[-1]

    def _check_tokenizer(self) -> None:
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        used = [
            i
            for i in (
                self.tokenizer.bos_token_id,
                self.tokenizer.eos_token_id,
                self.tokenizer.pad_token_id,
            )
            if i is not None
        ]
        if max([largest, *used]) >= self.vocab:
            raise InputError(
                f"the tokenizer of {self.options.tokenizer or self.options.lm} gives ids up to "
                f"{max([largest, *used])}, "
                f"the model has {self.vocab} embeddings; give the model's own with --acts.tokenizer"
            )


def longest_context(config: Any) -> int | None:
    """Return the longest context of a model, if its config says."""
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in _LENGTHS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def check_length(tokens: int, longest: int | None, lm: str, what: str = "a context") -> None:
    """Raise InputError for a context longer than the LM takes."""
    if longest is not None and tokens > longest:
        raise InputError(
            f"{what} is {tokens:,} tokens long, but {lm} takes at most {longest:,}; give a shorter "
            + ("--acts.context" if what == "acts.context" else "one")
        )


# ---- continuations -------------------------------------------------------------------------------


class Fork(ABC):
    """Many continuations of c contexts from one position on, made by `LM.fork`.

    fork(rows[r], x[r, d]) -> logits[r, length, v]: context rows[i] with the raw activation x[i]
    (float32) in place of the site's at that position; all others as they are. Rows may repeat and
    be in any order. Equal to `LM.replay` with that edit up to rounding.
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
        self.unread = {
            number
            for block in lm._before
            for module in block.modules()
            if isinstance(number := getattr(module, "layer_idx", None), int)
        }
        everyone = torch.arange(len(tokens), device=tokens.device)
        watched = lm._watch(
            self.tokens, torch.ones_like(self.tokens), self._past_of(everyone, frozenset())
        )
        self.logits, self.x, self.prefix = watched.logits, watched.x[:, 0], watched.prefix
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


class _ReplayedFork(Fork):
    """Runs each continuation's whole context: slower, and right wherever `LM.replay` is."""

    def __init__(self, lm: LM, tokens: Tensor, at: int, length: int):
        tokens = tokens[:, : at + length]
        self.lm, self.at, self.watched = (
            lm,
            at,
            lm.watch(tokens, torch.ones_like(tokens, dtype=torch.bool)),
        )
        self.logits, self.x = self.watched.logits[:, at:], self.watched.x[:, at]
        self.row_bytes = 4 * self.watched.logits[0].numel()

    @torch.inference_mode()
    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        rows = rows.to(self.watched.tokens.device)

        def put(old: Tensor) -> Tensor:
            new = old.clone()
            new[:, self.at] = x.to(old)
            return new

        part = self.watched._replace(
            tokens=self.watched.tokens[rows],
            attention=self.watched.attention[rows],
            prefix=_take(self.watched.prefix, rows),
        )
        return self.lm.replay(part, put)[:, self.at :]


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
    """Return how a cached fork fails to give what `LM.replay` gives, unchanged and with half the
    activation; '' if it does."""
    rows = torch.arange(len(tokens), device=tokens.device).flip(0)
    slow = _ReplayedFork(lm, tokens, at, length)
    halves = slow.x[rows] / 2
    expected = torch.cat([slow.logits, slow(rows, halves)]).float()
    try:
        fast = _CachedFork(lm, tokens, at, length)
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


def resolve_device(name: str) -> str:
    """Return the device that a recipe asks for; auto takes an accelerator if there is one."""
    if name == "auto":
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name!r} is not to be had here: {str(error).splitlines()[0]}; cpu always is"
        ) from None
    return name


# ---- loading -------------------------------------------------------------------------------------


def find_model(name: str) -> str:
    """Return a folder or a Hub name; raise InputError for a path that is not there."""
    if name == "pylm" or name.startswith("pylm/"):
        try:
            return str(pylm.folder(name.partition("/")[2] or pylm.DEFAULT))
        except ValueError as error:
            raise InputError(str(error)) from None
    path = Path(name)
    if not files.exists(path) and (
        path.is_absolute() or name.startswith(".") or name.count("/") > 1
    ):
        raise InputError(
            f"model folder {name} does not exist; give a folder with config.json, a Hub name such "
            "as gpt2, or pylm"
        )
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"model folder {name} holds an adapter (adapter_config.json), which would be left out; "
            "merge it into its LM (PEFT: merge_and_unload, then save_pretrained), and give that"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model folder {name} has no config.json; it is not a Hugging Face model")
    return name


def load_model(source: str, dtype: torch.dtype, options: dict[str, Any]) -> CausalLM:
    """Load a causal LM; raise InputError, naming them, for tensors that its files lack or hold
    beside what the model has."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of tensors that do not fit is said below, in one line
    try:
        config = read_config(source, options)
        _check_size(config, source, dtype, options)
        loaded: tuple[CausalLM, dict[str, Any]]  # the library's annotation knows the model alone
        loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError, InputError):
        raise
    # of transformers, safetensors, a quantiser's package, or code that comes with the model
    except Exception as error:
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM: {_reason(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    model, report = loaded
    _check_weights(model, source, report)
    if not getattr(config, "quantization_config", None):
        _check_dtypes(model, source)
    return model


def read_config(source: str, options: dict[str, Any]) -> Any:
    """Read a model's config.json; raise InputError where it names code of the Hub, or cannot be
    one of a model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # of transformers, or of code that comes with the model
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM: {_reason(error)}"
        ) from error
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        kernel = str(getattr(part, "_attn_implementation", None) or "")
        if "/" in kernel and not options["trust_remote_code"]:
            raise InputError(
                f"model {source!r}: its config names {kernel!r}, code of the Hub, for its "
                "attention. If you have read that code and "
                "trust it, give --trust-remote-code True; else take the name out of its config.json"
            )
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise InputError(
                f"model {source!r}: its config.json says {layers:,} layers, more than the "
                f"{MOST_LAYERS:,} that any LM has here; put the right number there"
            )
    return config


def without_weights(
    config: Any, source: str, options: dict[str, Any], dtype: torch.dtype | None = None
) -> CausalLM:
    """Return a causal LM of a config's shape that takes no memory; raise InputError if no LM can
    have it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype or torch.float32,
                trust_remote_code=options["trust_remote_code"],
            )
    except Exception as error:  # of transformers, torch, or of code that comes with the model
        raise InputError(
            f"model {source!r} cannot be loaded as a causal LM, none can be made of its config: "
            f"{_reason(error)}"
        ) from error


def _check_size(config: Any, source: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Raise InputError, before memory is taken, for a folder's config of far more parameters than
    its weights can hold."""
    if not files.exists(Path(source)):
        return
    weights = [*Path(source).glob("*.safetensors"), *Path(source).glob("*.bin")]
    size = sum(file.stat().st_size for file in weights if file.is_file())
    model = without_weights(config, source, options, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if size and parameters > size * PARAMETERS_PER_BYTE:
        raise InputError(
            f"model {source!r}: its config.json describes {parameters:,} parameters, its weights "
            f"are {size:,} bytes, so that they cannot be of this model; complete the folder"
        )


def _reason(error: Exception) -> str:
    """Return the first line of an error, with what to do where code of the model's own is
    needed."""
    said = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return (
            f"{line[:200].rstrip('.')}. If you have read that code and trust it, give "
            "--trust-remote-code True "
            "(in Python trust_remote_code=True)"
        )
    return line


def _check_weights(model: nn.Module, source: str, report: dict[str, Any]) -> None:
    """Raise InputError where a model's file and the model do not hold the same tensors: what is
    missing would be random.

    Whole parts that the model does not have (a vision tower, a second head) may be in the file; a
    line says so.
    """
    modules = {_numberless(name) for name, _ in model.named_modules()}
    buffers = {name for name, _ in model.named_buffers()}
    extra = sorted(set(report.get("unexpected_keys", ())) - buffers)
    inside = [name for name in extra if _numberless(name.rpartition(".")[0]) in modules]
    missing = sorted(report.get("missing_keys", ()))
    shaped = sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ())
    )
    wrong = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("of another shape", shaped),
            ("unknown to the model", inside),
        )
        if names
    ]
    if not wrong and len(extra) and not missing:
        _log.warning(
            "model %s: its files hold parts that the causal LM does not have, which are left out: "
            "%s",
            source,
            _some(extra),
        )
    if wrong:
        if missing and extra and not inside:
            wrong.append(f"unknown to the model: {_some(extra)}")
        raise InputError(
            f"model {source!r}: its weights do not fit its config, so that the LM would not be "
            "what its files say. "
            f"Tensors {'; '.join(wrong)}. Save the model again with save_pretrained under its own "
            "names, or complete the folder"
        )


def _check_dtypes(model: nn.Module, source: str) -> None:
    """Raise InputError for parameters that a folder's files hold as integers, truth values or
    complex numbers: read as real numbers, they would be others."""
    from safetensors import safe_open

    parameters = {_bare(model, name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for file in sorted(Path(source).glob("model*.safetensors")):
        held = safe_open(file, framework="pt")
        for name in sorted(held.keys()):
            dtype = held.get_slice(name).get_dtype()
            if _bare(model, name) in parameters and not dtype.startswith(("F", "BF")):
                raise InputError(
                    f"model {source!r}: {name} in {file.name} is of {dtype}, not of real numbers, "
                    "and its config names no quantisation; save the model again"
                )


def _bare(model: nn.Module, name: str) -> str:
    """Return a tensor's name without that of the base model, with or without which it is saved."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _numberless(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"folder {source} has no tokenizer; name one with --acts.tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (
        Exception
    ) as error:  # of transformers, tokenizers, a missing package, or code that comes with the model
        raise InputError(
            f"tokenizer {source!r} cannot be loaded: {_reason(error)}; name another with "
            "--acts.tokenizer"
        ) from error
