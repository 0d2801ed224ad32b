"""shared_prefix and merge_attention against references, and both with paged_decode as one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, TOLERANCES, HeadShape, PagedKV
from batchgen.kernels.paged_decode import paged_decode, plan_decode
from batchgen.kernels.shared_prefix import merge_attention, shared_prefix

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS = 38
PREFIX_LENS = [96, 5, 0, 33, 170]
GROUP_SIZES = [3, 0, 2, 23, 1]  # the rest of the rows has no group


def members(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scattered batch rows of every group, with padding at the end, and their borders."""
    rows = torch.randperm(NUM_ROWS, generator=cases.generator("cpu", 3))
    member_ids_U = rows[: sum(GROUP_SIZES) + 4].int()
    return member_ids_U.to(device), torch.tensor([0, *GROUP_SIZES]).cumsum(0).int().to(device)


def prefixes(kv: PagedKV) -> tuple[torch.Tensor, ...]:
    table_GX = kv.block_table_RX[kv.slot_ids_B.long()]
    return kv.k_cache_PKSH, kv.v_cache_PKSH, table_GX, kv.seq_lens_B


def test_reference_is_torchs_attention(device: str) -> None:
    shape = HEAD_SHAPES[3]
    kv = cases.paged_kv(shape, PREFIX_LENS, torch.float64, device)
    q_BNH = cases.random_query(shape, NUM_ROWS, torch.float64, device)
    member_ids_U, cu_members_G1 = members(device)
    out_BNH, lse_BN = reference.shared_prefix(
        q_BNH, *prefixes(kv), member_ids_U, cu_members_G1, scale=0.2
    )
    groups = torch.repeat_interleave(torch.arange(5), torch.tensor(GROUP_SIZES))
    for row, group in zip(member_ids_U.tolist(), groups.tolist(), strict=False):
        if PREFIX_LENS[group] == 0:
            assert torch.all(lse_BN[row] == -math.inf)
            continue
        expected_N1H = functional.scaled_dot_product_attention(
            q_BNH[row, :, None][None],
            kv.k_contiguous[group].transpose(0, 1)[None],
            kv.v_contiguous[group].transpose(0, 1)[None],
            scale=0.2,
            enable_gqa=True,
        )[0]
        torch.testing.assert_close(out_BNH[row], expected_N1H[:, 0])


