"""paged_decode and its plan against the reference, and the reference against torch's attention."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, TOLERANCES, HeadShape, PagedKV
from batchgen.kernels.decode_plan import TILE, plan_decode
from batchgen.kernels.fp8 import FP8
from batchgen.kernels.paged_decode import paged_decode

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")


def ragged(shape: HeadShape) -> list[int]:
    """Lengths around a block, a padding row, around a tile, and one that is cut into pieces."""
    size = shape.block_size
    return [1, size - 1, size, 0, size + 1, TILE, TILE + 1, 610]


def caches(kv: PagedKV) -> tuple[torch.Tensor, ...]:
    return (
        kv.k_cache_PKSH,
        kv.v_cache_PKSH,
        kv.block_table_RX,
        kv.slot_ids_B,
        kv.seq_lens_B,
    )


def assert_decodes(
    kv: PagedKV,
    q_BNH: torch.Tensor,
    *,
    kv_starts_B: torch.Tensor | None = None,
    num_shares: int | None = None,
) -> None:
    scale = q_BNH.shape[2] ** -0.5
    plan = plan_decode(
        kv.seq_lens_B,
        kv_starts_B,
        num_kv_heads=kv.k_cache_PKSH.shape[1],
        num_shares=num_shares,
    )
    out_BNH, lse_BN = paged_decode(
        q_BNH, *caches(kv), plan, scale=scale, kv_starts_B=kv_starts_B, return_lse=True
    )
    expected_BNH, expected_lse_BN = reference.paged_decode(
        q_BNH, *caches(kv), scale=scale, kv_starts_B=kv_starts_B
    )
    tolerance = TOLERANCES[q_BNH.dtype]
    bounds = {"rtol": tolerance.rtol, "atol": tolerance.atol}
    torch.testing.assert_close(out_BNH.double(), expected_BNH, **bounds)
    torch.testing.assert_close(lse_BN.double(), expected_lse_BN, **bounds)
    assert torch.all(out_BNH[kv.seq_lens_B == 0] == 0)


@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_reference_is_torchs_attention(shape: HeadShape, device: str) -> None:
    lengths = [1, 17, 130]
    kv = cases.paged_kv(shape, lengths, torch.float64, device)
    q_BNH = cases.random_query(shape, 3, torch.float64, device)
    starts_B = torch.tensor([0, 3, 64], device=device)
    out_BNH, lse_BN = reference.paged_decode(q_BNH, *caches(kv), scale=0.11, kv_starts_B=starts_B)
    for row, start in enumerate(starts_B.tolist()):
        k_LKH, v_LKH = kv.k_contiguous[row][start:], kv.v_contiguous[row][start:]
        expected_N1H = functional.scaled_dot_product_attention(
            q_BNH[row, :, None][None],
            k_LKH.transpose(0, 1)[None],
            v_LKH.transpose(0, 1)[None],
            scale=0.11,
            enable_gqa=True,
        )[0]
        torch.testing.assert_close(out_BNH[row], expected_N1H[:, 0])
        # The lse, by its definition: one score at a time.
        group = shape.num_heads // shape.num_kv_heads
        for head in range(shape.num_heads):
            scores_L = k_LKH[:, head // group] @ q_BNH[row, head] * 0.11
            torch.testing.assert_close(lse_BN[row, head], scores_L.exp().sum().log())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_decode(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    lengths = ragged(shape)
    kv = cases.paged_kv(shape, lengths, dtype, device)
    q_BNH = cases.random_query(shape, len(lengths), dtype, device)
    assert_decodes(kv, q_BNH, num_shares=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_decode_of_an_fp8_cache(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    """The cache's values are exact in every dtype of queries: the bounds are those of dtype."""
    lengths = ragged(shape)
    kv = cases.paged_kv(shape, lengths, FP8, device)
    q_BNH = cases.random_query(shape, len(lengths), dtype, device)
    assert_decodes(kv, q_BNH, num_shares=3)


