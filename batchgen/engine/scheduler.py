"""Decides what the device does next. Imports no torch: tested in milliseconds.

A prompt waits, is prefilled in one or more chunks, then decodes in windows of several steps
until it ends. When the KV is full, the newest sequences are swapped to the host and come back,
oldest first, before anything new is admitted.

Nothing here depends on the tokens that the device samples, so the next step is planned while the
last one still runs: lengths are upper bounds, exact for every sequence that has not ended.

No deadlock: the oldest sequence must always be able to end. Others grow, and new ones enter, only
while the free blocks of both pools together cover the longest sequence twice: once for the oldest
to grow, once so that a sequence of any length can be swapped out to make it room. Swapping leaves
that sum as it is, because a block that several rows hold is in one pool for all of them.

The samples of a prompt have a row each. The first one prefills the prompt; with its last chunk the
others are forked from it and hold the same blocks. The copy that a row takes of a shared block
before it writes counts as its growth. By that a row never takes more than its length, since it held
the block that it copies; but the original stays behind for its other holders, so that samples which
have the pool to themselves need one block more than the longest sequence (`check_room`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.admission import Admission
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.prefill import Prefill
from batchgen.engine.prefix_groups import find_groups
from batchgen.engine.room import Room
from batchgen.engine.sequence_table import SequenceTable
from batchgen.engine.sequences import (
    Admissible,
    QueuedPrompt,
    SchedulerConfig,
    SchedulerCounters,
    State,
)
from batchgen.engine.shared_tail import SharedTail
from batchgen.engine.step_plan import (
    DecodePlan,
    PrefillPlan,
    PrefixGroups,
    StepPlan,
)
from batchgen.records import Prompt, RowKey


class Scheduler:
    """Plans steps over the slot table, the KV and the queue of waiting prompts."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        rows = config.max_num_seqs
        self.kv = KVCache(
            num_rows=rows,
            max_blocks=-(-config.max_model_len // config.block_size),
            block_size=config.block_size,
            gpu_blocks=config.gpu_blocks,
            cpu_blocks=config.cpu_blocks,
        )
        assert config.gpu_blocks >= self.kv.table_RX.shape[1], "the KV holds no whole sequence"
        self.counters = SchedulerCounters()
        self.table = SequenceTable(rows)
        self.admission = Admission(config, self.table, self.kv, self.counters)
        self._tail = SharedTail(self.kv)
        self._prefill = Prefill(
            config, self.table, self.kv, self._tail, self.admission, self.counters
        )
        self._room = Room(config, self.table, self.kv, self._tail, self.counters)
        self._ending: list[int] = []  # rows of the last plan that need no KV after it

    # -- what comes in and what is known -------------------------------------------------------

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Queues one window of prompts, in the order of the prefix plan."""
        self.admission.add(prompts)

    @property
    def num_live(self) -> int:
        return len(self.table.occupants)

    @property
    def num_swapped(self) -> int:
        return int(np.count_nonzero(self.table.state_R == State.SWAPPED))

    def key_of(self, row: int) -> RowKey:
        return self.table.occupants[row].prompt.key

    def finish(self, row: int, num_output_tokens: int) -> QueuedPrompt:
        """The sequence in `row` has ended: its row and its blocks are free for the next step."""
        sequence = self.table.leave(row)
        self._release(row)
        self.admission.learn(sequence, num_output_tokens)
        return sequence

    def _release(self, row: int) -> None:
        waiting = self.admission.waiting
        self._tail.leave(row, waiting[0] if waiting else None)
        self.kv.release(row)

    # -- planning ------------------------------------------------------------------------------

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        """The next step, or None when there is nothing to do (or all waits for `in_flight`)."""
        # The device runs steps in order: what the next one writes, the last one has read.
        self._tail.begin_step()
        self.kv.begin_step()
        for row in self._ending:
            self._release(row)
        self._ending = []
        self._room.swap_in()
        plan = self._plan_step()
        if plan is None and not in_flight and self.num_swapped:
            self._room.force_oldest_in()
            plan = self._plan_step()
        return plan

    def _plan_step(self) -> StepPlan | None:
        admissible = self.admission.admissible()
        prefill = self._plan_prefill(admissible) if self._prefill.is_due(admissible) else None
        decode = self._plan_decode() if prefill is None else None
        if prefill is not None:
            self.counters.prefill_steps += 1
            rows = prefill.sample_rows
        elif decode is not None:
            self.counters.decode_steps += decode.num_steps
            rows = decode.rows
        else:
            return None
        runs_arriving = bool(self._room.is_arriving(rows).any())
        self._room.end_step()
        self._note_ending(rows)
        return StepPlan(
            sequence_ids=self.table.sequence_id_R[rows],
            rows=rows,
            swap_out=self.kv.take_swap_out(),
            swap_in=self.kv.take_swap_in(),
            waits_for_swaps=self.kv.take_wait() or runs_arriving,
            copies=self.kv.take_copies(),
            table=self.kv.take_table_updates(),
            prefill=prefill,
            decode=decode,
            beams=None,
        )

    def _note_ending(self, rows: NDArray[np.int32]) -> None:
        """Of the rows that yield tokens, those that certainly make none after this step."""
        table = self.table
        ends = table.kv_len_R[rows] >= table.stop_len_R[rows] - 1
        table.state_R[rows[ends]] = State.ENDING
        self._ending = rows[ends].tolist()

    def _plan_prefill(self, admissible: Admissible) -> PrefillPlan | None:
        longest = self.table.longest_live()

        def spare_with(item: QueuedPrompt) -> int:
            nonlocal longest
            longest = max(longest, item.num_prompt_tokens + item.max_tokens)
            return self._room.spare_blocks(longest)

        return self._prefill.plan(admissible, spare_with)

    # -- decode --------------------------------------------------------------------------------

    def _plan_decode(self) -> DecodePlan | None:
        rows = self.table.decodable()
        is_arriving = self._room.is_arriving(rows)
        if not is_arriving.all():  # else only a step that waits for the copies is left
            rows = rows[~is_arriving]
        if len(rows) == 0:
            return None
        block = self.config.block_size
        left = self.table.stop_len_R[rows] - 1 - self.table.kv_len_R[rows]
        num_steps = int(min(self.config.decode_window, left.max()))
        target = self.table.kv_len_R[rows] + np.minimum(left, num_steps)
        growth = -(-target // block) - self.kv.num_blocks_R[rows]
        next_target = target + np.minimum(left - (target - self.table.kv_len_R[rows]), num_steps)
        own = -(-target // block) - self.table.cached_len_R[rows] // block
        next_growth = np.where(left <= num_steps, -own, -(-next_target // block) + target // -block)
        takes_copy = self.kv.writes_shared(rows, self.table.kv_len_R[rows])
        runs = self._room.make_room(rows, growth + takes_copy, next_growth)
        rows, target, growth = rows[runs], target[runs], growth[runs]
        if len(rows) == 0:
            return None
        groups = self._prefix_groups(rows, num_steps)
        self.counters.copied_blocks += self.kv.copy_on_write(rows, self.table.kv_len_R[rows])
        grows = growth > 0
        self.kv.grow(rows[grows].astype(np.int32), growth[grows])
        grown = target - self.table.kv_len_R[rows]
        self.table.kv_len_R[rows] = target
        self._sample_kv(float((grown - 1).sum()) / 2)
        return DecodePlan(rows=rows.astype(np.int32), num_steps=num_steps, groups=groups)

    def _prefix_groups(self, rows: NDArray[np.intp], num_steps: int) -> PrefixGroups | None:
        """Rows whose shared prefix is read once in each of the steps, where that pays."""
        min_saving = self.config.min_prefix_saving
        if min_saving is None or not self.table.cached_len_R[rows].any():
            return None
        num_full = self.table.kv_len_R[rows] // self.config.block_size
        groups = find_groups(self.kv.table_RX[rows], num_full, min_saving)
        if groups is not None:
            sizes = np.diff(groups.cu_members)
            saved = sum((n - 1) * len(b) for n, b in zip(sizes, groups.blocks, strict=True))
            self.counters.prefix_blocks_saved += num_steps * int(saved)
        return groups

    def _sample_kv(self, not_yet_written: float) -> None:
        """KV slots that hold no token, of all that are held, as the mean over a window's steps; and
        the blocks that rows share, of all that they would hold otherwise.

        `not_yet_written`: slots of the window that fill up while it runs, on average.
        """
        rows = self.table.live_rows(State.DECODE)
        slots = self.kv.num_blocks_R[rows].astype(np.int64) * self.config.block_size
        unused = float((slots - self.table.kv_len_R[rows]).sum()) + not_yet_written
        self.counters.waste_sum += unused / (self.kv.gpu.num_used * self.config.block_size)
        self.counters.waste_samples += 1
        saved = self.kv.saved_blocks()
        self.counters.peak_saved_blocks = max(self.counters.peak_saved_blocks, saved)
        self.counters.saved_sum += saved / int(self.kv.num_blocks_R.sum())

    def check_integrity(self) -> None:
        """Asserts that rows, blocks and states agree. Called after every step in tests."""
        self.kv.check_integrity()
        self.table.check_integrity()
        on_device = np.flatnonzero(np.isin(self.table.state_R, (State.PREFILL, State.DECODE)))
        slots = self.kv.num_blocks_R[on_device].astype(np.int64) * self.config.block_size
        assert np.all(slots >= self.table.kv_len_R[on_device]), "a sequence outgrew its blocks"
