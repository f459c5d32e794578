"""The folders of the built-in models, and how their loss fell with compute. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

SIZES = ("0.3m", "1.9m", "7.6m")
DEFAULT = "1.9m"  # the lowest held-out loss so far: the largest has seen fewer tokens


def folder(size: str = DEFAULT) -> Path:
    """Return the Hugging Face folder of the built-in model of a size.

    Raises:
        ValueError: There is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"built-in model {size!r} does not exist; there are {', '.join(SIZES)}")
    return Path(__file__).parent / "models" / size


def loss_table(model: Path) -> list[tuple[float, float]]:
    """Read how a model's loss fell in training from the training.jsonl in its folder.

    Returns:
        [(training FLOPs, held-out loss in nats per token)]; empty if there is no such file.
    """
    log = model / "training.jsonl"
    if not log.is_file():
        return []
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [(row["flops"], row["loss"]) for row in rows if row["flops"] > 0]
