"""Launch parameters of the attention kernels: a committed table, a row for each kind of GPU.

Nothing is searched for at start. The row of Hopper was measured on an H200 with
`tests/kernels/bench_attention.py --sweep`; a GPU without a row gets parameters that fit the shared
memory of every one since Ampere (under 64 KiB a program), which is safe and not tuned.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """Launch parameters: query rows and KV tokens of a tile, warps, pipeline stages."""

    block_m: int
    block_l: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """Launch parameters of a kernel with a loading warp: KV tokens of a tile, tiles in flight."""

    block_l: int
    num_stages: int


def _tile(block_m: int, block_l: int, num_warps: int, num_stages: int) -> TileShape:
    return TileShape(block_m=block_m, block_l=block_l, num_warps=num_warps, num_stages=num_stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """For fp16 and bf16, by head size: up to 64, and above. Decode takes at least block_m rows."""

    decode: tuple[TileShape, TileShape]
    decode_fp8: tuple[TileShape, TileShape]  # over a cache in fp8
    prefill: tuple[TileShape, TileShape]
    prefix: tuple[TileShape, TileShape]
    small_prefix: TileShape  # up to 64 query rows a group
    # Pieces of a step's KV over all kv heads, for each multiprocessor: up to 128 rows, and above.
    decode_shares: tuple[int, int]


_ANY_GPU = Tuning(
    decode=(_tile(16, 64, 4, 3), _tile(16, 32, 4, 3)),
    decode_fp8=(_tile(16, 64, 4, 3), _tile(16, 32, 4, 3)),
    prefill=(_tile(64, 64, 4, 2), _tile(64, 32, 4, 2)),
    prefix=(_tile(64, 64, 4, 2), _tile(64, 32, 4, 2)),
    small_prefix=_tile(64, 32, 4, 2),
    decode_shares=(8, 8),
)
_HOPPER = Tuning(
    # Up to 96 KiB of K and V in flight on a multiprocessor.
    decode=(_tile(16, 64, 2, 3), _tile(16, 64, 4, 2)),
    decode_fp8=(_tile(16, 64, 1, 3), _tile(16, 32, 1, 3)),
    prefill=(_tile(128, 64, 4, 3), _tile(128, 64, 8, 3)),
    prefix=(_tile(128, 64, 4, 3), _tile(128, 64, 8, 3)),
    small_prefix=_tile(64, 64, 4, 3),
    decode_shares=(4, 12),
)
_BY_CAPABILITY = {(9, 0): _HOPPER}

# fp32 is for tests and CPU-like exactness: tiles that fit anywhere.
FP32_DECODE = _tile(16, 32, 4, 2)
FP32_PREFILL = _tile(32, 32, 4, 1)

# For paged_prefill_hopper, on no other GPU. At head size 128 a sixth stage would not fit.
HOPPER_PREFILL = RingShape(block_l=64, num_stages=5)


@functools.cache
def tuning_for(device: torch.device) -> Tuning:
    """The row of the table for a device; on the interpreter Hopper's, so that it is tested."""
    if device.type != "cuda":
        return _HOPPER
    return _BY_CAPABILITY.get(torch.cuda.get_device_capability(device), _ANY_GPU)


def prefill_tile(dtype: torch.dtype, head_size: int, device: torch.device) -> TileShape:
    """Of paged_prefill; paged_prefill_hopper has as many query rows."""
    if dtype == torch.float32:
        return FP32_PREFILL
    return by_head(tuning_for(device).prefill, head_size)


def by_head(shapes: tuple[TileShape, TileShape], head_size: int) -> TileShape:
    return shapes[0] if head_size <= 64 else shapes[1]
