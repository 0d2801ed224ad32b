"""paged_prefill against its reference, and the reference against torch's attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, TOLERANCES, HeadShape, PagedKV
from batchgen.kernels.paged_prefill import paged_prefill
from batchgen.kernels.shared_prefix import merge_attention

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")


def ragged(shape: HeadShape) -> tuple[list[int], list[int]]:
    """Query and sequence lengths: whole prompts, chunks over cached KV, a row without queries."""
    size = shape.block_size
    whole = [1, size - 1, size, size + 1, 150]
    return [*whole, 5, 0, 60, 1], [*whole, 70, 40, 131, 100]


def cumulative(lengths: Sequence[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_reference_is_torchs_attention(shape: HeadShape, device: str) -> None:
    query_lens, seq_lens = ragged(shape)
    kv = cases.paged_kv(shape, seq_lens, torch.float32, device)
    q_TNH = cases.random_query(shape, sum(query_lens), torch.float32, device).double()
    cu_seqlens_q = cumulative(query_lens, device)
    args = (kv.k_cache_PKSH.double(), kv.v_cache_PKSH.double(), kv.block_table_RX)
    out_TNH, _ = reference.paged_prefill(
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
    expected_TNH, _ = reference.paged_prefill(*args, scale=shape.head_size**-0.5)
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
    expected_TNH, _ = reference.paged_prefill(*args, scale=shape.head_size**-0.5)
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
    expected_TNH, _ = reference.paged_prefill(*args, scale=shape.head_size**-0.5)
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
    expected_TNH, _ = reference.paged_prefill(*args, scale=0.125)
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
    expected_TNH, _ = reference.paged_prefill(*args, scale=0.125)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out_TNH, expected_TNH, rtol=tolerance.rtol, atol=tolerance.atol)


def assert_parts(
    q_TNH: torch.Tensor, kv: PagedKV, lengths: Sequence[int], kv_starts: list[int], is_causal: bool
) -> None:
    """Outputs, log-sum-exps and what is empty, against the reference; `lengths` of the queries."""
    device = str(q_TNH.device)
    args = (
        q_TNH,
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        cumulative(lengths, device),
        kv.seq_lens_B,
    )
    starts_B = torch.tensor(kv_starts, dtype=torch.int32, device=device) if kv_starts else None
    out_TNH, lse_TN = paged_prefill(
        *args, scale=0.1, kv_starts_B=starts_B, is_causal=is_causal, return_lse=True
    )
    expected_TNH, expected_lse_TN = reference.paged_prefill(
        *args, scale=0.1, kv_starts_B=starts_B, is_causal=is_causal
    )
    tolerance = TOLERANCES[q_TNH.dtype]
    bounds = {"rtol": tolerance.rtol, "atol": tolerance.atol}
    torch.testing.assert_close(lse_TN.double(), expected_lse_TN, **bounds)
    sees_T = expected_lse_TN[:, 0] > -math.inf
    torch.testing.assert_close(out_TNH[sees_T].double(), expected_TNH[sees_T], **bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES[1:4], ids=str)
def test_own_kv_alone(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    """Starts at the first token, at a block within, and just before the chunk."""
    query_lens, seq_lens = ragged(shape)
    kv = cases.paged_kv(shape, seq_lens, dtype, device)
    contexts = [s - q for q, s in zip(query_lens, seq_lens, strict=True)]
    starts = [context // shape.block_size // (1 + row % 2) for row, context in enumerate(contexts)]
    assert len({start * shape.block_size for start in starts}) > 2
    q_TNH = cases.random_query(shape, sum(query_lens) + 3, dtype, device)
    assert_parts(q_TNH, kv, query_lens, [s * shape.block_size for s in starts], is_causal=True)


PREFIXES = [(33, 96), (0, 50), (5, 0), (150, 64), (1, 7), (70, 131), (8, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES[1:4], ids=str)
def test_all_tokens_see_a_whole_prefix(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    """More query tokens than KV, fewer, none, and prefixes without KV."""
    query_lens, prefix_lens = zip(*PREFIXES, strict=True)
    kv = cases.paged_kv(shape, list(prefix_lens), dtype, device)
    q_TNH = cases.random_query(shape, sum(query_lens) + 3, dtype, device)
    assert_parts(q_TNH, kv, query_lens, [], is_causal=False)


def test_reference_of_the_parts_is_torchs_attention(device: str) -> None:
    """KV from a start on, by torch's attention under an explicit mask."""
    shape = HEAD_SHAPES[1]
    kv = cases.paged_kv(shape, [150], torch.float64, device)
    q_TNH = cases.random_query(shape, 40, torch.float64, device)
    args = (q_TNH, kv.k_cache_PKSH, kv.v_cache_PKSH, kv.block_table_RX, kv.slot_ids_B)
    cu_seqlens_q = cumulative([40], device)
    for start, is_causal in itertools.product((0, 96), (True, False)):
        starts_B = torch.tensor([start], device=device)
        out_TNH, lse_TN = reference.paged_prefill(
            *args, cu_seqlens_q, kv.seq_lens_B, scale=0.2, kv_starts_B=starts_B, is_causal=is_causal
        )
        visible_TL = torch.ones(40, 150 - start, dtype=torch.bool, device=device)
        if is_causal:
            visible_TL = visible_TL.tril(110 - start)
        k_NLH = kv.k_contiguous[0][start:].transpose(0, 1).repeat_interleave(2, dim=0)
        v_NLH = kv.v_contiguous[0][start:].transpose(0, 1).repeat_interleave(2, dim=0)
        q_NTH = q_TNH.transpose(0, 1)
        expected_NTH = functional.scaled_dot_product_attention(
            q_NTH, k_NLH, v_NLH, attn_mask=visible_TL, scale=0.2
        )
        torch.testing.assert_close(out_TNH, expected_NTH.transpose(0, 1))
        scores_NTL = (q_NTH @ k_NLH.mT * 0.2).masked_fill(~visible_TL, -math.inf)
        torch.testing.assert_close(lse_TN, scores_NTL.logsumexp(-1).T)


