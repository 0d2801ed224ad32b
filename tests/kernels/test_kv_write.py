"""kv_write against its reference, and the reference against transformers' rotary embedding."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, ROUNDINGS, HeadShape, random_tensor
from batchgen.kernels.fp8 import FP8
from batchgen.kernels.kv_write import kv_write

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS, NUM_LAYERS, LAYER = 6, 3, 1
NUM_POSITIONS = 200


def slots(block_size: int, device: str) -> torch.Tensor:
    """Slots of nine tokens over shuffled blocks; two are padding."""
    addresses = [(5, 0), (0, block_size - 1), None, (3, 2), (3, 3), (0, 0), None, (1, 4), (4, 7)]
    ids = [-1 if a is None else a[0] * block_size + a[1] for a in addresses]
    return torch.tensor(ids, device=device)


POSITIONS = [0, 17, 0, 2, 3, 199, 0, 101, 64]


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_reference_is_transformers_rope(shape: HeadShape, with_norm: bool, device: str) -> None:
    size = shape.head_size
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv_TC = random_tensor(9, num_heads * size, dtype=torch.float32, device=device)
    positions_T = torch.tensor(POSITIONS, device=device)
    config = LlamaConfig(
        hidden_size=shape.num_heads * size, num_attention_heads=shape.num_heads, head_dim=size
    )
    cos, sin = LlamaRotaryEmbedding(config).to(device)(qkv_TC, positions_T[None])
    q, k, v = qkv_TC.view(9, -1, size).split(
        (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1
    )
    norms: dict[str, torch.Tensor] = {}
    if with_norm:
        q_norm, k_norm = (Qwen3RMSNorm(size, eps=1e-6).to(device) for _ in range(2))
        q_norm.weight.data = random_tensor(size, dtype=torch.float32, device=device, seed=3)
        k_norm.weight.data = random_tensor(size, dtype=torch.float32, device=device, seed=4)
        q, k = q_norm(q).detach(), k_norm(k).detach()
        norms = {"q_norm_H": q_norm.weight.data, "k_norm_H": k_norm.weight.data}
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)

    pool = cases.nan_kv_pool(
        shape, num_blocks=NUM_BLOCKS, num_layers=1, dtype=torch.float32, device=device
    )
    slot_mapping_T = slots(shape.block_size, device)
    q_TNH = reference.kv_write(
        qkv_TC,
        cases.cos_sin_table(NUM_POSITIONS, size, device),
        positions_T,
        slot_mapping_T,
        pool[:, 0, 0],
        pool[:, 0, 1],
        num_q_heads=shape.num_heads,
        **norms,
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(q_TNH, q[0].transpose(0, 1), **close)
    for token, slot in enumerate(slot_mapping_T.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, shape.block_size)
            torch.testing.assert_close(pool[block, 0, 0, :, offset], k[0, :, token], **close)
            assert torch.equal(pool[block, 0, 1, :, offset], v[token])


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_kv_write(shape: HeadShape, dtype: torch.dtype, with_norm: bool, device: str) -> None:
    size = shape.head_size
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv_TC = random_tensor(9, num_heads * size, dtype=dtype, device=device, scale=2.0)
    norms = {}
    if with_norm:
        norms = {
            name: random_tensor(size, dtype=dtype, device=device, seed=seed)
            for seed, name in enumerate(("q_norm_H", "k_norm_H"), 3)
        }
    pools, queries = [], []
    for op in (reference.kv_write, kv_write):
        pool = cases.nan_kv_pool(
            shape, num_blocks=NUM_BLOCKS, num_layers=NUM_LAYERS, dtype=dtype, device=device
        )
        q_TNH = op(
            qkv_TC,
            cases.cos_sin_table(NUM_POSITIONS, size, device),
            torch.tensor(POSITIONS, dtype=torch.int32, device=device),
            slots(shape.block_size, device),
            pool[:, LAYER, 0],
            pool[:, LAYER, 1],
            num_q_heads=shape.num_heads,
            **norms,
        )
        assert q_TNH.is_contiguous()
        pools.append(pool)
        queries.append(q_TNH)
    bounds = ROUNDINGS[dtype]
    close = {"rtol": bounds.rtol, "atol": 10 * bounds.atol}
    torch.testing.assert_close(queries[1], queries[0], **close)
    # Free slots, other layers and what padding would have written must still be NaN.
    torch.testing.assert_close(pools[1], pools[0], equal_nan=True, **close)
    written = 7 * 2 * shape.num_kv_heads * size
    assert int((~pools[1].isnan()).sum()) == written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_fp8_cache(shape: HeadShape, dtype: torch.dtype, device: str) -> None:
    """What a cache of the queries' dtype would get, cast by torch and saturated."""
    size = shape.head_size
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv_TC = random_tensor(9, num_heads * size, dtype=dtype, device=device, scale=2.0)
    qkv_TC[3:5] *= 400.0  # some above 448
    pools, queries = {}, {}
    for cache_dtype in (dtype, FP8):
        pool = cases.nan_kv_pool(
            shape, num_blocks=NUM_BLOCKS, num_layers=NUM_LAYERS, dtype=cache_dtype, device=device
        )
        queries[cache_dtype] = kv_write(
            qkv_TC,
            cases.cos_sin_table(NUM_POSITIONS, size, device),
            torch.tensor(POSITIONS, dtype=torch.int32, device=device),
            slots(shape.block_size, device),
            pool[:, LAYER, 0],
            pool[:, LAYER, 1],
            num_q_heads=shape.num_heads,
        )
        pools[cache_dtype] = pool.float()
    assert torch.equal(queries[dtype], queries[FP8])
    written = ~pools[dtype].isnan()
    assert torch.equal(written, ~pools[FP8].isnan())
    expected = pools[dtype][written].clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(pools[FP8][written], expected)
    assert int((expected.abs() == 448).sum()) > 10


