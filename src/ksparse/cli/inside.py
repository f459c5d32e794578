"""steer, attribute: an SAE in a running LM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ksparse.cli.arguments import parse, take_folder, verb
from ksparse.cli.shown import visible
from ksparse.errors import CorruptError, InputError
from ksparse.runs import RunFolder


@dataclass(frozen=True)
class SteerArgs:
    latent: tuple[int, ...] = ()
    """Latents to steer, several if wanted."""
    prompt: str = ""
    """Text that the LM continues."""
    value: float | None = None
    """What the latents are held at, of either sign, in the unit of their activations; 0 takes them out."""
    scale: float | None = None
    """Instead: what their own activations are multiplied by."""
    error: Literal["keep", "drop"] = "keep"
    """keep: what the SAE fails to reconstruct stays. drop: the LM gets the reconstruction."""
    tokens: int = 40
    """Most tokens of a continuation."""
    temperature: float = 0.0
    """0: always the likeliest token. Above: drawn, with the same random numbers for both continuations."""
    seed: int = 0
    """Draws the tokens."""
    shown: int = 10
    """Tokens listed whose probability changes most."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@verb
def steer(arguments: list[str]) -> None:
    """steer RUN --latent I --value V --prompt … what the LM writes with latents held at a value, beside what it writes as it is"""
    folder, rest = take_folder("steer", arguments)
    asked = parse(SteerArgs, "steer RUN", rest)
    if not asked.latent or not asked.prompt:
        raise InputError(f"steering needs {'a latent: --latent 123' if not asked.latent else 'a text to continue: --prompt TEXT'}")
    if (asked.value is None) == (asked.scale is None):
        raise InputError("give one of --value V, which latents are held at, and --scale S, which their own activations are multiplied by")
    from ksparse import steering
    from ksparse.sae.store import load

    sae = load(folder)
    steering.check_latents(sae, asked.latent)
    lm = steering.lm_of(sae, asked.device)
    how = {"clamp" if asked.scale is None else "scale": dict.fromkeys(asked.latent, asked.value if asked.scale is None else asked.scale)}
    found = steering.compare(lm, sae.to(lm.device), asked.prompt, error=asked.error, tokens=asked.tokens, temperature=asked.temperature,
                             seed=asked.seed, **how)
    for latent in asked.latent:
        print(f"latent   {latent}{_what_is_known(folder, latent)}")
    print(f"as it is {asked.prompt}{visible(found.before.text)}\nsteered  {asked.prompt}{visible(found.after.text)}")
    print(f"next token, KL {found.kl:.4f} nats{'':<16}as it is   steered")
    for token, before, after in found.moved(asked.shown):
        print(f"  {lm.tokenizer.decode([token])!r:<40}{before:>10.4f}{after:>10.4f}")


def _what_is_known(folder: str, latent: int) -> str:
    """Return what `stats` has found of a latent, so that a value can be chosen; nothing if it has not been run."""
    try:
        arrays = RunFolder(Path(folder)).arrays_file("stats")
    except CorruptError:
        arrays = None
    if arrays is None:
        return ""
    from safetensors.numpy import load_file

    found = load_file(arrays)
    return (f": fires on {found['density'][latent]:.2%} of tokens, with {found['mean_act'][latent]:.3g} on average and "
            f"{found['max_act'][latent]:.3g} at most")


@dataclass(frozen=True)
class AttributeArgs:
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


@verb
def attribute(arguments: list[str]) -> None:
    """attribute RUN --prompt … --toward T --away U   which latents the LM's preference for a token hangs on: activation x gradient"""
    folder, rest = take_folder("attribute", arguments)
    asked = parse(AttributeArgs, "attribute RUN", rest)
    from ksparse import steering
    from ksparse.sae.store import load

    sae = load(folder)
    lm = steering.lm_of(sae, asked.device)
    scores = steering.attribute(lm, sae.to(lm.device), asked.prompt, steering.logit_difference(lm, asked.toward, asked.away))
    order = [i for i in scores.abs().argsort(descending=True).tolist() if scores[i]]
    print(f"difference of logits by first-order effect of each latent, mean over {len(asked.prompt)} prompts, all together {scores.sum():+.4f}")
    for latent in sorted(order[: asked.shown], key=lambda i: -scores[i]):
        print(f"  latent {latent:<9}{scores[latent]:>+10.4f}{_what_is_known(folder, latent)}")
    if order:
        print(f"next     ksparse steer {folder} --latent {order[0]} --value 0 --prompt …")