def assert_groups_make_the_whole(
    shape: HeadShape,
    dtype: torch.dtype,
    device: str,
    groups: list[tuple[int, list[tuple[int, int]]]],
) -> None:
    """`groups`: tokens of the prefix (0: none is shared), and each chunk's context and queries."""
    chunks = [(prefix, *chunk) for prefix, members in groups for chunk in members]
    kv = cases.paged_kv(shape, [context + own for _, context, own in chunks], dtype, device)
    firsts = [0, *itertools.accumulate(len(members) for _, members in groups)]
    for (prefix, _), (first, end) in zip(groups, itertools.pairwise(firsts), strict=True):
        slots = kv.slot_ids_B[first:end].long()
        count = prefix // shape.block_size
        kv.block_table_RX[slots, :count] = kv.block_table_RX[slots[0], :count].clone()
    query_lens = [own for _, _, own in chunks]
    q_TNH = cases.random_query(shape, sum(query_lens), dtype, device)
    table = (kv.k_cache_PKSH, kv.v_cache_PKSH, kv.block_table_RX)
    chunk_args = (kv.slot_ids_B, cumulative(query_lens, device), kv.seq_lens_B)
    own_side = paged_prefill(
        q_TNH,
        *table,
        *chunk_args,
        scale=0.125,
        kv_starts_B=torch.tensor([prefix for prefix, _, _ in chunks], device=device).int(),
        return_lse=True,
    )
    prefix_side = paged_prefill(
        q_TNH,
        *table,
        kv.slot_ids_B[torch.tensor(firsts[:-1], device=device)],
        cumulative([sum(own for _, own in members) for _, members in groups], device),
        torch.tensor([prefix for prefix, _ in groups], device=device).int(),
        scale=0.125,
        is_causal=False,
        return_lse=True,
    )
    out_TNH = merge_attention(*own_side, *prefix_side)
    expected_TNH, _ = reference.paged_prefill(q_TNH, *table, *chunk_args, scale=0.125)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        out_TNH.double(), expected_TNH, rtol=tolerance.rtol, atol=tolerance.atol
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_prefixes_and_own_kv_make_the_whole(
    shape: HeadShape, dtype: torch.dtype, device: str
) -> None:
    """Two groups, members with more cached tokens than the prefix, and chunks without a group."""
    groups = [
        (96, [(96, 5), (96, 30), (130, 1), (128, 17)]),
        (0, [(0, 33), (70, 4)]),
        (32, [(32, 9), (45, 40)]),
        (0, [(0, 1)]),
    ]
    assert_groups_make_the_whole(shape, dtype, device, groups)


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
def test_more_groups_than_programs(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    """Programs that stay on the device go through items with and without KV, of many lengths."""
    groups: list[tuple[int, list[tuple[int, int]]]] = []
    for index in range(40):
        prefix = (index % 7) * 64
        count = 1 + index * 5 % 13
        groups.append((prefix, [(prefix + i % 3 * 50, 1 + (i * 37) % 90) for i in range(count)]))
    assert_groups_make_the_whole(shape, dtype, device, groups)
