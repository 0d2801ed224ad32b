"""Which sequence holds which KV blocks, on the device and, when swapped out, on the host.

No torch. One row a sequence slot; a swapped sequence keeps its row, only its blocks move.
Legend: R rows, X blocks of the longest sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.block_pool import BlockPool, Blocks
from batchgen.engine.step_plan import BlockCopies, BlockTableUpdates, Int32


def block_hashes(
    token_ids: Int32, block_size: int, like: tuple[Int32, Sequence[bytes]] | None = None
) -> list[bytes]:
    """A hash for each full block, of its tokens and all before them (a chain, 16 bytes each).

    `like`: another prompt and its hashes, taken over for the blocks that both begin with.
    Source: vLLM's prefix caching; blake2b, so that equal hashes mean equal tokens in practice.
    """
    hashes: list[bytes] = []
    if like is not None:
        other_ids, other_hashes = like
        length = min(len(token_ids), len(other_ids))
        differs = token_ids[:length] != other_ids[:length]
        same = int(np.argmax(differs)) if differs.any() else length
        hashes.extend(other_hashes[: same // block_size])
    data = token_ids.tobytes()
    step = block_size * token_ids.itemsize
    previous = hashes[-1] if hashes else b""
    for start in range(len(hashes) * step, len(data) - step + 1, step):
        previous = hashlib.blake2b(previous + data[start : start + step], digest_size=16).digest()
        hashes.append(previous)
    return hashes


class KVCache:
    """Owns the block table and both pools."""

    def __init__(
        self, *, num_rows: int, max_blocks: int, block_size: int, gpu_blocks: int, cpu_blocks: int
    ) -> None:
        self.block_size = block_size
        self.gpu = BlockPool(gpu_blocks)
        self.cpu = BlockPool(cpu_blocks)
        self.table_RX = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self.num_blocks_R = np.zeros(num_rows, dtype=np.int32)  # held on the device
        self._swapped: dict[int, Blocks] = {}  # row -> host blocks
        self._updates: list[tuple[Int32, Int32, Int32]] = []
        self._copies_out: list[tuple[Blocks, Blocks]] = []
        self._copies_in: list[tuple[Blocks, Blocks]] = []
        self._leaving_host: list[Blocks] = []  # read by this step's copies, free after it

    @property
    def can_swap(self) -> bool:
        """Whether the host has room for a sequence of any length."""
        return self.cpu.num_blocks >= self.table_RX.shape[1]

    def blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_blocks(self, hashes: Sequence[bytes]) -> Blocks:
        """The blocks of the longest known prefix."""
        return self.gpu.lookup(hashes)

    def blocks_needed(self, num_tokens: int, cached: Blocks) -> int:
        """Free blocks that a sequence of `num_tokens` would take, given its cached prefix."""
        return self.blocks_of(num_tokens) - int(np.count_nonzero(self.gpu.ref_count[cached]))

    def admit(self, row: int, num_tokens: int, cached: Blocks) -> None:
        """Gives `row` its cached prefix and fresh blocks for the rest of `num_tokens`."""
        self.gpu.share(cached)
        fresh = self.gpu.allocate(self.blocks_of(num_tokens) - len(cached))
        self._set_row(row, np.concatenate([cached, fresh]))

    def register(self, row: int, hashes: Sequence[bytes], first: int, last: int) -> None:
        """Makes the row's blocks [first, last) known by content: they are computed by now."""
        for index in range(first, min(last, len(hashes))):
            self.gpu.register(int(self.table_RX[row, index]), hashes[index])

    def grow(self, rows: Int32, counts: NDArray[np.int64]) -> None:
        """Appends `counts[i]` fresh blocks to `rows[i]`."""
        fresh = self.gpu.allocate(int(counts.sum()))
        owners = np.repeat(rows, counts)
        offsets = np.arange(len(fresh)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = (self.num_blocks_R[owners] + offsets).astype(np.int32)
        self.table_RX[owners, columns] = fresh
        self.num_blocks_R[rows] += counts.astype(np.int32)
        self._updates.append((owners, columns, fresh))

    def common_blocks(self, rows: NDArray[np.intp], num_tokens: int) -> Int32:
        """The leading blocks, within the first `num_tokens`, that all of `rows` share."""
        first_X = self.table_RX[rows[0], : num_tokens // self.block_size]
        if len(first_X) == 0 or self.gpu.ref_count[first_X[0]] < len(rows):
            return first_X[:0].copy()
        is_same_X = (self.table_RX[rows, : len(first_X)] == first_X).all(axis=0)
        count = len(first_X) if is_same_X.all() else int(np.argmin(is_same_X))
        return first_X[:count].copy()

    def release(self, row: int) -> None:
        """Gives back all that `row` holds, wherever it is."""
        host = self._swapped.pop(row, None)
        if host is not None:
            self.cpu.release(host)
            return
        self.gpu.release(self._row_blocks(row))
        self.num_blocks_R[row] = 0

    def can_swap_out(self, row: int) -> bool:
        return self.cpu.num_free >= int(self.num_blocks_R[row])

    def swap_out(self, row: int) -> None:
        """Moves the row's blocks to the host; known prefixes stay known until evicted."""
        blocks = self._row_blocks(row)
        host = self.cpu.allocate(len(blocks))
        self._copies_out.append((blocks, host))
        self._swapped[row] = host
        self.gpu.release(blocks)
        self.num_blocks_R[row] = 0

    def swapped_blocks(self, row: int) -> int:
        return len(self._swapped[row])

    def swap_in(self, row: int, hashes: Sequence[bytes]) -> None:
        """Brings the row back. Blocks whose content is still known are shared, not copied."""
        host = self._swapped.pop(row)
        cached = self.cached_blocks(hashes)
        self.gpu.share(cached)
        fresh = self.gpu.allocate(len(host) - len(cached))
        self._copies_in.append((host[len(cached) :], fresh))
        self._leaving_host.append(host)
        self._set_row(row, np.concatenate([cached, fresh]))

    def take_swap_out(self) -> BlockCopies | None:
        copies, self._copies_out = self._copies_out, []
        return _join_copies(copies)

    def take_swap_in(self) -> BlockCopies | None:
        for blocks in self._leaving_host:
            self.cpu.release(blocks)
        self._leaving_host = []
        copies, self._copies_in = self._copies_in, []
        return _join_copies(copies)

    def take_table_updates(self) -> BlockTableUpdates | None:
        """Changes of the block table since the last call; a cell changed twice has one entry."""
        if not self._updates:
            return None
        rows, columns, blocks = (np.concatenate(part) for part in zip(*self._updates, strict=True))
        self._updates = []
        cells = rows.astype(np.int64) * self.table_RX.shape[1] + columns
        _, last = np.unique(cells[::-1], return_index=True)
        keep = len(cells) - 1 - last
        return BlockTableUpdates(rows=rows[keep], columns=columns[keep], blocks=blocks[keep])

    def check_integrity(self) -> None:
        """Asserts that both pools agree with the table and with the swapped sequences."""
        held = np.flatnonzero(self.num_blocks_R)
        self.gpu.check_integrity(self._row_blocks(int(row)) for row in held)
        self.cpu.check_integrity(self._swapped.values())

    def _row_blocks(self, row: int) -> Blocks:
        return self.table_RX[row, : self.num_blocks_R[row]].copy()

    def _set_row(self, row: int, blocks: Blocks) -> None:
        count = len(blocks)
        self.table_RX[row, :count] = blocks
        self.num_blocks_R[row] = count
        owners = np.full(count, row, dtype=np.int32)
        self._updates.append((owners, np.arange(count, dtype=np.int32), blocks))


def _join_copies(copies: list[tuple[Blocks, Blocks]]) -> BlockCopies | None:
    if not copies:
        return None
    source, target = (np.concatenate(part) for part in zip(*copies, strict=True))
    return BlockCopies(source=source, target=target)
