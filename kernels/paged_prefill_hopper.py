"""paged_prefill for Hopper in Gluon: one warp loads tiles, two warp groups multiply them.

A program stays on its multiprocessor and works through items: a tile of query tokens with all
heads of a GQA group. The loading warp (paged_prefill_hopper_loader.py) runs ahead by several KV
tiles, into the next item, too. Each warp group has 64 of an item's 128 query rows and issues the
scores of KV tile j before it does the softmax of the same tile, beside P V of tile j - 1, so that
the tensor cores have work while exponentials are taken:

    S_j = Q K_j^T ∥ O += P_{j-1} V_{j-1};  P_j = exp2(S_j - max);  O *= exp2(old max - max)

Legend: M query rows of a warp group (64), L KV tokens of a tile, H head size; T, N, P, K, S, R, X,
B as in paged_prefill.py.
Source: FlashAttention-3 (Shah et al., 2024) for the roles of the warps and the order of the work.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from batchgen.kernels.attention import LOG2_E, num_processors
from batchgen.kernels.paged_prefill_hopper_loader import (
    BOX_DIMS,
    GROUP_ROWS,
    RECORD_SIZE,
    advance,
    as_boxes,
    barrier,
    load_items,
    read_item,
)
from batchgen.kernels.tuning import HOPPER_PREFILL

_WARP_GROUPS = 2
# Registers of a thread: 2 x 232 + 40 is what a multiprocessor has for three warp groups.
_REGISTERS = gl.constexpr(232)
_LOADER_REGISTERS = gl.constexpr(40)
_LOG_2 = gl.constexpr(math.log(2))
_HEAD_SIZES = (64, 128)
_BLOCK_SIZES = (8, 16, 32, 64)


def supports(q_TNH: Tensor, k_cache_PKSH: Tensor) -> bool:
    """Whether this kernel takes such queries and caches, on their device."""
    _, num_heads, head_size = q_TNH.shape
    _, num_kv_heads, block_size, _ = k_cache_PKSH.shape
    return (
        _is_hopper(q_TNH.device)
        and q_TNH.dtype == k_cache_PKSH.dtype
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and head_size in _HEAD_SIZES
        and block_size in _BLOCK_SIZES
        and GROUP_ROWS.value % (num_heads // num_kv_heads) == 0
        and k_cache_PKSH.stride(0) % head_size == 0
        and len(q_TNH) > 0
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@gluon.jit
def _softmax(scores_ML, max_M, sum_M, qk_scale):
    """exp2 of scaled scores under the new maximum, the running maximum and sum, the rescaling."""
    new_max_M = gl.maximum(max_M, gl.max(scores_ML, 1) * qk_scale)
    p_ML = gl.exp2(scores_ML * qk_scale - new_max_M[:, None])
    rescale_M = gl.exp2(max_M - new_max_M)
    return p_ML, new_max_M, sum_M * rescale_M + gl.sum(p_ML, 1), rescale_M


@gluon.jit
def _mask(scores_ML, start, last_M):
    """Row m sees positions up to last_M[m]."""
    offsets_L = gl.arange(0, scores_ML.shape[1], gl.SliceLayout(0, scores_ML.type.layout))
    visible_ML = start + offsets_L[None, :] <= last_M[:, None]
    return gl.where(visible_ML, scores_ML, -float("inf"))


@gluon.jit
def _attend_tile(q, state, last_M, j, num_kv, buffers, barriers, qk_scale, MASKED: gl.constexpr):
    """Scores and softmax of KV tile j, which is there, beside P V of tile j - 1 in `stage`."""
    p_ML, acc_MH, max_M, sum_M, stage, phase = state
    _, k_smem, v_smem, _ = buffers
    _, _, k_full, v_full, kv_empty = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_L: gl.constexpr = k_smem.shape[1]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_L, 16])
    acc_layout: gl.constexpr = acc_MH.type.layout
    next_stage, next_phase = advance(stage, phase, STAGES)
    zero_ML = gl.zeros([GROUP_ROWS, BLOCK_L], gl.float32, scores_layout)
    k_HL = k_smem.index(next_stage).permute((1, 0))
    scores_ML = warpgroup_mma(q, k_HL, zero_ML, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    acc_MH = warpgroup_mma(p_ML, v_smem.index(stage), acc_MH, is_async=True)
    scores_ML = warpgroup_mma_wait(1, deps=(scores_ML,))
    if MASKED:
        scores_ML = _mask(scores_ML, j * BLOCK_L, last_M)
    p_ML, max_M, sum_M, rescale_M = _softmax(scores_ML, max_M, sum_M, qk_scale)
    # The wait for the next tile stands here because it is a branch: without one, ptxas moves the
    # exponentials behind the wait for P V, and nothing overlaps.
    later_stage, later_phase = advance(next_stage, next_phase, STAGES)
    mbarrier.wait(k_full.index(later_stage), later_phase, pred=j + 1 < num_kv)
    acc_MH, p_ML = warpgroup_mma_wait(0, deps=(acc_MH, p_ML))
    mbarrier.arrive(kv_empty.index(stage))
    rescale_M = gl.convert_layout(rescale_M, gl.SliceLayout(1, acc_layout))
    p_ML = gl.convert_layout(p_ML.to(k_smem.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return p_ML, acc_MH * rescale_M[:, None], max_M, sum_M, next_stage, next_phase


@gluon.jit
def _clear_tail(v_smem, stage, start, seq_len):
    """Zero the values of a stage past the sequence: free slots may hold NaN, and 0 * NaN is NaN.

    Each warp group does it for itself; what the other has begun to read stays as it is.
    """
    STAGES: gl.constexpr = v_smem.shape[0]
    PARTS: gl.constexpr = v_smem.shape[2] // BOX_DIMS
    ROWS: gl.constexpr = 16
    SLICES: gl.constexpr = v_smem.shape[1] // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    boxes = as_boxes(v_smem, [STAGES * PARTS * SLICES, ROWS, BOX_DIMS])
    for index in gl.static_range(SLICES):
        slice_start = start + index * ROWS
        if slice_start + ROWS > seq_len:
            position_R = slice_start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            for part in gl.static_range(PARTS):
                box = boxes.index((stage * PARTS + part) * SLICES + index)
                value_RH = gl.where((position_R < seq_len)[:, None], box.load(layout), 0.0)
                box.store(value_RH.to(v_smem.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def _store_rows(
    out_ptr, out_MH, group, token, num_tokens, kv_head, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr
):
    ROWS: gl.constexpr = out_MH.shape[0]
    HEAD: gl.constexpr = out_MH.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    rows_M = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offsets_H = gl.arange(0, HEAD, gl.SliceLayout(0, layout))
    token_M = rows_M // GROUP
    head_M = kv_head * GROUP + rows_M % GROUP
    index_M = ((token + token_M) * NUM_HEADS + head_M).to(gl.int64) * HEAD
    out_MH = gl.convert_layout(out_MH, layout)
    mask_M1 = (token_M < num_tokens)[:, None]
    gl.store(out_ptr + (index_M[:, None] + offsets_H[None, :]), out_MH, mask=mask_M1)


@gluon.jit
def _multiply(
    outputs,
    buffers,
    barriers,
    qk_scale,
    group,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    """A warp group: its rows of one item after the other."""
    out_ptr, lse_ptr = outputs
    q_smem, k_smem, v_smem, record_E1 = buffers
    q_full, q_empty, k_full, v_full, kv_empty = barriers
    dtype: gl.constexpr = k_smem.dtype
    ROWS: gl.constexpr = q_smem.shape[1]
    HEAD: gl.constexpr = q_smem.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_L: gl.constexpr = k_smem.shape[1]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_L, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    scores_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    rows_M = group * ROWS + gl.arange(0, ROWS, scores_rows)
    zero_ML = gl.zeros([ROWS, BLOCK_L], gl.float32, scores_layout)
    lowest_M = gl.full([ROWS], -float("inf"), gl.float32, scores_rows)
    zero_M = gl.zeros([ROWS], gl.float32, scores_rows)

    # Before the first item stands one without tokens: the loop ends an item beside the start of
    # the next.
    count = 0
    stage = STAGES - 1
    phase = 1
    num_tokens = 0
    num_full = 0
    num_kv = 1
    first_token = 0
    kv_head = 0
    seq_len = 0
    q = gl.zeros([ROWS, HEAD], dtype, gl.DotOperandLayout(0, scores_layout, 2))
    p_ML = gl.zeros([ROWS, BLOCK_L], dtype, gl.DotOperandLayout(0, acc_layout, 2))
    acc_MH = gl.zeros([ROWS, HEAD], gl.float32, acc_layout)
    max_M = lowest_M
    sum_M = zero_M
    last_M = rows_M
    is_running = True
    while is_running:
        state = (p_ML, acc_MH, max_M, sum_M, stage, phase)
        for j in range(1, num_full):
            state = _attend_tile(
                q, state, last_M, j, num_kv, buffers, barriers, qk_scale, MASKED=False
            )
        for j in range(gl.maximum(num_full, 1), num_kv):
            state = _attend_tile(
                q, state, last_M, j, num_kv, buffers, barriers, qk_scale, MASKED=True
            )
        p_ML, acc_MH, max_M, sum_M, stage, phase = state

        mbarrier.wait(q_full, count & 1)
        count += 1
        next_tokens, next_token, position, next_head, next_len = read_item(record_E1)
        is_running = next_tokens > 0
        has_rows = next_tokens > group * (ROWS // GROUP)
        q = q_smem.index(group).load(gl.DotOperandLayout(0, scores_layout, 2))
        barrier()
        mbarrier.arrive(q_empty, pred=is_running)
        next_stage, next_phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=has_rows)
        k_HL = k_smem.index(next_stage).permute((1, 0))
        scores_ML = warpgroup_mma(q, k_HL, zero_ML, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), phase, pred=num_tokens > 0)
        if (num_tokens > 0) & (num_kv * BLOCK_L > seq_len):
            _clear_tail(v_smem, stage, (num_kv - 1) * BLOCK_L, seq_len)
        acc_MH = warpgroup_mma(p_ML, v_smem.index(stage), acc_MH, is_async=True)
        scores_ML = warpgroup_mma_wait(1, deps=(scores_ML,))
        if IS_CAUSAL:
            last_M = position + rows_M // GROUP
        else:
            last_M = gl.full([ROWS], next_len - 1, gl.int32, scores_rows)
        scores_ML = _mask(scores_ML, 0, last_M)
        if lse_ptr is not None:
            lse_M = (max_M + gl.log2(sum_M)) * _LOG_2
        p_ML, max_M, next_sum_M, _unused = _softmax(scores_ML, lowest_M, zero_M, qk_scale)
        next_kv = gl.cdiv(position + next_tokens, BLOCK_L)
        later_stage, later_phase = advance(next_stage, next_phase, STAGES)
        mbarrier.wait(k_full.index(later_stage), later_phase, pred=has_rows & (next_kv > 1))
        acc_MH, p_ML = warpgroup_mma_wait(0, deps=(acc_MH, p_ML))
        mbarrier.arrive(kv_empty.index(stage), pred=num_tokens > 0)

        out_MH = acc_MH / gl.convert_layout(sum_M, gl.SliceLayout(1, acc_layout))[:, None]
        _store_rows(
            out_ptr, out_MH.to(dtype), group, first_token, num_tokens, kv_head, NUM_HEADS, GROUP
        )
        if lse_ptr is not None:
            token_M = rows_M // GROUP
            index_M = (first_token + token_M) * NUM_HEADS + kv_head * GROUP + rows_M % GROUP
            gl.store(lse_ptr + index_M, lse_M, mask=token_M < num_tokens)
        p_ML = gl.convert_layout(p_ML.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
        acc_MH = gl.zeros([ROWS, HEAD], gl.float32, acc_layout)
        sum_M = next_sum_M
        first_token = next_token
        kv_head = next_head
        seq_len = next_len
        if has_rows:
            stage = next_stage
            phase = next_phase
            num_tokens = next_tokens
            num_kv = next_kv
            num_full = (position + 1 if IS_CAUSAL else seq_len) // BLOCK_L
        else:
            # All of the item's tokens are the other warp group's: let its tiles pass.
            num_tokens = 0
            num_kv = 1
            num_full = 0
            for _tile in range(gl.where(is_running, next_kv, 0)):
                stage, phase = advance(stage, phase, STAGES)
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(kv_empty.index(stage))


@gluon.jit(do_not_specialize=["num_rows", "num_tiles"])
def _paged_prefill_hopper_kernel(
    q,
    k_cache,
    v_cache,
    table_ptr,
    slot_ids_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    kv_starts_ptr,
    counter_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    num_tiles,
    block_lines,
    table_stride,
    qk_scale,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    BLOCK_L: gl.constexpr,
    STAGES: gl.constexpr,
    WARP_GROUPS: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype
    tiles: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [WARP_GROUPS, GROUP_ROWS, HEAD], tiles)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_L, HEAD], tiles)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_L, HEAD], tiles)
    record_E1 = gl.allocate_shared_memory(
        gl.int32, [RECORD_SIZE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    mbarrier.init(q_full, 1)
    mbarrier.init(q_empty, WARP_GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), 1)
        mbarrier.init(v_full.index(stage), 1)
        mbarrier.init(kv_empty.index(stage), WARP_GROUPS)
    fence_async_shared()
    barrier()
    buffers = (q_smem, k_smem, v_smem, record_E1)
    barriers = (q_full, q_empty, k_full, v_full, kv_empty)
    table = (table_ptr, table_stride, block_lines)
    KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    tickets = (counter_ptr, num_rows, num_tiles * KV_HEADS)
    rows = (cu_seqlens_q_ptr, seq_lens_ptr, slot_ids_ptr, kv_starts_ptr, tickets)
    outputs = (out_ptr, lse_ptr)
    gl.warp_specialize(
        [
            (_multiply, (outputs, buffers, barriers, qk_scale, 0, NUM_HEADS, GROUP, IS_CAUSAL)),
            (_multiply, (outputs, buffers, barriers, qk_scale, 1, NUM_HEADS, GROUP, IS_CAUSAL)),
            (
                load_items,
                (q, k_cache, v_cache, table, rows, buffers, barriers, KV_HEADS, IS_CAUSAL),
            ),
        ],
        [4, 1],
        [_REGISTERS, _LOADER_REGISTERS],
    )


def launch(
    q_TNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    cu_seqlens_q_B1: Tensor,
    seq_lens_B: Tensor,
    kv_starts_B: Tensor | None,
    out_TNH: Tensor,
    lse_TN: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
) -> None:
    """Write the attention of paged_prefill, which has checked its arguments, into out_TNH and
    lse_TN."""
    num_tokens, num_heads, head_size = q_TNH.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache_PKSH.shape
    group = num_heads // num_kv_heads
    group_tokens = GROUP_ROWS.value // group
    num_rows = slot_ids_B.shape[0]
    num_tiles = num_tokens // (_WARP_GROUPS * group_tokens) + num_rows
    block_lines = k_cache_PKSH.stride(0) // head_size
    lines = (num_blocks - 1) * block_lines + num_kv_heads * block_size
    kv_layout = gl.NVMMASharedLayout(128, 16, 2)
    kv_args = ([lines, head_size], [head_size, 1], [block_size, BOX_DIMS.value], kv_layout)
    q_args = (
        [num_tokens, num_heads, head_size],
        [num_heads * head_size, head_size, 1],
        [group_tokens, group, BOX_DIMS.value],
        gl.NVMMASharedLayout(128, 16, 3),
    )
    grid = min(num_processors(q_TNH.device), num_tiles * num_kv_heads)
    _paged_prefill_hopper_kernel[(grid,)](
        TensorDescriptor(q_TNH, *q_args),
        TensorDescriptor(k_cache_PKSH, *kv_args),
        TensorDescriptor(v_cache_PKSH, *kv_args),
        block_table_RX,
        slot_ids_B,
        cu_seqlens_q_B1,
        seq_lens_B,
        kv_starts_B,
        torch.zeros(1, dtype=torch.int32, device=q_TNH.device),
        out_TNH,
        lse_TN,
        num_rows,
        num_tiles,
        block_lines,
        block_table_RX.stride(0),
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD=head_size,
        IS_CAUSAL=is_causal,
        BLOCK_L=HOPPER_PREFILL.block_l,
        STAGES=HOPPER_PREFILL.num_stages,
        WARP_GROUPS=_WARP_GROUPS,
        num_warps=4,
    )
