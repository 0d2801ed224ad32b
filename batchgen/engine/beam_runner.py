"""Runs the plans of a `BeamScheduler` on the device, as `model_runner` does those of sampled rows.

Legend: M beam groups (of the last one, `padding_group`, all rows are the padding row), W beams of a
group, G groups of a step, B = G * W rows of the slot table, X blocks of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchgen.engine.beam_search import BeamSearch, BeamTables, Hypothesis
from batchgen.engine.cuda_graphs import StepGraphs
from batchgen.engine.inputs import (
    SharedPrefixes,
    SlotState,
    StepBatch,
    decode_batch,
    prefill_batch,
    to_device,
)
from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.model_runner import padding_groups, padding_prefill
from batchgen.engine.ops import EngineOps
from batchgen.engine.prefix_groups import MAX_GROUPS
from batchgen.engine.step_plan import BeamPlan, Int32, Int64, PrefillPlan, StepPlan
from batchgen.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamCounts:
    """Sums over steps and running groups, since the start: see BeamTables."""

    copied_blocks: int
    distinct_blocks: int
    beam_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamWindow:
    """What the host knows of a plan's groups once the device has run it."""

    active_G: NDArray[np.bool_]  # the group goes on
    num_outputs_G: Int64  # tokens of each of its beams
    table_GWX: Int32  # as many columns as the plan's max_blocks
    counts: BeamCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamResult:
    """A BeamWindow on its way to the host."""

    active_G: Tensor
    num_outputs_G: Tensor
    table_GWX: Tensor
    counts_3: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> BeamWindow:
        """The window, once the device has written it."""
        if self.event is not None:
            self.event.synchronize()
        copied, distinct, beams = self.counts_3.tolist()
        return BeamWindow(
            active_G=self.active_G.numpy(),
            num_outputs_G=self.num_outputs_G.numpy(),
            table_GWX=self.table_GWX.numpy(),
            counts=BeamCounts(copied_blocks=copied, distinct_blocks=distinct, beam_blocks=beams),
        )