def test_reference_of_an_fp8_cache(device: str) -> None:
    shape = HEAD_SHAPES[0]
    qkv_TC = random_tensor(9, 6 * 64, dtype=torch.float32, device=device, scale=300.0)
    pools = {}
    for dtype in (torch.float32, FP8):
        pool = cases.nan_kv_pool(
            shape, num_blocks=NUM_BLOCKS, num_layers=1, dtype=dtype, device=device
        )
        reference.kv_write(
            qkv_TC,
            cases.cos_sin_table(NUM_POSITIONS, 64, device),
            torch.tensor(POSITIONS, device=device),
            slots(shape.block_size, device),
            pool[:, 0, 0],
            pool[:, 0, 1],
            num_q_heads=2,
        )
        pools[dtype] = pool.float()
    expected = pools[torch.float32].clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(pools[FP8].nan_to_num(7), expected.nan_to_num(7))


def test_fp8_cache_keeps_nan(device: str) -> None:
    shape = HEAD_SHAPES[0]
    pool = torch.zeros(1, 2, 2, 16, 64, device=device).to(FP8)
    kv_write(
        torch.full((1, 6 * 64), torch.nan, device=device),
        cases.cos_sin_table(1, 64, device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        pool[:, 0],
        pool[:, 1],
        num_q_heads=shape.num_heads,
    )
    assert int(pool.float().isnan().sum()) == 2 * 2 * 64


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """A block whose first element lies more than 2^31 elements into the pool."""
    shape = HeadShape(num_heads=1, num_kv_heads=1, head_size=64, block_size=16)
    num_blocks, num_layers = 17_000, 64  # 2.2e9 elements
    size = (num_blocks, num_layers, 2, 1, shape.block_size, shape.head_size)
    pool = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    qkv_TC = torch.ones(1, 3 * 64, dtype=torch.bfloat16, device="cuda")
    kv_write(
        qkv_TC,
        cases.cos_sin_table(1, 64, "cuda"),
        torch.zeros(1, dtype=torch.int32, device="cuda"),
        torch.tensor([num_blocks * shape.block_size - 1], device="cuda"),
        pool[:, -1, 0],
        pool[:, -1, 1],
        num_q_heads=1,
    )
    assert bool((pool[-1, -1, :, 0, -1] == 1).all())


def test_refuses_a_cache_whose_blocks_are_not_contiguous(device: str) -> None:
    cache = torch.zeros(4, 16, 2, 64, device=device).transpose(1, 2)
    with pytest.raises(AssertionError, match="contiguous"):
        kv_write(
            torch.zeros(1, 6 * 64, device=device),
            cases.cos_sin_table(4, 64, device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            cache,
            cache,
            num_q_heads=2,
        )
