"""The protocol of an evaluation: what every metric implements, and what it can read.

    HeldOut        the held-out text of an LM, in batches
    HeldOutBatch   one batch: its tokens, and what the LM alone makes of them
    SAEBatch       the same batch as one SAE encodes and reconstructs it
    Metric         takes SAEBatches and returns a Result
    EvalContext    one SAE, the held-out text, and the metrics that measure this SAE

The runner (ksparse.evals.runner) reads the text once for all metrics of all SAEs at a site, and a
second time only if a metric needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

from ksparse.errors import InputError
from ksparse.evals.batches import HeldOut, SAEBatch
from ksparse.evals.statistics import Result
from ksparse.progress import Progress
from ksparse.sae.model import SAE


class EvalContext:
    """One SAE under evaluation, its held-out text, and the metrics that measure it.

    Args:
        sae: the SAE, on the LM's device.
        data: the held-out text.
        notes: remarks that belong to every result of this SAE.

    Raises:
        InputError: if the SAE has another `d_model` than the LM's site.
    """

    def __init__(self, sae: SAE, data: HeldOut, notes: Sequence[str] = ()):
        if data.d_model != sae.shape.d_model:
            trained, lm = sae.metadata.get("acts", {}), data.lm
            raise InputError(
                f"the SAE is for d_model = {sae.shape.d_model}, {lm.options.lm} has {lm.d_model} "
                f"at {lm.options.site}; "
                f"the SAE was trained on {trained.get('lm', 'an unknown LM')} at "
                f"{trained.get('site', 'an unknown site')}"
            )
        self.sae, self.data, self.options, self.lm = sae, data, data.options, data.lm
        self.parts: dict[type, Metric] = {}
        self.notes = list(notes)

    def part(self, metric: type[MetricT]) -> MetricT:
        """Return the metric of a class, constructing it the first time.

        A metric that builds on another calls this in its constructor, so the other one comes first
        in `parts` and receives each batch before it.
        """
        part = self.parts.get(metric)
        if not isinstance(part, metric):
            part = self.parts[metric] = metric(self)
        return part


class Metric:
    """One question about one SAE; subclasses override the steps that they need.

    The runner calls, in this order: `prepare`; `update` for each batch; `compute`;
    `update_second_pass` for each batch, if `passes` is 2; `finalize`. Constructors only set up
    empty state: they neither run the LM nor read the text.
    """

    needs_text: ClassVar[bool] = True
    """Whether it reads tokens, positions or the LM. Others also judge SAEs that were trained on
    activations that anybody made."""
    passes: ClassVar[int] = 1
    """How many passes over the text the metric takes: 0, 1 or 2."""
    comparison_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the result that are copied into the results of the other SAEs in the same
    evaluation, so that a figure of one run can show all of them."""

    def __init__(self, context: EvalContext):
        self.context = context

    def prepare(self) -> None:
        """Compute what `update` needs before the first batch."""

    def update(self, batch: SAEBatch) -> None:
        """Accumulate one batch of the first pass."""

    def compute(self, progress: Progress) -> None:
        """Do the work that needs the whole first pass."""

    def update_second_pass(self, batch: SAEBatch) -> None:
        """Accumulate one batch of the second pass."""

    def finalize(self) -> Result | None:
        """Return the result; None from a metric that only serves other metrics."""


MetricT = TypeVar("MetricT", bound=Metric)
