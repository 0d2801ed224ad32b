"""Keys and values of single tokens copied from slot to slot, in one layer of the paged cache.

Prompts that share a part of a block share it by these copies: whole blocks are shared as they are.

C copies, P blocks, K kv heads, S block size, H head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_slots_kernel(
    k_cache_ptr,
    v_cache_ptr,
    source_ptr,
    target_ptr,
    stride_block,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    K_PADDED: tl.constexpr,
    H_PADDED: tl.constexpr,
):
    copy = tl.program_id(0)
    source = tl.load(source_ptr + copy)
    target = tl.load(target_ptr + copy)
    heads = tl.arange(0, K_PADDED)[:, None]
    columns = tl.arange(0, H_PADDED)[None, :]
    mask = (heads < K) & (columns < H)
    token_offsets = heads * (S * H) + columns
    source_offsets = (source // S) * stride_block + (source % S) * H + token_offsets
    target_offsets = (target // S) * stride_block + (target % S) * H + token_offsets
    k = tl.load(k_cache_ptr + source_offsets, mask=mask)
    v = tl.load(v_cache_ptr + source_offsets, mask=mask)
    tl.store(k_cache_ptr + target_offsets, k, mask=mask)
    tl.store(v_cache_ptr + target_offsets, v, mask=mask)


def copy_slots(
    k_cache_PKSH: Tensor, v_cache_PKSH: Tensor, source_C: Tensor, target_C: Tensor
) -> None:
    """Copies the token in slot source_C[i] to slot target_C[i], keys and values.

    source_C, target_C: int64, block * S + offset; no slot is both a source and a target, and none
      is a target twice.
    k_cache_PKSH, v_cache_PKSH: views of one dtype whose blocks may lie apart; written.
    """
    _, num_kv_heads, block_size, head_size = k_cache_PKSH.shape
    assert source_C.shape == target_C.shape, "one target a source"
    assert source_C.dtype == target_C.dtype == torch.int64, "slots must be int64"
    assert v_cache_PKSH.shape == k_cache_PKSH.shape, "caches differ in shape"
    assert v_cache_PKSH.stride() == k_cache_PKSH.stride(), "caches differ in stride"
    assert k_cache_PKSH.stride()[1:] == (block_size * head_size, head_size, 1), (
        "a block of a cache must be contiguous"
    )
    if len(source_C) == 0:
        return
    _copy_slots_kernel[(len(source_C),)](
        k_cache_PKSH,
        v_cache_PKSH,
        source_C,
        target_C,
        k_cache_PKSH.stride(0),
        K=num_kv_heads,
        S=block_size,
        H=head_size,
        K_PADDED=triton.next_power_of_2(num_kv_heads),
        H_PADDED=triton.next_power_of_2(head_size),
    )
