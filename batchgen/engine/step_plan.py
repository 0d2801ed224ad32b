"""What the scheduler tells the device to do next: plain frozen records of numpy arrays.

Legend: T tokens of a prefill step, B sequences of the step, R rows of the slot table.
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
    """KV blocks to copy between the device's pool and the host's."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Computes the KV of prompt chunks, packed side by side, and samples where a prompt ends."""

    token_ids: Int32  # [T]
    rows: Int32  # [B]
    query_lens: Int32  # [B] tokens of each chunk, at least one
    seq_lens: Int32  # [B] tokens with KV after the step: earlier chunks, cached prefix, chunk
    is_last: Bool  # [B] the chunk ends its prompt
    new: NewSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Runs `num_steps` decode steps of these rows without the host."""

    rows: Int32  # [B]
    num_steps: int
    shared_blocks: Int32  # the leading blocks that all rows have in common, whole and computed


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One launch. Order on the device: swap out, swap in, table updates, then the work."""

    sequence_ids: Int64  # [B] of the rows that yield tokens: the occupants when planned
    rows: Int32  # [B] those rows
    swap_out: BlockCopies | None
    swap_in: BlockCopies | None
    table: BlockTableUpdates | None
    prefill: PrefillPlan | None
    decode: DecodePlan | None
