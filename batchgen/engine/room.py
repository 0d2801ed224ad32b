"""Room in the KV for what runs: who is swapped to the host, who comes back, who waits. No torch.

The rule that keeps it from a deadlock is in the scheduler's module text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.kv_cache import KVCache
from batchgen.engine.sequence_table import SequenceTable
from batchgen.engine.sequences import SchedulerConfig, SchedulerCounters, State
from batchgen.engine.shared_tail import SharedTail


class Room:
    """Decides which sequences have their KV on the device."""

    def __init__(
        self,
        config: SchedulerConfig,
        table: SequenceTable,
        kv: KVCache,
        tail: SharedTail,
        counters: SchedulerCounters,
    ) -> None:
        self._config = config
        self._table = table
        self._kv = kv
        self._tail = tail
        self._counters = counters
        self._arriving: set[int] = set()  # rows whose KV comes in with this step's copies

    def end_step(self) -> None:
        """The plan is complete: rows that come in with it may go out with the next one."""
        self._arriving.clear()

    def is_arriving(self, rows: NDArray[np.signedinteger]) -> NDArray[np.bool_]:
        """Which of `rows` wait for this step's copies."""
        return np.isin(rows, list(self._arriving))

    def spare_blocks(self, longest: int) -> int:
        """Free blocks of both pools beyond those that let the oldest sequence end always.

        `longest`: tokens that the longest of all sequences may come to.
        """
        blocks = self._kv.blocks_of(longest)
        if not self._kv.can_swap:
            return self._kv.num_free - blocks
        return self._kv.num_free + self._kv.cpu.num_free - (2 * blocks + 1)

    def make_room(
        self, rows: NDArray[np.intp], growth: NDArray[np.int64], next_growth: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of `rows` (oldest first) may grow now; swaps the newest out where it must.

        `next_growth`: blocks that the rows will want (or, below zero, give back) with the step
        after this one. What is swapped out now, beside this step, is free for that one.
        """
        runs = np.ones(len(rows), dtype=np.bool_)
        total = int(growth.sum())
        wanted = growth + next_growth if self._kv.can_swap else growth
        num_wanted = max(total, int(wanted.sum()))
        if num_wanted > self._kv.num_free:
            self._tail.forget()
        spare = self.spare_blocks(self._table.longest_live())
        if num_wanted <= self._kv.num_free and total <= spare:
            return runs
        live = self._table.live_rows(State.PREFILL, State.DECODE, State.SWAPPED)
        oldest = int(live[0])
        self._push_idle_out(num_wanted)
        allowed = max(spare, 0) + (int(growth[0]) if rows[0] == oldest else 0)
        runs[:] = (np.cumsum(growth) <= allowed) | (growth == 0)
        newest_first = [*np.flatnonzero(~runs)[::-1].tolist(), *np.flatnonzero(runs)[::-1].tolist()]
        for index in newest_first:
            if max(int(growth[runs].sum()), int(wanted[runs].sum())) <= self._kv.num_free:
                break
            row = int(rows[index])
            fixed = row == oldest or row in self._arriving
            if not fixed and self._kv.can_swap and self._kv.can_swap_out(row):
                self._push_out(row)
                runs[index] = False
        # What the host has no room for waits in place, the newest first.
        for index in np.flatnonzero(runs & (growth > 0))[::-1].tolist():
            if int(growth[runs].sum()) <= self._kv.num_free:
                break
            runs[index] = False
        self._counters.stalled += int(
            np.count_nonzero(self._table.state_R[rows[~runs]] == State.DECODE)
        )
        return runs

    def swap_in(self) -> None:
        """Brings sequences back, oldest first, while all that run keep room for two windows."""
        swapped = self._table.live_rows(State.SWAPPED)
        if len(swapped) == 0:
            return
        window_blocks = self._kv.blocks_of(self._config.decode_window)
        running = len(self._table.live_rows(State.DECODE))
        for row in swapped.tolist():
            margin = 2 * window_blocks * (running + 1) if running else window_blocks
            if self._kv.swapped_blocks(row) + margin > self._kv.gpu.num_free:
                return
            self._bring_in(row)
            running += 1

    def _bring_in(self, row: int) -> None:
        hashes = self._table.occupants[row].hashes
        self._counters.swapped_in_blocks += self._kv.swap_in(row, hashes)
        self._table.state_R[row] = State.DECODE
        self._arriving.add(row)

    def _push_out(self, row: int) -> None:
        self._counters.swapped_out_blocks += self._kv.swap_out(row)
        self._table.state_R[row] = State.SWAPPED

    def _push_idle_out(self, num_wanted: int, keep: int | None = None) -> None:
        """Frees up to `num_wanted` blocks on the device that only swapped rows hold, not `keep`."""
        missing = num_wanted - self._kv.num_free
        self._counters.swapped_out_blocks += self._kv.swap_out_idle(missing, keep)

    def force_oldest_in(self) -> None:
        """Nothing can run: makes room for the oldest swapped sequence at the newest's expense."""
        oldest = int(self._table.live_rows(State.SWAPPED)[0])
        needed = self._kv.swapped_blocks(oldest) + self._kv.blocks_of(self._config.decode_window)
        self._tail.forget()
        self._push_idle_out(needed, keep=oldest)
        for row in self._table.live_rows(State.DECODE)[::-1].tolist():
            if self._kv.num_free >= needed:
                break
            if row not in self._arriving and self._kv.can_swap_out(row):
                self._push_out(row)
        assert self._kv.num_free >= self._kv.swapped_blocks(oldest), "the KV is deadlocked"
        self._bring_in(oldest)