class BeamRunner:
    """Owns everything on the device: weights, KV, slot table, beams, graphs."""

    def __init__(
        self,
        *,
        decoder: Decoder[StepBatch],
        ops: EngineOps,
        memory: KVMemory,
        state: SlotState,
        search: BeamSearch,
        tables: BeamTables,
        use_graphs: bool,
        has_prefixes: bool,
    ) -> None:
        """`state` has W rows for each of the groups of `search`.

        `has_prefixes`: steps may read shared prefixes apart.
        """
        self.state = state
        self._decoder = decoder
        self._ops = ops
        self._memory = memory
        self._search = search
        self._tables = tables
        self._has_prefixes = has_prefixes
        device, width = state.device, search.options.width
        self._beams_W = torch.arange(width, device=device)
        num_groups = search.padding_group
        self._groups_G = torch.full((num_groups,), search.padding_group, device=device)
        max_blocks = state.block_table_RX.shape[1]
        self._prefixes = SharedPrefixes(max_blocks, num_groups * width, device)
        is_cuda = device.type == "cuda"
        self._read_stream = torch.cuda.Stream() if is_cuda else None  # type: ignore[no-untyped-call]
        self._graphs: StepGraphs | None = None
        if use_graphs:
            self._graphs = StepGraphs(
                lambda size, max_groups: self._decode_step(self._groups_G[:size], max_groups),
                num_groups,
                has_prefixes=has_prefixes,
            )

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int) -> None:
        """Compiles every kernel and captures the graphs: see ModelRunner.warm_up."""
        if self.state.device.type == "cpu":
            return
        plan = padding_prefill(self.state, max_num_batched_tokens, self._memory.block_size)
        groups = np.full(len(plan.rows), self._search.padding_group, dtype=np.int32)
        self._prefill(plan, groups)
        if self._has_prefixes:
            prefixes = padding_groups(len(plan.rows))
            self._prefill(dataclasses.replace(plan, groups=prefixes), groups)
        if self._graphs is not None:
            self._graphs.capture_all()
        torch.cuda.synchronize()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> BeamResult:
        """Queues the step on the device: the table's updates, then the work."""
        if plan.table is not None:
            self.state.update_table(plan.table)
        if plan.prefill is not None:
            self._prefill(plan.prefill, plan.rows)
            return self._result(plan.rows, 0)
        assert plan.beams is not None
        self._decode(plan.beams)
        return self._result(plan.rows, plan.beams.max_blocks)

    @torch.inference_mode()
    def hypotheses(self, groups: Sequence[int]) -> list[list[Hypothesis]]:
        """Of groups that have ended, by a result that was waited for: see BeamSearch.best. Waits
        for no step that is in flight."""
        if self._read_stream is None:
            return self._search.best(groups)
        with torch.cuda.stream(self._read_stream):
            return self._search.best(groups)

    def _prefill(self, plan: PrefillPlan, groups: Int32) -> None:
        """`groups`: those whose prompts end with the step."""
        device = self.state.device
        new = plan.new
        if len(new.rows):
            width = len(self._beams_W)
            self._search.enter(new.rows // width, new.prompt_lens, new.stop_lens)
        batch = prefill_batch(plan, self.state, self._memory.block_size)
        self._ops.begin_step(batch)
        hidden_GD = self._decoder.forward(
            to_device(plan.token_ids, device), batch, batch.last.tokens_B
        )
        if len(hidden_GD):
            groups_G = to_device(groups.astype(np.int64), device)
            self._go_on(groups_G, self._rows(groups_G), self._decoder.logits(hidden_GD))

    def _decode(self, plan: BeamPlan) -> None:
        count, width = len(plan.groups), len(self._beams_W)
        max_groups = 0
        if plan.prefixes is not None:
            max_groups = 1 if len(plan.prefixes.blocks) == 1 else MAX_GROUPS
        size = count if self._graphs is None else self._graphs.size_for(count, max_groups)
        groups = np.full(size, self._search.padding_group, dtype=np.int64)
        groups[:count] = plan.groups
        self._groups_G[:size] = to_device(groups, self.state.device)
        if plan.prefixes is not None:
            self._prefixes.set(plan.prefixes, size * width, self._memory.block_size)
        for _ in range(plan.num_steps):
            if self._graphs is None:
                self._decode_step(self._groups_G[:size], max_groups)
            else:
                self._graphs.replay(size, max_groups)

    def _decode_step(self, groups_G: Tensor, max_groups: int) -> None:
        """One token for each beam of a running group; reads and writes device state only."""
        rows_B = self._rows(groups_G)
        block_size = self._memory.block_size
        batch = decode_batch(
            self._ops.read_slots, self.state, rows_B, block_size, self._prefixes, max_groups
        )
        self._ops.begin_step(batch)
        hidden_BD = self._decoder.forward(batch.token_ids_T, batch)
        self._go_on(groups_G, rows_B, self._decoder.logits(hidden_BD))

    def _rows(self, groups_G: Tensor) -> Tensor:
        rows_GW = groups_G[:, None] * len(self._beams_W) + self._beams_W
        return rows_GW.flatten().clamp_(max=self.state.padding_row)

    def _go_on(self, groups_G: Tensor, rows_B: Tensor, logits_HV: Tensor) -> None:
        """Chooses the next tokens, forks the beams' blocks, and sets the rows for the next step.

        `logits_HV`: of all beams, or of each group's first one (see BeamSearch.step).
        """
        state = self.state
        step = self._search.step(groups_G, logits_HV)
        forks = self._tables.fork(groups_G, rows_B, state.block_table_RX, step)
        self._ops.copy_block_starts(
            self._memory.kv_PL2KSH,
            forks.source_B,
            forks.target_B,
            forks.num_slots_B,
            forks.is_copied_B,
        )
        shape = step.tokens_GW.shape
        state.kv_lens_R[rows_B] = step.kv_lens_G[:, None].expand(shape).flatten()
        state.last_tokens_R[rows_B] = step.tokens_GW.flatten()
        state.active_R[rows_B] = step.is_running_G[:, None].expand(shape).flatten()

    def _result(self, groups: Int32, max_blocks: int) -> BeamResult:
        groups_G = to_device(groups.astype(np.int64), self.state.device)
        table_BX = self.state.block_table_RX[self._rows(groups_G), :max_blocks]
        counts = self._tables.copied_blocks, self._tables.distinct_blocks, self._tables.beam_blocks
        parts = [
            ~self._search.is_done_M[groups_G],
            self._search.num_outputs_M[groups_G],
            table_BX.view(len(groups), len(self._beams_W), max_blocks),
            torch.stack(counts),
        ]
        event = None
        if self.state.device.type == "cuda":
            parts = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in parts
            ]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        active_G, num_outputs_G, table_GWX, counts_3 = parts
        return BeamResult(
            active_G=active_G,
            num_outputs_G=num_outputs_G,
            table_GWX=table_GWX,
            counts_3=counts_3,
            event=event,
        )
