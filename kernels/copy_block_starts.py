"""The filled slots at the start of KV blocks copied to other blocks, in all layers at once.

Beams that go on from one beam each write on in a copy of its last block. Which blocks are copied is
decided on the device, in a captured step: the launch is the same for every step, and its programs
end at once where nothing is to copy.

F forks, P blocks, L layers, 2 for keys and values, K kv heads, S block size, H head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements of a head's block that a program moves at a time
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by item size


@triton.jit
def _copy_block_starts_kernel(
    kv_ptr,
    source_ptr,
    target_ptr,
    num_slots_ptr,
    is_copied_ptr,
    stride_block,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    fork = tl.program_id(0)
    layer = tl.program_id(1)
    if tl.load(is_copied_ptr + fork):
        source = tl.load(source_ptr + fork).to(tl.int64) * stride_block
        target = tl.load(target_ptr + fork).to(tl.int64) * stride_block
        size = tl.load(num_slots_ptr + fork) * H
        for head in range(HEADS):
            start = (layer * HEADS + head) * (S * H)
            for tile in range(0, S * H, TILE):
                offsets = tile + tl.arange(0, TILE)
                values = tl.load(kv_ptr + source + start + offsets, mask=offsets < size)
                tl.store(kv_ptr + target + start + offsets, values, mask=offsets < size)


def copy_block_starts(
    kv_PL2KSH: Tensor, source_F: Tensor, target_F: Tensor, num_slots_F: Tensor, is_copied_F: Tensor
) -> None:
    """Copies the first num_slots_F[i] slots of block source_F[i] to block target_F[i], in every
    layer, keys and values, where is_copied_F[i].

    kv_PL2KSH: contiguous, items of 1, 2 or 4 bytes; written.
    source_F, target_F, num_slots_F: int32, at most S slots. Of the forks that are copied, no block
      is both a source and a target, and none is a target twice; the others are not looked at.
    is_copied_F: bool.
    """
    _, num_layers, _, num_kv_heads, block_size, head_size = kv_PL2KSH.shape
    assert kv_PL2KSH.is_contiguous(), "the cache must be contiguous"
    for tensor in (source_F, target_F, num_slots_F):
        assert tensor.dtype == torch.int32, "blocks and counts must be int32"
        assert tensor.shape == is_copied_F.shape, "one entry a fork"
        assert tensor.is_contiguous(), "one entry after the other"
    assert is_copied_F.dtype == torch.bool, "is_copied_F must be bool"
    if len(source_F) == 0:
        return
    _copy_block_starts_kernel[(len(source_F), num_layers)](
        kv_PL2KSH.view(_BITS[kv_PL2KSH.itemsize]),
        source_F,
        target_F,
        num_slots_F,
        is_copied_F,
        kv_PL2KSH.stride(0),
        HEADS=2 * num_kv_heads,
        S=block_size,
        H=head_size,
        TILE=min(_TILE, triton.next_power_of_2(block_size * head_size)),
    )
