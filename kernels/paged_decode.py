"""Attention of one query token a sequence over paged KV, split over the KV and balanced.

out = softmax(scale * q k^T) v. A program reads one piece of a row's KV for one kv head and all
query heads of its group (see decode_plan). A row that is one piece writes its output directly;
the pieces of a longer row leave partial results that a second kernel merges by log-sum-exp.
Memory-bound: what counts is KV bytes in flight, so tiles are small and several programs share a
multiprocessor.

Legend: B batch rows, N query heads, K kv heads, H head size, P blocks, S block size, R slots,
X blocks of a table row, F partial results, M rows of a tile (the group's heads, padded).
Source: Flash-Decoding (Dao et al., 2023); stream-K for cutting work into equal shares.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.attention import (
    LOG2_E,
    attend,
    check_block_table,
    check_index,
    check_query,
    finish,
    merge_partials,
)
from batchgen.kernels.decode_plan import TILE, DecodePlan, plan_decode
from batchgen.kernels.fp8 import FP8
from batchgen.kernels.tuning import FP32_DECODE, TileShape, by_head, tuning_for

__all__ = ["DecodePlan", "paged_decode", "plan_decode"]


def tile_shape(
    dtype: torch.dtype, cache_dtype: torch.dtype, head_padded: int, group: int, device: torch.device
) -> TileShape:
    """Launch parameters; a tile has the heads of a GQA group, and at least what a product takes."""
    shape = FP32_DECODE
    if dtype != torch.float32:
        tuning = tuning_for(device)
        shapes = tuning.decode_fp8 if cache_dtype == FP8 else tuning.decode
        shape = by_head(shapes, head_padded)
    return replace(shape, block_m=max(shape.block_m, triton.next_power_of_2(group)))


@triton.jit(do_not_specialize=["num_rows"])
def _paged_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    slot_ids_ptr,
    seq_lens_ptr,
    kv_starts_ptr,
    pieces_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    num_rows,
    block_stride,
    table_stride,
    qk_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    TILE: tl.constexpr,
    LOG_2: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece_ptr = pieces_ptr + tl.program_id(1) * 4
    row = tl.load(piece_ptr)
    if row >= num_rows:
        return
    first_tile = tl.load(piece_ptr + 1)
    end_tile = tl.load(piece_ptr + 2)
    partial = tl.load(piece_ptr + 3)
    slot = tl.load(slot_ids_ptr + row).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
    begin = first_tile * TILE
    end = end_tile * TILE
    if kv_starts_ptr is not None:
        kv_start = tl.load(kv_starts_ptr + row).to(tl.int32)
        begin += kv_start
        end += kv_start
    end = tl.minimum(end, seq_len)

    offsets_M = tl.arange(0, BLOCK_M)
    offsets_H = tl.arange(0, HEAD_PADDED)
    head_M = kv_head * GROUP + offsets_M
    real_M = offsets_M < GROUP
    mask_MH = real_M[:, None] & (offsets_H < HEAD)[None, :]
    row_M = row * NUM_HEADS + head_M
    row_MH = row_M[:, None] * HEAD + offsets_H[None, :]
    q_MH = tl.load(q_ptr + row_MH, mask=mask_MH, other=0.0)
    acc_MH, max_M, sum_M = attend(
        tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32),
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        q_MH,
        tl.zeros([BLOCK_M], tl.int32) + (end - 1),
        k_ptr + kv_head * BLOCK_SIZE * HEAD,
        v_ptr + kv_head * BLOCK_SIZE * HEAD,
        table_ptr + slot * table_stride,
        begin,
        end,
        block_stride,
        qk_scale,
        HEAD,
        HEAD_PADDED,
        BLOCK_SIZE,
        BLOCK_L,
        MASKED=True,
    )
    out_MH, lse_M = finish(acc_MH, max_M, sum_M)
    if partial < 0:
        tl.store(out_ptr + row_MH, out_MH.to(out_ptr.dtype.element_ty), mask=mask_MH)
        if lse_ptr is not None:
            tl.store(lse_ptr + row_M, lse_M * LOG_2, mask=real_M)
    else:
        partial_M = partial * NUM_HEADS + head_M
        partial_MH = partial_M[:, None] * HEAD + offsets_H[None, :]
        tl.store(partial_out_ptr + partial_MH, out_MH, mask=mask_MH)
        tl.store(partial_lse_ptr + partial_M, lse_M, mask=real_M)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_pieces_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    merges_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LOG_2: tl.constexpr,
):
    merge_ptr = merges_ptr + tl.program_id(1) * 3
    row = tl.load(merge_ptr)
    if row >= num_rows:
        return
    first = tl.load(merge_ptr + 1)
    end = tl.load(merge_ptr + 2)
    offsets_H = tl.arange(0, HEAD_PADDED)
    for index in range(GROUP):
        head = tl.program_id(0) * GROUP + index
        out_H, lse = merge_partials(
            partial_out_ptr,
            partial_lse_ptr,
            first,
            end,
            head,
            NUM_HEADS,
            HEAD,
            HEAD_PADDED,
            BLOCK_F,
        )
        out_row = row * NUM_HEADS + head
        out_ptrs = out_ptr + out_row * HEAD + offsets_H
        tl.store(out_ptrs, out_H.to(out_ptr.dtype.element_ty), mask=offsets_H < HEAD)
        if lse_ptr is not None:
            tl.store(lse_ptr + out_row, lse * LOG_2)


@overload
def paged_decode(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    seq_lens_B: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def paged_decode(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    seq_lens_B: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def paged_decode(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    seq_lens_B: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each row's one query token over its KV. Returns out_BNH in q's dtype.

    seq_lens_B counts the token being decoded, whose KV is in the cache; a row of length 0 is
    padding: it reads nothing and its output is zeros. kv_starts_B counts leading tokens to leave
    out. The plan must be made from the same lengths and starts. With return_lse also lse_BN: the
    natural log of the sum of exp(scale * score), fp32, -inf for a row without tokens.
    scale is positive.
    """
    check_query(q_BNH, k_cache_PKSH, v_cache_PKSH)
    num_rows, num_heads, head_size = q_BNH.shape
    _, num_kv_heads, block_size, _ = k_cache_PKSH.shape
    device = q_BNH.device
    check_index(slot_ids_B, (num_rows,), device, "slot_ids")
    check_index(seq_lens_B, (num_rows,), device, "seq_lens")
    if kv_starts_B is not None:
        check_index(kv_starts_B, (num_rows,), device, "kv_starts")
    check_block_table(block_table_RX, device)
    assert plan.num_rows == num_rows, f"the plan is for {plan.num_rows} rows, not {num_rows}"
    group = num_heads // num_kv_heads
    head_padded = triton.next_power_of_2(head_size)
    shape = tile_shape(q_BNH.dtype, k_cache_PKSH.dtype, head_padded, group, device)
    constants = {
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "HEAD": head_size,
        "HEAD_PADDED": head_padded,
        "LOG_2": math.log(2),
    }
    out_BNH = torch.empty_like(q_BNH)
    lse_BN = (
        torch.empty((num_rows, num_heads), dtype=torch.float32, device=device)
        if return_lse
        else None
    )
    partial_out_FNH = torch.empty(
        (plan.max_partials, num_heads, head_size), dtype=torch.float32, device=device
    )
    partial_lse_FN = torch.empty((plan.max_partials, num_heads), dtype=torch.float32, device=device)
    _paged_decode_kernel[(num_kv_heads, plan.pieces_P4.shape[0])](
        q_BNH,
        k_cache_PKSH,
        v_cache_PKSH,
        block_table_RX,
        slot_ids_B,
        seq_lens_B,
        kv_starts_B,
        plan.pieces_P4,
        out_BNH,
        lse_BN,
        partial_out_FNH,
        partial_lse_FN,
        num_rows,
        k_cache_PKSH.stride(0),
        block_table_RX.stride(0),
        scale * LOG2_E,
        **constants,
        BLOCK_SIZE=block_size,
        BLOCK_M=shape.block_m,
        BLOCK_L=shape.block_l,
        TILE=TILE,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    _merge_pieces_kernel[(num_kv_heads, plan.merges_W3.shape[0])](
        partial_out_FNH,
        partial_lse_FN,
        plan.merges_W3,
        out_BNH,
        lse_BN,
        num_rows,
        **constants,
        BLOCK_F=32,
    )
    return out_BNH if lse_BN is None else (out_BNH, lse_BN)
