"""The decoder of a run's SAE -> nearest latents.

Uses numpy only, except for an SAE that was judged: its format is read by `ksparse.interop`.
"""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np

from ksparse.errors import InputError
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder, shard_files

NEIGHBOURS = 12
"""Nearest latents shown for each latent."""


class Decoder:
    """W_dec [n, d] with rows scaled to norm 1 (zero rows stay zero), read on first use.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder):
        self.run, self._lock = run, threading.Lock()

    @property
    def rows(self) -> np.ndarray:
        """The scaled rows, [n, d] as float32."""
        with self._lock:  # several threads serve requests, and the file is read once
            return self._rows

    @cached_property
    def _rows(self) -> np.ndarray:
        if self.run.is_judged():
            from ksparse.interop import load_judged

            return _scaled(load_judged(self.run).W_dec.detach().numpy())
        return _scaled(self._read_checkpoint())

    def _read_checkpoint(self) -> np.ndarray:
        from safetensors import safe_open

        checkpoint, problems = self.run.newest_intact()
        if checkpoint is None:
            raise InputError(
                f"run {self.run.path} has no checkpoint to read: "
                f"{'; '.join(problems) or 'nothing has been saved yet'}"
            )
        parts = []
        for file in shard_files(checkpoint, "sae"):
            with safe_open(file, framework="np") as tensors:
                parts.append(tensors.get_tensor("W_dec").astype(np.float32, copy=False))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def identity(self) -> str:
        """Return what tells this decoder from others: checksums of the weights, not checked here.

        "" where the newest checkpoint has no manifest that can be read.
        """
        if (judged := self.run.subject().judged) is not None:
            return judged.weights_sha256
        newest = max(self.run.checkpoints(), default=None)
        if newest is None or not atomic.inside(newest, checksums.MANIFEST).is_file():
            return ""
        sums = jsonio.read_table(newest / checksums.MANIFEST, sha256=dict)["sha256"]
        return jsonio.digest({name: sums[name] for name in sums if name.startswith("sae")})

    def nearest(
        self, first: int, last: int, count: int = NEIGHBOURS
    ) -> list[list[tuple[int, float]]]:
        """Return the latents nearest to each of `first` to `last - 1`, itself left out.

        Args:
            first: the first latent.
            last: the end of the range, not in it.
            count: nearest latents of each at most.

        Returns:
            For each latent, (latent, cosine) of those with a positive cosine, the nearest first.
        """
        rows = self.rows
        cosines = rows[first:last] @ rows.T
        cosines[np.arange(len(cosines)), np.arange(first, first + len(cosines))] = -1
        return _largest(cosines, min(count, len(rows) - 1))

    def nearest_to(self, row: np.ndarray, count: int = NEIGHBOURS) -> list[tuple[int, float]]:
        """Return the latents nearest to a direction of another decoder.

        Args:
            row: the direction, [d], scaled to norm 1.
            count: nearest latents at most.

        Returns:
            (latent, cosine) of those with a positive cosine, the nearest first.
        """
        cosines = self.rows @ row
        return _largest(cosines[None], min(count, len(cosines)))[0]


def _largest(cosines: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    """Return (column, cosine) of the `count` largest positive cosines of each row, by size."""
    if count < 1:
        return [[] for _ in cosines]
    candidates = np.argpartition(cosines, -count, axis=1)[:, -count:]
    near = []
    for row, chosen in zip(cosines, candidates):
        order = chosen[np.lexsort((chosen, -row[chosen]))]
        near.append([(int(i), float(row[i])) for i in order if row[i] > 0])
    return near


def _scaled(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
