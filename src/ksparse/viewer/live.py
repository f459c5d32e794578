"""What needs the LM: a text's latents, and how a text continues with latents held at values.

Latents are held by `ksparse.steering`, so the autoencoder's error stays in the activation.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ksparse.config import ActsConfig
from ksparse.errors import InputError, KsparseError, NonFiniteError, OutOfMemoryError
from ksparse.report.tokens import safe_text, safe_token
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.requests import SteerRequest
from ksparse.viewer.run_data import number

if TYPE_CHECKING:
    from torch import Tensor

    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE, Code
    from ksparse.steering import Change, Comparison

MOST_TOKENS = 512
"""Tokens of a text at most."""
MOST_VALUE = 2.0**127
"""The largest value that a latent can be held at: float32 has room above it."""
PREDICTIONS = 12
"""Likeliest tokens listed of each distribution."""
OF_THE_TEXT = (
    *("site", "text", "text_config", "text_split", "text_field", "normalize", "mix", "lm_batch"),
    *("store", "shards", "shard_window"),
)
"""Keys of `acts` that two runs may differ in and share an LM."""


class LoadedLM:
    """The LM that was used last. Runs that read the same one share it, at each run's site."""

    def __init__(self) -> None:
        self._key: tuple[ActsConfig, bool] | None = None
        self._at_sites: dict[str, LM] = {}

    def get(self, acts: ActsConfig, *, trust_remote_code: bool) -> LM:
        """Return the LM at a site; another one is freed before it is loaded."""
        from ksparse.device import resolve_device
        from ksparse.lm.model import LM

        default = ActsConfig()
        neutral = {name: getattr(default, name) for name in OF_THE_TEXT}
        key = dataclasses.replace(acts, **neutral), trust_remote_code
        if key != self._key:
            self._key, self._at_sites = None, {}
        if not self._at_sites:
            lm = LM(acts=acts, device=resolve_device("auto"), trust_remote_code=trust_remote_code)
            self._key, self._at_sites = key, {acts.site: lm}
        if acts.site not in self._at_sites:
            self._at_sites[acts.site] = next(iter(self._at_sites.values())).at_site(acts.site)
        return self._at_sites[acts.site]


class Stopped(KsparseError):
    """Nobody waits for the answer any more."""


