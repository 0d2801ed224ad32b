"""Runs plans on the device. Nothing here waits for the device; `StepResult.wait` does.

Legend: R rows of the slot table, T tokens, B sequences of a step, S samples of the prompts that
end in a step, k steps of a window, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from batchgen.engine.ops import EngineOps
from batchgen.engine.prefix_groups import MAX_GROUPS
from batchgen.engine.sampler import Sampler
from batchgen.engine.step_plan import (
    ChunkGroups,
    DecodePlan,
    NewSequences,
    PrefillPlan,
    SlotCopies,
    StepPlan,
)
from batchgen.engine.swap import SwapSpace
from batchgen.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step yields, on its way to the host."""

    tokens_kB: Tensor  # int32, -1 where a row made none
    active_B: Tensor  # bool, the row goes on
    event: torch.cuda.Event | None

    def wait(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """tokens_Bk and active_B, once the device has written them."""
        if self.event is not None:
            self.event.synchronize()
        return np.ascontiguousarray(self.tokens_kB.numpy().T), self.active_B.numpy()


class ModelRunner:
    """Owns everything on the device: weights, KV, slot table, graphs."""

    def __init__(
        self,
        *,
        decoder: Decoder[StepBatch],
        ops: EngineOps,
        memory: KVMemory,
        state: SlotState,
        sampler: Sampler,
        swap: SwapSpace,
        max_num_seqs: int,
        decode_window: int,
        use_graphs: bool,
        has_prefixes: bool,
    ) -> None:
        """`has_prefixes`: steps may read shared prefixes apart."""
        self.state = state
        self._decoder = decoder
        self._ops = ops
        self._memory = memory
        self._sampler = sampler
        self._swap = swap
        self._has_prefixes = has_prefixes
        device = state.device
        self._rows_B = torch.full((max_num_seqs,), state.padding_row, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        shape = (decode_window, max_num_seqs)
        self._tokens_kB = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._prefixes = SharedPrefixes(state.block_table_RX.shape[1], max_num_seqs, device)
        self._graphs: StepGraphs | None = None
        if use_graphs:
            self._graphs = StepGraphs(
                lambda size, max_groups: self._decode_step(self._rows_B[:size], max_groups),
                max_num_seqs,
                has_prefixes=has_prefixes,
            )

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int) -> None:
        """Compiles every kernel and captures the graphs, so that the first steps are as fast as the
        others. All rows are the padding row: nothing is kept, and block 0, not owned yet, is
        written."""
        if self.state.device.type == "cpu":
            return
        plan = padding_prefill(self.state, max_num_batched_tokens, self._memory.block_size)
        self._prefill(plan)
        if self._has_prefixes:
            self._prefill(dataclasses.replace(plan, groups=padding_groups(len(plan.rows))))
        self.state.kv_lens_R.zero_()
        if self._graphs is not None:
            self._graphs.capture_all()
        torch.cuda.synchronize()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepResult:
        """Queues the step's copies and work on the device, in the order that StepPlan says."""
        self._swap.run(plan.swap_out, plan.swap_in, is_awaited=plan.waits_for_swaps)
        if plan.copies is not None:
            self._memory.copy(plan.copies)
        if plan.table is not None:
            self.state.update_table(plan.table)
        if plan.prefill is not None:
            return self._prefill(plan.prefill)
        assert plan.decode is not None
        return self._decode(plan.decode)

    def _prefill(self, plan: PrefillPlan) -> StepResult:
        device = self.state.device
        self.state.enter(plan.new)
        self._sampler.enter(plan.new)
        batch = prefill_batch(plan, self.state, self._memory.block_size)
        self._ops.begin_step(batch)
        last = batch.last
        hidden_BD = self._decoder.forward(to_device(plan.token_ids, device), batch, last.tokens_B)
        if len(hidden_BD) == 0:
            return StepResult(
                tokens_kB=torch.empty(1, 0, dtype=torch.int32),
                active_B=torch.empty(0, dtype=torch.bool),
                event=None,
            )
        logits_SV = self._decoder.logits(hidden_BD)
        rows_S, kv_lens_S = last.rows_B, last.seq_lens_B
        if len(plan.sample_rows) > len(hidden_BD):
            sample_of_S = to_device(plan.sample_of.astype(np.int64), device)
            rows_S = to_device(plan.sample_rows.astype(np.int64), device)
            kv_lens_S, logits_SV = kv_lens_S[sample_of_S], logits_SV[sample_of_S]
        tokens_S = self._sampler.sample_and_advance(self.state, rows_S, kv_lens_S, logits_SV)
        return self._result(tokens_S[None], rows_S)

    def _decode(self, plan: DecodePlan) -> StepResult:
        count = len(plan.rows)
        max_groups = 0
        if plan.groups is not None:
            max_groups = 1 if len(plan.groups.blocks) == 1 else MAX_GROUPS
        size = count if self._graphs is None else self._graphs.size_for(count, max_groups)
        rows = np.full(size, self.state.padding_row, dtype=np.int64)
        rows[:count] = plan.rows
        self._rows_B[:size] = to_device(rows, self.state.device)
        self._step.zero_()
        if plan.groups is not None:
            self._prefixes.set(plan.groups, size, self._memory.block_size)
        for _ in range(plan.num_steps):
            if self._graphs is None:
                self._decode_step(self._rows_B[:size], max_groups)
            else:
                self._graphs.replay(size, max_groups)
        return self._result(self._tokens_kB[: plan.num_steps, :count], self._rows_B[:count])

    def _decode_step(self, rows_B: Tensor, max_groups: int) -> None:
        """One token for each active row; reads and writes device state only."""
        state = self.state
        block_size = self._memory.block_size
        batch = decode_batch(
            self._ops.read_slots, state, rows_B, block_size, self._prefixes, max_groups
        )
        self._ops.begin_step(batch)
        hidden_BD = self._decoder.forward(batch.token_ids_T, batch)
        logits_BV = self._decoder.logits(hidden_BD)
        tokens_B = self._sampler.sample_and_advance(state, rows_B, batch.seq_lens_B, logits_BV)
        self._tokens_kB[:, : len(rows_B)].index_copy_(0, self._step, tokens_B[None])
        self._step.add_(1).remainder_(len(self._tokens_kB))  # stays valid while graphs warm up

    def _result(self, tokens_kB: Tensor, rows_B: Tensor) -> StepResult:
        active_B = self.state.active_R[rows_B]
        if self.state.device.type == "cpu":
            return StepResult(tokens_kB=tokens_kB.clone(), active_B=active_B, event=None)
        tokens, active = (
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in (tokens_kB.contiguous(), active_B)
        )
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return StepResult(tokens_kB=tokens, active_B=active, event=event)


def padding_prefill(state: SlotState, num_tokens: int, block_size: int) -> PrefillPlan:
    """A step of `num_tokens` that belong to nobody, for warming up."""
    length = min(num_tokens, state.block_table_RX.shape[1] * block_size)
    count = num_tokens // length
    empty = np.zeros(0, dtype=np.int32)
    return PrefillPlan(
        token_ids=np.zeros(count * length, dtype=np.int32),
        rows=np.full(count, state.padding_row, dtype=np.int32),
        query_lens=np.full(count, length, dtype=np.int32),
        seq_lens=np.full(count, length, dtype=np.int32),
        is_last=np.ones(count, dtype=np.bool_),
        sample_rows=np.full(count, state.padding_row, dtype=np.int32),
        sample_of=np.arange(count, dtype=np.int32),
        new=NewSequences(
            rows=empty,
            seeds=empty.astype(np.int64),
            prompt_lens=empty,
            stop_lens=empty,
            ignore_eos=empty.astype(np.bool_),
            prompts=(),
        ),
        slot_copies=SlotCopies(
            source=np.zeros(1, dtype=np.int64), target=np.ones(1, dtype=np.int64)
        ),
        groups=None,
    )


def padding_groups(num_chunks: int) -> ChunkGroups:
    """One group, of all chunks, that has nothing in common."""
    return ChunkGroups(
        cu_chunks=np.array([0, num_chunks], dtype=np.int32),
        prefix_lens=np.zeros(1, dtype=np.int32),
        num_blocks_saved=0,
    )
