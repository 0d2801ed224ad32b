"""The slot table on the device, and the inputs of a step made from it and from a plan.

Legend: R rows of the slot table (the last one, `padding_row`, belongs to nobody and is never
active), X blocks of a row, T tokens, B sequences of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchgen.engine.step_plan import BlockTableUpdates, Int32, NewSequences, PrefillPlan
from batchgen.kernels.reference import SlotInputs


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies to the device; on CUDA from pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class SlotState:
    """All that the device must know of a sequence to run decode steps without the host."""

    def __init__(self, *, num_rows: int, max_blocks: int, device: torch.device) -> None:
        size = num_rows + 1
        self.device = device
        self.padding_row = num_rows
        self.block_table_RX = torch.zeros(size, max_blocks, dtype=torch.int32, device=device)
        self.kv_lens_R = torch.zeros(size, dtype=torch.int32, device=device)
        self.last_tokens_R = torch.zeros(size, dtype=torch.int64, device=device)
        self.active_R = torch.zeros(size, dtype=torch.bool, device=device)
        self.ignore_eos_R = torch.zeros(size, dtype=torch.bool, device=device)
        self.seeds_R = torch.zeros(size, dtype=torch.int64, device=device)
        self.prompt_lens_R = torch.zeros(size, dtype=torch.int32, device=device)
        self.stop_lens_R = torch.zeros(size, dtype=torch.int32, device=device)

    def update_table(self, updates: BlockTableUpdates) -> None:
        cells = updates.rows.astype(np.int64) * self.block_table_RX.shape[1] + updates.columns
        blocks = to_device(updates.blocks, self.device)
        self.block_table_RX.view(-1)[to_device(cells, self.device)] = blocks

    def enter(self, new: NewSequences) -> None:
        """Sets the rows of sequences that begin; they become active when their prompt is done."""
        if len(new.rows) == 0:
            return
        rows = to_device(new.rows.astype(np.int64), self.device)
        self.seeds_R[rows] = to_device(new.seeds, self.device)
        self.prompt_lens_R[rows] = to_device(new.prompt_lens, self.device)
        self.stop_lens_R[rows] = to_device(new.stop_lens, self.device)
        self.ignore_eos_R[rows] = to_device(new.ignore_eos, self.device)
        # An assigned scalar would be copied from the host, and the copy waited for.
        self.active_R.index_fill_(0, rows, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastTokens:
    """The last tokens of the prompts that end in a prefill step: the only ones that matter after
    the KV of the last layer is written."""

    tokens_B: Tensor  # int64, places in the step
    rows_B: Tensor  # int64
    seq_lens_B: Tensor  # int32
    cu_seqlens_q_B1: Tensor  # int32, one query a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBatch:
    """Where the tokens of a prefill step stand. `query_lens` and `seq_lens` are the host's."""

    positions_T: Tensor  # int32
    slot_mapping_T: Tensor  # int64, block * block_size + offset
    rows_B: Tensor  # int32
    cu_seqlens_q_B1: Tensor  # int32
    seq_lens_B: Tensor  # int32
    last: LastTokens
    query_lens: NDArray[np.int32]
    seq_lens: NDArray[np.int32]


class SharedPrefix:
    """The leading blocks that all sequences of a decode batch have in common, on the device."""

    def __init__(self, max_blocks: int, max_num_seqs: int, device: torch.device) -> None:
        self.block_table_1X = torch.zeros(1, max_blocks, dtype=torch.int32, device=device)
        self.len_1 = torch.zeros(1, dtype=torch.int32, device=device)  # tokens
        self.members_B = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        # Row n is [0, n]: one group of n members.
        self.cu_members = torch.stack([torch.zeros_like(self.members_B), self.members_B], dim=1)

    def set(self, blocks: Int32, block_size: int) -> None:
        device = self.len_1.device
        self.block_table_1X[0, : len(blocks)] = to_device(blocks, device)
        self.len_1.fill_(len(blocks) * block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """One token a sequence, so T is B. An inactive row has seq_len 0 and a negative slot."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int32
    slot_mapping_T: Tensor  # int64
    rows_B: Tensor  # int32
    seq_lens_B: Tensor  # int32, the token of this step counted
    kv_starts_B: Tensor | None  # int32, tokens of the shared prefix, where it is read apart
    prefix: SharedPrefix | None


StepBatch = PrefillBatch | DecodeBatch


def prefill_batch(plan: PrefillPlan, state: SlotState, block_size: int) -> PrefillBatch:
    device = state.device
    cu_seqlens = np.zeros(len(plan.rows) + 1, dtype=np.int32)
    np.cumsum(plan.query_lens, out=cu_seqlens[1:])
    starts = plan.seq_lens - plan.query_lens - cu_seqlens[:-1]
    positions = np.repeat(starts, plan.query_lens) + np.arange(cu_seqlens[-1], dtype=np.int32)
    positions_T = to_device(positions.astype(np.int32), device)
    rows_T = to_device(np.repeat(plan.rows, plan.query_lens).astype(np.int64), device)
    ends = plan.is_last
    last = LastTokens(
        tokens_B=to_device((cu_seqlens[1:] - 1)[ends].astype(np.int64), device),
        rows_B=to_device(plan.rows[ends].astype(np.int64), device),
        seq_lens_B=to_device(plan.seq_lens[ends], device),
        cu_seqlens_q_B1=torch.arange(int(ends.sum()) + 1, dtype=torch.int32, device=device),
    )
    return PrefillBatch(
        positions_T=positions_T,
        slot_mapping_T=_slots(state, rows_T, positions_T, block_size),
        rows_B=to_device(plan.rows, device),
        cu_seqlens_q_B1=to_device(cu_seqlens, device),
        seq_lens_B=to_device(plan.seq_lens, device),
        last=last,
        query_lens=plan.query_lens,
        seq_lens=plan.seq_lens,
    )


def decode_batch(
    read_slots: Callable[..., SlotInputs],
    state: SlotState,
    rows_B: Tensor,
    block_size: int,
    prefix: SharedPrefix | None,
) -> DecodeBatch:
    """Made on the device from the slot table alone: part of the captured step."""
    inputs = read_slots(
        rows_B,
        state.block_table_RX,
        state.kv_lens_R,
        state.active_R,
        state.last_tokens_R,
        None if prefix is None else prefix.len_1,
        block_size=block_size,
    )
    return DecodeBatch(
        token_ids_T=inputs.token_ids_B,
        positions_T=inputs.positions_B,
        slot_mapping_T=inputs.slot_mapping_B,
        rows_B=inputs.row_ids_B,
        seq_lens_B=inputs.seq_lens_B,
        kv_starts_B=inputs.kv_starts_B,
        prefix=prefix,
    )


def _slots(state: SlotState, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
    blocks = state.block_table_RX[rows, (positions // block_size).long()].long()
    return blocks * block_size + positions % block_size
