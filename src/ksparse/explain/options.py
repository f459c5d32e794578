"""What to explain, and the server to ask."""

from __future__ import annotations

from dataclasses import dataclass

from ksparse.config import Config


@dataclass(frozen=True)
class ExplainConfig(Config):
    """Options of `ksparse explain`.

    Example:
        >>> from ksparse.explain.options import ExplainConfig
        >>> ExplainConfig(latents=5).examples
        16
    """

    url: str = ""
    """Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1. Without it nothing
    is sent: the requests are only counted."""
    model: str = ""
    """The model's name on that server."""
    key_variable: str = "KSPARSE_API_KEY"
    """Environment variable with the server's API key; unset: no key is sent."""
    latents: int = 20
    """Latents to explain: a random sample of those that fire often enough."""
    latent: tuple[int, ...] = ()
    """Numbers of the latents to explain, in place of a sample."""
    examples: int = 16
    """Texts that the server sees to explain a latent: half of them the strongest, half of all
    sizes."""
    test: int = 10
    """Texts to score an explanation on in which the latent fires, and as many in which it does
    not."""
    shown: int = 5
    """Texts in one request for a score."""
    tokens: int = 100_000
    """Held-out activations to choose texts from."""
    seed: int = 0
    """Seed of the sample of latents and texts."""
    schema: bool = False
    """Ask the server to hold labels to their form, by a JSON schema (`response_format`): small
    models rarely keep it by themselves. Not every server can."""
    per_minute: int = 0
    """Requests a minute at most; 0: no limit."""
    parallel: int = 4
    """Requests at the same time."""
    tries: int = 6
    """Times to send a request before the command gives up."""
    timeout: int = 120
    """Seconds to wait for an answer."""
    device: str = "auto"
    """Device of the run's LM: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("latents", "shown", "tokens", "parallel", "tries", "timeout", at_least=1)
        self.check_range("examples", "test", at_least=2)
        self.check_range("per_minute", "seed", at_least=0)
