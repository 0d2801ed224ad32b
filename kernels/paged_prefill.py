"""Attention of many query tokens a sequence over paged KV: prefill, whole or in chunks.

out = softmax(scale * q k^T + mask) v. Query token j of a sequence stands at position
seq_len - query_len + j and sees the KV at positions up to its own; this step's KV is already in
the cache, so a chunk over a cached prefix is the same call.

Neighbouring chunks that share a prefix may read it once: a call without the causal mask, in which
the chunks' queries together are one sequence over the prefix; a call over each chunk's own KV, by
kv_starts; and shared_prefix.merge_attention of both. What the first call saves are the prefix's
tiles over short chunks, which do not fill a tile of queries by themselves.

A program handles one kv head and a tile of query tokens with all heads of the GQA group, so that
a group reads its KV once and little of a tile is lost on the diagonal. Only the tiles on the
diagonal pay for masking. Hopper has a kernel of its own for what it supports
(paged_prefill_hopper.py); this one serves every other device, dtype and shape.

Legend: T tokens of a step, N query heads, K kv heads, H head size, P blocks, S block size,
R slots, X blocks of a table row, B sequences.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels import paged_prefill_hopper
from batchgen.kernels.attention import (
    LOG2_E,
    attend,
    check_block_table,
    check_index,
    check_query,
    find_row,
    finish,
)
from batchgen.kernels.tuning import prefill_tile


@triton.jit(do_not_specialize=["num_rows"])
def _paged_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    slot_ids_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    kv_starts_ptr,
    out_ptr,
    lse_ptr,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOG_2: tl.constexpr,
):
    kv_head = tl.program_id(0)
    # From the last tile to the first: those at the end of a sequence have the most work.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = find_row(cu_seqlens_q_ptr, tile, num_rows, BLOCK_Q)
    query_start = tl.load(cu_seqlens_q_ptr + row).to(tl.int32)
    query_len = tl.load(cu_seqlens_q_ptr + row + 1).to(tl.int32) - query_start
    first = (tile - query_start // BLOCK_Q - row) * BLOCK_Q
    if first >= query_len:
        return

    context_len = tl.load(seq_lens_ptr + row).to(tl.int32) - query_len
    slot = tl.load(slot_ids_ptr + row).to(tl.int64)
    offsets_M = tl.arange(0, BLOCK_M)
    offsets_H = tl.arange(0, HEAD_PADDED)
    token_M = first + offsets_M // GROUP
    head_M = kv_head * GROUP + offsets_M % GROUP
    real_M = (offsets_M < BLOCK_Q * GROUP) & (token_M < query_len)
    index_M = ((query_start + token_M).to(tl.int64) * NUM_HEADS + head_M) * HEAD
    index_MH = index_M[:, None] + offsets_H[None, :]
    mask_MH = real_M[:, None] & (offsets_H < HEAD)[None, :]
    q_MH = tl.load(q_ptr + index_MH, mask=mask_MH, other=0.0)

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MH = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    k_ptr += kv_head * BLOCK_SIZE * HEAD
    v_ptr += kv_head * BLOCK_SIZE * HEAD
    table_ptr += slot * table_stride
    if kv_starts_ptr is not None:
        # As if the sequence began there: positions count from the first KV token that is read.
        kv_start = tl.load(kv_starts_ptr + row).to(tl.int32)
        table_ptr += kv_start // BLOCK_SIZE
        context_len -= kv_start
    if IS_CAUSAL:
        position_M = context_len + token_M
        kv_end = context_len + tl.minimum(first + BLOCK_Q, query_len)
        full_end = (context_len + first + 1) // BLOCK_L * BLOCK_L
    else:
        kv_end = context_len + query_len
        position_M = tl.zeros([BLOCK_M], tl.int32) + (kv_end - 1)
        full_end = kv_end // BLOCK_L * BLOCK_L
    acc_MH, max_M, sum_M = attend(
        acc_MH,
        max_M,
        sum_M,
        q_MH,
        position_M,
        k_ptr,
        v_ptr,
        table_ptr,
        0,
        full_end,
        block_stride,
        qk_scale,
        HEAD,
        HEAD_PADDED,
        BLOCK_SIZE,
        BLOCK_L,
        MASKED=False,
    )
    acc_MH, max_M, sum_M = attend(
        acc_MH,
        max_M,
        sum_M,
        q_MH,
        position_M,
        k_ptr,
        v_ptr,
        table_ptr,
        full_end,
        kv_end,
        block_stride,
        qk_scale,
        HEAD,
        HEAD_PADDED,
        BLOCK_SIZE,
        BLOCK_L,
        MASKED=True,
    )
    out_MH, lse_M = finish(acc_MH, max_M, sum_M)
    tl.store(out_ptr + index_MH, out_MH.to(out_ptr.dtype.element_ty), mask=mask_MH)
    if lse_ptr is not None:
        tl.store(lse_ptr + index_M // HEAD, lse_M * LOG_2, mask=real_M)


@overload
def paged_prefill(
    q_TNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    seq_lens_B: Tensor,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    is_causal: bool = True,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def paged_prefill(
    q_TNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    seq_lens_B: Tensor,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    is_causal: bool = True,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def paged_prefill(
    q_TNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    seq_lens_B: Tensor,
    *,
    scale: float,
    kv_starts_B: Tensor | None = None,
    is_causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence's query tokens over its KV. Returns out_TNH in q's dtype.

    cu_seqlens_q_B1 cuts q_TNH into sequences; it begins with 0. Rows of q_TNH past its last entry
    are padding: they are not read and their output is not written. A sequence may have no query
    tokens. seq_lens_B counts all KV of a sequence, this step's tokens with it. scale is positive.

    kv_starts_B counts leading tokens to leave out, whole blocks, at most those before the first
    query token. Without is_causal every query token sees all KV, and a sequence may have none.
    With return_lse also lse_TN: the natural log of the sum of exp(scale * score), fp32, and -inf
    for padding and for tokens that see no KV, whose output is of no use (and not written).
    """
    check_query(q_TNH, k_cache_PKSH, v_cache_PKSH)
    num_tokens, num_heads, head_size = q_TNH.shape
    _, num_kv_heads, block_size, _ = k_cache_PKSH.shape
    num_rows = slot_ids_B.shape[0]
    check_index(slot_ids_B, (num_rows,), q_TNH.device, "slot_ids")
    check_index(seq_lens_B, (num_rows,), q_TNH.device, "seq_lens")
    check_index(cu_seqlens_q_B1, (num_rows + 1,), q_TNH.device, "cu_seqlens_q")
    check_block_table(block_table_RX, q_TNH.device)
    if kv_starts_B is not None:
        check_index(kv_starts_B, (num_rows,), q_TNH.device, "kv_starts")
    out_TNH = torch.empty_like(q_TNH)
    lse_TN = None
    if return_lse:
        lse_TN = q_TNH.new_full((num_tokens, num_heads), -math.inf, dtype=torch.float32)
    if paged_prefill_hopper.supports(q_TNH, k_cache_PKSH):
        paged_prefill_hopper.launch(
            q_TNH,
            k_cache_PKSH,
            v_cache_PKSH,
            block_table_RX,
            slot_ids_B,
            cu_seqlens_q_B1,
            seq_lens_B,
            kv_starts_B,
            out_TNH,
            lse_TN,
            scale=scale,
            is_causal=is_causal,
        )
        return out_TNH if lse_TN is None else (out_TNH, lse_TN)
    group = num_heads // num_kv_heads
    head_padded = triton.next_power_of_2(head_size)
    shape = prefill_tile(q_TNH.dtype, head_size, q_TNH.device)
    assert group <= shape.block_m, f"{group} query heads a kv head do not fit into a tile"
    block_q = shape.block_m // group
    _paged_prefill_kernel[(num_kv_heads, num_tokens // block_q + num_rows)](
        q_TNH,
        k_cache_PKSH,
        v_cache_PKSH,
        block_table_RX,
        slot_ids_B,
        cu_seqlens_q_B1,
        seq_lens_B,
        kv_starts_B,
        out_TNH,
        lse_TN,
        num_rows,
        k_cache_PKSH.stride(0),
        block_table_RX.stride(0),
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        BLOCK_M=shape.block_m,
        BLOCK_Q=block_q,
        BLOCK_L=shape.block_l,
        IS_CAUSAL=is_causal,
        LOG_2=math.log(2),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out_TNH if lse_TN is None else (out_TNH, lse_TN)
