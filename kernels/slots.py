"""The slot table at both ends of a decode step: what the step reads of it, and its move by a token.

Each is one kernel in the place of some twenty: a step of a small model takes a millisecond, and
every kernel of it costs two or three microseconds however little it does.

B batch rows, R rows of the slot table, X blocks of a row, E token ids, k steps of a window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.reference import NAN_TOKEN, SlotInputs, SlotTable

_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def _read_slots_kernel(
    rows_ptr,
    table_ptr,
    kv_lens_ptr,
    active_ptr,
    last_tokens_ptr,
    prefix_lens_ptr,
    token_ids_ptr,
    row_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    kv_starts_ptr,
    num_rows,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = batch < num_rows
    rows = tl.load(rows_ptr + batch, mask=mask, other=0)
    is_active = tl.load(active_ptr + rows, mask=mask, other=0) != 0
    positions = tl.load(kv_lens_ptr + rows, mask=mask, other=0)
    # A finished row may stand one past its last block: only active ones are looked up.
    block_ptrs = table_ptr + rows * table_stride + positions // BLOCK_SIZE
    blocks = tl.load(block_ptrs, mask=mask & is_active, other=0).to(tl.int64)
    slots = tl.where(is_active, blocks * BLOCK_SIZE + positions % BLOCK_SIZE, -1)
    tl.store(token_ids_ptr + batch, tl.load(last_tokens_ptr + rows, mask=mask, other=0), mask=mask)
    tl.store(row_ids_ptr + batch, rows.to(tl.int32), mask=mask)
    tl.store(positions_ptr + batch, positions, mask=mask)
    tl.store(slots_ptr + batch, slots, mask=mask)
    tl.store(seq_lens_ptr + batch, tl.where(is_active, positions + 1, 0), mask=mask)
    if prefix_lens_ptr is not None:
        prefix_lens = tl.load(prefix_lens_ptr + batch, mask=mask & is_active, other=0)
        tl.store(kv_starts_ptr + batch, prefix_lens, mask=mask)


def _check_table(table: SlotTable) -> None:
    lengths = table.kv_lens_R, table.stop_lens_R
    assert all(t.dtype == torch.int32 for t in (table.block_table_RX, *lengths)), "not int32"
    assert table.last_tokens_R.dtype == torch.int64, "tokens must be int64"
    assert table.active_R.dtype == table.ignore_eos_R.dtype == torch.bool, "flags must be bool"
    assert table.block_table_RX.stride(1) == 1, "rows of the block table must be contiguous"


def read_slots(
    rows_B: Tensor,
    table: SlotTable,
    prefix_lens_B: Tensor | None,
    *,
    block_size: int,
) -> SlotInputs:
    """What a decode step needs to know of the slots rows_B (int64): see SlotInputs.

    prefix_lens_B: leading tokens (int32) of each row that are read apart, with others' the same.
    """
    size = len(rows_B)
    device = rows_B.device
    assert rows_B.dtype == torch.int64, "rows must be int64"
    _check_table(table)
    assert prefix_lens_B is None or prefix_lens_B.shape == rows_B.shape, "one prefix length a row"
    inputs = SlotInputs(
        token_ids_B=torch.empty(size, dtype=torch.int64, device=device),
        row_ids_B=torch.empty(size, dtype=torch.int32, device=device),
        positions_B=torch.empty(size, dtype=torch.int32, device=device),
        slot_mapping_B=torch.empty(size, dtype=torch.int64, device=device),
        seq_lens_B=torch.empty(size, dtype=torch.int32, device=device),
        kv_starts_B=None
        if prefix_lens_B is None
        else torch.empty(size, dtype=torch.int32, device=device),
    )
    _read_slots_kernel[(triton.cdiv(size, _BLOCK),)](
        rows_B,
        table.block_table_RX,
        table.kv_lens_R,
        table.active_R,
        table.last_tokens_R,
        prefix_lens_B,
        inputs.token_ids_B,
        inputs.row_ids_B,
        inputs.positions_B,
        inputs.slot_mapping_B,
        inputs.seq_lens_B,
        inputs.kv_starts_B,
        size,
        table.block_table_RX.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
    )
    return inputs


@triton.jit(do_not_specialize=["num_rows", "num_eos", "num_stops"])
def _advance_slots_kernel(
    rows_ptr,
    seq_lens_ptr,
    sampled_ptr,
    logits_ptr,
    eos_ptr,
    stops_ptr,
    kv_lens_ptr,
    last_tokens_ptr,
    active_ptr,
    stop_lens_ptr,
    ignore_eos_ptr,
    out_ptr,
    num_rows,
    num_eos,
    num_stops,
    stride_logits,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_batch = batch < num_rows
    rows = tl.load(rows_ptr + batch, mask=in_batch, other=0)
    is_active = in_batch & (tl.load(active_ptr + rows, mask=in_batch, other=0) != 0)
    tokens = tl.load(sampled_ptr + batch, mask=is_active, other=-1)
    seq_lens = tl.load(seq_lens_ptr + batch, mask=is_active, other=0)
    ends = seq_lens + 1 >= tl.load(stop_lens_ptr + rows, mask=is_active, other=0)
    heeds_eos = tl.load(ignore_eos_ptr + rows, mask=is_active, other=1) == 0
    for index in range(num_eos):
        ends = ends | (heeds_eos & (tokens == tl.load(eos_ptr + index)))
    for index in range(num_stops):
        ends = ends | (tokens == tl.load(stops_ptr + index))
    first = tl.load(logits_ptr + batch.to(tl.int64) * stride_logits, mask=is_active, other=0.0)
    is_nan = first != first
    tl.store(kv_lens_ptr + rows, seq_lens, mask=is_active)
    tl.store(last_tokens_ptr + rows, tokens, mask=is_active)
    tl.store(active_ptr + rows, 0, mask=is_active & ends)
    tl.store(out_ptr + batch, tl.where(is_nan, NAN, tokens).to(tl.int32), mask=in_batch)


def advance_slots(
    rows_B: Tensor,
    seq_lens_B: Tensor,
    sampled_B: Tensor,
    logits_BV: Tensor,
    eos_E: Tensor,
    stops_E: Tensor,
    table: SlotTable,
) -> Tensor:
    """Moves active slots on by the token that was sampled; ends those that end. Returns int32 [B].

    seq_lens_B counts the tokens with KV, so the sampled token stands at that position; a slot ends
    with a token of stops_E, with one of eos_E unless it ignores them, or when it is stop_lens long.
    The result is -1 for inactive slots, and NAN_TOKEN where the row's first logit is NaN: one NaN
    in a hidden state makes all of its logits so. An active slot occurs once in rows_B.
    """
    size = len(rows_B)
    assert rows_B.dtype == sampled_B.dtype == torch.int64, "rows and tokens must be int64"
    assert seq_lens_B.dtype == torch.int32, "lengths must be int32"
    _check_table(table)
    assert eos_E.dtype == stops_E.dtype == torch.int64, "token ids must be int64"
    out_B = torch.empty(size, dtype=torch.int32, device=rows_B.device)
    if size == 0:
        return out_B
    _advance_slots_kernel[(triton.cdiv(size, _BLOCK),)](
        rows_B,
        seq_lens_B,
        sampled_B,
        logits_BV,
        eos_E,
        stops_E,
        table.kv_lens_R,
        table.last_tokens_R,
        table.active_R,
        table.stop_lens_R,
        table.ignore_eos_R,
        out_B,
        size,
        len(eos_E),
        len(stops_E),
        logits_BV.stride(0),
        NAN=NAN_TOKEN,
        BLOCK=_BLOCK,
    )
    return out_B
