"""Does a model of the caller's do as well from the reconstruction? `downstream` for activations
that anybody made.

The caller gives a function that turns edited activations into losses. It is called with held-out
rows as they are, with their reconstructions, with zeros, and with the mean of the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError, NonFiniteError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.rows import HeldOutRows, RowBatch
from ksparse.evals.statistics import DocumentSums, Result, ratio

NAME = "own_loss"
"""What its result is called."""


class Rows(NamedTuple):
    """Which rows some activations are.

    Args:
        numbers: the number of each row among all rows of the data, those of training included,
            int64 [m].
        documents: the document of each row, int64 [m]. All held-out rows of a document are in one
            call, one after another.
    """

    numbers: Tensor
    documents: Tensor


RowLoss = Callable[[Tensor, Rows], Any]
"""Maps activations x[m, d] in float32, in place of the rows', to losses: of each row, [m], or of
each document in the order in which the call has them."""


class OwnLoss(Metric):
    """The caller's loss with the activations as they are, with reconstructions, with zeros and with
    the mean, and the share of it that is recovered."""

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.sums = DocumentSums()
        self.data = cast(HeldOutRows, context.data)

    def prepare(self) -> None:
        self.mean = self.data.once("mean row", self.data.mean_row)

    def update(self, batch: SAEBatch) -> None:
        rows = cast(RowBatch, cast(Any, batch.held_out))
        x = rows.x
        shared = {
            name: rows.once(f"own loss {name}", functools.partial(self.losses, edited, rows))
            for name, edited in (
                ("clean", x),
                ("zero", torch.zeros_like(x)),
                ("mean", self.mean.expand_as(x).clone()),
            )
        }
        spliced = self.losses(batch.inputs.restore(batch.recon), rows)
        if len({len(spliced), *map(len, shared.values())}) > 1:
            raise InputError(
                "loss returned a loss for each row of some activations and for each document of "
                "others; it must do the same in every call"
            )
        by_row = len(spliced) == len(x)
        documents = rows.documents if by_row else rows.documents.unique_consecutive()
        self.sums.add(documents, **shared, spliced=spliced, count=torch.ones_like(spliced))

    def losses(self, x: Tensor, rows: RowBatch) -> Tensor:
        """Return the caller's losses of activations x[m, d] in the place of rows, checked: float64
        on the CPU, [m] or [documents]."""
        assert self.data.loss is not None
        which = Rows(rows.numbers, rows.documents)
        found = self.data.loss(x.clone(), which)
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        sizes = (len(x), len(which.documents.unique_consecutive()))
        if (
            not isinstance(found, Tensor)
            or found.ndim != 1
            or len(found) not in sizes
            or not found.is_floating_point()
        ):
            got = (
                f"{found.dtype} of shape {list(found.shape)}"
                if isinstance(found, Tensor)
                else f"a {type(found).__name__}"
            )
            raise InputError(
                f"loss returned {got} for {sizes[0]:,} rows of {sizes[1]:,} documents; it must "
                f"return floating-point losses [{sizes[0]}], one for each row, or [{sizes[1]}], "
                "one for each document"
            )
        found = found.detach().cpu().double()
        if not torch.isfinite(found).all():
            at = int((~torch.isfinite(found)).nonzero()[0])
            raise NonFiniteError(f"loss returned {found[at].item()} as number {at} of {len(found)}")
        return found

    def finalize(self) -> Result:
        sums = self.sums
        count = sums["count"]
        values = {
            f"loss_{name}": ratio(sums[name], count)
            for name in ("clean", "spliced", "zero", "mean")
        }
        gained = {name: sums[name] - sums["spliced"] for name in ("zero", "mean")}
        at_stake = {name: sums[name] - sums["clean"] for name in ("zero", "mean")}
        return Result(
            {
                **values,
                "loss_delta": ratio(sums["spliced"] - sums["clean"], count),
                "recovered": ratio(gained["zero"], at_stake["zero"]),
                "recovered_from_mean": ratio(gained["mean"], at_stake["mean"]),
                "n_losses": int(count.sum()),
            }
        )
