"""Which KV blocks the beams of a group hold. No torch.

A group holds its prompt's blocks as a row of the `KVCache` does: its full ones, shared with other
prompts, and the last, partly filled one. Every beam has a block of its own in each column beyond
the full ones; they belong to the group alone. The device forks beams by moving the entries of a
column among the group's rows (`beam_search.BeamTables`), so the host knows of a block the group
and the column, not the row. Once a column is full, beams share its blocks and none is written: a
block in it that no row refers to is lost for good, and given back.

Legend: M groups, W beams of a group, G groups of a step, X blocks of a row, P blocks of the pool.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.kv_cache import KVCache
from batchgen.engine.step_plan import BlockTableUpdates, Int32, Int64


def most_blocks(prompt_lens: Int64, stop_lens: Int64, *, width: int, block_size: int) -> Int64:
    """Blocks that a group may hold at most: if its beams share only the prompt's full blocks, and
    none was given back. The last token of an output needs no KV."""
    shared = prompt_lens // block_size
    columns = -(-np.maximum(stop_lens - 1, prompt_lens) // block_size)
    return shared + width * (columns - shared)


class BeamBlocks:
    """Owns the blocks of beams beside those of prompts, and their places in the block table.

    The rows of `kv` are groups; row `group * width + beam` of the device's table is a beam's.
    """

    def __init__(self, kv: KVCache, width: int) -> None:
        self._kv = kv
        self._width = width
        self._nobody = len(kv.table_RX)
        self._owner_P = np.full(kv.gpu.num_blocks, self._nobody, dtype=np.int32)
        self._column_P = np.zeros(kv.gpu.num_blocks, dtype=np.int64)
        self.num_held_M = np.zeros(self._nobody, dtype=np.int64)
        self.num_columns_M = np.zeros(self._nobody, dtype=np.int64)  # in which beams have blocks
        self._updates: list[tuple[Int32, Int32, Int32]] = []

    def blocks_beside(self, num_tokens: int) -> int:
        """Blocks that a group takes on entering beside its prompt's: each other beam has its own to
        go on in where the prompt's last block is partly filled."""
        return (self._width - 1) * (num_tokens % self._kv.block_size > 0)

    def enter(self, group: int, num_tokens: int) -> None:
        """The prompt's blocks are the group's by now: gives the other beams theirs."""
        columns = self._kv.blocks_of(num_tokens)
        self.num_columns_M[group] = columns
        if self.blocks_beside(num_tokens):
            rows = group * self._width + np.arange(1, self._width)
            self._give(rows, np.full(len(rows), columns - 1))

    def grow(self, groups: NDArray[np.intp], counts: Int64) -> None:
        """Gives each beam of `groups[i]` fresh blocks in `counts[i]` further columns."""
        firsts = np.repeat(self.num_columns_M[groups], counts)
        offsets = np.arange(len(firsts)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(groups, counts)[:, None] * self._width + np.arange(self._width)
        self._give(rows.ravel(), np.repeat(firsts + offsets, self._width))
        self.num_columns_M[groups] += counts

    def _give(self, rows: Int64, columns: Int64) -> None:
        fresh = self._kv.gpu.allocate(len(rows))
        groups = rows // self._width
        self._owner_P[fresh], self._column_P[fresh] = groups, columns
        np.add.at(self.num_held_M, groups, 1)
        self._updates.append((rows.astype(np.int32), columns.astype(np.int32), fresh))

    def reclaim(
        self, groups: NDArray[np.intp], kv_lens: Int64, table_GWX: Int32
    ) -> NDArray[np.intp]:
        """Gives back the lost blocks of running groups, with the table as the device has it at
        these lengths. Returns the groups whose prompt's last block is lost, which the cache holds.

        Later plans only add blocks in columns that are not full. `table_GWX` has at least the
        columns that are; a prompt's full blocks are in use by every beam.
        """
        num_full = kv_lens // self._kv.block_size
        is_used_P = np.zeros(len(self._owner_P), dtype=np.bool_)
        is_full_GX = np.arange(table_GWX.shape[2]) < num_full[:, None]
        is_used_P[table_GWX[np.broadcast_to(is_full_GX[:, None], table_GWX.shape)]] = True
        num_full_M = np.zeros(self._nobody + 1, dtype=np.int64)
        num_full_M[groups] = num_full
        is_lost_P = (self._column_P < num_full_M[self._owner_P]) & ~is_used_P
        lost = np.flatnonzero(is_lost_P).astype(np.int32)
        np.subtract.at(self.num_held_M, self._owner_P[lost], 1)
        self._owner_P[lost] = self._nobody
        self._kv.gpu.release(lost)
        last = np.maximum(self._kv.num_blocks_R[groups] - 1, 0)
        is_lost_G = ~is_used_P[self._kv.table_RX[groups, last]]
        is_lost_G &= (self._kv.num_blocks_R[groups] > 0) & (last < num_full)
        return groups[is_lost_G]

    def release(self, group: int) -> None:
        """Gives back all that the group's beams hold beside the prompt's blocks."""
        if self.num_held_M[group]:
            held = np.flatnonzero(self._owner_P == group).astype(np.int32)
            self._owner_P[held] = self._nobody
            self.num_held_M[group] = 0
            self._kv.gpu.release(held)

    def take_table_updates(self) -> BlockTableUpdates | None:
        """Changes of the device's table since the last call, those of prompts included: a prompt's
        blocks stand in the row of its group's first beam."""
        prompts = self._kv.take_table_updates()
        updates, self._updates = self._updates, []
        if prompts is not None:
            updates.append((prompts.rows * self._width, prompts.columns, prompts.blocks))
        if not updates:
            return None
        rows, columns, blocks = (np.concatenate(part) for part in zip(*updates, strict=True))
        return BlockTableUpdates(rows=rows, columns=columns, blocks=blocks)

    def check_integrity(self) -> None:
        """Asserts that pool, prompts and beams agree on every block."""
        groups = np.flatnonzero(self.num_held_M)
        held = [np.flatnonzero(self._owner_P == group).astype(np.int32) for group in groups]
        self._kv.check_integrity(held)
        assert [len(blocks) for blocks in held] == self.num_held_M[groups].tolist()
        assert np.count_nonzero(self._owner_P < self._nobody) == self.num_held_M.sum()
