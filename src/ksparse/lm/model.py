"""A causal LM of the transformers library, read and changed at one site by plain forward hooks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm import agreement
from ksparse.lm.hooks import hooked, not_activations
from ksparse.lm.sites import blocks_before, describe_sites, resolve
from ksparse.lm.tokens import TokenBatch, ids_of, token_strings, without_bos
from ksparse.storage import atomic
from ksparse.trust import code_is_trusted

if TYPE_CHECKING:
    pass


from ksparse.lm.continuations import Branch, CachedBranch, PatchedBranch, _disagreement
from ksparse.lm.hooks import _copied, _passing, _Stop
from ksparse.lm.loading import _load_tokenizer, find_model, load_model

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


class CachedRun(NamedTuple):
    """An unchanged run of the LM: logits[b, t, v], the site's x[b, t, d] as float32, and what
    `LM.run_patched` starts from."""

    logits: Tensor
    x: Tensor
    tokens: Tensor
    attention: Tensor
    prefix: Any


class LM:
    """A causal LM and a site in it.

    lm("text") returns the activations x[t, d] of the text's tokens. On batches of contexts, `acts`
    reads the site and stops there, `run_with_cache` runs the whole LM, and `run_patched` runs it again, from the
    site on, with other activations there. `branch_from` runs the rest of a context many times, with
    another activation at one position.
    """

    def __init__(
        self,
        name: str = "pylm/1.9m",
        site: str = "resid_post.3",
        *,
        acts: ActsConfig | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ):
        """name: a Hub name, a folder, or pylm. `acts` holds the other options; name and site are
        taken from it if given.

        trust_remote_code: let code that comes with the model run. Nothing else than this argument
        can.
        """
        self.options = acts or ActsConfig(lm=name, site=site)
        self.device = torch.device(device)
        folder = find_model(self.options.lm)
        common = {"trust_remote_code": trust_remote_code or code_is_trusted()} | (
            {} if atomic.exists(Path(folder)) else {"revision": self.options.revision}
        )
        self.model = (
            load_model(folder, getattr(torch, self.options.lm_dtype), common)
            .to(self.device)
            .eval()
            .requires_grad_(False)
        )
        self.tokenizer = _load_tokenizer(self.options.tokenizer or folder, common)
        self.folder = Path(folder) if atomic.exists(Path(folder)) else None
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
        self._branch: type[Branch] | None = None  # what `branch_from` has seen to be right
        self.refused = ""  # why activations at the site cannot be changed
        agreement.check_passes_agree(self)
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
    def run_with_cache(self, tokens: Tensor, attention: Tensor) -> CachedRun:
        """Run the LM unchanged."""
        return self._run_with_cache(tokens, attention)

    def _run_with_cache(self, tokens: Tensor, attention: Tensor, past: Any = None) -> CachedRun:
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
        return CachedRun(logits, seen[0], tokens, attention, prefix[0] if prefix else None)

    @torch.inference_mode()
    def run_patched(self, cached: CachedRun, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Return logits[b, t, v] with the site's x[b, t, d] (float32) mapped by `edit`; blocks
        before the site are not run again."""
        self.check_changes()
        with ExitStack() as changes:
            for block in self._before if cached.prefix is not None else ():
                changes.enter_context(_passing(block, cached.prefix))
            changes.enter_context(self._hooked(lambda x: edit(x.float()).to(x.dtype)))
            return self._forward(cached.tokens, cached.attention).logits

    @torch.inference_mode()
    def branch_from(self, tokens: Tensor, attention: Tensor, at: int, length: int) -> Branch:
        """Return a `Branch` of contexts tokens[c, t] at position `at`, whose logits are those of
        positions at .. at + length - 1.

        All positions before at + length must be attended (padding may follow). What comes before
        `at` is computed once and kept as keys and values. The first fork at a site is compared with
        `run_patched`; where the LM's cache does not give the same, a warning is logged and forks replay
        whole contexts instead.
        """
        end = at + length
        if at < 0 or length < 1 or end > tokens.shape[1]:
            raise InputError(
                f"positions {at} to {end - 1} cannot be branched from: the contexts have positions 0 to "
                f"{tokens.shape[1] - 1}"
            )
        if not bool(attention[:, :end].all()):
            raise InputError(
                f"positions {at} to {end - 1} cannot be branched from: some context has padding before "
                f"position {end}"
            )
        self.check_changes()
        if self._branch is None:
            self._branch = self._choose_branch(tokens.to(self.device), attention, at, length)
        return self._branch(self, tokens.to(self.device), at, length)

    def _choose_branch(
        self, tokens: Tensor, attention: Tensor, at: int, length: int
    ) -> type[Branch]:
        """Return the fork that is right: the cached one if it gives what `run_patched` gives, at `at`
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
                return PatchedBranch
        return CachedBranch

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

    def on_device(self, contexts: TokenBatch) -> TokenBatch:
        return TokenBatch(*(field.to(self.device) for field in contexts))

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
