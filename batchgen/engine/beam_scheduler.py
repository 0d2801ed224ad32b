"""Decides what the device does next in a job of beam search. No torch.

The rows of the slot table, of the cache and of the queue's forecast are beam groups here: all of a
group's beams have one length, and are one thing to admit, to prefill and to end. Their blocks are
in `beam_blocks`. As in `scheduler`, nothing depends on the tokens that the device chooses; which
blocks the beams have lost is read with each window's result.

Groups are not swapped. One that has no room waits in place, and the oldest can always end: others
grow, and new ones enter, only while the free blocks cover what the most demanding group may hold.
What the oldest has taken beyond that is its own, and comes back when it ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.admission import Admission
from batchgen.engine.beam_blocks import BeamBlocks, most_blocks
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.prefill import Prefill
from batchgen.engine.prefix_groups import find_groups
from batchgen.engine.sequence_table import SequenceTable
from batchgen.engine.sequences import (
    Admissible,
    QueuedPrompt,
    SchedulerConfig,
    SchedulerCounters,
    State,
)
from batchgen.engine.shared_tail import SharedTail
from batchgen.engine.step_plan import BeamPlan, Int32, PrefillPlan, PrefixGroups, StepPlan
from batchgen.records import Prompt


class BeamScheduler:
    """Plans steps over beam groups, their KV and the queue of waiting prompts."""

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.beam_width is not None
        self.config = config
        self.width = config.beam_width
        self.num_groups = config.max_num_seqs // self.width
        self.kv = KVCache(
            num_rows=self.num_groups,
            max_blocks=-(-config.max_model_len // config.block_size),
            block_size=config.block_size,
            gpu_blocks=config.gpu_blocks,
            cpu_blocks=0,
        )
        self.counters = SchedulerCounters()
        self.table = SequenceTable(self.num_groups)
        self.admission = Admission(config, self.table, self.kv, self.counters)
        self.blocks = BeamBlocks(self.kv, self.width)
        self._tail = SharedTail(self.kv)
        self._prefill = Prefill(
            config, self.table, self.kv, self._tail, self.admission, self.counters, self.blocks
        )
        self._last_share = 1.0  # see _distinct_share; before anything is known, all are distinct
        self._ending: list[int] = []  # groups of the last plan that need no KV after it

    # -- what comes in and what is known -------------------------------------------------------

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Queues one window of prompts, in the order of the prefix plan."""
        self.admission.add(prompts)

    @property
    def num_live(self) -> int:
        return len(self.table.occupants)

    @property
    def num_swapped(self) -> int:
        return 0

    def read_window(
        self, groups: NDArray[np.intp], kv_lens: NDArray[np.int64], table_GWX: Int32, saved: float
    ) -> None:
        """A window's result is read: these groups go on, with this table at these lengths. `saved`:
        the share of blocks that beams saved by sharing."""
        decodes = self.table.state_R[groups] == State.DECODE  # others have given all back
        groups, kv_lens, table_GWX = groups[decodes], kv_lens[decodes], table_GWX[decodes]
        if len(groups) == 0:
            return
        for group in self.blocks.reclaim(groups, kv_lens, table_GWX).tolist():
            self._leave_tail(group)
            self.kv.release_last(group)
        slots = self.blocks.num_columns_M[groups] * self.config.block_size
        unused = self.width * int((slots - kv_lens).sum())
        self.counters.waste_sum += unused / (self.kv.gpu.num_used * self.config.block_size)
        self.counters.saved_sum += saved
        self.counters.waste_samples += 1

    def finish(self, group: int, num_steps: int) -> QueuedPrompt:
        """The group has ended after so many tokens: its blocks are free for the next step."""
        item = self.table.leave(group)
        self._release(group)
        self.admission.learn(item, num_steps)
        return item

    def _release(self, group: int) -> None:
        self._leave_tail(group)
        self.kv.release(group)
        self.blocks.release(group)

    def _leave_tail(self, group: int) -> None:
        waiting = self.admission.waiting
        self._tail.leave(group, waiting[0] if waiting else None)

    # -- planning ------------------------------------------------------------------------------

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        """The next step, or None when there is nothing to do (or all waits for `in_flight`)."""
        self._tail.begin_step()
        for group in self._ending:
            self._release(group)
        self._ending = []
        admissible = self._admissible()
        prefill = self._plan_prefill(admissible) if self._prefill.is_due(admissible) else None
        decode = self._plan_decode() if prefill is None else None
        if prefill is not None:
            self.counters.prefill_steps += 1
            groups = prefill.sample_rows
            prefill = self._with_first_rows(prefill)
        elif decode is not None:
            self.counters.decode_steps += decode.num_steps
            groups = decode.groups
        else:
            return None
        self._note_ending(groups)
        return StepPlan(
            sequence_ids=self.table.sequence_id_R[groups],
            rows=groups,
            swap_out=None,
            swap_in=None,
            waits_for_swaps=False,
            copies=None,
            table=self.blocks.take_table_updates(),
            prefill=prefill,
            decode=None,
            beams=decode,
        )

    def _with_first_rows(self, plan: PrefillPlan) -> PrefillPlan:
        """With rows of the device's slot table in the place of groups: of each its first."""
        return dataclasses.replace(
            plan,
            rows=plan.rows * self.width,
            sample_rows=plan.sample_rows * self.width,
            new=dataclasses.replace(plan.new, rows=plan.new.rows * self.width),
        )

    def _note_ending(self, groups: Int32) -> None:
        table = self.table
        ends = table.kv_len_R[groups] >= table.stop_len_R[groups] - 1
        table.state_R[groups[ends]] = State.ENDING
        self._ending = groups[ends].tolist()

    # -- decode --------------------------------------------------------------------------------

    def _plan_decode(self) -> BeamPlan | None:
        groups = self.table.decodable()
        if len(groups) == 0:
            return None
        size, lengths = self.config.block_size, self.table.kv_len_R
        left = self.table.stop_len_R[groups] - 1 - lengths[groups]
        num_steps = int(min(self.config.decode_window, left.max()))
        target = lengths[groups] + np.minimum(left, num_steps)
        growth = -(-target // size) - self.blocks.num_columns_M[groups]
        runs = self._have_room(groups, self.width * growth)
        groups, target, growth = groups[runs], target[runs], growth[runs]
        if len(groups) == 0:
            return None
        self.blocks.grow(groups, growth)
        lengths[groups] = target
        return BeamPlan(
            groups=groups.astype(np.int32),
            num_steps=num_steps,
            max_blocks=int(self.blocks.num_columns_M[groups].max()),
            prefixes=self._prefixes(groups, num_steps),
        )

    def _have_room(self, groups: NDArray[np.intp], growth: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the groups (oldest first) may take so many blocks; the others wait in place."""
        free = self.kv.gpu.num_free
        if int(growth.sum()) > free:
            self._tail.forget()
            free = self.kv.gpu.num_free
        oldest = int(self.table.live_rows(State.PREFILL, State.DECODE)[0])
        allowed = max(free - self._most_blocks(), 0) + int(growth[0]) * (groups[0] == oldest)
        runs: NDArray[np.bool_] = (np.cumsum(growth) <= allowed) | (growth == 0)
        assert int(growth[runs].sum()) <= free, "the oldest group has no room to end"
        self.counters.stalled += int(np.count_nonzero(~runs))
        return runs

    def _most_blocks(self) -> int:
        """What the most demanding live group may come to hold."""
        live = self.table.live_rows(State.PREFILL, State.DECODE)
        prompts, stops = self.table.prompt_len_R[live], self.table.stop_len_R[live]
        return int(self._most(prompts, stops).max(initial=0))

    def _most(self, prompts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
        return most_blocks(prompts, stops, width=self.width, block_size=self.config.block_size)

    def _prefixes(self, groups: NDArray[np.intp], num_steps: int) -> PrefixGroups | None:
        """Full blocks of prompts, which all beams of a group share, and maybe other groups: read
        once in each step, where that pays."""
        if self.config.min_prefix_saving is None:
            return None
        rows = np.repeat(groups, self.width)
        num_full = self.table.prompt_len_R[rows] // self.config.block_size
        prefixes = find_groups(self.kv.table_RX[rows], num_full, self.config.min_prefix_saving)
        if prefixes is not None:
            sizes = np.diff(prefixes.cu_members)
            saved = sum((n - 1) * len(b) for n, b in zip(sizes, prefixes.blocks, strict=True))
            self.counters.prefix_blocks_saved += num_steps * int(saved)
        return prefixes

    # -- prefill -------------------------------------------------------------------------------

    def _plan_prefill(self, admissible: Admissible) -> PrefillPlan | None:
        most = self._most_blocks()

        def spare_with(item: QueuedPrompt) -> int:
            nonlocal most
            prompt = np.array([item.num_prompt_tokens])
            most = max(most, int(self._most(prompt, prompt + item.max_tokens)[0]))
            return self.kv.gpu.num_free - most

        return self._prefill.plan(admissible, spare_with)

    def _admissible(self) -> Admissible:
        """How many waiting prompts fit under the forecast KV peak, at most a step's worth.

        A group's KV grows by `rate` tokens a step: by its width, less what beams share as those
        that run now do. So in units of `rate` tokens a group is a row to the forecast.
        """
        table, size = self.table, self.config.block_size
        nothing = Admissible(count=0, num_rows=0, num_tokens=0)
        if not self.admission.waiting or not table.num_free:
            return nothing
        candidates, new_own = self.admission.candidates()
        if not candidates:
            return nothing
        groups = table.live_rows(State.PREFILL, State.DECODE)
        held = self.kv.num_blocks_R[groups] - table.cached_len_R[groups] // size
        held = np.maximum(held, 0) + self.blocks.num_held_M[groups]
        # Others than the oldest group do not touch what it may need.
        usable = self.kv.gpu.num_free - self._most_blocks() + int(held.sum())
        capacity = usable * size
        rate = self.width * self._distinct_share(groups)
        entering = new_own + self.width * size  # each beam soon has a block of its own to fill
        peaks = self.admission.forecast_peaks(
            groups,
            np.maximum(table.kv_len_R[groups] - table.prompt_len_R[groups], 0),
            candidates,
            (np.concatenate([held * size, entering]) / rate).astype(np.int64),
        )
        count = int(np.searchsorted(peaks, capacity / rate, side="right"))
        return Admissible(count=count, num_rows=count, num_tokens=int(new_own[:count].sum()))

    def _distinct_share(self, groups: NDArray[np.intp]) -> float:
        """In the full columns of outputs: blocks that groups hold, of what unshared ones would be;
        as last seen where there are no such columns."""
        num_full = self.table.kv_len_R[groups] // self.config.block_size
        num_open = self.blocks.num_columns_M[groups] - num_full
        num_outputs = num_full - self.table.prompt_len_R[groups] // self.config.block_size
        has_full = num_outputs > 0
        if has_full.any():
            held = (self.blocks.num_held_M[groups] - self.width * num_open)[has_full].sum()
            share = float(held / (self.width * num_outputs[has_full].sum()))
            self._last_share = min(1.0, max(share, 1 / self.width))
        return self._last_share

    def check_integrity(self) -> None:
        """Asserts that groups, blocks and states agree. Called after every step in tests."""
        self.blocks.check_integrity()
        self.table.check_integrity()
        live = self.table.live_rows(State.PREFILL, State.DECODE)
        slots = self.blocks.num_columns_M[live] * self.config.block_size
        assert np.all(slots >= self.table.kv_len_R[live]), "a group outgrew its blocks"
        holders = set(np.flatnonzero(self.kv.num_blocks_R + self.blocks.num_held_M).tolist())
        assert holders <= set(self.table.occupants), "a group that is gone holds blocks"
