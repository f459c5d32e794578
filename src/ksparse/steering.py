"""An autoencoder inside a running LM: read, changed, spliced in, on any Hugging Face model, by
plain forward hooks.

    attach(model, sae, site, change)        the mechanism: x -> code, code + change -> x', with what
                                            the SAE misses kept or dropped
    steer(model, sae, clamp={123: -5.0})    latents held at values, or scaled, inside a with block
    attribute(lm, sae, prompts, metric)     which latents a behaviour hangs on: activation x
                                            gradient (Gao et al. 2024, appendix E.3)
    continue_text(lm, prompt)               a continuation and the next token's distribution; inside
                                            `steer`, the steered ones
    compare(lm, sae, prompt, clamp={…})     both

With the error kept, x' = x + scale * W_dec^T change: nothing but the change reaches the LM,
whatever the SAE fails to reconstruct. Blocks nest, so several SAEs at several sites can be attached
at once; each sees what the ones before it have changed.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.lm import provenance
from ksparse.lm.hooks import hooked, not_activations, probing
from ksparse.lm.model import LM
from ksparse.lm.sites import resolve
from ksparse.lm.tokens import ids_of, token_strings
from ksparse.sae import serialization
from ksparse.sae.model import SAE, Code
from ksparse.sae.ranges import warn_beyond

_log = logging.getLogger("ksparse")
Change = Callable[[Code], Code]
"""Takes the code of an activation [..., k]; returns what is added to it: values of either sign
[..., m] at latents [..., m]."""
Positions = Literal["trained", "all"] | Tensor
Metric = Callable[[Tensor], Tensor]
"""Takes the logits [v] of the token after a prompt; returns a scalar."""


def lm_of(sae: SAE, device: str = "auto") -> LM:
    """Return the LM that an SAE was trained on, with its site."""
    return LM(acts=serialization.acts_of(sae.metadata), device=resolve_device(device))


# ---- an SAE in the way of a forward pass ---------------------------------------------------------


class Tap:
    """What an attached SAE saw in the last forward pass, before any change.

    x: raw activations [b, t, d] in the SAE's precision; code [b, t, k]; recon [b, t, d] on the
    scale of x; keep: bool[b, t], the positions that may be changed.
    """

    x: Tensor
    code: Code
    keep: Tensor

    def __init__(self, sae: SAE):
        self._sae = sae

    def __getattr__(self, name: str) -> Tensor:
        if name in ("x", "code", "keep"):
            raise InputError(
                f"nothing has gone through the site yet, so there is no {name}; run the model "
                "inside the `with`"
            )
        raise AttributeError(name)

    @property
    def recon(self) -> Tensor:
        return self._sae.normalize(self.x).restore(self._sae.decode_normalized(self.code))


@contextmanager
def attach(
    model: nn.Module,
    sae: SAE,
    site: str = "",
    *,
    change: Change | None = None,
    error: Literal["keep", "drop"] = "keep",
    positions: Positions = "trained",
) -> Iterator[Tap]:
    """Put an SAE in the way of every forward pass of a causal LM inside a with block; gradients
    flow through it.

    site: where, as in a recipe (`resid_post.8`, a module's name, NAME:in); the SAE's own if not
    given.
    change: what is added to the code; nothing if not given, so that the SAE only reads.
    error: keep: x + what the change decodes to. drop: the reconstruction takes the place of x.
    positions: trained: where the SAE was trained to read: not the first position and no BOS, EOS or
    separator, if it was trained so.
        Or all, or bool[b, t].
    """
    if error not in ("keep", "drop"):
        raise InputError(f"error is {error!r}; it must be 'keep' or 'drop'")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"an SAE is attached to a torch module, got {type(model).__name__}; of a ksparse.LM, "
            "give lm.model"
        )
    place = resolve(model, site or _own_site(sae))
    if (
        site
        and (own := provenance.trained_on(sae.metadata).get("site"))
        and not provenance.same_site(model, site, own)
    ):
        _log.warning("the autoencoder is attached at %s, but was trained at %s", site, own)
    site = site or _own_site(sae)
    tap, where = Tap(sae), _Called(sae, positions)

    def put(old: Tensor) -> Tensor | None:
        where.reached(site)
        if wrong := not_activations(old, where.shape):
            raise InputError(
                f"site {site!r} gives {wrong}, not activations [contexts, tokens, width]; choose "
                "another"
            )
        raw = old.to(sae.W_enc, copy=True)  # the model may go on in place
        inputs = sae.normalize(raw)
        code = sae.encode_normalized(inputs.x)
        tap.x, tap.code, tap.keep = raw, code, where.kept(old)
        added = None if change is None else sae.decoder(change(code))
        if error == "drop":
            recon = (
                sae.decode_normalized(code)
                if added is None
                else sae.decode_normalized(code) + added
            )
            new = inputs.restore(recon)
        elif added is None:
            return None
        else:
            new = raw + inputs.scale * added
        return torch.where(tap.keep[..., None], new.to(old), old)

    with where.watching(model, place.module), hooked(place, put):
        yield tap
    if where.calls and not where.reads:
        raise InputError(
            f"site {site!r} was not reached in {where.calls} calls of the model, so nothing was "
            "read or changed there; "
            "choose another site, or call a model that torch.compile has compiled as it was before"
        )


@contextmanager
def steer(
    model: nn.Module,
    sae: SAE,
    clamp: Mapping[int, float] | None = None,
    *,
    scale: Mapping[int, float] | None = None,
    site: str = "",
    error: Literal["keep", "drop"] = "keep",
    positions: Positions = "trained",
    largest: Mapping[int, float] | None = None,
) -> Iterator[Tap]:
    """Hold latents of an SAE at values, and multiply others' own activations, in every forward pass
    inside a with block.

    clamp: {latent: value}, of either sign; 0 takes the latent out. scale: {latent: factor}. All
    else as `attach`.
    largest: {latent: its largest value on a text}: a value far beyond it is warned of; without it,
    one beyond what the latent can reach.

        with ksparse.steer(model, sae, {123: -5.0}):
            model.generate(**tokenizer("Once upon a time", return_tensors="pt"))
    """
    clamp, scale = dict(clamp or {}), dict(scale or {})
    if not clamp and not scale:
        raise InputError("steering needs a latent: clamp={latent: value} or scale={latent: factor}")
    if both := sorted(set(clamp) & set(scale)):
        raise InputError(
            f"latent {both[0]} is to be both clamped and scaled; give it in one of the two"
        )
    check_latents(sae, [*clamp, *scale])
    for latent, value in (clamp | scale).items():
        number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if not number or not math.isfinite(value):
            raise InputError(
                f"latent {latent} is to be held at or scaled by {value!r}; give a finite number"
            )
    warn_beyond(sae, clamp, largest)
    with attach(
        model,
        sae,
        site,
        change=changes(clamped(clamp), scaled(scale)),
        error=error,
        positions=positions,
    ) as tap:
        yield tap


def check_latents(sae: SAE, latents: Sequence[int]) -> None:
    """Raise InputError for a latent that the SAE does not have."""
    for latent in latents:
        if not isinstance(latent, Integral) or isinstance(latent, bool):
            raise InputError(f"latent {latent!r} is no latent; give a whole number")
        if not 0 <= latent < sae.shape.n_latents:
            raise InputError(
                f"latent {latent} does not exist: this SAE has latents 0 to "
                f"{sae.shape.n_latents - 1}"
            )


def clamped(values: Mapping[int, float]) -> Change:
    """Return the change after which latents have these values, wherever they were."""
    return lambda code: _change(code, values, lambda own, given: given - own)


def scaled(factors: Mapping[int, float]) -> Change:
    """Return the change after which latents have so many times their activation."""
    return lambda code: _change(code, factors, lambda own, given: (given - 1) * own)


def changes(*parts: Change) -> Change:
    """Return the sum of several changes, each of the original code."""

    def change(code: Code) -> Code:
        return Code(
            *(torch.cat(columns, dim=-1) for columns in zip(*(part(code) for part in parts)))
        )

    return change


def acts_at(code: Code, latents: Tensor) -> Tensor:
    """Return the activations [..., m] of latents[m] in a code [..., k]; 0 where one is not
    active."""
    return torch.stack(
        [(code.values * (code.indices == latent)).sum(-1) for latent in latents.tolist()], dim=-1
    )


def _change(
    code: Code, given: Mapping[int, float], rule: Callable[[Tensor, Tensor], Tensor]
) -> Code:
    if not given:
        return Code(code.values[..., :0], code.indices[..., :0])
    latents = torch.tensor(list(given), device=code.indices.device)
    values = rule(
        acts_at(code, latents),
        torch.tensor(list(given.values()), dtype=code.values.dtype, device=code.values.device),
    )
    return Code(values, latents.expand(values.shape))


def _check_own(sae: SAE, lm: LM, force: bool) -> None:
    """Raise InputError where an SAE says that it was trained on another LM or site, unless by
    force."""
    if provenance.trained_on(sae.metadata):
        provenance.check(sae.metadata, lm, force=force)


def _own_site(sae: SAE) -> str:
    site = (sae.metadata.get("acts") or sae.metadata.get("origin") or {}).get("site")
    if not site:
        raise InputError(
            "this SAE does not say at which site it was trained; give one: site='resid_post.8', say"
        )
    return site


_STATES = ("past_key_values", "cache_params", "state", "past", "mems", "cache", "past_states")
"""What models call what they remember of earlier tokens."""


class _Call(NamedTuple):
    """A call that is running, of a model or of a part of it that takes ids."""

    part: int
    ids: Tensor | None
    attention: Tensor | None
    continues: bool
    """Whether earlier tokens of the same contexts were in other calls."""


class _Called:
    """What a model is called with, and so which positions an SAE may change."""

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
        self.running: list[_Call] = []  # from the outermost to the one that counts
        self.calls = self.reads = 0
        self.read = False  # whether the site was read in the call that counts

    @property
    def call(self) -> _Call | None:
        """The call that is running, if one is."""
        return self.running[-1] if self.running else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """[contexts, tokens] of the call that is running, where that is known."""
        return None if self.call is None or self.call.ids is None else tuple(self.call.ids.shape)

    @contextmanager
    def watching(self, model: nn.Module, module: nn.Module) -> Iterator[None]:
        """Note what is called of all that holds a module: the outermost call, and calls within it
        that take ids."""
        names = [
            name for name, part in model.named_modules(remove_duplicate=False) if part is module
        ]
        holders = {
            model.get_submodule(".".join(path[:end]))
            for path in (name.split(".") for name in names)
            for end in range(len(path))
        }
        with ExitStack() as hooks:
            for part in holders:
                note = part.register_forward_pre_hook(self._note, with_kwargs=True)
                end = part.register_forward_hook(self._end, always_call=True)
                hooks.callback(note.remove)
                hooks.callback(end.remove)
            yield

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if probing():
            return
        called = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        ids = called.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            ids = None
        if self.call is not None and ids is None:
            return
        attention = called.get("attention_mask")
        if not isinstance(attention, Tensor) or attention.ndim != 2:
            same = ids is not None and ids.shape == self.shape
            attention = self.call.attention if self.call is not None and same else None
        continues = self._continues(called, ids, attention)
        continues |= self.call is not None and self.call.continues
        self.calls += self.call is None
        self.running.append(_Call(id(module), ids, attention, continues))
        self.read = False
        self._tell_of_length()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        parts = [call.part for call in self.running]
        if id(module) in parts:
            del self.running[parts.index(id(module)) :]

    def reached(self, site: str) -> None:
        """Count that a site is read; raise InputError for the second time in one call."""
        if self.running and self.read:
            raise InputError(
                f"site {site!r} runs several times in one call of the model, so that it has no "
                "single activation of a token; choose another"
            )
        self.reads, self.read = self.reads + 1, True

    @staticmethod
    def _continues(called: dict[str, Any], ids: Tensor | None, attention: Tensor | None) -> bool:
        """Return whether earlier tokens of the same contexts have been seen: in a cache, a state,
        or by their positions."""
        if ids is not None and attention is not None and attention.shape[1] > ids.shape[1]:
            return True
        places = called.get("position_ids", called.get("cache_position"))
        if (
            isinstance(places, Tensor)
            and places.numel()
            and not places.is_floating_point()
            and int(places.min()) > 0
        ):
            return True
        return any(_remembers(called.get(name)) for name in _STATES)

    def _tell_of_length(self) -> None:
        """Say once that positions are changed which the SAE was never trained on."""
        length = max(
            (
                part.shape[1]
                for call in self.running
                for part in (call.ids, call.attention)
                if part is not None
            ),
            default=0,
        )
        if self.context is not None and length > self.context:
            _log.warning(
                "contexts of %s tokens are longer than the %s that this autoencoder was trained "
                "on; "
                "it has not seen the positions behind them",
                f"{length:,}",
                self.context,
            )
            self.context = None

    def kept(self, x: Tensor) -> Tensor:
        """Return the positions [b, t] of activations x[b, t, d] of the call that is running."""
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
            keep &= attended.long().cumsum(1) > 1  # padding may come first
        if ids is not None and ids.shape == keep.shape:
            for token in self.special:
                keep &= ids.to(x.device) != token
        return keep


def _remembers(state: Any) -> bool:
    """Return whether what a model is given as its memory holds earlier tokens; one that does not
    say holds some."""
    if state is None:
        return False
    for count in ("get_seq_length", "has_previous_state"):
        if callable(ask := getattr(state, count, None)):
            try:
                if ask():
                    return True
            except ValueError:  # a cache whose layers are all of the other kind
                continue
    if hasattr(state, "get_seq_length") or hasattr(state, "has_previous_state"):
        return getattr(state, "has_previous_state", False) is True
    if isinstance(offset := getattr(state, "seqlen_offset", None), int):
        return offset > 0
    return not isinstance(state, (list, tuple, dict)) or any(part is not None for part in state)


# ---- finding -------------------------------------------------------------------------------------


def attribute(
    lm: LM, sae: SAE, prompts: Sequence[str], metric: Metric, *, force: bool = False
) -> Tensor:
    """Return for each latent [n] how much it adds to a metric of the token after a prompt, summed
    over positions, mean over prompts.

    To first order: activation x gradient, the error kept. On an LM that is linear after the site it
    is what ablating the latent takes away.
    """
    if not prompts:
        raise InputError("attribution needs at least one prompt")
    _check_own(sae, lm, force)
    total = torch.zeros(sae.shape.n_latents, dtype=torch.float64)
    for prompt in prompts:
        contributions = attribution(lm, sae, prompt, metric)
        total.index_add_(
            0, contributions.indices.flatten().cpu(), contributions.values.flatten().cpu().double()
        )
    return total / len(prompts)


def attribution(lm: LM, sae: SAE, prompt: str, metric: Metric) -> Code:
    """Return activation x gradient of the active latents at each position of a prompt, BOS first,
    as a code [t, k] of contributions."""
    lm.check_changes()
    leaf: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        leaf.append(x.detach().float().requires_grad_())
        return leaf[0].to(x.dtype)

    with torch.inference_mode(False), torch.enable_grad():
        tokens = lm.tokenize(prompt)
        where = _Called(sae)
        with ExitStack() as hooks:
            hooks.enter_context(where.watching(lm.model, lm.module))
            hooks.enter_context(hooked(lm.site, take))
            logits = lm.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        gradient = torch.autograd.grad(metric(logits), leaf[0])[0][0]
    with torch.no_grad():
        raw = leaf[0].detach()
        inputs = sae.normalize(raw[0])
        code = sae.encode_normalized(inputs.x)
        slopes = torch.einsum(
            "td,tkd->tk", inputs.scale * gradient.to(inputs.x), sae.W_dec[code.indices]
        )
        return Code(code.values * slopes * where.kept(raw)[0][:, None], code.indices)


def logit_difference(lm: LM, toward: Sequence[str], away: Sequence[str] = ()) -> Metric:
    """Return the metric: mean logit of some tokens less the mean logit of others, each given as the
    text of one token."""
    plus, minus = (
        torch.tensor([one_token(lm, text) for text in texts], dtype=torch.long, device=lm.device)
        for texts in (toward, away)
    )
    if not len(plus):
        raise InputError("attribution needs at least one token to look toward")
    return lambda logits: (
        logits[plus].mean() - (logits[minus].mean() if len(minus) else logits.mean())
    )


def one_token(lm: LM, text: str) -> int:
    """Return the id of the token that looks like this in a text, a leading space included; raise
    InputError if there is none."""
    ids = ids_of(lm.tokenizer, text)
    if len(ids) == 1:
        return int(ids[0])
    strings = token_strings(
        lm.tokenizer, range(len(lm.tokenizer))
    )  # SentencePiece puts a space of its own before a text
    if text in strings:
        return strings.index(text)
    pieces = ", ".join(repr(piece) for piece in token_strings(lm.tokenizer, ids))
    raise InputError(
        f"{text!r} is {len(ids)} tokens of {lm.options.lm} ({pieces}); give a text that is one, a "
        "leading space included"
    )


# ---- continuing ----------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """How an LM goes on: the text, its token ids, and log-probabilities [v] of the first token
    after the prompt."""

    text: str
    tokens: list[int]
    log_probs: Tensor


@torch.inference_mode()
def continue_text(
    lm: LM, prompt: str, *, tokens: int = 40, temperature: float = 0.0, seed: int = 0
) -> Continuation:
    """Continue a prompt by so many tokens at most; temperature 0 always takes the likeliest.

    The same seed gives the same random numbers, so that two continuations differ by what was done
    to the LM alone.
    """
    if temperature < 0:
        raise InputError(
            f"temperature is {temperature}; it must be 0, for the likeliest token, or more"
        )
    if tokens < 1:
        raise InputError(f"a continuation of {tokens} tokens cannot be made; give at least 1")
    ids = lm.tokenize(prompt)
    if lm.context is not None and ids.shape[1] + tokens > lm.context:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, {tokens} more make {ids.shape[1] + tokens}; "
            f"{lm.options.lm} takes {lm.context}"
        )
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    pad = next(
        (i for i in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id) if i is not None), 0
    )
    with (
        _plain_generation(lm.model),
        torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        made = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
    new = made.sequences[0, ids.shape[1] :].tolist()
    whole, before = (
        lm.tokenizer.decode(some, skip_special_tokens=True)
        for some in ([*ids[0].tolist(), *new], ids[0].tolist())
    )
    return Continuation(whole[len(before) :], new, made.logits[0][0].float().log_softmax(-1).cpu())


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Generate by what is asked for alone: a model's generation_config.json may search with beams,
    penalise what was said or name what is no token. Where a text ends it may say."""
    from transformers import GenerationConfig

    theirs = model.generation_config
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    ends = [end for end in ends if type(end) is int and end >= 0]
    model.generation_config = GenerationConfig(eos_token_id=ends or None)
    try:
        yield
    finally:
        model.generation_config = theirs


class Comparison(NamedTuple):
    """An LM as it is and steered, on the same prompt."""

    before: Continuation
    after: Continuation

    @property
    def kl(self) -> float:
        """KL(as it is || steered) of the next token, in nats."""
        before, after = self.before.log_probs.double(), self.after.log_probs.double()
        return float((before.exp() * (before - after)).sum())

    def moved(self, most: int) -> list[tuple[int, float, float]]:
        """Return the tokens whose probability changes most, with it before and after."""
        before, after = self.before.log_probs.exp(), self.after.log_probs.exp()
        order = (after - before).abs().argsort(descending=True, stable=True)[:most]
        return [(int(i), float(before[i]), float(after[i])) for i in order]


def compare(
    lm: LM,
    sae: SAE,
    prompt: str,
    clamp: Mapping[int, float] | None = None,
    *,
    scale: Mapping[int, float] | None = None,
    error: Literal["keep", "drop"] = "keep",
    tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    largest: Mapping[int, float] | None = None,
    force: bool = False,
) -> Comparison:
    """Continue a prompt with the LM as it is and inside `steer`, with the same random numbers.

    Raises InputError where the LM or its site is not the SAE's own, unless by force.
    """
    _check_own(sae, lm, force)
    before = continue_text(lm, prompt, tokens=tokens, temperature=temperature, seed=seed)
    with steer(
        lm.model, sae, clamp, scale=scale, site=lm.options.site, error=error, largest=largest
    ):
        return Comparison(
            before, continue_text(lm, prompt, tokens=tokens, temperature=temperature, seed=seed)
        )