@pytest.mark.parametrize("shape", HEAD_SHAPES[1:4], ids=str)
def test_decode_without_leading_tokens(shape: HeadShape, device: str) -> None:
    """kv_starts inside a block, at the end of a row, and so that what is left is cut."""
    lengths = [30, 33, 0, 64, 700]
    kv = cases.paged_kv(shape, lengths, torch.float16, device)
    q_BNH = cases.random_query(shape, len(lengths), torch.float16, device)
    starts_B = torch.tensor([0, 32, 0, 64, 19], dtype=torch.int32, device=device)
    for row, start in enumerate(starts_B.tolist()):
        blocks = kv.block_table_RX[kv.slot_ids_B[row], : start // shape.block_size].long()
        kv.k_cache_PKSH[blocks] = torch.nan  # what is left out is not read either
        kv.v_cache_PKSH[blocks] = torch.nan
    assert_decodes(kv, q_BNH, kv_starts_B=starts_B, num_shares=2)


def test_decode_merges_more_pieces_than_one_round(device: str) -> None:
    """A single long row over the default shares: more than 32 partial results of one row."""
    shape = HeadShape(num_heads=2, num_kv_heads=1, head_size=64, block_size=32)
    kv = cases.paged_kv(shape, [8500, 5], torch.float16, device)
    q_BNH = cases.random_query(shape, 2, torch.float16, device)
    assert_decodes(kv, q_BNH, num_shares=40)


def test_decode_without_lse_is_the_same(device: str) -> None:
    shape = HEAD_SHAPES[0]
    kv = cases.paged_kv(shape, [5, 600], torch.float16, device)
    q_BNH = cases.random_query(shape, 2, torch.float16, device)
    plan = plan_decode(kv.seq_lens_B, num_kv_heads=2, num_shares=2)
    with_lse_BNH, _ = paged_decode(q_BNH, *caches(kv), plan, scale=0.1, return_lse=True)
    out_BNH = paged_decode(q_BNH, *caches(kv), plan, scale=0.1)
    assert torch.equal(out_BNH, with_lse_BNH)


@pytest.mark.parametrize("seed", range(6))
def test_plan_covers_every_tile_once(seed: int, device: str) -> None:
    choose = random.Random(seed)
    num_rows, num_shares = choose.choice([(1, 1), (1, 40), (5, 7), (300, 33), (2000, 132)])
    longest = choose.choice([1, 300, 9000])
    seq_lens = [choose.choice([0, 1, choose.randrange(longest + 1)]) for _ in range(num_rows)]
    starts = [choose.choice([0, choose.randrange(length + 1)]) for length in seq_lens]
    plan = plan_decode(
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        num_kv_heads=1,
        num_shares=num_shares,
    )
    tiles = [-(-(length - start) // TILE) for length, start in zip(seq_lens, starts, strict=True)]
    share = max(-(-sum(tiles) // num_shares), 4)
    merges = {row: (first, end) for row, first, end in plan.merges_W3.tolist() if row < num_rows}
    partials: dict[int, list[int]] = {row: [] for row in merges}
    covered: dict[int, int] = dict.fromkeys(range(num_rows), 0)
    seen: set[int] = set()
    for row, first, end, partial in plan.pieces_P4.tolist():
        if row == num_rows:
            continue
        assert first == covered[row], "a row's pieces follow each other"
        assert end - first <= share
        covered[row] = end
        seen.add(row)
        if partial < 0:
            assert row not in merges
            assert end == tiles[row]
        else:
            partials[row].append(partial)
    assert seen == set(range(num_rows)), "every row has a piece, padding rows too"
    assert list(covered.values()) == tiles
    assert all(partials[row] == list(range(*merges[row])) for row in merges)
    slots = [index for row in merges for index in partials[row]]
    assert len(slots) == len(set(slots))
    assert max(slots, default=0) < plan.max_partials


@pytest.mark.gpu
def test_decode_is_replayed_with_new_lengths() -> None:
    """Plan and attention in one CUDA graph: lengths change between replays, shapes do not."""
    shape = HEAD_SHAPES[1]
    kv = cases.paged_kv(shape, [700, 40, 1000], torch.bfloat16, "cuda")
    q_BNH = cases.random_query(shape, 3, torch.bfloat16, "cuda")

    def step() -> torch.Tensor:
        plan = plan_decode(kv.seq_lens_B, num_kv_heads=shape.num_kv_heads, num_shares=6)
        return paged_decode(q_BNH, *caches(kv), plan, scale=0.1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BNH = step()
    for lengths in ([700, 40, 1000], [1, 0, 999], [650, 40, 2], [0, 0, 0]):
        kv.seq_lens_B.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected_BNH, _ = reference.paged_decode(q_BNH, *caches(kv), scale=0.1)
        torch.testing.assert_close(out_BNH.double(), expected_BNH, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.gpu
def test_decode_in_a_pool_past_32_bits() -> None:
    """Blocks whose offset, in elements, does not fit into an int32."""
    shape = HeadShape(num_heads=8, num_kv_heads=8, head_size=128, block_size=32)
    small = cases.paged_kv(shape, [70, 300], torch.bfloat16, "cuda")
    pool = small.k_cache_PKSH.shape[0]
    block_elements = 2 * 8 * 32 * 128
    first_block = 2**31 // block_elements + 1
    kv_P2KSH = torch.zeros((first_block + pool, 2, 8, 32, 128), dtype=torch.bfloat16, device="cuda")
    kv_P2KSH[first_block:, 0] = small.k_cache_PKSH
    kv_P2KSH[first_block:, 1] = small.v_cache_PKSH
    kv = PagedKV(
        k_cache_PKSH=kv_P2KSH[:, 0],
        v_cache_PKSH=kv_P2KSH[:, 1],
        block_table_RX=small.block_table_RX + first_block,
        slot_ids_B=small.slot_ids_B,
        seq_lens_B=small.seq_lens_B,
        k_contiguous=small.k_contiguous,
        v_contiguous=small.v_contiguous,
    )
    assert_decodes(kv, cases.random_query(shape, 2, torch.bfloat16, "cuda"), num_shares=2)
