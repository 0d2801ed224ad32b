"""Attention of decoding rows over a prefix that groups of them share, and its merge.

The members of a group attend to the same KV, so their queries and GQA heads are the rows of one
matrix product: the prefix is read once a tile of members instead of once a member. Each row's own
KV is left to paged_decode with kv_starts; both sides meet in merge_attention:

    out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b)

Where few tiles of members would leave the device idle, the prefix is split, too, and the parts
are merged by a second kernel.

Legend: B batch rows, N query heads, K kv heads, H head size, P blocks, S block size, G groups,
X blocks of a table row, U members of all groups, F partial results, M rows of a tile.
Source: Hydragen (Juravsky et al., 2024), and the cascade attention of flashinfer and vLLM.
"""

from __future__ import annotations

import math

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
    find_row,
    finish,
    merge_partials,
    num_processors,
)
from batchgen.kernels.tuning import FP32_PREFILL, TileShape, by_head, tuning_for

_MAX_SPLITS = 16
_PROGRAMS_PER_PROCESSOR = 2


def tile_shape(
    dtype: torch.dtype, head_padded: int, rows_per_group: int, device: torch.device
) -> TileShape:
    """Launch parameters; small groups take half a tile of rows."""
    if dtype == torch.float32:
        return FP32_PREFILL
    tuning = tuning_for(device)
    return tuning.small_prefix if rows_per_group <= 64 else by_head(tuning.prefix, head_padded)


