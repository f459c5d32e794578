"""Held-out text, read once for all questions about all SAEs at one site.

HeldOut ─▶ Batch (contexts, x, logits: of the LM alone) ─▶ Seen (one SAE's codes of the batch) ─▶
Eval.see
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from ksparse.errors import InputError
from ksparse.evals.batches import HeldOut, SAEBatch
from ksparse.evals.statistics import Result
from ksparse.sae.model import SAE

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class EvalContext:
    """One SAE under evaluation, and the parts that ask it something."""

    def __init__(self, sae: SAE, data: HeldOut, notes: Sequence[str] = ()):
        if data.lm.d_model != sae.shape.d_model:
            own, lm = sae.metadata.get("acts", {}), data.lm
            raise InputError(
                f"the SAE is for d_model = {sae.shape.d_model}, {lm.options.lm} has {lm.d_model} "
                f"at {lm.options.site}; "
                f"the SAE was trained on {own.get('lm', 'an unknown LM')} at "
                f"{own.get('site', 'an unknown site')}"
            )
        self.sae, self.data, self.options, self.lm = sae, data, data.options, data.lm
        self.parts: dict[type, Metric] = {}
        self.notes = list(notes)
        """What belongs to every number of it."""

    def part(self, kind: type[MetricT]) -> MetricT:
        """Return the one part of a kind, made when it is first asked for; what it needs comes
        before it."""
        part = self.parts.get(kind)
        if not isinstance(part, kind):
            part = self.parts[kind] = kind(self)
        return part


class Metric:
    """One question: sees each batch, works on what it kept, sees each batch again if it must, and
    answers."""

    passes: ClassVar[int] = 1
    """How often it sees the text: 0, 1 or 2 times."""
    comparison_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of its result that go into those of other SAEs in the same pass too, so that a figure
    can show all."""

    def __init__(self, context: EvalContext):
        self.context = context

    def update(self, batch: SAEBatch) -> None:
        """Take what is needed of a batch."""

    def compute(self, observe: Progress) -> None:
        """Do what needs all batches, between the first pass and the second."""

    def update_second_pass(self, batch: SAEBatch) -> None:
        """Take a batch of the second pass."""

    def finalize(self) -> Result | None:
        """Return the answer; None of a part that others only build on."""


MetricT = TypeVar("MetricT", bound=Metric)
