"""A causal LM of the transformers library, read and changed at one site by forward hooks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse import html
from ksparse.config import ActsConfig
from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.lm import agreement
from ksparse.lm.continuations import Branch, choose_branch
from ksparse.lm.head import Logits, run_base
from ksparse.lm.hooks import StopForward, copy_output, hooked, skipped
from ksparse.lm.loading import (
    find_model,
    load_model,
    load_tokenizer,
    loading_options,
    resolve_dtype,
)
from ksparse.lm.redraw import redraw_
from ksparse.lm.sites import blocks_before, describe_sites, require_one, resolve
from ksparse.lm.tokens import TokenBatch, token_strings, tokenize_text, without_bos
from ksparse.lookup import function_of
from ksparse.storage import atomic
from ksparse.trust import code_is_trusted

_log = logging.getLogger("ksparse")
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""Names under which configurations hold the longest context."""


class CachedRun(NamedTuple):
    """An unchanged run of the LM, and what `LM.run_patched` needs to start from it."""

    predictions: Logits
    """Logits [b, t, v], computed when they are read."""
    x: Tensor
    """[b, t, d] in float32: the site's activations."""
    tokens: Tensor
    attention: Tensor
    prefix: Any
    """Output of the last block before the site; None if there is none."""

    @property
    def logits(self) -> Tensor:
        """All logits [b, t, v]."""
        return self.predictions.full()


