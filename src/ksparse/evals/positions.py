"""How well is each position of a context reconstructed? Gao et al. 2024, appendix F.2."""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, ratio
from ksparse.evals.stats import spread, squared_distance


class Positions(Metric):
    """Norm, error, L0 and the LM's additional loss at each position of the context.

    Position 0 is the context's first token: BOS, if contexts have it.
    """

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.kept: dict[int, DocumentSums] = {}
        self.predicted: dict[int, DocumentSums] = {}

    def update(self, batch: SAEBatch) -> None:
        held_out = batch.held_out
        x, x_hat = batch.inputs.x.cpu().double(), batch.recon.cpu().double()
        position = torch.arange(held_out.keep.shape[1]).expand(held_out.keep.shape)
        _add_by_position(
            self.kept,
            position[held_out.keep.cpu()],
            held_out.documents,
            count=torch.ones(len(x)),
            norm=held_out.x.norm(dim=1),
            l0=(batch.code.values > 0).sum(1),
            error=(x - x_hat).square().sum(1),
            square=x.square().sum(1),
            sum=x,
        )
        clean, spliced = held_out.clean_losses, batch.spliced.losses
        _add_by_position(
            self.predicted,
            position[:, :-1][held_out.predicted.cpu()],
            held_out.predicted_documents,
            count=torch.ones(len(clean)),
            clean=clean,
            delta=spliced.double() - clean.double(),
        )

    def finalize(self) -> Result:
        kept = [(position, self.kept[position]) for position in sorted(self.kept)]
        predicted = [(position, self.predicted[position]) for position in sorted(self.predicted)]
        count = sum(sums["count"].sum() for _, sums in kept)
        mean = sum(sums["sum"].sum(0) for _, sums in kept) / count
        distances = (
            squared_distance(sums["square"], sums["sum"], sums["count"], mean) for _, sums in kept
        )
        variance = sum(distance.sum() for distance in distances) / count
        return Result(
            {
                "positions": [position for position, _ in kept],
                "norm": [ratio(sums["norm"], sums["count"]) for _, sums in kept],
                "l0": [ratio(sums["l0"], sums["count"]) for _, sums in kept],
                "error": [ratio(sums["error"], variance * sums["count"]) for _, sums in kept],
                "nmse": [
                    ratio(sums["error"], spread(sums["square"], sums["sum"], sums["count"]))
                    for _, sums in kept
                ],
                "predicted": [position for position, _ in predicted],
                "ce_clean": [ratio(sums["clean"], sums["count"]) for _, sums in predicted],
                "ce_delta": [ratio(sums["delta"], sums["count"]) for _, sums in predicted],
            }
        )


def _add_by_position(
    sums: dict[int, DocumentSums], position: Tensor, documents: Tensor, **columns: Tensor
) -> None:
    """Add the columns of tokens to the sums of their positions."""
    for at in position.unique().tolist():
        here = position == at
        sums.setdefault(at, DocumentSums()).add(
            documents.cpu()[here],
            **{name: column.cpu()[here] for name, column in columns.items()},
        )