class Live:
    """The LM and the autoencoder of a run, loaded on the first request; one request at a time.

    Args:
        run: the run folder.
        trust_remote_code: let code that comes with the LM run. Whoever opens the run decides,
            never the run's own files.
        loaded: the LM that other runs share.
    """

    def __init__(
        self, run: RunFolder, *, trust_remote_code: bool = False, loaded: LoadedLM | None = None
    ):
        self.run, self.trust_remote_code = run, trust_remote_code
        self._lock, self._loaded_lm = threading.Lock(), loaded or LoadedLM()
        self._checked: weakref.ref[LM] | None = None
        self._notes: list[str] = []

    @property
    def parts(self) -> tuple[SAE, LM]:
        """The autoencoder and its LM at its site, which belong together."""
        from ksparse.lm import provenance

        subject, sae = self.run.subject(), self._sae
        lm = self._loaded_lm.get(subject.acts, trust_remote_code=self.trust_remote_code)
        if self._checked is None or self._checked() is not lm:
            forced = subject.judged is not None and subject.judged.forced
            self._notes = provenance.check(sae.metadata, lm, force=forced, like=subject.acts)
            self._checked = weakref.ref(lm)
        return sae, lm

    @cached_property
    def _sae(self) -> SAE:
        from ksparse.device import resolve_device
        from ksparse.interop import load

        return load(self.run.path).to(resolve_device("auto")).eval()

    def activations(self, text: str, stop: threading.Event | None = None) -> dict[str, Any]:
        """Return a text's tokens and, for each, [latent, value] of its active latents by value.

        Args:
            text: the text.
            stop: set by another thread when nobody waits for the answer any more.

        Raises:
            InputError: the text is empty or too long.
            NonFiniteError: the LM or the autoencoder gives NaN or infinity.
            Stopped: `stop` was set.
        """
        import torch

        with self._at_work(stop) as (sae, lm), torch.inference_mode():
            tokens, strings = _tokenize(lm, text, 0)
            values, indices = _encode(sae, lm, tokens, len(strings))
            if not bool(values.isfinite().all()):
                raise NonFiniteError("the LM or the autoencoder gives NaN or infinity on this text")
            latents = [
                [[i, round_for_json(v)] for v, i in zip(row, row_indices) if v > 0]
                for row, row_indices in zip(values.tolist(), indices.tolist())
            ]
            return {"tokens": strings, "latents": latents}

    def steer(self, request: SteerRequest, stop: threading.Event | None = None) -> dict[str, Any]:
        """Return predictions and continuations of a text, without and with steering.

        Multiples are of the largest activation that `stats` found. A latent of which that is not
        known is held at multiples of its largest value on the text, or, if it is not active there,
        of the largest that any input of typical norm gives it.

        Args:
            request: the text, the latents, and how the text is continued.
            stop: as in `activations`.

        Raises:
            InputError: a latent or a token does not exist, the text is too long, or a value is too
                large.
            NonFiniteError: the LM predicts NaN.
            Stopped: `stop` was set.
        """
        from ksparse import steering
        from ksparse.sae.ranges import warn_beyond

        with self._at_work(stop) as (sae, lm), collect_warnings() as warnings:
            steering.check_latents(sae, list(request.times))
            tokens, strings = _tokenize(lm, request.text, request.tokens)
            if request.at is not None and request.at >= len(strings):
                raise InputError(f"token {request.at} is not one of 0 to {len(strings) - 1}")
            largest, sources = _largest(sae, lm, tokens, list(request.times))
            values = _values(sae, request.times, largest)
            warn_beyond(sae, values, largest)
            change = steering.clamped(values)
            if request.at is not None:
                # BOS comes before the text's own tokens.
                change = change_once_at(change, tokens.shape[1] - len(strings) + request.at)
            write = partial(
                steering.continue_text,
                lm,
                request.text,
                tokens=request.tokens,
                temperature=request.temperature,
                seed=request.seed,
            )
            before = write()
            with steering.attach(lm.model, sae, lm.options.site, change=change):
                after = write()
            comparison = steering.Comparison(before, after)
            if bool(before.log_probs.isnan().any()):
                raise NonFiniteError("the LM predicts NaN after this text")
            if bool(after.log_probs.isnan().any()):
                held = " and ".join(f"{latent} at {value:g}" for latent, value in values.items())
                raise NonFiniteError(
                    f"with latent {held} the LM predicts NaN; "
                    "hold it nearer to the values that it has on text"
                )
            plain, changed = mark_differences(
                *((side.tokens, _token_strings(lm, side.tokens)) for side in comparison)
            )
            return {
                "tokens": strings,
                "latents": [
                    {
                        "latent": latent,
                        "times": round_for_json(request.times[latent]),
                        "value": round_for_json(value),
                        "largest": number(largest.get(latent)),
                        "largest_of": sources.get(latent),
                    }
                    for latent, value in values.items()
                ],
                "kl": number(comparison.kl),
                "plain": plain,
                "changed": changed,
                "predictions": _list_predictions(lm, comparison),
                "warnings": list(dict.fromkeys([*map(safe_text, self._notes), *warnings])),
            }

    @contextmanager
    def _at_work(self, stop: threading.Event | None) -> Iterator[tuple[SAE, LM]]:
        """Yield autoencoder and LM for one request, which ends at the LM's next pass after `stop`
        is set."""

        def end_if_stopped(*given: Any) -> None:
            if stop is not None and stop.is_set():
                raise Stopped("nobody waits for the answer any more")

        with self._lock, translate_memory_errors():
            sae, lm = self.parts
            hook = lm.model.register_forward_pre_hook(end_if_stopped)
            try:
                yield sae, lm
            finally:
                hook.remove()


def _tokenize(lm: LM, text: str, continued: int) -> tuple[Tensor, list[str]]:
    """Return ids [1, t] with BOS as in training, and safe tokens, of a text that leaves room for a
    continuation."""
    tokens = lm.tokenize(text)
    most = MOST_TOKENS if lm.context is None else min(MOST_TOKENS, lm.context - continued)
    if tokens.shape[1] > most:
        room = f" before a continuation of {continued}" if continued and most < MOST_TOKENS else ""
        raise InputError(
            f"the text has {tokens.shape[1]:,} tokens; at most {most:,} are read here{room}"
        )
    return tokens, [safe_token(token) for token in lm.tokens(text)]


def _encode(sae: SAE, lm: LM, tokens: Tensor, last: int) -> Code:
    """Return the codes [last, k] of the last tokens."""
    import torch

    return sae.encode(lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -last:])


