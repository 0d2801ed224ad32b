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

from batchgen.engine.prefix_groups import MAX_GROUPS
from batchgen.engine.step_plan import (
    BlockTableUpdates,
    ChunkGroups,
    NewSequences,
    PrefillPlan,
    PrefixGroups,
)
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
class GroupedQueries:
    """Neighbouring sequences whose common prefix is read apart: as if a group were one sequence."""

    rows_G: Tensor  # int32, of one member each
    prefix_lens_G: Tensor  # int32, tokens; may be 0
    cu_seqlens_q_G1: Tensor  # int32
    kv_starts_B: Tensor  # int32, where each sequence's own KV begins


@dataclass(frozen=True, slots=True, kw_only=True)
class LastTokens:
    """The last tokens of the prompts that end in a prefill step: the only ones that matter after
    the KV of the last layer is written."""

    tokens_B: Tensor  # int64, places in the step
    rows_B: Tensor  # int64
    seq_lens_B: Tensor  # int32
    cu_seqlens_q_B1: Tensor  # int32, one query a sequence
    groups: GroupedQueries | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBatch:
    """Where the tokens of a prefill step stand. `query_lens` and `seq_lens` are the host's."""

    positions_T: Tensor  # int32
    slot_mapping_T: Tensor  # int64, block * block_size + offset
    rows_B: Tensor  # int32
    cu_seqlens_q_B1: Tensor  # int32
    seq_lens_B: Tensor  # int32
    slot_copies: tuple[Tensor, Tensor] | None  # int64: source and target slots, see SlotCopies
    groups: GroupedQueries | None  # never on a CPU
    last: LastTokens
    query_lens: NDArray[np.int32]
    seq_lens: NDArray[np.int32]


class SharedPrefixes:
    """Groups of a decode batch whose leading blocks are read once a group, on the device.

    As many of the tensors' entries are in use as the captured step has groups and rows: a group
    past the last is empty.
    """

    def __init__(self, max_blocks: int, max_num_seqs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.block_table_GX = zeros(MAX_GROUPS, max_blocks)
        self.lens_G = zeros(MAX_GROUPS)  # tokens
        self.members_B = zeros(max_num_seqs)  # positions in the batch, group by group
        self.cu_members_G1 = zeros(MAX_GROUPS + 1)
        self.lens_B = zeros(max_num_seqs)  # of each row's group, 0 without one

    def set(self, groups: PrefixGroups, batch_size: int, block_size: int) -> None:
        """Queues the groups' copy to the device. `batch_size`: rows of the step, padding too."""
        device = self.lens_G.device
        sizes = np.diff(groups.cu_members)
        num_blocks = [len(blocks) for blocks in groups.blocks]
        table = np.zeros((len(sizes), max(num_blocks)), dtype=np.int32)
        for row, blocks in zip(table, groups.blocks, strict=True):
            row[: len(blocks)] = blocks
        lens = np.zeros(MAX_GROUPS, dtype=np.int32)
        lens[: len(sizes)] = np.array(num_blocks) * block_size
        cu_members = np.full(MAX_GROUPS + 1, groups.cu_members[-1], dtype=np.int32)
        cu_members[: len(groups.cu_members)] = groups.cu_members
        lens_of_rows = np.zeros(batch_size, dtype=np.int32)
        lens_of_rows[groups.members] = np.repeat(lens[: len(sizes)], sizes)
        self.block_table_GX[: len(sizes), : table.shape[1]] = to_device(table, device)
        self.lens_G.copy_(to_device(lens, device))
        self.members_B[: len(groups.members)] = to_device(groups.members, device)
        self.cu_members_G1.copy_(to_device(cu_members, device))
        self.lens_B[:batch_size] = to_device(lens_of_rows, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """One token a sequence, so T is B. An inactive row has seq_len 0 and a negative slot."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int32
    slot_mapping_T: Tensor  # int64
    rows_B: Tensor  # int32
    seq_lens_B: Tensor  # int32, the token of this step counted
    kv_starts_B: Tensor | None  # int32, tokens of a shared prefix that is read apart
    prefixes: SharedPrefixes | None
    max_groups: int  # groups that the prefixes may have


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
    groups = last_groups = None
    if plan.groups is not None:
        every = np.ones_like(ends)
        groups = _grouped(plan.groups, plan.rows, plan.query_lens, every, device)
        last_groups = _grouped(plan.groups, plan.rows, ends.astype(np.int32), ends, device)
    last = LastTokens(
        tokens_B=to_device((cu_seqlens[1:] - 1)[ends].astype(np.int64), device),
        rows_B=to_device(plan.rows[ends].astype(np.int64), device),
        seq_lens_B=to_device(plan.seq_lens[ends], device),
        cu_seqlens_q_B1=torch.arange(int(ends.sum()) + 1, dtype=torch.int32, device=device),
        groups=last_groups,
    )
    copies = plan.slot_copies
    slots = None
    if copies is not None:
        slots = to_device(copies.source, device), to_device(copies.target, device)
    return PrefillBatch(
        positions_T=positions_T,
        slot_mapping_T=_slots(state, rows_T, positions_T, block_size),
        rows_B=to_device(plan.rows, device),
        cu_seqlens_q_B1=to_device(cu_seqlens, device),
        seq_lens_B=to_device(plan.seq_lens, device),
        slot_copies=slots,
        groups=groups,
        last=last,
        query_lens=plan.query_lens,
        seq_lens=plan.seq_lens,
    )


def _grouped(
    groups: ChunkGroups,
    rows: NDArray[np.int32],
    query_lens: NDArray[np.int32],
    is_member: NDArray[np.bool_],
    device: torch.device,
) -> GroupedQueries:
    """`query_lens`: of each chunk, 0 where it is no member: a group may have none."""
    starts = np.repeat(groups.prefix_lens, np.diff(groups.cu_chunks))
    cu_seqlens = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    return GroupedQueries(
        rows_G=to_device(rows[groups.cu_chunks[:-1]], device),
        prefix_lens_G=to_device(groups.prefix_lens, device),
        cu_seqlens_q_G1=to_device(cu_seqlens[groups.cu_chunks], device),
        kv_starts_B=to_device(starts[is_member], device),
    )


def decode_batch(
    read_slots: Callable[..., SlotInputs],
    state: SlotState,
    rows_B: Tensor,
    block_size: int,
    prefixes: SharedPrefixes,
    max_groups: int,
) -> DecodeBatch:
    """Made on the device from the slot table alone: part of the captured step."""
    size = len(rows_B)
    inputs = read_slots(
        rows_B,
        state,
        prefixes.lens_B[:size] if max_groups else None,
        block_size=block_size,
    )
    return DecodeBatch(
        token_ids_T=inputs.token_ids_B,
        positions_T=inputs.positions_B,
        slot_mapping_T=inputs.slot_mapping_B,
        rows_B=inputs.row_ids_B,
        seq_lens_B=inputs.seq_lens_B,
        kv_starts_B=inputs.kv_starts_B,
        prefixes=prefixes if max_groups else None,
        max_groups=max_groups,
    )


def _slots(state: SlotState, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
    blocks = state.block_table_RX[rows, (positions // block_size).long()].long()
    return blocks * block_size + positions % block_size
