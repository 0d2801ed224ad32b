"""What lies between the QKV product and attention, in one pass over the QKV matrix.

QK-norm where the model has it, rotary embedding of queries and keys, and the write of keys and
values to their slots of the paged cache. With c, s the cosine and sine of a position's H/2 angles
and (a, b) the halves of a head: (a, b) -> (a c - b s, b c + a s) (RoPE as GPT-NeoX pairs it).

A cache in fp8 gets keys and values as they are (scale 1), saturated at +-448.

T tokens, N query heads, K kv heads, H head size, P blocks, S block size, M positions,
C = (N + 2K) * H. Source: RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.fp8 import FP8, FP8_MAX

_MAX_HEADS_PER_PROGRAM = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FP8_MAX = tl.constexpr(FP8_MAX)


@triton.jit
def _to_cache(x, cache_ptr):
    """x in the cache's dtype. NaN stays NaN, so that a fault shows."""
    dtype = cache_ptr.dtype.element_ty
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _norm_and_rotate(
    x1, x2, norm_ptr, cos, sin, columns, in_half, eps, H: tl.constexpr, QK_NORM: tl.constexpr
):
    """Both halves of some heads, normed where the model does that, and rotated."""
    dtype = x1.dtype
    a = x1.to(tl.float32)
    b = x2.to(tl.float32)
    if QK_NORM:
        mean_square = tl.sum(a * a + b * b, axis=1, keep_dims=True) / H
        scale = tl.rsqrt(mean_square + eps)
        weight1 = tl.load(norm_ptr + columns, mask=in_half, other=0.0).to(tl.float32)
        weight2 = tl.load(norm_ptr + H // 2 + columns, mask=in_half, other=0.0).to(tl.float32)
        # Rounded twice, like the norm of a whole row: see rms_norm.py.
        normed1 = (a * scale).to(dtype).to(tl.float32)
        normed2 = (b * scale).to(dtype).to(tl.float32)
        a = (normed1 * weight1).to(dtype).to(tl.float32)
        b = (normed2 * weight2).to(dtype).to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _kv_write_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    stride_qkv,
    stride_block,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    QK_NORM: tl.constexpr,
    Q_PARTS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    # A program has some query heads of a token, or all of its key and value heads.
    HALF: tl.constexpr = H // 2
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # The loads that others wait for come first.
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    columns = tl.arange(0, HALF_PADDED)[None, :]
    in_half = columns < HALF
    cos_ptrs = cos_sin_ptr + position * H + columns
    qkv_ptr += token * stride_qkv
    if part < Q_PARTS:
        heads = part * Q_HEADS + tl.arange(0, Q_HEADS)[:, None]
        mask = (heads < N) & in_half
        x_ptrs = qkv_ptr + heads * H + columns
        x1 = tl.load(x_ptrs, mask=mask, other=0.0)
        x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0)
        cos = tl.load(cos_ptrs, mask=in_half, other=0.0)
        sin = tl.load(cos_ptrs + HALF, mask=in_half, other=0.0)
        y1, y2 = _norm_and_rotate(x1, x2, q_norm_ptr, cos, sin, columns, in_half, eps, H, QK_NORM)
        y_ptrs = q_ptr + token * (N * H) + heads * H + columns
        tl.store(y_ptrs, y1, mask=mask)
        tl.store(y_ptrs + HALF, y2, mask=mask)
    elif slot >= 0:
        heads = tl.arange(0, K_PADDED)[:, None]
        mask = (heads < K) & in_half
        k_ptrs = qkv_ptr + (N + heads) * H + columns
        k1 = tl.load(k_ptrs, mask=mask, other=0.0)
        k2 = tl.load(k_ptrs + HALF, mask=mask, other=0.0)
        v1 = tl.load(k_ptrs + K * H, mask=mask, other=0.0)
        v2 = tl.load(k_ptrs + K * H + HALF, mask=mask, other=0.0)
        cos = tl.load(cos_ptrs, mask=in_half, other=0.0)
        sin = tl.load(cos_ptrs + HALF, mask=in_half, other=0.0)
        y1, y2 = _norm_and_rotate(k1, k2, k_norm_ptr, cos, sin, columns, in_half, eps, H, QK_NORM)
        cache_offsets = (slot // S) * stride_block + (slot % S) * H + heads * (S * H) + columns
        tl.store(k_cache_ptr + cache_offsets, _to_cache(y1, k_cache_ptr), mask=mask)
        tl.store(k_cache_ptr + cache_offsets + HALF, _to_cache(y2, k_cache_ptr), mask=mask)
        tl.store(v_cache_ptr + cache_offsets, _to_cache(v1, v_cache_ptr), mask=mask)
        tl.store(v_cache_ptr + cache_offsets + HALF, _to_cache(v2, v_cache_ptr), mask=mask)


def kv_write(
    qkv_TC: Tensor,
    cos_sin_MH: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    *,
    num_q_heads: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Norms and rotates queries and keys, writes keys and values, returns q_TNH (contiguous).

    qkv_TC: queries, keys and values side by side (bf16, fp16 or fp32; rows may be strided).
    cos_sin_MH: fp32, contiguous; a row holds the cosines of the H/2 angles, then their sines.
    positions_T: int32 or int64, each in [0, M), those of padding rows too.
    slot_mapping_T: int64, block * S + offset; a negative slot writes no key and no value.
    k_cache_PKSH, v_cache_PKSH: views of qkv_TC's dtype or float8_e4m3fn whose blocks may lie apart;
      written.
    q_norm_H, k_norm_H: weights of the RMSNorm over each head, both or neither.
    """
    num_tokens, width = qkv_TC.shape
    _, num_kv_heads, block_size, head_size = k_cache_PKSH.shape
    num_heads = num_q_heads + 2 * num_kv_heads
    assert qkv_TC.dtype in _DTYPES, f"no kernel for {qkv_TC.dtype}"
    assert qkv_TC.stride(1) == 1, "rows of qkv must be contiguous"
    assert width == num_heads * head_size, f"{width} columns are not {num_heads} heads"
    assert head_size % 2 == 0, f"head size {head_size} has no halves"
    _check_caches(qkv_TC, k_cache_PKSH, v_cache_PKSH)
    assert cos_sin_MH.dtype == torch.float32, "cosines and sines must be fp32"
    assert cos_sin_MH.shape[1] == head_size, "cosines and sines do not fit the head size"
    assert cos_sin_MH.is_contiguous(), "cosines and sines must be contiguous"
    assert positions_T.shape == slot_mapping_T.shape == (num_tokens,), "one position, one slot each"
    assert positions_T.dtype in (torch.int32, torch.int64), "positions must be integers"
    assert slot_mapping_T.dtype == torch.int64, "slots must be int64"
    assert positions_T.is_contiguous(), "positions must be contiguous"
    assert slot_mapping_T.is_contiguous(), "slots must be contiguous"
    assert (q_norm_H is None) == (k_norm_H is None), "QK-norm needs both weights"
    for tensor in (cos_sin_MH, positions_T, slot_mapping_T):
        assert tensor.device == qkv_TC.device, "all tensors must be on one device"

    q_TNH = torch.empty(
        (num_tokens, num_q_heads, head_size), dtype=qkv_TC.dtype, device=qkv_TC.device
    )
    if num_tokens == 0:
        return q_TNH
    q_heads = min(_MAX_HEADS_PER_PROGRAM, triton.next_power_of_2(num_q_heads))
    q_parts = triton.cdiv(num_q_heads, q_heads)
    _kv_write_kernel[(num_tokens, q_parts + 1)](
        qkv_TC,
        cos_sin_MH,
        positions_T,
        slot_mapping_T,
        qkv_TC if q_norm_H is None else q_norm_H,
        qkv_TC if k_norm_H is None else k_norm_H,
        q_TNH,
        k_cache_PKSH,
        v_cache_PKSH,
        qkv_TC.stride(0),
        k_cache_PKSH.stride(0),
        eps,
        N=num_q_heads,
        K=num_kv_heads,
        H=head_size,
        S=block_size,
        QK_NORM=q_norm_H is not None,
        Q_PARTS=q_parts,
        Q_HEADS=q_heads,
        K_PADDED=triton.next_power_of_2(num_kv_heads),
        HALF_PADDED=triton.next_power_of_2(head_size // 2),
        num_warps=2,
    )
    return q_TNH


def _check_caches(qkv_TC: Tensor, k_cache_PKSH: Tensor, v_cache_PKSH: Tensor) -> None:
    block_size, head_size = k_cache_PKSH.shape[2:]
    assert v_cache_PKSH.shape == k_cache_PKSH.shape, "caches differ in shape"
    assert v_cache_PKSH.stride() == k_cache_PKSH.stride(), "caches differ in stride"
    assert v_cache_PKSH.dtype == k_cache_PKSH.dtype, "caches differ in dtype"
    assert k_cache_PKSH.stride()[1:] == (block_size * head_size, head_size, 1), (
        "a block of a cache must be contiguous"
    )
    for cache in (k_cache_PKSH, v_cache_PKSH):
        assert cache.dtype in (qkv_TC.dtype, FP8), f"no cache of {cache.dtype} here"
        assert cache.device == qkv_TC.device, "caches and qkv are on different devices"
