"""Does the LM still predict as well when it gets the reconstruction? Gao et al. 2024, section 4.1.

Five runs on the same contexts: unchanged, and with the kept activations replaced by their
reconstruction, by zero, by the mean activation. All replace the same positions, and all losses are
taken at the same positions: those whose own activation is kept and whose next token is text.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from ksparse import pylm
from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import HeldOut, HeldOutBatch, SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, Value, ratio


class Downstream(Metric):
    """Cross-entropy clean, spliced, zero- and mean-ablated; KL; the compute that reaches the
    spliced loss."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.sums, self.mean = DocumentSums(), context.data.mean

    def update(self, batch: SAEBatch) -> None:
        held_out = batch.held_out
        self.sums.add(
            held_out.predicted_documents,
            clean=held_out.losses(held_out.clean),
            spliced=batch.spliced.losses,
            kl=batch.spliced.kl,
            zero=zero_losses(held_out),
            mean=held_out.once(
                "mean", lambda: held_out.losses(held_out.log_probs(held_out.spliced(self.mean)))
            ),
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
        if shift is not None and abs(shift) > 0.02:
            notes.append(
                f"compute_fraction: the loss table ends at {table[-1][1]:.3f} nats, the LM has "
                f"{clean:.3f} on this "
                "text; the table is shifted by the difference"
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


def zero_losses(held_out: HeldOutBatch) -> Tensor:
    """Return the loss of each measured position with zeros in place of the activations."""
    return held_out.once(
        "zero",
        lambda: held_out.losses(
            held_out.log_probs(
                held_out.spliced(torch.zeros(held_out.lm.d_model, device=held_out.lm.device))
            )
        ),
    )


def loss_table(data: HeldOut) -> tuple[list[tuple[float, float]], str]:
    """Return the LM's [(FLOPs, loss)] with falling loss, from the option or its folder, and a note
    where there is none."""
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
    falling: list[tuple[float, float]] = []
    for flops, loss in sorted(points):
        if not falling or loss < falling[-1][1]:
            falling.append((flops, loss))
    if len(falling) < 2:
        return [], (
            "compute_fraction: no loss-compute table for this LM; give one with --loss-table FILE, "
            "lines of JSON "
            '{"flops": …, "loss": …} from its pre-training'
        )
    return falling, ""


def compute_fraction(table: list[tuple[float, float]], delta: Value) -> Value:
    """Return the share of the pre-training compute whose model is as bad as the spliced one.

    The table's last loss stands for the clean LM, so it is read at last loss + delta, linearly
    between points in log compute. The standard error is half the distance between the readings one
    standard error of delta to both sides.
    """
    value, se = delta["value"], delta["se"]
    if not table or value is None:
        return {"value": None, "se": None}

    def read(difference: float) -> float:
        loss = table[-1][1] + difference
        if loss <= table[-1][1]:
            return 1.0
        for (c0, l0), (c1, l1) in itertools.pairwise(table):
            if l1 <= loss <= l0:
                return (
                    math.exp(math.log(c0) + (l0 - loss) / (l0 - l1) * math.log(c1 / c0))
                    / table[-1][0]
                )
        return table[0][0] / table[-1][0]  # worse than the first point: at most its compute

    return {
        "value": read(value),
        "se": None if se is None else (read(value - se) - read(value + se)) / 2,
    }
