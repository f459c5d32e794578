"""The decoder of a run's newest checkpoint -> nearest latents, and a plane to draw all of them on.
numpy alone."""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np

from ksparse.errors import InputError
from ksparse.storage.run_folder import RunFolder, shard_files

NEIGHBOURS = 12
"""Nearest latents that are shown of each."""


class Decoder:
    """W_dec[n, d] with rows of norm 1 (rows of zeros stay), read when first asked for."""

    def __init__(self, run: RunFolder):
        self.run, self._lock = run, threading.Lock()

    @property
    def rows(self) -> np.ndarray:
        with self._lock:  # requests come from several threads; the file is read once
            return self._rows

    @cached_property
    def _rows(self) -> np.ndarray:
        from safetensors import safe_open

        checkpoint, wrong = self.run.newest_intact()
        if checkpoint is None:
            raise InputError(
                f"run {self.run.path} has no checkpoint to read: "
                f"{'; '.join(wrong) or 'nothing has been saved yet'}"
            )
        parts = []
        for file in shard_files(checkpoint, "sae"):
            with safe_open(file, framework="np") as tensors:
                parts.append(tensors.get_tensor("W_dec").astype(np.float32, copy=False))
        rows = np.concatenate(parts) if len(parts) > 1 else parts[0]
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1)

    def nearest(
        self, first: int, last: int, count: int = NEIGHBOURS
    ) -> list[list[tuple[int, float]]]:
        """Return (latent, cosine) of the latents nearest to each of first to last - 1 but itself;
        those at a right angle or beyond are not near."""
        rows = self.rows
        cosines = rows[first:last] @ rows.T
        cosines[np.arange(len(cosines)), np.arange(first, first + len(cosines))] = -1
        count = min(count, len(rows) - 1)
        if count < 1:
            return [[] for _ in cosines]
        found = np.argpartition(cosines, -count, axis=1)[:, -count:]
        near = []
        for row, chosen in zip(cosines, found):
            order = chosen[np.lexsort((chosen, -row[chosen]))]
            near.append([(int(i), float(row[i])) for i in order if row[i] > 0])
        return near

    @cached_property
    def plane(self) -> np.ndarray:
        """Place each latent by the first two principal components of the decoder's rows, [n, 2];
        the sign is fixed."""
        rows = self.rows
        mean = rows.mean(0)
        covariance = rows.T @ rows / len(rows) - np.outer(mean, mean)
        axes = np.linalg.eigh(covariance.astype(np.float64))[1][:, ::-1][:, :2]
        axes *= np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
        placed = (rows - mean) @ axes.astype(np.float32)
        return np.pad(placed, ((0, 0), (0, 2 - placed.shape[1])))