class LM:
    """A causal language model, and a site in it whose activations are read and changed.

    `lm("text")` returns the activations x[t, d] of the text's tokens. On batches of contexts `acts`
    reads the site and stops there; `run_with_cache` runs the whole LM; `run_patched` runs it again
    from the site on, with other activations there; `branch_from` runs the rest of a context many
    times, with another activation at one position.

    Args:
        name: A Hub name, a folder, a GGUF file, or `pylm/SIZE`.
        site: An alias such as `resid_post.8` (see `ksparse.lm.sites`), or a module's name (its
            output), or NAME:in (its input).
        acts: All options at once; replaces `name` and `site`.
        device: Where the LM runs: "auto" for an accelerator if there is one, "cpu", "cuda", "mps".
        trust_remote_code: Run code that comes with the model. Nothing but this argument (or a
            `--trust-remote-code` flag) allows it.

    Raises:
        InputError: The model, tokenizer or site does not exist, does not fit together, or does not
            give the same activations in passes that must agree.

    Example:
        >>> import ksparse
        >>> lm = ksparse.LM("pylm/0.3m", site="resid_post.1")
        >>> x = lm("import os")
        >>> x.shape == (len(lm.tokens("import os")), lm.d_model)
        True
    """

    def __init__(
        self,
        name: str | Path = "pylm/1.9m",
        site: str = "resid_post.3",
        *,
        acts: ActsConfig | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
    ):
        device = resolve_device(str(device))
        self.options = acts or ActsConfig(lm=str(name), site=site)
        require_one(self.options.site)
        self.device = torch.device(device)
        source = find_model(self.options.lm)
        self.folder = Path(source) if atomic.exists(Path(source)) else None
        loading = loading_options(self.options, trust_remote_code or code_is_trusted())
        self.options = resolve_dtype(self.options, device, loading)
        self.model = load_model(source, self.options, loading, device)
        if self.options.lm_weights != "trained":
            keep_embedding = self.options.lm_weights == "redrawn_keep_embedding"
            redraw_(self.model, keep_embedding=keep_embedding)
        self.tokenizer = load_tokenizer(self.options.tokenizer or source, loading)
        self.vocab = self.model.get_input_embeddings().weight.shape[0]
        self._check_tokenizer()
        if acts is not None:
            self.check_length(acts.context, "acts.context")
        self._warned_of_length = False
        self.head_runs_alone = agreement.head_runs_alone(self)
        """Whether logits can be computed from the last hidden states, some at a time."""
        self._set_site(self.options.site)

    def _check_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        largest = max(
            [*tokenizer.get_vocab().values(), *(i for i in special if i is not None)], default=-1
        )
        if largest >= self.vocab:
            raise InputError(
                f"the tokenizer of {self.options.tokenizer or self.options.lm} gives ids up to "
                f"{largest}, the model has {self.vocab} embeddings; give the model's own with "
                "--acts.tokenizer"
            )

    def _set_site(self, site: str) -> None:
        self.options = dataclasses.replace(self.options, site=site)
        self.site = resolve(self.model, site)
        self.skippable = blocks_before(self.model, self.site)
        """Blocks before the site that `run_patched` need not run again."""
        self.read_only_reason = ""
        """Why activations at the site cannot be changed; '' if they can."""
        self._branch_type: type[Branch] | None = None  # chosen by the first `branch_from`
        agreement.check_passes_agree(self)
        tokens = torch.zeros(2, 3, dtype=torch.long)  # unlike [1, 1], no position table passes this
        self.d_model = self.acts(tokens, torch.ones_like(tokens, dtype=torch.bool)).shape[-1]

    def at_site(self, site: str) -> LM:
        """Return the same LM, sharing its weights, at another site."""
        other = copy.copy(self)
        other._set_site(site)
        return other

    @property
    def module(self) -> nn.Module:
        """The module at whose input or output (`at`) the site's activations are."""
        return self.site.place.module

    @property
    def at(self) -> str:
        """Which end of `module` the site is: 'in' or 'out'."""
        return self.site.place.at

    @property
    def bos(self) -> int | None:
        """The id of the token each context begins with; None without one."""
        return self.tokenizer.bos_token_id if self.options.bos == "auto" else None

    @property
    def context(self) -> int | None:
        """The longest context the LM takes; None if its config does not say."""
        longest = longest_context(self.model.config)
        if longest is None:
            return None
        # Positions begin behind that of padding where the table has one (RoBERTa).
        tables = (
            module.num_embeddings - module.padding_idx - 1
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
            and module.padding_idx is not None
            and "position" in name
        )
        return min(longest, *tables, longest)

    def __repr__(self) -> str:
        options = self.options
        return (
            f"LM({options.lm!r}, site={options.site!r}, d_model={self.d_model}, "
            f"dtype={options.lm_dtype!r}, device={str(self.device)!r})"
        )

    def _repr_html_(self) -> str:
        options = self.options
        words = {
            "site": options.site,
            "d_model": self.d_model,
            "vocabulary": self.vocab,
            "context": f"{options.context} of at most {self.context or 'unknown'} tokens",
            "precision": options.lm_dtype,
            "device": self.device,
        }
        return html.table(f"Language model {options.lm}", words)

    # ---- texts

    def encode(self, texts: str | Sequence[str], sae: Any, *, force: bool = False) -> Any:
        """Return the code of texts by an SAE, a row for each token.

        Texts are read in batches. One that is longer than the context that the SAE was trained with
        is cut into contexts of that length, as in training.

        Args:
            texts: A text, or several.
            sae: The autoencoder.
            force: Allow an LM, site or contexts that contradict what the SAE was trained on.

        Returns:
            A code values[rows, k], indices[rows, k] with `tokens` (the token of each row) and
            `documents` (the number of its text); see `ksparse.sae.code.TextCode`.

        Raises:
            InputError: A text has no token, or the LM, its site or its BOS contradicts what the SAE
                was trained on.

        Example:
            >>> import ksparse
            >>> sae = ksparse.load("runs/demo")
            >>> code = sae.lm().encode(["import os", "x = 1"], sae)
            >>> len(code.tokens) == len(code.values), code.documents.max().item()
            (True, 1)
        """
        return function_of("LM.encode")(self, texts, sae, force=force)

    def __call__(self, text: str) -> Tensor:
        """Return the raw activations x[t, d] of a text's tokens, in float32.

        BOS is put before the text if the LM has one, and its own row is left out.
        """
        tokens = self.tokenize(text)
        self.check_length(tokens.shape[1], "the text")
        if tokens.shape[1] > self.options.context and not self._warned_of_length:
            self._warned_of_length = True
            _log.warning(
                "a text of %s tokens is longer than acts.context, %s: an autoencoder trained on "
                "such contexts has not seen the positions beyond",
                f"{tokens.shape[1]:,}",
                self.options.context,
            )
        lead = int(self.bos is not None)
        return self.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, lead:]

    def tokens(self, text: str) -> list[str]:
        """Return the strings of a text's tokens, one for each row of `lm(text)`."""
        lead = int(self.bos is not None)
        return token_strings(self.tokenizer, self.tokenize(text)[0, lead:].tolist())

    def tokenize(self, text: str) -> Tensor:
        """Return ids [1, t] of a text, BOS first as in training.

        A text that begins with BOS, such as a rendered chat, gets no second one.
        """
        if not isinstance(text, str):
            raise InputError(
                f"a text is a str, got {type(text).__name__}; for the codes of several texts: "
                "lm.encode(texts, sae)"
            )
        ids = without_bos(tokenize_text(self.tokenizer, text), self.bos)
        if not ids:
            raise InputError(f"the text {text!r} has no token")
        return torch.tensor([([] if self.bos is None else [self.bos]) + ids], device=self.device)

    # ---- passes

    def acts(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Return the raw activations x[b, t, d] at the site; nothing after it is computed.

        Args:
            tokens: Ids [b, t].
            attention: bool [b, t], False for padding.

        Returns:
            x[b, t, d] in float32.
        """
        return self.acts_at((self.options.site,), tokens, attention)[self.options.site]

    @torch.inference_mode()
    def acts_at(self, sites: Sequence[str], tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Return the raw activations x[b, t, d] at several sites in float32, from one pass that
        stops at the last of them."""
        reads: dict[str, Tensor] = {}

        def record(site: str, x: Tensor) -> None:
            # A later block may add to x in place, so it is copied unless the pass ends here.
            reads.setdefault(site, x.clone() if len(sites) > 1 else x)
            if len(reads) == len(set(sites)):
                raise StopForward

        with ExitStack() as hooks:
            for site in dict.fromkeys(sites):
                where = self.site if site == self.options.site else resolve(self.model, site)
                hooks.enter_context(hooked(where, functools.partial(record, site)))
            with suppress(StopForward):
                self.forward(tokens, attention)
        return {
            site: agreement.check_activations(self, site, reads, tokens).float().to(self.device)
            for site in sites
        }

    @torch.inference_mode()
    def run_with_cache(self, tokens: Tensor, attention: Tensor) -> CachedRun:
        """Run the unchanged LM on ids [b, t]; keep its logits and activations for `run_patched`."""
        return self.run_after(None, tokens, attention)

    def run_after(self, past: Any, tokens: Tensor, attention: Tensor) -> CachedRun:
        """Run the unchanged LM after the tokens of a key-value cache; None for no cache."""
        reads: list[Tensor] = []
        prefix: list[Any] = []
        with ExitStack() as hooks:
            if self.skippable:
                last = self.skippable[-1].register_forward_hook(
                    lambda module, args, output: prefix.append(copy_output(output))
                )
                hooks.callback(last.remove)
            hooks.enter_context(
                self.hooked(lambda x: reads.append(x.to(self.device, torch.float32, copy=True)))
            )
            predictions = self.predict(tokens, attention, past)
        return CachedRun(predictions, reads[0], tokens, attention, prefix[0] if prefix else None)

    def run_patched(self, cached: CachedRun, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits [b, t, v] of `predict_patched`."""
        return self.predict_patched(cached, edit).full()

    def predict_patched(
        self, cached: CachedRun, edit: Callable[[Tensor], Tensor], *, gradient: bool = False
    ) -> Logits:
        """Run the LM again with the site's activations changed; blocks before it are skipped.

        Args:
            cached: What `run_with_cache` returned.
            edit: Maps x[b, t, d] (float32) to what takes its place.
            gradient: Record what `LogitRows.gradient` needs. The LM itself stays as it is.

        Returns:
            The logits [b, t, v], computed when they are read.

        Raises:
            InputError: The site is read-only.
        """
        self.check_changes()
        with (
            torch.inference_mode(not gradient),
            torch.set_grad_enabled(gradient),
            ExitStack() as changes,
        ):
            for block in self.skippable if cached.prefix is not None else ():
                changes.enter_context(skipped(block, cached.prefix))
            changes.enter_context(self.hooked(lambda x: edit(x.float().to(self.device)).to(x)))
            return self.predict(cached.tokens, cached.attention)

    @torch.inference_mode()
    def branch_from(self, tokens: Tensor, attention: Tensor, at: int, length: int) -> Branch:
        """Prepare to run positions at … at + length - 1 many times, with other activations at `at`.

        What precedes `at` is computed once and kept as keys and values. The first branch at a site
        is compared with `run_patched`; where the LM's cache does not give the same, a warning is
        logged and branches run whole contexts instead.

        Args:
            tokens: Ids of contexts [c, t].
            attention: bool [c, t]; all positions before at + length must be True.
            at: The position at which activations are replaced.
            length: The number of positions whose logits are returned.

        Raises:
            InputError: Positions are out of range or padded, or the site is read-only.
        """
        end = at + length
        if at < 0 or length < 1 or end > tokens.shape[1]:
            raise InputError(
                f"positions {at} to {end - 1} cannot be branched from: the contexts have positions "
                f"0 to {tokens.shape[1] - 1}"
            )
        if not bool(attention[:, :end].all()):
            raise InputError(
                f"positions {at} to {end - 1} cannot be branched from: some context has padding "
                f"before position {end}"
            )
        self.check_changes()
        tokens = tokens.to(self.device)
        if self._branch_type is None:
            self._branch_type = choose_branch(self, tokens, attention, at, length)
        return self._branch_type(self, tokens, at, length)

    def forward(self, tokens: Tensor, attention: Tensor, past: Any = None) -> Any:
        """Run the model on ids [b, t], after the tokens of a key-value cache if one is given."""
        return self.model(**self._inputs(tokens, attention, past))

    def predict(self, tokens: Tensor, attention: Tensor, past: Any = None) -> Logits:
        """Run the model as `forward` does; its logits are computed when they are read."""
        inputs = self._inputs(tokens, attention, past)
        if self.head_runs_alone:
            return Logits(self.model, run_base(self.model, **inputs), self.vocab)
        return Logits(self.model, self.model(**inputs).logits, self.vocab)

    def _inputs(self, tokens: Tensor, attention: Tensor, past: Any) -> dict[str, Any]:
        if past is None:
            self.check_length(tokens.shape[1])
        cache = (
            {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
        )
        mask = None if bool(attention.all()) else attention.long()
        return {"input_ids": tokens.to(self.device), "attention_mask": mask, **cache}

    def hooked(self, change: Callable[[Tensor], Tensor | None]) -> AbstractContextManager[None]:
        """Pass the site's activations through `change` inside a `with` block."""
        return hooked(self.site, change)

    def check_changes(self) -> None:
        """Raise InputError where activations at the site can be read but not changed."""
        if self.read_only_reason:
            raise InputError(
                f"activations at site {self.options.site!r} of {self.options.lm} can be read but "
                f"not changed: {self.read_only_reason}; choose another:\n"
                f"{describe_sites(self.model)}"
            )

    def check_length(self, tokens: int, what: str = "a context") -> None:
        """Raise InputError for more tokens than the LM takes: it would fail, or read positions it
        was never trained on."""
        check_length(tokens, self.context, self.options.lm, what)

    def on_device(self, contexts: TokenBatch) -> TokenBatch:
        """Move a batch of contexts to the LM's device."""
        return TokenBatch(*(field.to(self.device) for field in contexts))


def longest_context(config: Any) -> int | None:
    """Return the longest context of a model; None if its config does not say."""
    text = config.get_text_config()
    lengths = [getattr(text, name, None) for name in _CONTEXT_KEYS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def check_length(tokens: int, longest: int | None, lm: str, what: str = "a context") -> None:
    """Raise InputError for a context of more tokens than the LM takes."""
    if longest is not None and tokens > longest:
        raise InputError(
            f"{what} is {tokens:,} tokens long, but {lm} takes at most {longest:,}; give a shorter "
            + ("--acts.context" if what == "acts.context" else "one")
            + (", or lm.encode(text, sae), which cuts it" if what == "the text" else "")
        )
