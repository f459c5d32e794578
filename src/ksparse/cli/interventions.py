"""Verbs that use an SAE inside a running LM: steer, attribute."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ksparse.cli.arguments import parse, split_folder, verb
from ksparse.cli.output import ProgressBar, escape_unprintable
from ksparse.cli.subjects import SubjectArgs, check_source, open_subject
from ksparse.config import Config
from ksparse.errors import CorruptError, InputError, NonFiniteError
from ksparse.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from ksparse.lm.model import LM
    from ksparse.sae.model import SAE


LOWEST_TEMPERATURE = 1e-3  # below, logits divided by the temperature overflow


@dataclass(frozen=True)
class SteerArgs(SubjectArgs, Config):
    """Options of `ksparse steer`."""

    OWNER = "the command"

    latent: tuple[int, ...] = ()
    """Latents to steer, one or several."""
    prompt: str = ""
    """Text for the LM to continue."""
    value: float | None = None
    """Value to hold the latents at, of either sign and in the unit of their activations; 0 ablates
    them."""
    scale: float | None = None
    """Instead of a value: factor to multiply the latents' own activations by."""
    error: Literal["keep", "drop"] = "keep"
    """keep: add the SAE's reconstruction error back. drop: give the LM the reconstruction."""
    tokens: int = 40
    """Largest number of tokens to generate."""
    temperature: float = 0.0
    """0: always the most likely token. Above 0: sample, with the same random numbers for both
    continuations."""
    seed: int = 0
    """Seed of the sampling."""
    shown: int = 10
    """Tokens to list, those whose probability changes most."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps."""
    force: bool = False
    """Use the SAE even where its metadata contradict the LM, site or contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("shown", at_least=0)

    def check(self) -> None:
        """Raise InputError unless the options say what to steer, and how."""
        if not self.latent or not self.prompt:
            raise InputError(
                "steering needs "
                + ("a text to continue: --prompt TEXT" if self.latent else "a latent: --latent 123")
            )
        if (self.value is None) == (self.scale is None):
            raise InputError(
                "give one of --value V, which latents are held at, and --scale S, which their own "
                "activations are multiplied by"
            )
        if self.temperature and self.temperature < LOWEST_TEMPERATURE:
            raise InputError(
                f"temperature is {self.temperature}; it must be 0, for the most likely token, or "
                f"at least {LOWEST_TEMPERATURE}"
            )


@verb
def steer(arguments: list[str]) -> None:
    """steer SAE --latent I --value V --prompt …

    Show what the LM writes with latents held at a value, beside what it writes without.
    """
    folder, flags = split_folder("steer", arguments, "an SAE, such as the run runs/demo")
    options = parse(SteerArgs, "steer SAE", flags)
    options.check()
    check_source(folder)
    from ksparse import steering

    with ProgressBar("steering"):
        opened = open_subject(folder, options, force=options.force, needs_text=False)
        sae = opened.sae
        steering.check_latents(sae, options.latent)
        lm = opened.load_lm(options.device)
        stats = _read_latent_stats(folder)
        largest = _largest_acts(lm, sae.to(lm.device), options.prompt, options.latent, stats)
        comparison = steering.compare(
            lm,
            sae,
            options.prompt,
            None if options.value is None else dict.fromkeys(options.latent, options.value),
            unit="value",
            scale=None if options.scale is None else dict.fromkeys(options.latent, options.scale),
            error=options.error,
            tokens=options.tokens,
            temperature=options.temperature,
            seed=options.seed,
            largest=largest,
        )
    if not math.isfinite(comparison.kl):
        raise NonFiniteError(
            "with these latents held there the LM's predictions are not finite; give a value from "
            "the latents' own range"
        )
    for latent in options.latent:
        description = _describe_latent(stats, latent)
        print(
            f"latent   {latent}{description or f': {largest[latent]:.3g} at most on this prompt'}"
        )
    print(
        f"as it is {options.prompt}{escape_unprintable(comparison.before.text)}\nsteered  "
        f"{options.prompt}{escape_unprintable(comparison.after.text)}"
    )
    _print_next_token(comparison, lm, options.shown)


def _print_next_token(comparison: Any, lm: LM, count: int) -> None:
    """Print how steering changes the probabilities of the next token, the largest changes."""
    from ksparse.lm.tokens import token_strings

    rows = [
        (token, f"{before:>10.4f}", f"{after:>10.4f}")
        for token, before, after in comparison.moved(count)
    ]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        print(
            "nothing changed"
            if comparison.before.tokens == comparison.after.tokens
            else f"next token, KL {comparison.kl:.1e} nats: no probability changes by 0.0001; "
            "later tokens do"
        )
        return
    print(f"next token, KL {comparison.kl:.4f} nats{'':<16}as it is   steered")
    strings = token_strings(lm.tokenizer, [token for token, _, _ in rows])
    for (_, before, after), string in zip(rows, strings):
        print(f"  {string!r:<40}{before}{after}")


def _largest_acts(
    lm: LM, sae: SAE, prompt: str, latents: Sequence[int], stats: Mapping[str, Any]
) -> dict[int, float]:
    """Return the largest activation of each latent: from `stats`, or else on the prompt."""
    import torch

    from ksparse.steering import acts_at

    if stats:
        return {latent: float(stats["max_act"][latent]) for latent in latents}
    with torch.no_grad():
        acts = acts_at(sae.encode(lm(prompt)), torch.tensor(latents))
    return dict(zip(latents, acts.max(0).values.tolist()))


def _read_latent_stats(folder: str) -> dict[str, Any]:
    """Return the arrays of the evaluation `stats`; none if it has not been run."""
    try:
        arrays = RunFolder(Path(folder)).arrays_file("stats")
    except CorruptError:
        arrays = None
    if arrays is None:
        return {}
    from safetensors.numpy import load_file

    return load_file(arrays)


def _describe_latent(stats: Mapping[str, Any], latent: int) -> str:
    if not stats:
        return ""
    return (
        f": fires on {stats['density'][latent]:.2%} of tokens, with "
        f"{stats['mean_act'][latent]:.3g} on average and {stats['max_act'][latent]:.3g} at most"
    )


@dataclass(frozen=True)
class AttributeArgs(SubjectArgs, Config):
    """Options of `ksparse attribute`."""

    OWNER = "the command"

    prompt: tuple[str, ...] = ()
    """Texts; the prediction of the token after each is explained."""
    toward: tuple[str, ...] = ()
    """Tokens whose mean logit is explained, written as in a text, with a leading space if they have
    one."""
    away: tuple[str, ...] = ()
    """Tokens whose mean logit is subtracted; by default the mean of all logits."""
    shown: int = 10
    """Latents to list, those with the largest effect."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps."""
    force: bool = False
    """Use the SAE even where its metadata contradict the LM, site or contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("shown", at_least=0)


@verb
def attribute(arguments: list[str]) -> None:
    """attribute SAE --prompt … --toward T --away U

    Find the latents that make the LM prefer a token, by activation x gradient.
    """
    folder, flags = split_folder("attribute", arguments, "an SAE, such as the run runs/demo")
    options = parse(AttributeArgs, "attribute SAE", flags)
    check_source(folder)
    from ksparse import steering

    with ProgressBar("attributing"):
        opened = open_subject(folder, options, force=options.force, needs_text=False)
        sae, lm = opened.sae, opened.load_lm(options.device)
        scores = steering.attribute(
            lm,
            sae.to(lm.device),
            options.prompt,
            steering.logit_difference(lm, options.toward, options.away),
        )
    stats = _read_latent_stats(folder)
    order = [i for i in scores.abs().argsort(descending=True).tolist() if scores[i]]
    print(
        "difference of logits by first-order effect of each latent, mean over "
        f"{len(options.prompt)} prompts, all together {scores.sum():+.4f}"
    )
    for latent in sorted(order[: options.shown], key=lambda i: -scores[i]):
        print(f"  latent {latent:<9}{scores[latent]:>+10.4f}{_describe_latent(stats, latent)}")
    if order:
        where = [word for key, value in options.given.items() for word in (f"--{key}", str(value))]
        command = shlex.join(["ksparse", "steer", folder, *where])
        print(f"next     {command} --latent {order[0]} --value 0 --prompt …")
