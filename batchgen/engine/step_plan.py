"""What the scheduler tells the device to do next: plain frozen records of numpy arrays.

Legend: T tokens of a prefill step, B sequences of the step, S rows that a prefill step samples for,
R rows of the slot table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopies:
    """KV blocks to copy between the device's pool and the host's, or within the device's."""

    source: Int32
    target: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTableUpdates:
    """`block_table_RX[rows, columns] = blocks`, before anything else of the step."""

    rows: Int32
    columns: Int32
    blocks: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequences:
    """State of the sequences that enter a slot with this step."""

    rows: Int32
    seeds: Int64
    prompt_lens: Int32
    stop_lens: Int32  # prompt and output together end here at the latest
    ignore_eos: Bool
    prompts: tuple[Int32, ...]
    outputs: tuple[Int32, ...] = ()  # what an earlier run generated, by row; empty: nothing of any


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCopies:
    """Tokens whose KV another prompt has: copied, in each layer once the step's KV is written.

    A slot is block * block_size + offset. Sources are computed by this step or an earlier one.
    """

    source: Int64
    target: Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkGroups:
    """Neighbouring chunks whose common leading blocks, all full, are read once for their tokens
    together. Each chunk is in one group; chunks that share nothing are in one of length 0."""

    cu_chunks: Int32  # [G + 1] where each group begins
    prefix_lens: Int32  # [G] tokens
    num_blocks_saved: int  # blocks that are not read, one for each tile of queries that did


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Computes the KV of prompt chunks, packed side by side, and samples where a prompt ends."""

    token_ids: Int32  # [T]
    rows: Int32  # [B]
    query_lens: Int32  # [B] tokens of each chunk, at least one
    seq_lens: Int32  # [B] tokens with KV after the step: earlier chunks, cached prefix, chunk
    is_last: Bool  # [B] the chunk ends its prompt
    sample_rows: Int32  # [S] the rows of all samples of the prompts that end
    sample_of: Int32  # [S] which of these prompts each belongs to: 0 is the first that ends
    new: NewSequences
    slot_copies: SlotCopies | None
    groups: ChunkGroups | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixGroups:
    """Groups of rows whose common leading blocks, all full, are read once for the whole group."""

    members: Int32  # [U] positions in DecodePlan.rows, group by group
    cu_members: Int32  # [G + 1] where each group begins
    blocks: tuple[Int32, ...]  # of each group


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Runs `num_steps` decode steps of these rows without the host."""

    rows: Int32  # [B]
    num_steps: int
    groups: PrefixGroups | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamPlan:
    """Runs `num_steps` decode steps of all beams of these groups without the host."""

    groups: Int32  # [G]
    num_steps: int
    max_blocks: int  # of a beam, after the steps
    prefixes: PrefixGroups | None  # members are beams: `width` positions for each of `groups`


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One launch. Order on the device: copies, table updates, then the work.

    What is swapped out was last written by the step before. Swaps run beside the work, out before
    in: it touches none of their blocks, but that of the next plan may. With `waits_for_swaps` they
    run before the copies.
    """

    sequence_ids: Int64  # [B] of the rows that yield tokens: the occupants when planned
    rows: Int32  # [B] those rows; where rows are beams, their groups
    swap_out: BlockCopies | None
    swap_in: BlockCopies | None
    waits_for_swaps: bool
    copies: BlockCopies | None  # within the device: blocks that a row is about to write alone
    table: BlockTableUpdates | None
    prefill: PrefillPlan | None
    decode: DecodePlan | None
    beams: BeamPlan | None
