"""What an evaluation looks at; without torch, so that the command line can show it at once."""

from __future__ import annotations

from dataclasses import dataclass

from ksparse.errors import InputError


@dataclass(frozen=True)
class EvalOptions:
    """Which text, and how much of it."""

    tokens: int = 100_000
    """Kept activations to look at; fewer if the text has fewer."""
    per_document: int = 512
    """Tokens used of each document, so that few tokens still come from many documents."""
    split: str = "held-out"
    """Side of the text that training never saw."""
    text: str = ""
    """Another text than the SAE's own."""
    loss_table: str = ""
    """JSON lines {flops, loss} of the LM's pre-training, for compute_fraction; the LM folder's training.jsonl if not given."""
    examples: int = 8
    """Contexts kept of each latent, as many of its strongest as of random ones."""
    seed: int = 0
    """Draws the random examples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        for name in ("tokens", "per_document", "examples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of an evaluation is {getattr(self, name)}; it must be at least 1")
