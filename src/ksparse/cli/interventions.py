"""steer, attribute: an SAE in a running LM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ksparse.cli.arguments import parse, take_folder, verb
from ksparse.cli.output import visible
from ksparse.config import Config
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE


COLDEST = 1e-3  # below, logits over the temperature overflow


@dataclass(frozen=True)
class SteerArgs(Config):
    latent: tuple[int, ...] = ()
    """Latents to steer, several if wanted."""
    prompt: str = ""
    """Text that the LM continues."""
    value: float | None = None
    """What the latents are held at, of either sign, in the unit of their activations; 0 takes them
    out."""
    scale: float | None = None
    """Instead: what their own activations are multiplied by."""
    error: Literal["keep", "drop"] = "keep"
    """keep: what the SAE fails to reconstruct stays. drop: the LM gets the reconstruction."""
    tokens: int = 40
    """Most tokens of a continuation."""
    temperature: float = 0.0
    """0: always the likeliest token. Above: drawn, with the same random numbers for both
    continuations."""
    seed: int = 0
    """Draws the tokens."""
    shown: int = 10
    """Tokens listed whose probability changes most."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("the command", shown=0)


@verb
def steer(arguments: list[str]) -> None:
    """steer RUN --latent I --value V --prompt …

    what the LM writes with latents held at a value, beside what it writes as it is
    """
    folder, rest = take_folder("steer", arguments)
    asked = parse(SteerArgs, "steer RUN", rest)
    if not asked.latent or not asked.prompt:
        raise InputError(
            "steering needs "
            + ("a text to continue: --prompt TEXT" if asked.latent else "a latent: --latent 123")
        )
    if (asked.value is None) == (asked.scale is None):
        raise InputError(
            "give one of --value V, which latents are held at, and --scale S, which their own "
            "activations are multiplied by"
        )
    if asked.temperature and asked.temperature < COLDEST:
        raise InputError(
            f"temperature is {asked.temperature}; it must be 0, for the likeliest token, or at "
            f"least {COLDEST}"
        )
    from ksparse import steering
    from ksparse.lm.tokens import token_strings
    from ksparse.sae.serialization import load

    sae = load(folder)
    steering.check_latents(sae, asked.latent)
    lm = steering.lm_of(sae, asked.device)
    known = _stats_of(folder)
    largest = _largest(lm, sae.to(lm.device), asked.prompt, asked.latent, known)
    clamp = None if asked.value is None else dict.fromkeys(asked.latent, asked.value)
    scale = None if asked.scale is None else dict.fromkeys(asked.latent, asked.scale)
    found = steering.compare(
        lm,
        sae,
        asked.prompt,
        clamp,
        scale=scale,
        error=asked.error,
        tokens=asked.tokens,
        temperature=asked.temperature,
        seed=asked.seed,
        largest=largest,
    )
    if not math.isfinite(found.kl):
        raise NonFiniteError(
            "with these latents held there the LM's predictions are not finite; give a value from "
            "the latents' own range"
        )
    for latent in asked.latent:
        said = _what_is_known(known, latent) or f": {largest[latent]:.3g} at most on this prompt"
        print(f"latent   {latent}{said}")
    print(
        f"as it is {asked.prompt}{visible(found.before.text)}\nsteered  "
        f"{asked.prompt}{visible(found.after.text)}"
    )
    moved = [
        (token, f"{before:>10.4f}", f"{after:>10.4f}")
        for token, before, after in found.moved(asked.shown)
    ]
    moved = [row for row in moved if row[1] != row[2]]
    if not moved:
        print(
            "nothing changed"
            if found.before.tokens == found.after.tokens
            else f"next token, KL {found.kl:.1e} nats: no probability changes by 0.0001; later "
            "tokens do"
        )
        return
    print(f"next token, KL {found.kl:.4f} nats{'':<16}as it is   steered")
    for (_, before, after), string in zip(
        moved, token_strings(lm.tokenizer, [token for token, _, _ in moved])
    ):
        print(f"  {string!r:<40}{before}{after}")


def _largest(
    lm: LM, sae: SAE, prompt: str, latents: Sequence[int], found: Mapping[str, Any]
) -> dict[int, float]:
    """Return the largest value of each latent: that `stats` has found, else that on the tokens of
    the prompt."""
    import torch

    from ksparse.steering import acts_at

    if found:
        return {latent: float(found["max_act"][latent]) for latent in latents}
    with torch.no_grad():
        acts = acts_at(sae.encode(lm(prompt)), torch.tensor(latents))
    return dict(zip(latents, acts.max(0).values.tolist()))


def _stats_of(folder: str) -> dict[str, Any]:
    """Return what `stats` has found of each latent, so that a value can be chosen; nothing if it
    has not been run."""
    try:
        arrays = RunFolder(Path(folder)).arrays_file("stats")
    except CorruptError:
        arrays = None
    if arrays is None:
        return {}
    from safetensors.numpy import load_file

    return load_file(arrays)


def _what_is_known(found: Mapping[str, Any], latent: int) -> str:
    return (
        (
            f": fires on {found['density'][latent]:.2%} of tokens, with "
            f"{found['mean_act'][latent]:.3g} on average and "
            f"{found['max_act'][latent]:.3g} at most"
        )
        if found
        else ""
    )


@dataclass(frozen=True)
class AttributeArgs(Config):
    prompt: tuple[str, ...] = ()
    """Texts; what counts is the token after each."""
    toward: tuple[str, ...] = ()
    """Tokens whose mean logit is explained, as they look in a text, leading space included."""
    away: tuple[str, ...] = ()
    """Tokens whose mean logit is taken off; the mean of all logits if not given."""
    shown: int = 10
    """Latents listed on either side."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("the command", shown=0)


@verb
def attribute(arguments: list[str]) -> None:
    """attribute RUN --prompt … --toward T --away U

    which latents the LM's preference for a token hangs on: activation x gradient
    """
    folder, rest = take_folder("attribute", arguments)
    asked = parse(AttributeArgs, "attribute RUN", rest)
    from ksparse import steering
    from ksparse.sae.serialization import load

    sae = load(folder)
    lm = steering.lm_of(sae, asked.device)
    scores = steering.attribute(
        lm, sae.to(lm.device), asked.prompt, steering.logit_difference(lm, asked.toward, asked.away)
    )
    known = _stats_of(folder)
    order = [i for i in scores.abs().argsort(descending=True).tolist() if scores[i]]
    print(
        f"difference of logits by first-order effect of each latent, mean over {len(asked.prompt)} "
        f"prompts, all together {scores.sum():+.4f}"
    )
    for latent in sorted(order[: asked.shown], key=lambda i: -scores[i]):
        print(f"  latent {latent:<9}{scores[latent]:>+10.4f}{_what_is_known(known, latent)}")
    if order:
        print(f"next     ksparse steer {folder} --latent {order[0]} --value 0 --prompt …")
