"""Shapes, dtypes, tolerances and builders of inputs, shared by the kernels' tests and benchmarks.

Letters of the shape suffixes are those of reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchgen.kernels.reference import Filters

# ---- shared -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Bounds for torch.testing.assert_close."""

    rtol: float
    atol: float


TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.float16: Tolerance(rtol=2e-3, atol=2e-3),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1.6e-2),
}


def dtypes_for(device: str) -> list[torch.dtype]:
    """The dtypes that a kernel is tested with; the interpreter's bf16 is too coarse to compare."""
    if device == "cuda":
        return [torch.float32, torch.float16, torch.bfloat16]
    return [torch.float32, torch.float16]


def generator(device: str, seed: int = 0) -> torch.Generator:
    """A seeded generator on the device."""
    return torch.Generator(device=device).manual_seed(seed)


# ---- element-wise and sampling ------------------------------------------------------------------

# A kernel rounds in the same places as its reference: they differ by the order of a sum, which may
# tip one rounding.
ROUNDINGS = {
    torch.float32: Tolerance(rtol=2e-6, atol=2e-6),
    torch.float16: Tolerance(rtol=2e-3, atol=1e-5),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-5),
}

# [T, D]: a single row, sizes that are no power of two, rows that do not fill a program.
NORM_SHAPES = [(1, 64), (7, 576), (3, 1000), (5, 2048), (2, 4096)]
# [T, I]
SILU_SHAPES = [(1, 32), (3, 1536), (2, 1000), (3, 3072)]
FILTERS = [
    Filters(temperature=0.0, top_k=5),
    Filters(),
    Filters(temperature=0.7),
    Filters(temperature=0.8, top_k=1),
    Filters(temperature=1.3, top_k=50),
    Filters(temperature=0.8, top_p=0.9),
    Filters(temperature=2.5, top_p=0.999),
    Filters(temperature=1.5, min_p=0.05),
    Filters(temperature=1.1, top_k=40, top_p=0.8, min_p=0.02),
]


def random_tensor(
    *shape: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal values with a standard deviation of `scale`, the same on every device."""
    values = torch.randn(shape, generator=generator("cpu", seed)) * scale
    return values.to(dtype).to(device)


def cos_sin_table(num_positions: int, head_size: int, device: str) -> Tensor:
    """cos_sin_MH for a RoPE base of 10000, fp32."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * 10000.0**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(device)


def nan_kv_pool(
    shape: HeadShape, *, num_blocks: int, num_layers: int, dtype: torch.dtype, device: str
) -> Tensor:
    """kv_PL2KSH full of NaN."""
    size = (num_blocks, num_layers, 2, shape.num_kv_heads, shape.block_size, shape.head_size)
    return torch.full(size, torch.nan, dtype=dtype, device=device)


# ---- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Heads of an attention layer and the block size of its cache."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int


# GQA groups 1, 2, 3, 4, 8; head sizes 64, 96, 128; block sizes 8, 16, 32.
HEAD_SHAPES = [
    HeadShape(num_heads=2, num_kv_heads=2, head_size=64, block_size=16),
    HeadShape(num_heads=4, num_kv_heads=2, head_size=128, block_size=16),
    HeadShape(num_heads=9, num_kv_heads=3, head_size=64, block_size=32),
    HeadShape(num_heads=8, num_kv_heads=2, head_size=96, block_size=8),
    HeadShape(num_heads=8, num_kv_heads=1, head_size=128, block_size=32),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKV:
    """Random KV of ragged sequences in a pool of blocks, as one layer of an engine sees it.

    Every slot of the pool without a token holds NaN, and so does the neighbouring layer. A row's
    blocks are scattered over the pool, rows of the block table over the slots, and table entries
    past a row's blocks name a block of NaN.
    """

    k_cache_PKSH: Tensor
    v_cache_PKSH: Tensor
    block_table_RX: Tensor  # int32
    slot_ids_B: Tensor  # int32
    seq_lens_B: Tensor  # int32
    k_contiguous: list[Tensor]  # [L, K, H] a row
    v_contiguous: list[Tensor]


def paged_kv(
    shape: HeadShape, seq_lens: list[int], dtype: torch.dtype, device: str, seed: int = 0
) -> PagedKV:
    """A PagedKV with sequences of these lengths; length 0 is a padding row."""
    random = generator(device, seed)
    num_blocks = [-(-seq_len // shape.block_size) for seq_len in seq_lens]
    num_slots = len(seq_lens) + 3
    pool = sum(num_blocks) + 5
    kv_PL2KSH = torch.full(
        (pool, 2, 2, shape.num_kv_heads, shape.block_size, shape.head_size),
        torch.nan,
        dtype=dtype,
        device=device,
    )
    k_cache_PKSH, v_cache_PKSH = kv_PL2KSH[:, 1, 0], kv_PL2KSH[:, 1, 1]
    free_blocks = torch.randperm(pool, generator=random, device=device).int()
    slot_ids_B = torch.randperm(num_slots, generator=random, device=device)[: len(seq_lens)].int()
    block_table_RX = free_blocks[-1].repeat(num_slots, max(num_blocks) + 2)
    k_contiguous: list[Tensor] = []
    v_contiguous: list[Tensor] = []
    for row, (seq_len, blocks) in enumerate(zip(seq_lens, num_blocks, strict=True)):
        taken, free_blocks = free_blocks[:blocks], free_blocks[blocks:]
        block_table_RX[slot_ids_B[row], :blocks] = taken
        positions = torch.arange(seq_len, device=device)
        block_of, offset = taken[positions // shape.block_size].long(), positions % shape.block_size
        size = (seq_len, shape.num_kv_heads, shape.head_size)
        for cache_PKSH, rows in ((k_cache_PKSH, k_contiguous), (v_cache_PKSH, v_contiguous)):
            tokens = torch.randn(size, generator=random, dtype=torch.float32, device=device)
            rows.append(tokens.to(dtype))
            cache_PKSH[block_of, :, offset] = rows[-1]
    return PagedKV(
        k_cache_PKSH=k_cache_PKSH,
        v_cache_PKSH=v_cache_PKSH,
        block_table_RX=block_table_RX,
        slot_ids_B=slot_ids_B,
        seq_lens_B=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        k_contiguous=k_contiguous,
        v_contiguous=v_contiguous,
    )


def random_query(shape: HeadShape, num_tokens: int, dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal queries, [T, N, H]."""
    size = (num_tokens, shape.num_heads, shape.head_size)
    q_TNH = torch.randn(size, generator=generator(device, 1), dtype=torch.float32, device=device)
    return q_TNH.to(dtype)
