"""paged_prefill against its reference, and the reference against torch's attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, TOLERANCES, HeadShape
from batchgen.kernels.paged_prefill import paged_prefill

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")


def ragged(shape: HeadShape) -> tuple[list[int], list[int]]:
    """Query and sequence lengths: whole prompts, chunks over cached KV, a row without queries."""
    size = shape.block_size
    whole = [1, size - 1, size, size + 1, 150]
    return [*whole, 5, 0, 60, 1], [*whole, 70, 40, 131, 100]


def cumulative(lengths: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_reference_is_torchs_attention(shape: HeadShape, device: str) -> None:
    query_lens, seq_lens = ragged(shape)
    kv = cases.paged_kv(shape, seq_lens, torch.float32, device)
    q_TNH = cases.random_query(shape, sum(query_lens), torch.float32, device).double()
    cu_seqlens_q = cumulative(query_lens, device)
    args = (kv.k_cache_PKSH.double(), kv.v_cache_PKSH.double(), kv.block_table_RX)
    out_TNH = reference.paged_prefill(
        q_TNH, *args, kv.slot_ids_B, cu_seqlens_q, kv.seq_lens_B, scale=0.11
    )
    for row, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        start = int(cu_seqlens_q[row])
        # All positions are queried, so that torch's own causal mask applies; the last ones count.
        q_LNH = torch.zeros(seq_len, *q_TNH.shape[1:], dtype=torch.float64, device=device)
        q_LNH[seq_len - query_len :] = q_TNH[start : start + query_len]
        expected_NLH = functional.scaled_dot_product_attention(
            q_LNH.transpose(0, 1)[None],
            kv.k_contiguous[row].double().transpose(0, 1)[None],
            kv.v_contiguous[row].double().transpose(0, 1)[None],
            is_causal=True,
            scale=0.11,
            enable_gqa=True,
        )[0]
        expected_QNH = expected_NLH.transpose(0, 1)[seq_len - query_len :]
        torch.testing.assert_close(out_TNH[start : start + query_len], expected_QNH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_prefill(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    query_lens, seq_lens = ragged(shape)
    num_tokens = sum(query_lens)
    kv = cases.paged_kv(shape, seq_lens, dtype, device)
    q_TNH = cases.random_query(shape, num_tokens + 7, dtype, device)
    q_TNH[num_tokens:] = torch.nan  # padding of a step
    args = (
        q_TNH,
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        cumulative(query_lens, device),
        kv.seq_lens_B,
    )
    out_TNH = paged_prefill(*args, scale=shape.head_size**-0.5)
    expected_TNH = reference.paged_prefill(*args, scale=shape.head_size**-0.5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        out_TNH[:num_tokens].double(),
        expected_TNH[:num_tokens],
        rtol=tolerance.rtol,
        atol=tolerance.atol,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_in_fp8(dtype: torch.dtype, device: str) -> None:
    """The cache's values widen to q's dtype; its scale is 1."""
    shape = HEAD_SHAPES[1]
    query_lens, seq_lens = ragged(shape)
    kv = cases.paged_kv(shape, seq_lens, dtype, device)
    args = (
        cases.random_query(shape, sum(query_lens), dtype, device),
        kv.k_cache_PKSH.to(torch.float8_e4m3fn),
        kv.v_cache_PKSH.to(torch.float8_e4m3fn),
        kv.block_table_RX,
        kv.slot_ids_B,
        cumulative(query_lens, device),
        kv.seq_lens_B,
    )
    out_TNH = paged_prefill(*args, scale=shape.head_size**-0.5)
    expected_TNH = reference.paged_prefill(*args, scale=shape.head_size**-0.5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        out_TNH.double(), expected_TNH, rtol=tolerance.rtol, atol=tolerance.atol
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        HeadShape(num_heads=16, num_kv_heads=8, head_size=128, block_size=16),
        HeadShape(num_heads=32, num_kv_heads=8, head_size=128, block_size=8),
        HeadShape(num_heads=12, num_kv_heads=12, head_size=64, block_size=64),
        HeadShape(num_heads=16, num_kv_heads=1, head_size=64, block_size=32),
    ],
    ids=str,
)
def test_more_work_than_programs(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    """Programs that stay on the device go through several items each, long and short ones."""
    query_lens = [1, 700, 65, 0, 1025, 128, 33, 250, 64, 17]
    seq_lens = [900, 700, 130, 40, 1025, 1152, 500, 251, 64, 1000]
    num_tokens = sum(query_lens)
    kv = cases.paged_kv(shape, seq_lens, dtype, device)
    args = (
        cases.random_query(shape, num_tokens, dtype, device),
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        cumulative(query_lens, device),
        kv.seq_lens_B,
    )
    out_TNH = paged_prefill(*args, scale=shape.head_size**-0.5)
    expected_TNH = reference.paged_prefill(*args, scale=shape.head_size**-0.5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        out_TNH.double(), expected_TNH, rtol=tolerance.rtol, atol=tolerance.atol
    )


def test_one_prompt_that_fills_its_tiles(device: str) -> None:
    """No padding anywhere: the grid's bound is met exactly."""
    shape = HeadShape(num_heads=4, num_kv_heads=1, head_size=64, block_size=16)
    kv = cases.paged_kv(shape, [256], torch.float16, device)
    q_TNH = cases.random_query(shape, 256, torch.float16, device)
    args = (
        q_TNH,
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        cumulative([256], device),
        kv.seq_lens_B,
    )
    out_TNH = paged_prefill(*args, scale=0.125).double()
    expected_TNH = reference.paged_prefill(*args, scale=0.125)
    torch.testing.assert_close(out_TNH, expected_TNH, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_sequences_than_one_lookup(dtype: torch.dtype, device: str) -> None:
    """The tile lookup counts rows 128 at a time."""
    shape = HeadShape(num_heads=1, num_kv_heads=1, head_size=64, block_size=8)
    lengths = [1 + row % 3 for row in range(140)]
    kv = cases.paged_kv(shape, lengths, dtype, device)
    q_TNH = cases.random_query(shape, sum(lengths), dtype, device)
    args = (
        q_TNH,
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        cumulative(lengths, device),
        kv.seq_lens_B,
    )
    out_TNH = paged_prefill(*args, scale=0.125).double()
    expected_TNH = reference.paged_prefill(*args, scale=0.125)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out_TNH, expected_TNH, rtol=tolerance.rtol, atol=tolerance.atol)
