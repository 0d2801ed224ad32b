"""The tokens that the host has read so far, one row a sequence slot. No torch.

Legend: R rows, W width (grown as outputs get longer), B sequences, k steps of a window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.step_plan import Int32


class OutputBuffer:
    """Owns the generated tokens of live sequences."""

    def __init__(self, num_rows: int) -> None:
        self.tokens_RW = np.zeros((num_rows, 256), dtype=np.int32)
        self.counts_R = np.zeros(num_rows, dtype=np.int64)

    def begin(self, row: int, token_ids: Int32) -> None:
        """Gives an empty row the tokens that an earlier run has generated."""
        assert self.counts_R[row] == 0, "the row is not empty"
        self._widen(len(token_ids))
        self.tokens_RW[row, : len(token_ids)] = token_ids
        self.counts_R[row] = len(token_ids)

    def append(self, rows: Int32, tokens_Bk: Int32) -> NDArray[np.int64]:
        """Appends the tokens of a window; negative ones are none. Returns how many, per row."""
        valid_Bk = tokens_Bk >= 0
        added_B: NDArray[np.int64] = valid_Bk.sum(axis=1)
        counts_B = self.counts_R[rows]
        self._widen(int((counts_B + added_B).max(initial=0)))
        columns_Bk = counts_B[:, None] + np.arange(tokens_Bk.shape[1])
        rows_Bk = np.broadcast_to(rows[:, None], tokens_Bk.shape)
        self.tokens_RW[rows_Bk[valid_Bk], columns_Bk[valid_Bk]] = tokens_Bk[valid_Bk]
        self.counts_R[rows] += added_B
        return added_B

    def take(self, row: int, count: int | None = None) -> Int32:
        """The row's tokens (the first `count` of them), and empties it."""
        tokens = self.tokens_RW[row, : self.counts_R[row]][:count].copy()
        self.counts_R[row] = 0
        return tokens

    def _widen(self, width: int) -> None:
        have = self.tokens_RW.shape[1]
        if width > have:
            more = np.zeros((len(self.tokens_RW), max(width, 2 * have) - have), dtype=np.int32)
            self.tokens_RW = np.concatenate([self.tokens_RW, more], axis=1)
