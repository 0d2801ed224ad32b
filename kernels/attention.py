"""What the paged attention kernels share: online softmax over paged KV, tile lookup, checks.

Scores are kept in base 2 (log2(e) is folded into the scale), so that exp2 is the only exponential.

Legend: P blocks of the pool, K kv heads, S block size, H head size, R slots, X blocks of a table
row, N query heads; in kernels M query rows of a tile (query tokens x heads of a GQA group) and
L KV tokens of a tile.
Source: FlashAttention-2 (Dao, 2023) for the online softmax; vLLM's unified Triton attention for
packing a GQA group into the rows of a tile.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.fp8 import FP8

LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETER_PROCESSORS = 4  # stands for a GPU's multiprocessors where there is none


@triton.jit
def attend(
    acc_MH,
    max_M,
    sum_M,
    q_MH,
    last_M,
    k_ptr,
    v_ptr,
    table_ptr,
    begin,
    end,
    block_stride,
    qk_scale,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the KV tokens [begin, end) to the running softmax of a tile of query rows.

    k_ptr and v_ptr point to a kv head within block 0, table_ptr to a sequence's row of the block
    table. With MASKED, row m sees tokens up to last_M[m]; without it `end - begin` is a multiple
    of BLOCK_L and every row sees all. Each row must see a token in the first tile it ever meets,
    or its maximum stays -inf and exp2 gives NaN.
    """
    if k_ptr.dtype.element_ty == tl.float8e4nv and q_MH.dtype == tl.bfloat16:
        # fp8 is exact in fp16, one instruction for two values; to bf16 it goes by way of fp32.
        q_MH = q_MH.to(tl.float16)
    offsets_L = tl.arange(0, BLOCK_L)
    offsets_H = tl.arange(0, HEAD_PADDED)
    # A tile's block ids are loaded one iteration ahead: otherwise each K load waits for its id.
    first_L = begin + offsets_L
    blocks_L = tl.load(table_ptr + first_L // BLOCK_SIZE, mask=first_L < end, other=0)
    for start in range(begin, end, BLOCK_L):
        positions_L = start + offsets_L
        next_L = positions_L + BLOCK_L
        next_blocks_L = tl.load(table_ptr + next_L // BLOCK_SIZE, mask=next_L < end, other=0)
        kv_L = blocks_L.to(tl.int64) * block_stride + (positions_L % BLOCK_SIZE) * HEAD
        kv_LH = kv_L[:, None] + offsets_H[None, :]
        # Tokens that nobody sees are not read: a free slot may hold NaN, and 0 * NaN is NaN.
        if MASKED:
            mask_LH = (positions_L < end)[:, None] & (offsets_H < HEAD)[None, :]
            k_LH = tl.load(k_ptr + kv_LH, mask=mask_LH, other=0.0)
            v_LH = tl.load(v_ptr + kv_LH, mask=mask_LH, other=0.0)
        elif HEAD != HEAD_PADDED:
            mask_1H = (offsets_H < HEAD)[None, :]
            k_LH = tl.load(k_ptr + kv_LH, mask=mask_1H, other=0.0)
            v_LH = tl.load(v_ptr + kv_LH, mask=mask_1H, other=0.0)
        else:
            k_LH = tl.load(k_ptr + kv_LH)
            v_LH = tl.load(v_ptr + kv_LH)
        # A cache of another dtype (fp8) widens after the load; else these are no operations.
        k_LH = k_LH.to(q_MH.dtype)
        v_LH = v_LH.to(q_MH.dtype)
        scores_ML = tl.dot(q_MH, tl.trans(k_LH), input_precision="ieee")
        if MASKED:
            visible_ML = positions_L[None, :] <= last_M[:, None]
            scores_ML = tl.where(visible_ML, scores_ML, -float("inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores_ML, 1) * qk_scale)
        p_ML = tl.exp2(scores_ML * qk_scale - new_max_M[:, None])
        rescale_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * rescale_M + tl.sum(p_ML, 1)
        acc_MH = acc_MH * rescale_M[:, None]
        acc_MH = tl.dot(p_ML.to(v_LH.dtype), v_LH, acc_MH, input_precision="ieee")
        max_M = new_max_M
        blocks_L = next_blocks_L
    return acc_MH, max_M, sum_M


@triton.jit
def finish(acc_MH, max_M, sum_M):
    """Normalise a running softmax: out_MH and its log2-sum-exp2. No tokens: zeros and -inf."""
    safe_sum_M = tl.where(sum_M > 0.0, sum_M, 1.0)
    return acc_MH / safe_sum_M[:, None], max_M + tl.log2(safe_sum_M)


@triton.jit
def merge_partials(
    out_ptr,
    lse_ptr,
    first,
    end,
    head,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The softmax of one query head over the partial results [first, end): out_H and its lse.

    Partials are out[F, N, H] and log2-sum-exp2 lse[F, N], fp32; an empty one has lse -inf.
    """
    offsets_H = tl.arange(0, HEAD_PADDED)
    total_max = -float("inf")
    total = 0.0
    acc_H = tl.zeros([HEAD_PADDED], tl.float32)
    for start in range(first, end, BLOCK_F):
        rows_F = start + tl.arange(0, BLOCK_F)
        index_F = rows_F.to(tl.int64) * NUM_HEADS + head
        lse_F = tl.load(lse_ptr + index_F, mask=rows_F < end, other=-float("inf"))
        mask_FH = (lse_F > -float("inf"))[:, None] & (offsets_H < HEAD)[None, :]
        part_FH = tl.load(
            out_ptr + index_F[:, None] * HEAD + offsets_H[None, :], mask=mask_FH, other=0.0
        )
        new_max = tl.maximum(total_max, tl.max(lse_F, 0))
        base = tl.where(new_max > -float("inf"), new_max, 0.0)
        weight_F = tl.exp2(lse_F - base)
        rescale = tl.exp2(total_max - base)
        total = total * rescale + tl.sum(weight_F, 0)
        acc_H = acc_H * rescale + tl.sum(weight_F[:, None] * part_FH, 0)
        total_max = new_max
    safe_total = tl.where(total > 0.0, total, 1.0)
    return acc_H / safe_total, total_max + tl.log2(safe_total)


@triton.jit
def find_row(cu_ptr, tile, num_rows, TILE: tl.constexpr):
    """Which ragged row a tile belongs to, when row b owns tiles from cu[b] // TILE + b on.

    That start leaves room for ceil(length / TILE) tiles in each row, so `T // TILE + num_rows`
    tiles cover everything: a grid from shapes alone. A row's surplus tile is empty.
    """
    count = 0
    for start in range(0, num_rows, 128):
        rows = start + tl.arange(0, 128)
        cu = tl.load(cu_ptr + rows, mask=rows < num_rows, other=0)
        first_tiles = cu // TILE + rows
        count += tl.sum(((first_tiles <= tile) & (rows < num_rows)).to(tl.int32), 0)
    return count - 1


def check_query(q_TNH: Tensor, k_cache_PKSH: Tensor, v_cache_PKSH: Tensor) -> None:
    """Assert what every kernel here takes for granted of queries and caches.

    The caches hold q's dtype or float8_e4m3fn, whose values stand for themselves (scale 1).
    """
    _, num_kv_heads, block_size, head_size = k_cache_PKSH.shape
    assert q_TNH.dtype in DTYPES, f"no kernel for {q_TNH.dtype}"
    assert k_cache_PKSH.dtype in (q_TNH.dtype, FP8), "the cache's dtype is not q's"
    assert k_cache_PKSH.dtype == v_cache_PKSH.dtype, "k and v caches differ in dtype"
    assert k_cache_PKSH.shape == v_cache_PKSH.shape, "k and v caches differ in shape"
    assert k_cache_PKSH.stride() == v_cache_PKSH.stride(), "k and v caches differ in strides"
    head_stride = block_size * head_size
    assert k_cache_PKSH.stride()[1:] == (head_stride, head_size, 1), "a block must be contiguous"
    assert q_TNH.is_contiguous(), "q must be contiguous"
    assert q_TNH.shape[2] == head_size, "q and the cache differ in head size"
    assert q_TNH.shape[1] % num_kv_heads == 0, "query heads must be a multiple of kv heads"
    assert q_TNH.device == k_cache_PKSH.device == v_cache_PKSH.device, "tensors on several devices"


def check_index(tensor: Tensor, shape: tuple[int, ...], device: torch.device, name: str) -> None:
    """Assert that an index tensor is contiguous, integer, of this shape and on this device."""
    assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
    assert tensor.dtype in (torch.int32, torch.int64), f"{name} must hold integers"
    assert tensor.is_contiguous(), f"{name} must be contiguous"
    assert tensor.device == device, f"{name} is on another device"


def check_block_table(block_table_RX: Tensor, device: torch.device) -> None:
    """Assert that a block table is int32 with contiguous rows, on this device."""
    assert block_table_RX.dtype == torch.int32, "block_table must be int32"
    assert block_table_RX.stride(1) == 1, "rows of block_table must be contiguous"
    assert block_table_RX.device == device, "block_table is on another device"


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small stand-in under the interpreter."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
