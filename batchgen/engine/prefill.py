"""Prefill steps: when the next one is due, which prompts enter with it, and its chunks. No torch.

The rows of a step are those of the slot table, or the beam groups of a job with beams: a group
prefills its prompt once, as the first of a prompt's samples does for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batchgen.engine.admission import Admission
from batchgen.engine.beam_blocks import BeamBlocks
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.prefill_groups import find_chunk_groups
from batchgen.engine.sequence_table import SequenceTable
from batchgen.engine.sequences import (
    Admissible,
    Chunks,
    QueuedPrompt,
    SchedulerConfig,
    SchedulerCounters,
    State,
)
from batchgen.engine.shared_tail import SharedTail
from batchgen.engine.step_plan import ChunkGroups, Int32, NewSequences, PrefillPlan


class Prefill:
    """Owns the prompt that is prefilled in part."""

    def __init__(
        self,
        config: SchedulerConfig,
        table: SequenceTable,
        kv: KVCache,
        tail: SharedTail,
        admission: Admission,
        counters: SchedulerCounters,
        beams: BeamBlocks | None = None,
    ) -> None:
        """`beams`: what a group takes beside its prompt's blocks, where rows are beam groups."""
        self._config = config
        self._table = table
        self._kv = kv
        self._tail = tail
        self._admission = admission
        self._counters = counters
        self._beams = beams
        self._partial: int | None = None  # the row whose prompt is prefilled in part

    def is_due(self, admissible: Admissible) -> bool:
        """Prefill when its step is at least half full, when the decode batch grows by an eighth, or
        when nothing is left to wait for: a prompt held back then would decode late and alone."""
        if self._partial is not None:
            return True
        running, waiting = len(self._table.decodable()), self._admission.waiting
        if running == 0:
            is_swapped = bool((self._table.state_R == State.SWAPPED).any())
            return bool(waiting and self._table.num_free and not is_swapped)
        return admissible.count > 0 and (
            2 * admissible.num_tokens >= self._config.max_num_batched_tokens
            or 8 * admissible.num_rows >= running
            or admissible.count == len(waiting)
        )

    def plan(
        self, admissible: Admissible, spare_with: Callable[[QueuedPrompt], int]
    ) -> PrefillPlan | None:
        """The next step, or None where no prompt can enter.

        `spare_with`: free blocks beyond those that keep the scheduler from a deadlock, with this
        prompt and those asked about before it among what is live.
        """
        chunks = Chunks()
        if self._partial is not None:
            self._add_chunk(chunks, self._partial)
        count = admissible.count
        if not self._table.occupants:
            count = max(count, 1)
        waiting = self._admission.waiting
        while count > 0 and waiting and chunks.num_tokens < self._config.max_num_batched_tokens:
            item = waiting[0]
            if item.num_rows > self._table.num_free:
                break
            rows = self._admit(item, spare_with)
            if not rows:
                break
            waiting.popleft()
            chunks.new.extend(rows)
            self._add_chunk(chunks, rows[0])
            count -= 1
        if not chunks.rows:
            return None
        query_lens = np.array([len(ids) for ids in chunks.token_ids], dtype=np.int32)
        seq_lens = np.array(chunks.seq_lens, dtype=np.int32)
        return PrefillPlan(
            token_ids=np.concatenate(chunks.token_ids),
            rows=np.array(chunks.rows, dtype=np.int32),
            query_lens=query_lens,
            seq_lens=seq_lens,
            is_last=np.array(chunks.is_last, dtype=np.bool_),
            sample_rows=np.array([r for rows in chunks.samples for r in rows], dtype=np.int32),
            sample_of=np.array(
                [i for i, rows in enumerate(chunks.samples) for _ in rows], dtype=np.int32
            ),
            new=self._new_sequences(chunks.new),
            slot_copies=self._tail.take_copies(),
            groups=self._chunk_groups(chunks.rows, query_lens, seq_lens - query_lens),
        )

    def _chunk_groups(
        self, rows: list[int], query_lens: Int32, context_lens: Int32
    ) -> ChunkGroups | None:
        """Chunks whose shared prefix is read once for all their tokens, where that pays."""
        config = self._config
        if config.min_prefix_saving is None or not context_lens.any():
            return None
        groups = find_chunk_groups(
            self._kv.table_RX[rows],
            context_lens.astype(np.int64) // config.block_size,
            query_lens,
            block_size=config.block_size,
            tile_tokens=config.prefill_tile_tokens,
            min_saving=config.min_prefix_saving,
        )
        if groups is not None:
            self._counters.prefill_blocks_saved += groups.num_blocks_saved
        return groups

    def _admit(self, item: QueuedPrompt, spare_with: Callable[[QueuedPrompt], int]) -> list[int]:
        """Gives the prompt its rows and the first one its blocks, if they are there."""
        length = item.num_prompt_tokens
        usable = item.hashes[: (length - 1) // self._config.block_size]  # one token is computed
        cached = self._kv.cached_blocks(usable)
        num_cached = len(cached) * self._config.block_size
        num_copied = self._tail.num_tokens(item, num_cached)
        needed = self._kv.blocks_needed(length, cached)
        if self._beams is not None:
            needed += self._beams.blocks_beside(length)
        if needed > self._kv.gpu.num_free:
            self._tail.forget()
            num_copied = 0
        if needed > self._kv.gpu.num_free:
            return []
        spare = spare_with(item)
        if self._table.occupants and needed > spare:
            return []
        item.num_computed = num_cached + num_copied
        rows = self._table.enter(item, length // self._config.block_size * self._config.block_size)
        self._kv.admit(rows[0], length, cached)
        self._tail.follow(rows[0], num_cached, num_copied)
        if self._beams is not None:
            self._beams.enter(rows[0], length)
        repeated = length * len(item.duplicates)
        self._counters.prompt_tokens += length + repeated
        self._counters.cached_prompt_tokens += item.num_computed + repeated
        return rows

    def _add_chunk(self, chunks: Chunks, row: int) -> None:
        """Plans as many of the row's remaining prompt tokens as the step has room for."""
        item = self._table.occupants[row]
        start = item.num_computed
        room = self._config.max_num_batched_tokens - chunks.num_tokens
        end = min(item.num_prompt_tokens, start + room)
        item.num_computed = end
        self._table.kv_len_R[row] = end
        block = self._config.block_size
        self._kv.register(row, item.hashes, start // block, end // block)
        done = end == item.num_prompt_tokens
        self._partial = None if done else row
        if done:
            rows = self._table.begin_decode(row)
            self._kv.fork(row, rows[1:])
            chunks.samples.append(rows)
        chunks.token_ids.append(item.token_ids[start:end])
        chunks.rows.append(row)
        chunks.seq_lens.append(end)
        chunks.is_last.append(done)
        chunks.num_tokens += end - start

    def _new_sequences(self, rows: list[int]) -> NewSequences:
        items = [self._table.occupants[row] for row in rows]
        samples = self._table.sample_R[rows].tolist()
        seeds = [item.prompt.seeds[i] for item, i in zip(items, samples, strict=True)]
        return NewSequences(
            rows=np.array(rows, dtype=np.int32),
            seeds=np.array(seeds, dtype=np.int64),
            prompt_lens=self._table.prompt_len_R[rows].astype(np.int32),
            stop_lens=self._table.stop_len_R[rows].astype(np.int32),
            ignore_eos=np.array([item.prompt.ignore_eos for item in items], dtype=np.bool_),
            prompts=tuple(item.token_ids[: len(item.prompt.token_ids)] for item in items),
            outputs=tuple(item.token_ids[len(item.prompt.token_ids) :] for item in items),
        )
