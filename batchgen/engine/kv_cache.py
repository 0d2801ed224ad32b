"""Which sequence holds which KV blocks, on the device and, when swapped out, on the host.

No torch. One row a sequence slot; a swapped sequence keeps its row, only its blocks move.

Rows share blocks by reference count: a prefix, or all that the samples of one prompt began with. A
block that several rows hold is full or is not written: the row that would write gets a copy first.

Every block is in one pool. What a swapped row shares with a row on the device stays there; the
rest, and what only swapped rows hold, can move to the host, for all of its holders at once. So
swapping takes on the host what it frees on the device, whoever shares what.

Copies between the pools run beside the step that they are planned with: a block that leaves is held
until the next step, and a row that comes back runs with the next one. Where blocks that leave are
wanted at once, the step waits for the copies (`take_wait`).
Source: copy-on-write of partly filled blocks, vLLM's PagedAttention (SOSP 2023).

Legend: R rows, X blocks of the longest sequence, P blocks of the device's pool.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(slots=True)
class _SwappedRow:
    """The blocks of a swapped row in the order of its tokens, each in one of the pools."""

    blocks: Blocks
    on_host: NDArray[np.bool_]


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
        self._swapped: dict[int, _SwappedRow] = {}
        # Swapped rows, by blocks that are not theirs alone: whether on the host, and the number.
        self._sharers: dict[tuple[bool, int], set[int]] = {}
        self._swapped_holders_P = np.zeros(gpu_blocks, dtype=np.int32)  # of the references
        self._copies: list[tuple[Blocks, Blocks]] = []
        self._updates: list[tuple[Int32, Int32, Int32]] = []
        self._copies_out: list[tuple[Blocks, Blocks]] = []
        self._copies_in: list[tuple[Blocks, Blocks]] = []
        self._leaving: list[Blocks] = []  # device blocks that copies of the next plan read
        self._departed: list[Blocks] = []  # those that the last plan's copies read
        self._waits_for_copies = False
        self._leaving_host: list[Blocks] = []  # read by this step's copies, free after it
        self._kept: set[int] = set()  # blocks that are held beside the rows

    @property
    def can_swap(self) -> bool:
        """Whether the host has room for a sequence of any length."""
        return self.cpu.num_blocks >= self.table_RX.shape[1]

    @property
    def num_free(self) -> int:
        """Device blocks that can be had, at worst by waiting for copies to the host."""
        return self.gpu.num_free + sum(len(blocks) for blocks in self._leaving)

    def begin_step(self) -> None:
        """The last plan was launched: what its copies read is free after them."""
        for blocks in self._departed:
            self.gpu.release(blocks)
        self._departed = []

    def _allocate(self, count: int) -> Blocks:
        if count > self.gpu.num_free:
            for blocks in self._leaving:
                self.gpu.release(blocks)
            self._leaving = []
            self._waits_for_copies = True
        return self.gpu.allocate(count)

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
        fresh = self._allocate(self.blocks_of(num_tokens) - len(cached))
        self._set_row(row, np.concatenate([cached, fresh]))

    def register(self, row: int, hashes: Sequence[bytes], first: int, last: int) -> None:
        """Makes the row's blocks [first, last) known by content: they are computed by now."""
        for index in range(first, min(last, len(hashes))):
            self.gpu.register(int(self.table_RX[row, index]), hashes[index])

    def grow(self, rows: Int32, counts: NDArray[np.int64]) -> None:
        """Appends `counts[i]` fresh blocks to `rows[i]`."""
        fresh = self._allocate(int(counts.sum()))
        owners = np.repeat(rows, counts)
        offsets = np.arange(len(fresh)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = (self.num_blocks_R[owners] + offsets).astype(np.int32)
        self.table_RX[owners, columns] = fresh
        self.num_blocks_R[rows] += counts.astype(np.int32)
        self._updates.append((owners, columns, fresh))

    def fork(self, row: int, others: Sequence[int]) -> None:
        """Gives `others`, which hold nothing, the blocks of `row` as well."""
        blocks = self._row_blocks(row)
        for other in others:
            self.gpu.share(blocks)
            self._set_row(other, blocks)

    def writes_shared(
        self, rows: NDArray[np.intp], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which rows, with `lengths` tokens, would write next into a block that others hold."""
        columns = np.minimum(lengths // self.block_size, self.table_RX.shape[1] - 1)
        is_shared = self.gpu.ref_count[self.table_RX[rows, columns]] > 1
        is_partly_filled: NDArray[np.bool_] = lengths % self.block_size != 0
        return is_partly_filled & is_shared

    def copy_on_write(self, rows: NDArray[np.intp], lengths: NDArray[np.int64]) -> int:
        """Gives rows that would write into a shared block a copy of it; returns how many copies.

        Where all holders of a block are among `rows`, the first one keeps the block.
        """
        is_shared = self.writes_shared(rows, lengths)
        owners = rows[is_shared].astype(np.int32)
        columns = (lengths[is_shared] // self.block_size).astype(np.int32)
        blocks = self.table_RX[owners, columns]
        found, first, counts = np.unique(blocks, return_index=True, return_counts=True)
        is_copied = np.ones(len(owners), dtype=np.bool_)
        is_copied[first[counts == self.gpu.ref_count[found]]] = False
        owners, columns, blocks = owners[is_copied], columns[is_copied], blocks[is_copied]
        if len(owners) == 0:
            return 0
        fresh = self._allocate(len(owners))
        self.gpu.unshare(blocks)
        self.table_RX[owners, columns] = fresh
        self._updates.append((owners, columns, fresh))
        self._copies.append((blocks, fresh))
        return len(owners)

    def saved_blocks(self) -> int:
        """How many blocks more the rows on the device would hold if they shared none."""
        held = [self._idle_blocks(), *self._leaving, np.array(sorted(self._kept), dtype=np.int32)]
        others = len(held[0]) + sum(int((self.gpu.ref_count[b] == 1).sum()) for b in held[1:])
        return int(self.num_blocks_R.sum()) - (self.gpu.num_used - others)

    def keep(self, block: int) -> None:
        """Holds a block that a row holds, too, and goes on when the row gives it back."""
        self._kept.add(block)
        self.gpu.share(np.array([block], dtype=np.int32))

    def drop(self, block: int) -> None:
        """Undoes `keep`."""
        self._kept.remove(block)
        self.gpu.release(np.array([block], dtype=np.int32))

    def release(self, row: int) -> None:
        """Gives back all that `row` holds, wherever it is."""
        held = self._swapped.pop(row, None)
        if held is not None:
            self._forget_sharer(row, held)
            on_device = held.blocks[~held.on_host]
            self._swapped_holders_P[on_device] -= 1
            self.gpu.release(on_device)
            self.cpu.release(held.blocks[held.on_host])
            return
        if self.num_blocks_R[row]:
            self.gpu.release(self._row_blocks(row))
            self.num_blocks_R[row] = 0

    def can_swap_out(self, row: int) -> bool:
        blocks = self._row_blocks(row)
        is_last = self.gpu.ref_count[blocks] == self._swapped_holders_P[blocks] + 1
        return self.cpu.num_free >= int(np.count_nonzero(is_last))

    def swap_out(self, row: int) -> int:
        """Moves what no other row on the device holds to the host; returns how many blocks.

        Known prefixes stay known until evicted.
        """
        blocks = self._row_blocks(row)
        self.num_blocks_R[row] = 0
        self._swapped[row] = _SwappedRow(blocks, np.zeros(len(blocks), dtype=np.bool_))
        self._swapped_holders_P[blocks] += 1
        for block in blocks[self.gpu.ref_count[blocks] > 1].tolist():
            self._sharers.setdefault((False, block), set()).add(row)
        is_idle = self.gpu.ref_count[blocks] == self._swapped_holders_P[blocks]
        self._move_out(blocks[is_idle], row)
        return int(np.count_nonzero(is_idle))

    def swap_out_idle(self, count: int, keep: int | None = None) -> int:
        """Moves up to `count` blocks that only swapped rows hold, but none of the row `keep`, to
        the host, as far as it has room; returns how many."""
        idle = self._idle_blocks()
        if keep in self._swapped:
            idle = np.setdiff1d(idle, self._swapped[keep].blocks[~self._swapped[keep].on_host])
        idle = idle[: max(0, min(count, self.cpu.num_free))]
        self._move_out(idle)
        return len(idle)

    def swapped_blocks(self, row: int) -> int:
        """Blocks of the row that are on the host."""
        return int(np.count_nonzero(self._swapped[row].on_host))

    def swap_in(self, row: int, hashes: Sequence[bytes]) -> int:
        """Brings the row back; returns how many blocks left the host for it.

        Blocks whose content is still known are shared, not copied.
        """
        held = self._swapped[row]
        places = np.flatnonzero(held.on_host)
        host = held.blocks[places]
        cached = self.cached_blocks(hashes)
        known = cached[places[places < len(cached)]]
        self.gpu.share(known)
        fresh = self._allocate(len(places) - len(known))
        blocks = np.concatenate([known, fresh])
        self._copies_in.append((host[len(known) :], fresh))
        self.cpu.share(host)  # until this step's copies have read them
        self._leaving_host.append(host)
        self._rehome(host, blocks, row, to_host=False)
        self.gpu.release(blocks)  # each holder has a reference of its own by now
        self._forget_sharer(row, held)
        del self._swapped[row]
        self._swapped_holders_P[held.blocks] -= 1
        self._set_row(row, held.blocks)
        return len(host)

    def _idle_blocks(self) -> Blocks:
        """Blocks on the device that only swapped rows hold."""
        if not self._swapped:
            return np.empty(0, dtype=np.int32)
        held = self._swapped_holders_P
        return np.flatnonzero((held > 0) & (self.gpu.ref_count == held)).astype(np.int32)

    def _forget_sharer(self, row: int, held: _SwappedRow) -> None:
        for key in zip(held.on_host.tolist(), held.blocks.tolist(), strict=True):
            sharers = self._sharers.get(key)
            if sharers is not None:
                sharers.discard(row)
                if not sharers:
                    del self._sharers[key]

    def _move_out(self, blocks: Blocks, row: int | None = None) -> None:
        """Moves blocks to the host that only swapped rows hold: one, `row`, or several."""
        if len(blocks) == 0:
            return
        host = self.cpu.allocate(len(blocks))
        self._copies_out.append((blocks, host))
        self.gpu.share(blocks)
        self._leaving.append(blocks)
        self._rehome(blocks, host, row, to_host=True)
        self.cpu.release(host)  # each holder has a reference of its own by now

    def _rehome(self, old: Blocks, new: Blocks, row: int | None, *, to_host: bool) -> None:
        """Lets swapped rows, `row` and all sharers, that hold `old[i]` hold `new[i]`, in the other
        pool."""
        rows = set() if row is None else {row}
        for old_block, new_block in zip(old.tolist(), new.tolist(), strict=True):
            sharers = self._sharers.pop((not to_host, old_block), None)
            if sharers is not None:
                self._sharers[to_host, new_block] = sharers
                rows |= sharers
        order = np.argsort(old)
        old, new = old[order], new[order]
        for held in (self._swapped[row] for row in rows):
            places = np.flatnonzero(held.on_host != to_host)
            index = np.minimum(np.searchsorted(old, held.blocks[places]), len(old) - 1)
            is_old = old[index] == held.blocks[places]
            places, index = places[is_old], index[is_old]
            held.blocks[places], held.on_host[places] = new[index], to_host
            if to_host:
                self._swapped_holders_P[old[index]] -= 1
                self.gpu.release(old[index])
                self.cpu.share(new[index])
            else:
                self._swapped_holders_P[new[index]] += 1
                self.gpu.share(new[index])
                self.cpu.release(old[index])

    def take_copies(self) -> BlockCopies | None:
        copies, self._copies = self._copies, []
        return _join_copies(copies)

    def take_wait(self) -> bool:
        """Whether the step uses blocks that its own copies to the host free."""
        waits, self._waits_for_copies = self._waits_for_copies, False
        return waits

    def take_swap_out(self) -> BlockCopies | None:
        self._departed, self._leaving = self._leaving, []
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

    def release_last(self, row: int) -> None:
        """Gives back the last block that `row` holds on the device."""
        self.num_blocks_R[row] -= 1
        self.gpu.release(self.table_RX[row, self.num_blocks_R[row], None])

    def check_integrity(self, others: Sequence[Blocks] = ()) -> None:
        """Asserts that both pools agree with the table and with the swapped sequences.

        `others`: what each further owner holds on the device.
        """
        swapped = self._swapped.values()
        left_behind = [held.blocks[~held.on_host] for held in swapped]
        kept = [*(np.array([block]) for block in self._kept), *self._leaving, *self._departed]
        rows = np.flatnonzero(self.num_blocks_R)
        on_device = [self._row_blocks(int(row)) for row in rows]
        self.gpu.check_integrity([*on_device, *left_behind, *kept, *others])
        self.cpu.check_integrity([held.blocks[held.on_host] for held in swapped])
        holders_P = np.zeros_like(self._swapped_holders_P)
        for blocks in left_behind:
            holders_P[blocks] += 1
        assert np.array_equal(holders_P, self._swapped_holders_P), "swapped holders are miscounted"
        self._check_sharers()

    def _check_sharers(self) -> None:
        holders: defaultdict[tuple[bool, int], set[int]] = defaultdict(set)
        for row, held in self._swapped.items():
            for key in zip(held.on_host.tolist(), held.blocks.tolist(), strict=True):
                holders[key].add(row)
        for key, rows in holders.items():
            assert len(rows) == 1 or self._sharers.get(key) == rows, "a sharer is not known"
        for key, rows in self._sharers.items():
            assert rows <= holders[key], "a sharer holds the block no more"

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
