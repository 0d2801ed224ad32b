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

from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.forecast import OutputLengths, forecast_peak
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.prefix_plan import order_window
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
    """Owns the slot table of the host: who sits in which row, and how far each is planned."""

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
        self.output_lengths = OutputLengths()
        self.waiting: deque[QueuedPrompt] = deque()
        self.state_R = np.full(rows, State.FREE, dtype=np.int8)
        self.kv_len_R = np.zeros(rows, dtype=np.int64)  # tokens with KV after all planned steps
        self.cached_len_R = np.zeros(rows, dtype=np.int64)  # of these, from the prefix cache
        self.prompt_len_R = np.zeros(rows, dtype=np.int64)
        self.stop_len_R = np.zeros(rows, dtype=np.int64)  # prompt and output end here at the latest
        self.exact_R = np.zeros(rows, dtype=np.bool_)  # ends at stop_len, not before
        self.sequence_id_R = np.zeros(rows, dtype=np.int64)  # grows with age: the oldest is least
        self.sequences: dict[int, QueuedPrompt] = {}  # by row
        self._free_rows = list(range(rows - 1, -1, -1))
        self._partial: int | None = None  # the row whose prompt is prefilled in part
        self._next_id = 1
        self._last_hashed: QueuedPrompt | None = None
        self._swapped_in_now: set[int] = set()  # their copies run with the next plan

    # -- what comes in and what is known -------------------------------------------------------

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Queues one window of prompts, in the order of the prefix plan."""
        config = self.config
        block_size = config.block_size if config.enable_prefix_caching else None
        window = [QueuedPrompt(prompt, block_size) for prompt in prompts]
        if config.merge_duplicates:
            window = self._merge_duplicates(window)
        self.waiting.extend(order_window(window))

    def _merge_duplicates(self, window: list[QueuedPrompt]) -> list[QueuedPrompt]:
        """The first of each set of equal prompts, with the others attached to it."""
        alike: defaultdict[tuple[object, ...], list[QueuedPrompt]] = defaultdict(list)
        for item in window:
            alike[item.bucket].append(item)
        kept: list[QueuedPrompt] = []
        for items in alike.values():
            first: dict[int, QueuedPrompt] = {}
            for item in items:
                ids = item.prompt.token_ids
                other = first.setdefault(hash(tuple(ids)), item) if len(items) > 1 else item
                if other is item or other.prompt.token_ids != ids:
                    kept.append(item)
                else:
                    other.duplicates.append(item.prompt)
        self.counters.merged_prompts += len(window) - len(kept)
        return kept

    @property
    def num_live(self) -> int:
        return len(self.sequences)

    @property
    def num_swapped(self) -> int:
        return int(np.count_nonzero(self.state_R == State.SWAPPED))

    def key_of(self, row: int) -> RowKey:
        return self.sequences[row].prompt.key

    def finish(self, row: int, num_output_tokens: int) -> QueuedPrompt:
        """The sequence in `row` has ended: its row and its blocks are free for the next step."""
        sequence = self.sequences.pop(row)
        self.kv.release(row)
        self.state_R[row] = State.FREE
        self.sequence_id_R[row] = 0
        self._free_rows.append(row)
        repeated = sequence.num_prompt_tokens * len(sequence.duplicates)
        self.counters.prompt_tokens += repeated
        self.counters.cached_prompt_tokens += repeated
        if not sequence.prompt.ignore_eos:
            is_cut = num_output_tokens >= sequence.max_tokens
            self.output_lengths.add(num_output_tokens, is_cut=is_cut)
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
        admissible = self._num_admissible()
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
            sequence_ids=self.sequence_id_R[rows],
            rows=rows,
            swap_out=self.kv.take_swap_out(),
            swap_in=self.kv.take_swap_in(),
            table=self.kv.take_table_updates(),
            prefill=prefill,
            decode=decode,
        )

    def _live_rows(self, *states: State) -> NDArray[np.intp]:
        """Rows in one of these states, oldest first."""
        rows = np.flatnonzero(np.isin(self.state_R, states))
        return rows[np.argsort(self.sequence_id_R[rows])]

    def _decodable(self) -> NDArray[np.intp]:
        """Rows with decode steps left to plan, oldest first."""
        rows = self._live_rows(State.DECODE)
        return rows[self.kv_len_R[rows] < self.stop_len_R[rows] - 1]

    # -- room ----------------------------------------------------------------------------------

    def _longest_live(self) -> int:
        """Tokens that the longest sequence may come to."""
        return int(self.stop_len_R[self.state_R != State.FREE].max(initial=0))

    def _reserve(self, longest: int) -> int:
        """Blocks that stay free so that the oldest sequence can always end (see the module)."""
        blocks = self.kv.blocks_of(longest)
        return 2 * blocks + 1 if self._can_swap() else blocks

    def _can_swap(self) -> bool:
        return self.kv.cpu.num_blocks >= self.kv.table_RX.shape[1]

    def _free_blocks(self) -> int:
        return self.kv.gpu.num_free + (self.kv.cpu.num_free if self._can_swap() else 0)

    # -- swapping ------------------------------------------------------------------------------

    def _swap_in(self) -> None:
        """Brings sequences back, oldest first, while all that run keep room for two windows."""
        swapped = self._live_rows(State.SWAPPED)
        if len(swapped) == 0:
            return
        window_blocks = self.kv.blocks_of(self.config.decode_window)
        running = len(self._live_rows(State.DECODE))
        for row in swapped.tolist():
            margin = 2 * window_blocks * (running + 1) if running else window_blocks
            if self.kv.swapped_blocks(row) + margin > self.kv.gpu.num_free:
                return
            self._bring_in(row)
            running += 1

    def _bring_in(self, row: int) -> None:
        self.counters.swapped_in_blocks += self.kv.swapped_blocks(row)
        self.kv.swap_in(row, self.sequences[row].hashes)
        self.state_R[row] = State.DECODE
        self._swapped_in_now.add(row)

    def _push_out(self, row: int) -> None:
        self.counters.swapped_out_blocks += int(self.kv.num_blocks_R[row])
        self.kv.swap_out(row)
        self.state_R[row] = State.SWAPPED

    def _force_oldest_in(self) -> None:
        """Nothing can run: makes room for the oldest swapped sequence at the newest's expense."""
        oldest = int(self._live_rows(State.SWAPPED)[0])
        needed = self.kv.swapped_blocks(oldest) + self.kv.blocks_of(self.config.decode_window)
        for row in self._live_rows(State.DECODE)[::-1].tolist():
            if self.kv.gpu.num_free >= needed:
                break
            if self.kv.can_swap_out(row):
                self._push_out(row)
        assert self.kv.gpu.num_free >= self.kv.swapped_blocks(oldest), "the KV is deadlocked"
        self._bring_in(oldest)

    # -- decode --------------------------------------------------------------------------------

    def _plan_decode(self) -> DecodePlan | None:
        rows = self._decodable()
        if len(rows) == 0:
            return None
        left = self.stop_len_R[rows] - 1 - self.kv_len_R[rows]
        num_steps = int(min(self.config.decode_window, left.max()))
        target = self.kv_len_R[rows] + np.minimum(left, num_steps)
        growth = -(-target // self.config.block_size) - self.kv.num_blocks_R[rows]
        runs = self._make_room(rows, growth)
        rows, target, growth = rows[runs], target[runs], growth[runs]
        if len(rows) == 0:
            return None
        shared_blocks = self.kv.common_blocks(rows, int(self.kv_len_R[rows].min()))
        grows = growth > 0
        self.kv.grow(rows[grows].astype(np.int32), growth[grows])
        grown = target - self.kv_len_R[rows]
        self.kv_len_R[rows] = target
        self._sample_waste(float((grown - 1).sum()) / 2)
        return DecodePlan(
            rows=rows.astype(np.int32), num_steps=num_steps, shared_blocks=shared_blocks
        )

    def _make_room(self, rows: NDArray[np.intp], growth: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `rows` (oldest first) may grow now; swaps the newest out where it must."""
        runs = np.ones(len(rows), dtype=np.bool_)
        total = int(growth.sum())
        spare = self._free_blocks() - self._reserve(self._longest_live())
        if total <= self.kv.gpu.num_free and total <= spare:
            return runs
        live = self._live_rows(State.PREFILL, State.DECODE, State.SWAPPED)
        oldest = int(live[0])
        allowed = max(spare, 0) + (int(growth[0]) if rows[0] == oldest else 0)
        runs[:] = (np.cumsum(growth) <= allowed) | (growth == 0)
        newest_first = [*np.flatnonzero(~runs)[::-1].tolist(), *np.flatnonzero(runs)[::-1].tolist()]
        for index in newest_first:
            if int(growth[runs].sum()) <= self.kv.gpu.num_free:
                break
            row = int(rows[index])
            fixed = row == oldest or row in self._swapped_in_now
            if not fixed and self._can_swap() and self.kv.can_swap_out(row):
                self._push_out(row)
                runs[index] = False
        # What the host has no room for waits in place, the newest first.
        for index in np.flatnonzero(runs & (growth > 0))[::-1].tolist():
            if int(growth[runs].sum()) <= self.kv.gpu.num_free:
                break
            runs[index] = False
        self.counters.stalled += int(np.count_nonzero(self.state_R[rows[~runs]] == State.DECODE))
        return runs

    def _sample_waste(self, not_yet_written: float) -> None:
        """KV slots that hold no token, of all that are held: the mean over a window's steps.

        `not_yet_written`: slots of the window that fill up while it runs, on average.
        """
        rows = self._live_rows(State.DECODE)
        slots = self.kv.num_blocks_R[rows].astype(np.int64) * self.config.block_size
        unused = float((slots - self.kv_len_R[rows]).sum()) + not_yet_written
        self.counters.waste_sum += unused / (self.kv.gpu.num_used * self.config.block_size)
        self.counters.waste_samples += 1

    # -- prefill -------------------------------------------------------------------------------

    def _wants_prefill(self, admissible: Admissible) -> bool:
        """Prefill when its step is at least half full, when the decode batch grows by an eighth, or
        when nothing is left to wait for: a prompt held back then would decode late and alone."""
        if self._partial is not None:
            return True
        running = len(self._decodable())
        if running == 0:
            return bool(self.waiting and self._free_rows and not self.num_swapped)
        return admissible.count > 0 and (
            2 * admissible.num_tokens >= self.config.max_num_batched_tokens
            or 8 * admissible.count >= running
            or admissible.count == len(self.waiting)
        )

    def _num_admissible(self) -> Admissible:
        """How many waiting prompts fit under the forecast KV peak, at most a step's worth."""
        if not self.waiting or not self._free_rows or self.num_swapped:
            return Admissible(count=0, num_tokens=0)
        candidates, new_own = self._candidates()
        rows = self._live_rows(State.PREFILL, State.DECODE, State.SWAPPED)
        block = self.config.block_size
        # The prompt of a row that is prefilled in part has all of its blocks.
        kv_len = np.maximum(self.kv_len_R[rows], self.prompt_len_R[rows])
        own = kv_len - self.cached_len_R[rows]
        held = self.kv.num_blocks_R[rows] - self.cached_len_R[rows] // block
        shared = max(self.kv.gpu.num_used - int(held.sum()), 0)
        capacity = float((self.config.gpu_blocks - shared) * block)

        generated = kv_len - self.prompt_len_R[rows]
        max_tokens = np.concatenate(
            [
                self.stop_len_R[rows] - self.prompt_len_R[rows],
                np.array([item.max_tokens for item in candidates]),
            ]
        )
        exact = np.concatenate(
            [
                self.exact_R[rows],
                np.array([item.prompt.ignore_eos for item in candidates], dtype=np.bool_),
            ]
        )
        slack = (block + self.config.decode_window) / 2  # the last, partly filled blocks
        tokens = np.concatenate([own, new_own]) + slack
        gone = np.concatenate([generated, np.zeros(len(candidates), dtype=np.int64)])
        remaining = self.output_lengths.expected_remaining(gone, max_tokens, exact)
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high + 1) // 2
            end = len(rows) + middle
            if forecast_peak(tokens[:end], remaining[:end]) <= capacity:
                low = middle
            else:
                high = middle - 1
        # The last of the queue would decode late and alone: better to swap a few for a while.
        is_rest = low < len(candidates) == len(self.waiting)
        if is_rest and forecast_peak(tokens, remaining) <= capacity + self._overcommitment():
            low = len(candidates)
        return Admissible(count=low, num_tokens=int(new_own[:low].sum()))

    def _overcommitment(self) -> float:
        """Tokens by which the forecast may exceed the device's KV, to be swapped at the peak."""
        if not self._can_swap():
            return 0.0
        return self.config.block_size * min(self.kv.cpu.num_free / 2, self.config.gpu_blocks / 10)

    def _candidates(self) -> tuple[list[QueuedPrompt], NDArray[np.int64]]:
        """The next prompts, at most what a step or the free KV holds, and the tokens of each that
        are not cached."""
        room = min(
            self.config.max_num_batched_tokens, self.kv.gpu.num_free * self.config.block_size
        )
        candidates, own, total = [], [], 0
        for item in islice(self.waiting, len(self._free_rows)):
            item.make_hashes(self._last_hashed)
            self._last_hashed = item
            cached = len(self.kv.cached_blocks(item.hashes)) * self.config.block_size
            candidates.append(item)
            own.append(item.num_prompt_tokens - cached)
            total += own[-1]
            if total >= room:
                break
        return candidates, np.array(own, dtype=np.int64)

    def _plan_prefill(self, admissible: int) -> PrefillPlan | None:
        chunks = Chunks()
        if self._partial is not None:
            self._add_chunk(chunks, self._partial)
        if not self.sequences:
            admissible = max(admissible, 1)
        room = self.config.max_num_batched_tokens
        longest = self._longest_live()
        while admissible > 0 and self.waiting and self._free_rows and chunks.num_tokens < room:
            item = self.waiting[0]
            longest = max(longest, item.num_prompt_tokens + item.max_tokens)
            row = self._admit(item, longest)
            if row is None:
                break
            self.waiting.popleft()
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
        if self.sequences and needed > spare:
            return None
        row = self._free_rows.pop()
        self.kv.admit(row, length, cached)
        item.num_computed = len(cached) * self.config.block_size
        self.counters.prompt_tokens += length
        self.counters.cached_prompt_tokens += item.num_computed
        self.sequences[row] = item
        self.state_R[row] = State.PREFILL
        self.sequence_id_R[row] = self._next_id
        self._next_id += 1
        self.prompt_len_R[row] = length
        self.stop_len_R[row] = length + item.max_tokens
        self.exact_R[row] = item.prompt.ignore_eos
        self.kv_len_R[row] = self.cached_len_R[row] = item.num_computed
        return row

    def _add_chunk(self, chunks: Chunks, row: int) -> None:
        """Plans as many of the row's remaining prompt tokens as the step has room for."""
        item = self.sequences[row]
        start = item.num_computed
        room = self.config.max_num_batched_tokens - chunks.num_tokens
        end = min(item.num_prompt_tokens, start + room)
        item.num_computed = end
        self.kv_len_R[row] = end
        block = self.config.block_size
        self.kv.register(row, item.hashes, start // block, end // block)
        done = end == item.num_prompt_tokens
        self._partial = None if done else row
        if done:
            self.state_R[row] = State.DECODE
        chunks.token_ids.append(item.token_ids[start:end])
        chunks.rows.append(row)
        chunks.seq_lens.append(end)
        chunks.is_last.append(done)
        chunks.num_tokens += end - start

    def _new_sequences(self, rows: list[int]) -> NewSequences:
        items = [self.sequences[row] for row in rows]
        return NewSequences(
            rows=np.array(rows, dtype=np.int32),
            seeds=np.array([item.prompt.seed for item in items], dtype=np.int64),
            prompt_lens=self.prompt_len_R[rows].astype(np.int32),
            stop_lens=self.stop_len_R[rows].astype(np.int32),
            ignore_eos=np.array([item.prompt.ignore_eos for item in items], dtype=np.bool_),
            prompts=tuple(item.token_ids for item in items),
        )

    def check_integrity(self) -> None:
        """Asserts that rows, blocks and states agree. Called after every step in tests."""
        self.kv.check_integrity()
        live = set(np.flatnonzero(self.state_R != State.FREE).tolist())
        assert live == set(self.sequences), "states and sequences differ"
        assert live.isdisjoint(self._free_rows), "a live row is free"
        assert len(live) + len(self._free_rows) == self.config.max_num_seqs, "a row is lost"
        on_device = np.flatnonzero(np.isin(self.state_R, (State.PREFILL, State.DECODE)))
        slots = self.kv.num_blocks_R[on_device].astype(np.int64) * self.config.block_size
        assert np.all(slots >= self.kv_len_R[on_device]), "a sequence outgrew its blocks"