def _largest(
    sae: SAE, lm: LM, tokens: Tensor, latents: list[int]
) -> tuple[dict[int, float], dict[int, str]]:
    """Return the largest activation of each latent, where there is one, and what it is of."""
    import torch

    from ksparse.sae.ranges import largest_acts, reach
    from ksparse.steering import acts_at

    largest = largest_acts(sae, latents)
    sources = dict.fromkeys(largest, "stats")
    missing = [latent for latent in latents if latent not in largest]
    if missing:
        with torch.inference_mode():
            acts = acts_at(_encode(sae, lm, tokens, tokens.shape[1]), torch.tensor(missing))
        here = dict(zip(missing, acts.max(0).values.tolist()))
        for latent in missing:
            value = here[latent] if here[latent] > 0 else reach(sae, latent)
            if value > 0:
                largest[latent] = value
                sources[latent] = "text" if here[latent] > 0 else "any input"
    return largest, sources


def _values(sae: SAE, times: dict[int, float], largest: dict[int, float]) -> dict[int, float]:
    """Return the values at which latents are held; raise InputError if float32 has no room."""
    from ksparse.sae.ranges import in_values

    dead = [latent for latent, multiple in times.items() if multiple and latent not in largest]
    if dead:
        raise InputError(
            f"latent {dead[0]} is never active, on no input, so multiples of its largest "
            "activation have no meaning; choose another"
        )
    values = in_values(sae, times, largest)
    for latent, value in values.items():
        if not abs(value) <= MOST_VALUE:
            raise InputError(
                f"latent {latent} would be held at {value:.3g}; at most {MOST_VALUE:.1e} either way"
            )
    return values


def _token_strings(lm: LM, tokens: list[int]) -> list[str]:
    from ksparse.lm.tokens import token_strings

    return [safe_token(token) for token in token_strings(lm.tokenizer, tokens)]


def _list_predictions(lm: LM, comparison: Comparison) -> list[dict[str, Any]]:
    """Return the likeliest tokens of either distribution, with both probabilities."""
    before, after = (side.log_probs.exp() for side in comparison)
    tokens = list(
        dict.fromkeys(
            token
            for probs in (before, after)
            for token in probs.topk(min(PREDICTIONS, len(probs))).indices.tolist()
        )
    )
    tokens.sort(key=lambda token: -max(float(before[token]), float(after[token])))
    return [
        {
            "token": string,
            "plain": round_for_json(before[token]),
            "changed": round_for_json(after[token]),
        }
        for token, string in zip(tokens, _token_strings(lm, tokens))
    ]


Side = tuple[Sequence[int], Sequence[str]]


def mark_differences(plain: Side, changed: Side) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return two texts as pieces [string, whether it differs from the other text].

    Args:
        plain: tokens and their strings of one text.
        changed: tokens and their strings of the other.

    Example:
        >>> from ksparse.viewer.live import mark_differences
        >>> mark_differences(([1, 2, 3], ["a", "b", "c"]), ([1, 4, 3], ["a", "x", "c"]))
        ([['a', False], ['b', True], ['c', False]], [['a', False], ['x', True], ['c', False]])
    """
    matcher = SequenceMatcher(None, plain[0], changed[0], autojunk=False)
    pieces: tuple[list[list[Any]], list[list[Any]]] = ([], [])
    for kind, *ends in matcher.get_opcodes():
        for side, (_, strings), first, last in zip(pieces, (plain, changed), ends[::2], ends[1::2]):
            if first < last:
                side.append(["".join(strings[first:last]), kind != "equal"])
    return pieces


def change_once_at(change: Change, position: int) -> Change:
    """Return a change at one position of the first forward pass only, which reads the prompt."""
    passes = 0

    def change_at_position(code: Code) -> Code:
        nonlocal passes
        passes += 1
        added, keep = change(code), code.values.new_zeros(code.values.shape[-2], 1)
        if passes == 1:
            keep[position] = 1
        return added._replace(values=added.values * keep)

    return change_at_position


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that takes what ksparse warns of in this thread, made safe to look at."""
    collected: list[str] = []
    thread, handler = threading.get_ident(), logging.Handler(logging.WARNING)

    def emit(record: logging.LogRecord) -> None:
        if record.thread == thread:
            collected.append(safe_text(record.getMessage()))

    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("ksparse")
    logger.addHandler(handler)
    try:
        yield collected
    finally:
        logger.removeHandler(handler)


@contextmanager
def translate_memory_errors() -> Iterator[None]:
    """Raise torch's out-of-memory errors as OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        message = (str(error) or "MemoryError").splitlines()[0]
        raise OutOfMemoryError(f"out of memory: {message} Take a shorter text") from error


def round_for_json(value: Any) -> float:
    """Return a number with five significant digits."""
    return float(f"{float(value):.5g}")
