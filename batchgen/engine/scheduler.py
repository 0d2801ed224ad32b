"""Decides what the device does next. Imports no torch: tested in milliseconds.

A prompt waits, is prefilled in one or more chunks, then decodes in windows of several steps
until it ends. When the KV is full, the newest sequences are swapped to the host and come back,
oldest first, before anything new is admitted.

Nothing here depends on the tokens that the device samples, so the next step is planned while the
last one still runs: lengths are upper bounds, exact for every sequence that has not ended.

No deadlock: the oldest sequence must always be able to end. Others grow, and new ones enter, only
while the free blocks of both pools together cover the longest sequence twice: once for the oldest
to grow, once so that a sequence of any length can be swapped out to make it room.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.admission import Admission
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.sequence_table import SequenceTable
from batchgen.engine.sequences import (
    Admissible,
    Chunks,
    QueuedPrompt,
    SchedulerConfig,
    SchedulerCounters,
    State,
)
from batchgen.engine.step_plan import DecodePlan, NewSequences, PrefillPlan, StepPlan
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
        self._partial: int | None = None  # the row whose prompt is prefilled in part
        self._swapped_in_now: set[int] = set()  # their copies run with the next plan

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
        self.kv.release(row)
        repeated = sequence.num_prompt_tokens * len(sequence.duplicates)
        self.counters.prompt_tokens += repeated
        self.counters.cached_prompt_tokens += repeated
        self.admission.learn(sequence, num_output_tokens)
        return sequence

    # -- planning ------------------------------------------------------------------------------

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        """The next step, or None when there is nothing to do (or all waits for `in_flight`)."""
        self._swap_in()
        plan = self._plan_step()
        if plan is None and not in_flight and self.num_swapped:
            self._force_oldest_in()
            plan = self._plan_step()
        return plan

    def _plan_step(self) -> StepPlan | None:
        admissible = self.admission.admissible()
        prefill = self._plan_prefill(admissible.count) if self._wants_prefill(admissible) else None
        decode = self._plan_decode() if prefill is None else None
        if prefill is not None:
            self.counters.prefill_steps += 1
            rows = prefill.rows[prefill.is_last]
        elif decode is not None:
            self.counters.decode_steps += decode.num_steps
            rows = decode.rows
        else:
            return None
        self._swapped_in_now.clear()
        return StepPlan(
            sequence_ids=self.table.sequence_id_R[rows],
            rows=rows,
            swap_out=self.kv.take_swap_out(),
            swap_in=self.kv.take_swap_in(),
            table=self.kv.take_table_updates(),
            prefill=prefill,
            decode=decode,
        )

    # -- room ----------------------------------------------------------------------------------

    def _reserve(self, longest: int) -> int:
        """Blocks that stay free so that the oldest sequence can always end (see the module)."""
        blocks = self.kv.blocks_of(longest)
        return 2 * blocks + 1 if self.kv.can_swap else blocks

    def _free_blocks(self) -> int:
        return self.kv.gpu.num_free + (self.kv.cpu.num_free if self.kv.can_swap else 0)

    # -- swapping ------------------------------------------------------------------------------

    def _swap_in(self) -> None:
        """Brings sequences back, oldest first, while all that run keep room for two windows."""
        swapped = self.table.live_rows(State.SWAPPED)
        if len(swapped) == 0:
            return
        window_blocks = self.kv.blocks_of(self.config.decode_window)
        running = len(self.table.live_rows(State.DECODE))
        for row in swapped.tolist():
            margin = 2 * window_blocks * (running + 1) if running else window_blocks
            if self.kv.swapped_blocks(row) + margin > self.kv.gpu.num_free:
                return
            self._bring_in(row)
            running += 1

    def _bring_in(self, row: int) -> None:
        self.counters.swapped_in_blocks += self.kv.swapped_blocks(row)
        self.kv.swap_in(row, self.table.occupants[row].hashes)
        self.table.state_R[row] = State.DECODE
        self._swapped_in_now.add(row)

    def _push_out(self, row: int) -> None:
        self.counters.swapped_out_blocks += int(self.kv.num_blocks_R[row])
        self.kv.swap_out(row)
        self.table.state_R[row] = State.SWAPPED

    def _force_oldest_in(self) -> None:
        """Nothing can run: makes room for the oldest swapped sequence at the newest's expense."""
        oldest = int(self.table.live_rows(State.SWAPPED)[0])
        needed = self.kv.swapped_blocks(oldest) + self.kv.blocks_of(self.config.decode_window)
        for row in self.table.live_rows(State.DECODE)[::-1].tolist():
            if self.kv.gpu.num_free >= needed:
                break
            if self.kv.can_swap_out(row):
                self._push_out(row)
        assert self.kv.gpu.num_free >= self.kv.swapped_blocks(oldest), "the KV is deadlocked"
        self._bring_in(oldest)

    # -- decode --------------------------------------------------------------------------------

    def _plan_decode(self) -> DecodePlan | None:
        rows = self.table.decodable()
        if len(rows) == 0:
            return None
        left = self.table.stop_len_R[rows] - 1 - self.table.kv_len_R[rows]
        num_steps = int(min(self.config.decode_window, left.max()))
        target = self.table.kv_len_R[rows] + np.minimum(left, num_steps)
        growth = -(-target // self.config.block_size) - self.kv.num_blocks_R[rows]
        runs = self._make_room(rows, growth)
        rows, target, growth = rows[runs], target[runs], growth[runs]
        if len(rows) == 0:
            return None
        shared_blocks = self.kv.common_blocks(rows, int(self.table.kv_len_R[rows].min()))
        grows = growth > 0
        self.kv.grow(rows[grows].astype(np.int32), growth[grows])
        grown = target - self.table.kv_len_R[rows]
        self.table.kv_len_R[rows] = target
        self._sample_waste(float((grown - 1).sum()) / 2)
        return DecodePlan(
            rows=rows.astype(np.int32), num_steps=num_steps, shared_blocks=shared_blocks
        )

    def _make_room(self, rows: NDArray[np.intp], growth: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `rows` (oldest first) may grow now; swaps the newest out where it must."""
        runs = np.ones(len(rows), dtype=np.bool_)
        total = int(growth.sum())
        spare = self._free_blocks() - self._reserve(self.table.longest_live())
        if total <= self.kv.gpu.num_free and total <= spare:
            return runs
        live = self.table.live_rows(State.PREFILL, State.DECODE, State.SWAPPED)
        oldest = int(live[0])
        allowed = max(spare, 0) + (int(growth[0]) if rows[0] == oldest else 0)
        runs[:] = (np.cumsum(growth) <= allowed) | (growth == 0)
        newest_first = [*np.flatnonzero(~runs)[::-1].tolist(), *np.flatnonzero(runs)[::-1].tolist()]
        for index in newest_first:
            if int(growth[runs].sum()) <= self.kv.gpu.num_free:
                break
            row = int(rows[index])
            fixed = row == oldest or row in self._swapped_in_now
            if not fixed and self.kv.can_swap and self.kv.can_swap_out(row):
                self._push_out(row)
                runs[index] = False
        # What the host has no room for waits in place, the newest first.
        for index in np.flatnonzero(runs & (growth > 0))[::-1].tolist():
            if int(growth[runs].sum()) <= self.kv.gpu.num_free:
                break
            runs[index] = False
        self.counters.stalled += int(
            np.count_nonzero(self.table.state_R[rows[~runs]] == State.DECODE)
        )
        return runs

    def _sample_waste(self, not_yet_written: float) -> None:
        """KV slots that hold no token, of all that are held: the mean over a window's steps.

        `not_yet_written`: slots of the window that fill up while it runs, on average.
        """
        rows = self.table.live_rows(State.DECODE)
        slots = self.kv.num_blocks_R[rows].astype(np.int64) * self.config.block_size
        unused = float((slots - self.table.kv_len_R[rows]).sum()) + not_yet_written
        self.counters.waste_sum += unused / (self.kv.gpu.num_used * self.config.block_size)
        self.counters.waste_samples += 1

    # -- prefill -------------------------------------------------------------------------------

    def _wants_prefill(self, admissible: Admissible) -> bool:
        """Prefill when its step is at least half full, when the decode batch grows by an eighth, or
        when nothing is left to wait for: a prompt held back then would decode late and alone."""
        if self._partial is not None:
            return True
        running = len(self.table.decodable())
        if running == 0:
            return bool(self.admission.waiting and self.table.num_free and not self.num_swapped)
        return admissible.count > 0 and (
            2 * admissible.num_tokens >= self.config.max_num_batched_tokens
            or 8 * admissible.count >= running
            or admissible.count == len(self.admission.waiting)
        )

    def _plan_prefill(self, admissible: int) -> PrefillPlan | None:
        chunks = Chunks()
        if self._partial is not None:
            self._add_chunk(chunks, self._partial)
        if not self.table.occupants:
            admissible = max(admissible, 1)
        room = self.config.max_num_batched_tokens
        longest = self.table.longest_live()
        waiting = self.admission.waiting
        while admissible > 0 and waiting and self.table.num_free and chunks.num_tokens < room:
            item = waiting[0]
            longest = max(longest, item.num_prompt_tokens + item.max_tokens)
            row = self._admit(item, longest)
            if row is None:
                break
            waiting.popleft()
            chunks.new.append(row)
            self._add_chunk(chunks, row)
            admissible -= 1
        if not chunks.rows:
            return None
        return PrefillPlan(
            token_ids=np.concatenate(chunks.token_ids),
            rows=np.array(chunks.rows, dtype=np.int32),
            query_lens=np.array([len(ids) for ids in chunks.token_ids], dtype=np.int32),
            seq_lens=np.array(chunks.seq_lens, dtype=np.int32),
            is_last=np.array(chunks.is_last, dtype=np.bool_),
            new=self._new_sequences(chunks.new),
        )

    def _admit(self, item: QueuedPrompt, longest: int) -> int | None:
        """Gives the prompt a row and its blocks, if they are there.

        `longest`: tokens that the longest of all sequences and this one may come to.
        """
        length = item.num_prompt_tokens
        usable = item.hashes[: (length - 1) // self.config.block_size]  # one token is computed
        cached = self.kv.cached_blocks(usable)
        needed = self.kv.blocks_needed(length, cached)
        if needed > self.kv.gpu.num_free:
            return None
        spare = self._free_blocks() - self._reserve(longest)
        if self.table.occupants and needed > spare:
            return None
        item.num_computed = len(cached) * self.config.block_size
        row = self.table.enter(item)
        self.kv.admit(row, length, cached)
        self.counters.prompt_tokens += length
        self.counters.cached_prompt_tokens += item.num_computed
        return row

    def _add_chunk(self, chunks: Chunks, row: int) -> None:
        """Plans as many of the row's remaining prompt tokens as the step has room for."""
        item = self.table.occupants[row]
        start = item.num_computed
        room = self.config.max_num_batched_tokens - chunks.num_tokens
        end = min(item.num_prompt_tokens, start + room)
        item.num_computed = end
        self.table.kv_len_R[row] = end
        block = self.config.block_size
        self.kv.register(row, item.hashes, start // block, end // block)
        done = end == item.num_prompt_tokens
        self._partial = None if done else row
        if done:
            self.table.state_R[row] = State.DECODE
        chunks.token_ids.append(item.token_ids[start:end])
        chunks.rows.append(row)
        chunks.seq_lens.append(end)
        chunks.is_last.append(done)
        chunks.num_tokens += end - start

    def _new_sequences(self, rows: list[int]) -> NewSequences:
        items = [self.table.occupants[row] for row in rows]
        return NewSequences(
            rows=np.array(rows, dtype=np.int32),
            seeds=np.array([item.prompt.seed for item in items], dtype=np.int64),
            prompt_lens=self.table.prompt_len_R[rows].astype(np.int32),
            stop_lens=self.table.stop_len_R[rows].astype(np.int32),
            ignore_eos=np.array([item.prompt.ignore_eos for item in items], dtype=np.bool_),
            prompts=tuple(item.token_ids for item in items),
        )

    def check_integrity(self) -> None:
        """Asserts that rows, blocks and states agree. Called after every step in tests."""
        self.kv.check_integrity()
        self.table.check_integrity()
        on_device = np.flatnonzero(np.isin(self.table.state_R, (State.PREFILL, State.DECODE)))
        slots = self.kv.num_blocks_R[on_device].astype(np.int64) * self.config.block_size
        assert np.all(slots >= self.table.kv_len_R[on_device]), "a sequence outgrew its blocks"
