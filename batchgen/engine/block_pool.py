"""The pool of KV blocks: reference counts, a free list, and the cache of full prompt blocks.

No torch: a block is a number. A block is in exactly one of three states:

    used       ref_count > 0
    evictable  ref_count == 0, but its content is a known prefix and may be taken up again
    free       ref_count == 0, content unknown
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int32]


class BlockPool:
    """Owns which block is whose. All block arrays are int32."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_count = np.zeros(num_blocks, dtype=np.int32)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack, top at the end
        self._num_free = num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._is_known = np.zeros(num_blocks, dtype=np.bool_)  # has a hash
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free and evictable ones."""
        return self._num_free + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> Blocks:
        """Takes `count` blocks, each with one reference. The caller checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        for _ in range(count - self._num_free):
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
            self._is_known[block] = False
            self._free[self._num_free] = block
            self._num_free += 1
        self._num_free -= count
        blocks = self._free[self._num_free : self._num_free + count].copy()
        self.ref_count[blocks] = 1
        return blocks

    def release(self, blocks: Blocks) -> None:
        """Drops one reference of each block. Later blocks of a prefix become evictable first."""
        blocks = blocks[::-1]
        self.ref_count[blocks] -= 1
        dead = blocks[self.ref_count[blocks] == 0]
        is_known = self._is_known[dead]
        for block in dead[is_known].tolist():
            self._evictable[block] = None
        dead = dead[~is_known]
        self._free[self._num_free : self._num_free + len(dead)] = dead
        self._num_free += len(dead)

    def lookup(self, hashes: Sequence[bytes]) -> Blocks:
        """The blocks that hold the longest known prefix of `hashes`. Takes no reference."""
        block_of = self._block_of
        found = [block_of[block_hash] for block_hash in takewhile(block_of.__contains__, hashes)]
        return np.array(found, dtype=np.int32)

    def share(self, blocks: Blocks) -> None:
        """Takes one more reference of each of these distinct blocks: used ones, or of `lookup`."""
        for block in blocks[self.ref_count[blocks] == 0].tolist():
            del self._evictable[block]
        self.ref_count[blocks] += 1

    def unshare(self, blocks: Blocks) -> None:
        """Drops a reference for each entry. Entries may repeat, and every block stays used."""
        np.subtract.at(self.ref_count, blocks, 1)
        assert np.all(self.ref_count[blocks] > 0), "a block's last holder gave it up"

    def register(self, block: int, block_hash: bytes) -> None:
        """Says that `block`, which the caller holds, will have this content for good.

        Where two blocks have the same content, the first one stays the known one.
        """
        assert block not in self._hash_of, "a block's content changed"
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._is_known[block] = True

    def check_integrity(self, owners: Iterable[Blocks]) -> None:
        """Asserts that counts, free list and cache agree with what the `owners` hold."""
        expected = np.zeros(self.num_blocks, dtype=np.int32)
        for blocks in owners:
            assert len(np.unique(blocks)) == len(blocks), "one owner holds a block twice"
            expected[blocks] += 1
        assert np.array_equal(expected, self.ref_count), "reference counts differ from owners"
        free = set(self._free[: self._num_free].tolist())
        assert len(free) == self._num_free, "a block is in the free list twice"
        idle = set(np.flatnonzero(self.ref_count == 0).tolist())
        assert free | set(self._evictable) == idle, "idle blocks are not free or evictable"
        assert not free & set(self._evictable), "a block is free and evictable"
        assert set(self._evictable) <= set(self._hash_of), "an evictable block has no content"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "the cache is torn"
        assert set(np.flatnonzero(self._is_known).tolist()) == set(self._hash_of), "a wrong mark"
