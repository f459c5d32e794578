"""How well is each position of a context reconstructed? Gao et al. 2024, appendix F.2."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, ratio
from ksparse.evals.stats import spread


class Positions(Metric):
    """Norm, error, L0 and the LM's additional loss at each position of the context; position 0 is
    its first token, BOS if it has one."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.kept: dict[int, DocumentSums] = {}
        self.predicted: dict[int, DocumentSums] = {}

    def update(self, batch: SAEBatch) -> None:
        held_out = batch.held_out
        x, x_hat = batch.sae.normalize(held_out.x).x.cpu().double(), batch.recon.cpu().double()
        position = torch.arange(held_out.keep.shape[1]).expand(held_out.keep.shape)
        self._add(
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
        clean, spliced = held_out.losses(held_out.clean), batch.spliced.losses
        self._add(
            self.predicted,
            position[:, :-1][held_out.predicted.cpu()],
            held_out.predicted_documents,
            count=torch.ones(len(clean)),
            clean=clean,
            delta=spliced.double() - clean.double(),
        )

    @staticmethod
    def _add(
        sums: dict[int, DocumentSums], position: Tensor, documents: Tensor, **columns: Tensor
    ) -> None:
        """Add columns of tokens to the sums of their positions."""
        for at in position.unique().tolist():
            mine = position == at
            sums.setdefault(at, DocumentSums()).add(
                documents.cpu()[mine],
                **{name: column.cpu()[mine] for name, column in columns.items()},
            )

    def finalize(self) -> Result:
        kept, predicted = (
            [(at, sums[at]) for at in sorted(sums)] for sums in (self.kept, self.predicted)
        )
        whole = sum(sums["sum"].sum(0) for _, sums in kept) / sum(
            sums["count"].sum() for _, sums in kept
        )
        baseline = sum(_around(sums, whole).sum() for _, sums in kept) / sum(
            sums["count"].sum() for _, sums in kept
        )
        return Result(
            {
                "positions": [at for at, _ in kept],
                "norm": [ratio(sums["norm"], sums["count"]) for _, sums in kept],
                "l0": [ratio(sums["l0"], sums["count"]) for _, sums in kept],
                "error": [ratio(sums["error"], baseline * sums["count"]) for _, sums in kept],
                "nmse": [
                    ratio(sums["error"], spread(sums["square"], sums["sum"], sums["count"]))
                    for _, sums in kept
                ],
                "predicted": [at for at, _ in predicted],
                "ce_clean": [ratio(sums["clean"], sums["count"]) for _, sums in predicted],
                "ce_delta": [ratio(sums["delta"], sums["count"]) for _, sums in predicted],
            }
        )


def _around(sums: DocumentSums, mean: np.ndarray) -> np.ndarray:
    """Return each document's squared distance to a given mean, from sums."""
    return sums["square"] - 2 * sums["sum"] @ mean + sums["count"] * (mean @ mean)