def assert_prefix(
    shape: HeadShape,
    dtype: torch.dtype,
    num_splits: int,
    device: str,
    cache_dtype: torch.dtype | None = None,
) -> None:
    kv = cases.paged_kv(shape, PREFIX_LENS, dtype, device)
    q_BNH = cases.random_query(shape, NUM_ROWS, dtype, device)
    k_cache_PKSH, v_cache_PKSH, *prefix = prefixes(kv)
    if cache_dtype is not None:
        k_cache_PKSH, v_cache_PKSH = k_cache_PKSH.to(cache_dtype), v_cache_PKSH.to(cache_dtype)
    args = (q_BNH, k_cache_PKSH, v_cache_PKSH, *prefix, *members(device))
    out_BNH, lse_BN = shared_prefix(*args, scale=0.1, num_splits=num_splits)
    expected_BNH, expected_lse_BN = reference.shared_prefix(*args, scale=0.1)
    tolerance = TOLERANCES[dtype]
    bounds = {"rtol": tolerance.rtol, "atol": tolerance.atol}
    torch.testing.assert_close(lse_BN.double(), expected_lse_BN, **bounds)
    has_prefix_B = expected_lse_BN[:, 0] > -math.inf
    torch.testing.assert_close(out_BNH[has_prefix_B].double(), expected_BNH[has_prefix_B], **bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_shared_prefix(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    assert_prefix(shape, dtype, 1, device)


@pytest.mark.parametrize("shape", HEAD_SHAPES[1:4], ids=str)
def test_shared_prefix_in_splits(shape: HeadShape, device: str) -> None:
    """Some splits of a short prefix are empty."""
    assert_prefix(shape, torch.float16, 4, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_prefix_in_fp8(dtype: torch.dtype, device: str) -> None:
    assert_prefix(HEAD_SHAPES[1], dtype, 1, device, torch.float8_e4m3fn)


def test_prefix_and_own_tokens_make_the_whole(device: str) -> None:
    """Rows whose first tokens are a group's prefix: both kernels merged equal one attention."""
    shape = HeadShape(num_heads=4, num_kv_heads=2, head_size=64, block_size=16)
    prefix_len, lengths = 96, [97, 300, 40, 111, 96]
    kv = cases.paged_kv(shape, lengths, torch.float32, device)
    table_BX = kv.block_table_RX[kv.slot_ids_B.long()]
    sharing = [0, 1, 3, 4]
    for row in sharing[1:]:
        kv.block_table_RX[kv.slot_ids_B[row], : prefix_len // 16] = table_BX[0, : prefix_len // 16]
    q_BNH = cases.random_query(shape, len(lengths), torch.float32, device)
    starts = [prefix_len if row in sharing else 0 for row in range(len(lengths))]
    kv_starts_B = torch.tensor(starts, dtype=torch.int32, device=device)
    prefix_side = shared_prefix(
        q_BNH,
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        table_BX[:1],
        torch.tensor([prefix_len], dtype=torch.int32, device=device),
        torch.tensor(sharing, dtype=torch.int32, device=device),
        torch.tensor([0, len(sharing)], dtype=torch.int32, device=device),
        scale=0.125,
    )
    args = (
        q_BNH,
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        kv.seq_lens_B,
    )
    plan = plan_decode(kv.seq_lens_B, kv_starts_B, num_kv_heads=2)
    own_side = paged_decode(*args, plan, scale=0.125, kv_starts_B=kv_starts_B, return_lse=True)
    out_BNH = merge_attention(*prefix_side, *own_side)
    expected_BNH, _ = reference.paged_decode(*args, scale=0.125)
    torch.testing.assert_close(out_BNH.double(), expected_BNH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [64, 96])
def test_merge_attention(head_size: int, dtype: torch.dtype, device: str) -> None:
    shape = HeadShape(num_heads=3, num_kv_heads=3, head_size=head_size, block_size=8)
    out_a_BNH = cases.random_query(shape, 9, dtype, device)
    out_b_BNH = out_a_BNH.flip(0).contiguous()
    random = cases.generator(device, 5)
    lse_a_BN = torch.randn(9, 3, generator=random, device=device) * 20
    lse_b_BN = torch.randn(9, 3, generator=random, device=device) * 20
    for row, empty in ((2, lse_a_BN), (5, lse_b_BN), (7, lse_a_BN), (7, lse_b_BN)):
        empty[row] = -math.inf
    out_a_BNH[2] = torch.nan  # never written, never read
    out_b_BNH[5] = torch.nan
    merged_BNH = merge_attention(out_a_BNH, lse_a_BN, out_b_BNH, lse_b_BN)
    expected_BNH = reference.merge_attention(out_a_BNH, lse_a_BN, out_b_BNH, lse_b_BN)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        merged_BNH.double(), expected_BNH, rtol=tolerance.rtol, atol=tolerance.atol
    )
    assert torch.equal(merged_BNH[2], out_b_BNH[2])
    assert torch.all(merged_BNH[7] == 0)


def test_merge_reference_is_attention_over_both_sides(device: str) -> None:
    """Cutting the KV anywhere and merging gives the attention over all of it."""
    shape = HEAD_SHAPES[1]
    kv = cases.paged_kv(shape, [150], torch.float64, device)
    q_BNH = cases.random_query(shape, 1, torch.float64, device)
    table = (kv.k_cache_PKSH, kv.v_cache_PKSH, kv.block_table_RX, kv.slot_ids_B)
    whole_BNH, _ = reference.paged_decode(q_BNH, *table, kv.seq_lens_B, scale=0.3)
    for cut in (1, 64, 149):
        cut_B = torch.tensor([cut], device=device)
        left = reference.paged_decode(q_BNH, *table, cut_B, scale=0.3)
        right = reference.paged_decode(q_BNH, *table, kv.seq_lens_B, scale=0.3, kv_starts_B=cut_B)
        torch.testing.assert_close(reference.merge_attention(*left, *right), whole_BNH)
