"""Prompts that share a part of a block with the one before them: its tokens are copied. No torch.

Whole blocks are shared as they are. In the order of the prefix plan a prompt shares the most with
the one before it, so that one's blocks are all that has to be at hand: with the copies, prompts
compute each distinct token once.
"""

from __future__ import annotations

import numpy as np

from batchgen.engine.kv_cache import KVCache
from batchgen.engine.sequences import QueuedPrompt
from batchgen.engine.step_plan import SlotCopies


class SharedTail:
    """Follows the last admitted prompt: in its row, and for one block beyond its end."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self._row: int | None = None  # where the last admitted prompt sits
        self._kept: int | None = None  # a block of it, once it has left its row
        self._read: list[int] = []  # kept until the step that copies from it is planned
        self._origin: dict[int, int] = {}  # of the step's copies: target slot -> source slot

    def begin_step(self) -> None:
        """The last plan is complete: what its copies read may be written again."""
        for block in self._read:
            self._kv.drop(block)
        self._read = []

    def num_tokens(self, item: QueuedPrompt, num_cached: int) -> int:
        """How many tokens after its `num_cached` cached ones the next prompt can copy."""
        size = self._kv.block_size
        shared = min(item.num_shared, item.num_prompt_tokens - 1)  # one token is computed
        count = shared - num_cached
        return count if 0 < count < size and self._block(shared // size) is not None else 0

    def follow(self, row: int, num_cached: int, count: int) -> None:
        """The next prompt has entered `row`; copies the `count` tokens that num_tokens said."""
        size = self._kv.block_size
        if count:
            index = num_cached // size
            source = self._block(index)
            assert source is not None, "num_tokens said that there was a block"
            target = int(self._kv.table_RX[row, index])
            for offset in range(count):
                slot = source * size + offset
                # What is itself a copy of this step may not be there yet.
                self._origin[target * size + offset] = self._origin.get(slot, slot)
        if self._kept is not None:
            self._read.append(self._kept)
        self._row, self._kept = row, None

    def leave(self, row: int, following: QueuedPrompt | None) -> None:
        """The sequence in `row` is about to give its blocks back; `following` is admitted next."""
        if row != self._row:
            return
        self._row = None
        if following is not None and following.num_shared % self._kv.block_size:
            index = following.num_shared // self._kv.block_size
            if index < self._kv.num_blocks_R[row]:
                self._kept = int(self._kv.table_RX[row, index])
                self._kv.keep(self._kept)

    def forget(self) -> None:
        """Nothing is kept any more: the blocks are needed, or their row is swapped out."""
        if self._kept is not None:
            self._kv.drop(self._kept)
        self._row = self._kept = None

    def take_copies(self) -> SlotCopies | None:
        """The copies since the last call."""
        if not self._origin:
            return None
        targets, sources = zip(*self._origin.items(), strict=True)
        self._origin = {}
        return SlotCopies(
            source=np.array(sources, dtype=np.int64), target=np.array(targets, dtype=np.int64)
        )

    def _block(self, index: int) -> int | None:
        """The last prompt's block `index`, if it is still there."""
        if self._row is None:
            return self._kept
        if index >= self._kv.num_blocks_R[self._row]:
            return None
        return int(self._kv.table_RX[self._row, index])
