"""Does the LM still predict as well from the reconstruction? Gao et al. 2024, section 4.1.

The LM runs on the same contexts unchanged, and with the kept activations replaced by their
reconstruction, by zeros, and by the mean activation. All runs replace the same positions, and all
losses are taken at the same positions: those whose own activation is kept and whose next token is
text.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import torch

from ksparse import pylm
from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import HeldOut, SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, Value, no_value, ratio

_MAX_SHIFT = 0.02  # nats between the loss table's end and the LM's loss, before a note says so

LossTable = list[tuple[float, float]]
"""[(FLOPs, loss in nats)] of a pre-training run, in order of FLOPs, with falling loss."""


class Downstream(Metric):
    """Cross-entropy of the LM unchanged, with reconstructions, with zeros and with the mean.

    Also the KL divergence to the unchanged LM, the share of the loss recovered, and the share of
    the pre-training compute that reaches the spliced loss.
    """

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.sums = DocumentSums()

    def prepare(self) -> None:
        self.mean = self.context.data.mean_activation()

    def update(self, batch: SAEBatch) -> None:
        held_out = batch.held_out
        self.sums.add(
            held_out.predicted_documents,
            clean=held_out.clean_losses,
            spliced=batch.spliced.losses,
            kl=batch.spliced.kl,
            zero=held_out.zero_losses,
            mean=held_out.once("mean losses", lambda: held_out.losses_with(self.mean)),
            tokens=torch.ones_like(batch.spliced.kl),
        )

    def finalize(self) -> Result:
        sums = self.sums
        tokens = sums["tokens"]
        values = {
            f"ce_{name}": ratio(sums[name], tokens) for name in ("clean", "spliced", "zero", "mean")
        }
        delta = ratio(sums["spliced"] - sums["clean"], tokens)
        table, note = loss_table(self.context.data)
        clean = values["ce_clean"]["value"]
        shift = clean - table[-1][1] if table and clean is not None else None
        notes = [note] if note else []
        if shift is not None and abs(shift) > _MAX_SHIFT:
            notes.append(
                f"compute_fraction: the loss table ends at {table[-1][1]:.3f} nats, the LM has "
                f"{clean:.3f} on this text; the table is shifted by the difference"
            )
        return Result(
            {
                **values,
                "ce_delta": delta,
                "kl": ratio(sums["kl"], tokens),
                "recovered": ratio(sums["zero"] - sums["spliced"], sums["zero"] - sums["clean"]),
                "compute_fraction": compute_fraction(table, delta),
                "loss_table": {"points": table, "shift": shift},
                "n_predictions": int(tokens.sum()),
                "notes": notes,
            }
        )


def loss_table(data: HeldOut) -> tuple[LossTable, str]:
    """Return the loss-compute table of the LM's pre-training.

    Args:
        data: the held-out text, whose `options.loss_table` names a file; by default the table in
            the LM's folder, if it has one.

    Returns:
        The points, in order of FLOPs with falling loss, and "". Without two such points, an empty
        table and a note.

    Raises:
        InputError: if the file named in the options cannot be read.
    """
    if data.options.loss_table:
        path = Path(data.options.loss_table)
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            points = [(float(row["flops"]), float(row["loss"])) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"loss table {path} is not lines of JSON with 'flops' and 'loss': {error!r}"
            ) from None
    else:
        points = pylm.loss_table(data.lm.folder) if data.lm.folder else []
    falling: LossTable = []
    for flops, loss in sorted(points):
        if not falling or loss < falling[-1][1]:
            falling.append((flops, loss))
    if len(falling) < 2:
        return [], (
            "compute_fraction: no loss-compute table for this LM; give one with --loss-table FILE, "
            'lines of JSON {"flops": …, "loss": …} from its pre-training'
        )
    return falling, ""


def compute_fraction(table: LossTable, delta: Value) -> Value:
    """Return the share of the pre-training compute whose model is as bad as the spliced one.

    The table's last loss stands for the unchanged LM, so the table is read at its last loss +
    delta, linearly in log compute between points. The standard error is half the distance between
    the readings one standard error of delta to either side.

    Args:
        table: the loss table; empty if there is none.
        delta: the spliced loss less the clean loss, in nats.

    Returns:
        A share from 0 to 1. At a loss above the first point's, the first point's share, which is
        then an upper bound.

    Example:
        >>> table = [(1e10, 4.0), (1e12, 2.0)]
        >>> round(compute_fraction(table, {"value": 2.0, "se": None})["value"], 6)
        0.01
    """
    value, se = delta["value"], delta["se"]
    if not table or value is None:
        return no_value()

    def read(difference: float) -> float:
        loss = table[-1][1] + difference
        if loss <= table[-1][1]:
            return 1.0
        for (c0, l0), (c1, l1) in itertools.pairwise(table):
            if l1 <= loss <= l0:
                log_compute = math.log(c0) + (l0 - loss) / (l0 - l1) * math.log(c1 / c0)
                return math.exp(log_compute) / table[-1][0]
        return table[0][0] / table[-1][0]

    return {
        "value": read(value),
        "se": None if se is None else (read(value - se) - read(value + se)) / 2,
    }
