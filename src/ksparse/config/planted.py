"""What planted features are like: the options of a stream whose features are known."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, cast

from ksparse.config.options import Config, UnknownKeyError, build, plain
from ksparse.errors import InputError

PREFIX = "planted:"
"""What `acts.text` begins with where activations are planted; the options follow as JSON."""


@dataclass(frozen=True)
class Planted(Config):
    """A stream of activations made of known features: x = sum of z_i f_i + bias.

    Features f_i are directions of norm 1 in order of falling frequency. The settings are those of
    SAELens' synthetic models (Chanin & Garriga-Alonso 2026, arXiv 2602.14687, section 3), so that
    a benchmark of theirs can be set up here. `ksparse.data.planted` draws them.

    Raises:
        InputError: For values out of range, or at odds with one another.

    Example:
        >>> from ksparse.config import Planted
        >>> Planted(features=512, d_model=128, probability=0.3, least=0.001, exponent=1.0).roots
        0
        >>> Planted(probability=0.1, least=0.2)
        Traceback (most recent call last):
        ksparse.errors.InputError: least of planted features is 0.2, more than probability, 0.1; ...
    """

    OWNER = "planted features"

    features: int = 256
    """Number of features."""
    d_model: int = 64
    """Width of the activations."""
    seed: int = 0
    """Seed of all that is drawn. It shares no draw with the start values of an SAE of the same
    seed."""
    probability: float = 0.05
    """How often the most frequent feature fires."""
    least: float = 0.0
    """How often the rarest fires; 0: all as often."""
    exponent: float = 0.0
    """How frequency falls from `probability` to `least`. Above 0: as rank^-exponent, a power law.
    0: linearly."""
    roots: int = 0
    """Trees of features: a feature of a tree fires only where its parent does. The first `roots`
    features are their roots, the next ones the roots' children, and so on; features that are left
    over belong to no tree. 0: no hierarchy."""
    children: int = 4
    """Children of each feature of a tree."""
    depth: int = 2
    """Generations below the roots."""
    exclusive: float = 0.0
    """Share of the parents of which only one child fires at a time."""
    compensate: bool = True
    """Let children fire more often where their parent does, so that frequencies stay about as
    asked."""
    scaled: bool = False
    """Multiply a child's size by its parent's, over the parent's mean."""
    rank: int = 0
    """Rank of the correlations of which features fire together; 0: they fire independently."""
    correlation: float = 0.1
    """Size of those correlations: the standard deviation of the factors' entries."""
    sizes: tuple[float, ...] = (1.0, 1.0)
    """Mean values of the first and the last feature where they fire, linear in between."""
    spread: tuple[float, ...] = (0.0, 0.0)
    """Standard deviation of a feature's values: each feature's is drawn, as the absolute value of a
    normal number of this mean and standard deviation. Values below 0 become 0."""
    bias: float = 0.0
    """Norm of a vector that is added to all activations."""
    apart: int = 0
    """Steps by which the random directions are driven apart, towards being orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("features", "d_model", at_least=1)
        self.check_range("children", "depth", at_least=1)
        for key in ("seed", "roots", "rank", "correlation", "exponent", "bias", "apart"):
            self.check_range(key, at_least=0)
        self.check_range("probability", above=0, at_most=1)
        self.check_range("least", "exclusive", at_least=0, at_most=1)
        if self.least > self.probability:
            raise InputError(
                f"least of planted features is {self.least}, more than probability, "
                f"{self.probability}; it is how often the rarest fires: give less"
            )
        if self.exponent and not self.least:
            raise InputError(
                f"exponent of planted features is {self.exponent} and least is 0; a power law "
                "falls to how often the rarest fires: give least"
            )
        for key in ("sizes", "spread"):
            pair = getattr(self, key)
            if len(pair) != 2 or min(pair) < 0:
                raise InputError(
                    f"{key} of planted features is {list(pair)}; give two numbers of at least 0"
                )
        if self.roots > self.features:
            raise InputError(
                f"roots of planted features is {self.roots}, more than the {self.features} features"
            )

    def to_text(self) -> str:
        """Return what a recipe's `acts.text` has: the keys that differ from the defaults.

        Example:
            >>> Planted(seed=3, rank=8).to_text()
            'planted:{"seed": 3, "rank": 8}'
        """
        defaults = plain(dataclasses.asdict(Planted()))
        table = plain(dataclasses.asdict(self))
        return PREFIX + json.dumps({k: v for k, v in table.items() if v != defaults[k]})

    @classmethod
    def from_text(cls, text: str) -> Planted | None:
        """Return what `acts.text` says of planted features; None where it names a text.

        Raises:
            InputError: For what is not JSON, and for keys that do not exist.

        Example:
            >>> Planted.from_text('planted:{"seed": 3}') == Planted(seed=3), Planted.from_text("a")
            (True, None)
        """
        if not text.startswith(PREFIX):
            return None
        try:
            table: Any = json.loads(text.removeprefix(PREFIX))
        except json.JSONDecodeError as error:
            table = str(error)
        if not isinstance(table, dict):
            raise InputError(
                f"acts.text is {text[:80]!r}; after {PREFIX!r} it wants the options of planted "
                'features as a JSON object, such as planted:{"features": 512}'
            )
        try:
            return cast(Planted, build(cls, table))
        except UnknownKeyError as error:
            keys = ", ".join(field.name for field in dataclasses.fields(cls))
            raise InputError(f"{error} of planted features; they are {keys}") from None