@triton.jit(do_not_specialize=["num_groups"])
def _shared_prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    prefix_lens_ptr,
    member_ids_ptr,
    cu_members_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    num_groups,
    block_stride,
    table_stride,
    qk_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SPLITS: tl.constexpr,
    LOG_2: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    group = find_row(cu_members_ptr, tile, num_groups, BLOCK_U)
    members_start = tl.load(cu_members_ptr + group).to(tl.int32)
    num_members = tl.load(cu_members_ptr + group + 1).to(tl.int32) - members_start
    first = (tile - members_start // BLOCK_U - group) * BLOCK_U
    if first >= num_members:
        return

    prefix_len = tl.load(prefix_lens_ptr + group).to(tl.int32)
    split_tiles = (prefix_len + SPLITS * BLOCK_L - 1) // (SPLITS * BLOCK_L)
    begin = tl.minimum(split * split_tiles * BLOCK_L, prefix_len)
    end = tl.minimum(begin + split_tiles * BLOCK_L, prefix_len)
    full_end = begin + (end - begin) // BLOCK_L * BLOCK_L

    offsets_M = tl.arange(0, BLOCK_M)
    offsets_H = tl.arange(0, HEAD_PADDED)
    member_M = first + offsets_M // GROUP
    real_M = (offsets_M < BLOCK_U * GROUP) & (member_M < num_members)
    member_M += members_start
    head_M = kv_head * GROUP + offsets_M % GROUP
    row_M = tl.load(member_ids_ptr + member_M, mask=real_M, other=0).to(tl.int32)
    row_M = row_M * NUM_HEADS + head_M
    row_MH = row_M[:, None] * HEAD + offsets_H[None, :]
    mask_MH = real_M[:, None] & (offsets_H < HEAD)[None, :]
    q_MH = tl.load(q_ptr + row_MH, mask=mask_MH, other=0.0)

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MH = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    last_M = tl.zeros([BLOCK_M], tl.int32) + (end - 1)
    k_ptr += kv_head * BLOCK_SIZE * HEAD
    v_ptr += kv_head * BLOCK_SIZE * HEAD
    table_ptr += group.to(tl.int64) * table_stride
    acc_MH, max_M, sum_M = attend(
        acc_MH,
        max_M,
        sum_M,
        q_MH,
        last_M,
        k_ptr,
        v_ptr,
        table_ptr,
        begin,
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
        last_M,
        k_ptr,
        v_ptr,
        table_ptr,
        full_end,
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
    if SPLITS == 1:
        tl.store(out_ptr + row_MH, out_MH.to(out_ptr.dtype.element_ty), mask=mask_MH)
        tl.store(lse_ptr + row_M, lse_M * LOG_2, mask=real_M)
    else:
        partial_M = (member_M * SPLITS + split) * NUM_HEADS + head_M
        partial_MH = partial_M.to(tl.int64)[:, None] * HEAD + offsets_H[None, :]
        tl.store(partial_out_ptr + partial_MH, out_MH, mask=mask_MH)
        tl.store(partial_lse_ptr + partial_M, lse_M, mask=real_M)


@triton.jit(do_not_specialize=["num_groups"])
def _merge_splits_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    member_ids_ptr,
    cu_members_ptr,
    out_ptr,
    lse_ptr,
    num_groups,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LOG_2: tl.constexpr,
):
    member = tl.program_id(1)
    if member >= tl.load(cu_members_ptr + num_groups):
        return
    row = tl.load(member_ids_ptr + member).to(tl.int32)
    offsets_H = tl.arange(0, HEAD_PADDED)
    for index in range(GROUP):
        head = tl.program_id(0) * GROUP + index
        out_H, lse = merge_partials(
            partial_out_ptr,
            partial_lse_ptr,
            member * SPLITS,
            (member + 1) * SPLITS,
            head,
            NUM_HEADS,
            HEAD,
            HEAD_PADDED,
            BLOCK_F,
        )
        out_row = row * NUM_HEADS + head
        out_ptrs = out_ptr + out_row * HEAD + offsets_H
        tl.store(out_ptrs, out_H.to(out_ptr.dtype.element_ty), mask=offsets_H < HEAD)
        tl.store(lse_ptr + out_row, lse * LOG_2)


def shared_prefix(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    prefix_block_table_GX: Tensor,
    prefix_lens_G: Tensor,
    member_ids_U: Tensor,
    cu_members_G1: Tensor,
    *,
    scale: float,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each member over its group's prefix. Returns out_BNH and lse_BN (fp32).

    member_ids_U are distinct batch rows sorted by group, cut into groups by cu_members_G1, which
    begins with 0; entries past its last are padding. A group may be empty, or its prefix. For rows
    without a prefix lse_BN is -inf and out_BNH is not written: merge_attention never reads it.
    """
    check_query(q_BNH, k_cache_PKSH, v_cache_PKSH)
    num_rows, num_heads, head_size = q_BNH.shape
    _, num_kv_heads, block_size, _ = k_cache_PKSH.shape
    device = q_BNH.device
    num_groups = prefix_lens_G.shape[0]
    num_members = member_ids_U.shape[0]
    check_index(prefix_lens_G, (num_groups,), device, "prefix_lens")
    check_index(member_ids_U, (num_members,), device, "member_ids")
    check_index(cu_members_G1, (num_groups + 1,), device, "cu_members")
    check_block_table(prefix_block_table_GX, device)
    group = num_heads // num_kv_heads
    head_padded = triton.next_power_of_2(head_size)
    rows_per_group = group * triton.cdiv(num_members, num_groups)
    shape = tile_shape(q_BNH.dtype, head_padded, rows_per_group, device)
    assert group <= shape.block_m, f"{group} query heads a kv head do not fit into a tile"
    block_u = shape.block_m // group
    num_tiles = num_members // block_u + num_groups
    if num_splits is None:
        programs = _PROGRAMS_PER_PROCESSOR * num_processors(device)
        wanted = max(programs // (num_tiles * num_kv_heads), 1)
        num_splits = min(
            1 << (wanted.bit_length() - 1), _MAX_SPLITS
        )  # few values: few compilations
    num_partials = num_members * num_splits if num_splits > 1 else 0
    partial_out_FNH = torch.empty(
        (num_partials, num_heads, head_size), dtype=torch.float32, device=device
    )
    partial_lse_FN = torch.empty((num_partials, num_heads), dtype=torch.float32, device=device)
    out_BNH = torch.empty_like(q_BNH)
    lse_BN = torch.full((num_rows, num_heads), -math.inf, dtype=torch.float32, device=device)
    constants = {
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "HEAD": head_size,
        "HEAD_PADDED": head_padded,
        "SPLITS": num_splits,
        "LOG_2": math.log(2),
    }
    _shared_prefix_kernel[(num_kv_heads, num_tiles, num_splits)](
        q_BNH,
        k_cache_PKSH,
        v_cache_PKSH,
        prefix_block_table_GX,
        prefix_lens_G,
        member_ids_U,
        cu_members_G1,
        out_BNH,
        lse_BN,
        partial_out_FNH,
        partial_lse_FN,
        num_groups,
        k_cache_PKSH.stride(0),
        prefix_block_table_GX.stride(0),
        scale * LOG2_E,
        **constants,
        BLOCK_SIZE=block_size,
        BLOCK_M=shape.block_m,
        BLOCK_U=block_u,
        BLOCK_L=shape.block_l,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if num_splits > 1:
        _merge_splits_kernel[(num_kv_heads, num_members)](
            partial_out_FNH,
            partial_lse_FN,
            member_ids_U,
            cu_members_G1,
            out_BNH,
            lse_BN,
            num_groups,
            **constants,
            BLOCK_F=_MAX_SPLITS,
        )
    return out_BNH, lse_BN


@triton.jit(do_not_specialize=["num_rows"])
def _merge_attention_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    num_rows,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offsets_H = tl.arange(0, HEAD_PADDED)
    real_R = rows_R < num_rows
    lse_a_R = tl.load(lse_a_ptr + rows_R, mask=real_R, other=-float("inf"))
    lse_b_R = tl.load(lse_b_ptr + rows_R, mask=real_R, other=-float("inf"))
    # An empty side is not read: it may never have been written.
    has_a_R = lse_a_R > -float("inf")
    has_b_R = lse_b_R > -float("inf")
    head_1H = (offsets_H < HEAD)[None, :]
    index_RH = rows_R[:, None] * HEAD + offsets_H[None, :]
    out_a_RH = tl.load(out_a_ptr + index_RH, mask=has_a_R[:, None] & head_1H, other=0.0)
    out_b_RH = tl.load(out_b_ptr + index_RH, mask=has_b_R[:, None] & head_1H, other=0.0)
    base_R = tl.maximum(lse_a_R, lse_b_R)
    base_R = tl.where(has_a_R | has_b_R, base_R, 0.0)
    weight_a_R = tl.exp(lse_a_R - base_R)
    weight_b_R = tl.exp(lse_b_R - base_R)
    total_R = tl.where(has_a_R | has_b_R, weight_a_R + weight_b_R, 1.0)
    share_a_R = weight_a_R / total_R
    share_b_R = weight_b_R / total_R
    out_RH = share_a_R[:, None] * out_a_RH.to(tl.float32)
    out_RH += share_b_R[:, None] * out_b_RH.to(tl.float32)
    mask_RH = real_R[:, None] & head_1H
    tl.store(out_ptr + index_RH, out_RH.to(out_ptr.dtype.element_ty), mask=mask_RH)


def merge_attention(
    out_a_BNH: Tensor, lse_a_BN: Tensor, out_b_BNH: Tensor, lse_b_BN: Tensor
) -> Tensor:
    """The attention over two disjoint sets of KV, from the outputs and lses over each.

    A side with lse -inf is empty and not read; where both are, the output is zeros.
    """
    num_rows, num_heads, head_size = out_a_BNH.shape
    for out_BNH in (out_a_BNH, out_b_BNH):
        assert out_BNH.shape == out_a_BNH.shape, "the outputs differ in shape"
        assert out_BNH.dtype == out_a_BNH.dtype, "the outputs differ in dtype"
        assert out_BNH.is_contiguous(), "the outputs must be contiguous"
    for lse_BN in (lse_a_BN, lse_b_BN):
        assert lse_BN.shape == (num_rows, num_heads), "lse must be [rows, heads]"
        assert lse_BN.dtype == torch.float32, "lse must be fp32"
        assert lse_BN.is_contiguous(), "lse must be contiguous"
    merged_BNH = torch.empty_like(out_a_BNH)
    block_r = 16
    _merge_attention_kernel[(triton.cdiv(num_rows * num_heads, block_r),)](
        out_a_BNH,
        lse_a_BN,
        out_b_BNH,
        lse_b_BN,
        merged_BNH,
        num_rows * num_heads,
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        BLOCK_R=block_r,
    )
    return merged_BNH
