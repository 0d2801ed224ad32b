"""The CPU's compiled operations against the references, as the Triton kernels are tested."""

from __future__ import annotations

import pytest
import torch

from batchgen.kernels import native, reference

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")

BF16 = torch.bfloat16


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert not actual.isnan().any()
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def paged_cache(num_blocks: int, heads: int, size: int, head: int) -> torch.Tensor:
    """[P, layers, 2, K, S, H], all NaN: what is not written must not be read."""
    return torch.full((num_blocks, 3, 2, heads, size, head), torch.nan, dtype=BF16)


@pytest.mark.parametrize("width", [64, 576, 1000])
def test_rms_norm_and_the_residual(width: int) -> None:
    x, residual = torch.randn(17, width).to(BF16), torch.randn(17, width).to(BF16)
    weight = torch.randn(width).to(BF16)
    assert error(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < 2e-3
    ours, theirs = residual.clone(), residual.clone()
    out = native.rms_norm(x, weight, 1e-5, ours)
    assert error(out, reference.add_rms_norm(x, theirs, weight, 1e-5)) < 2e-3
    assert torch.equal(ours, theirs)


def test_silu_mul_over_its_whole_range() -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4000), torch.zeros(96)])
    gate_up = torch.stack([torch.cat([gate, torch.randn(4096)]) for _ in range(3)]).to(BF16)
    assert error(native.silu_mul(gate_up), reference.silu_mul(gate_up)) < 2e-3


@pytest.mark.parametrize("head", [16, 64, 96, 128])
@pytest.mark.parametrize("has_norm", [False, True])
def test_kv_write(head: int, has_norm: bool) -> None:
    tokens, q_heads, kv_heads, size = 21, 6, 2, 8
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head).to(BF16)
    cos_sin = torch.randn(50, head)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    slots = torch.randperm(10 * size)[:tokens]
    slots[[3, 9]] = -1
    norm = torch.randn(head).to(BF16) if has_norm else None
    made = []
    for op in (native.kv_write, reference.kv_write):
        kv = paged_cache(10, kv_heads, size, head)
        q = op(
            qkv,
            cos_sin,
            positions,
            slots,
            kv[:, 1, 0],
            kv[:, 1, 1],
            num_q_heads=q_heads,
            q_norm_H=norm,
            k_norm_H=norm,
            eps=1e-6,
        )
        made.append((q, kv))
    (q, kv), (expected_q, expected_kv) = made
    assert error(q, expected_q) < 4e-3
    assert torch.equal(kv.isnan(), expected_kv.isnan()), "wrote other slots"
    assert error(kv.nan_to_num(), expected_kv.nan_to_num()) < 4e-3


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (5, 1), (16, 2)])
@pytest.mark.parametrize("head", [16, 64, 96, 128])
@pytest.mark.parametrize("size", [8, 16, 128])
def test_paged_decode(q_heads: int, kv_heads: int, head: int, size: int) -> None:
    lengths = torch.tensor([0, 1, size - 1, size, size + 1, 300], dtype=torch.int32)
    columns = -(-300 // size)
    num_blocks = 8 * columns
    table = torch.randperm(num_blocks).view(8, columns).to(torch.int32)
    rows = torch.randperm(8)[: len(lengths)].to(torch.int32)
    kv = paged_cache(num_blocks, kv_heads, size, head)
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        for position in range(length):
            block = int(table[row, position // size])
            kv[block, 1, :, :, position % size] = torch.randn(2, kv_heads, head).to(BF16)
    q = torch.randn(len(lengths), q_heads, head).to(BF16)
    arguments = (q, kv[:, 1, 0], kv[:, 1, 1], table, rows, lengths)
    out = native.paged_decode(*arguments, scale=head**-0.5)
    expected, _ = reference.paged_decode(*arguments, scale=head**-0.5)
    assert error(out, expected) < 5e-3
    assert torch.equal(out[0], torch.zeros_like(out[0]))


@pytest.mark.parametrize("width", [1, 255, 256, 257, 1000, 49152])
def test_argmax_takes_the_lowest_of_a_tie(width: int) -> None:
    logits = torch.randn(9, width).to(BF16)
    logits[0] = 1.0
    logits[1] = -torch.inf
    logits[2, width // 2 :] = 9.0
    expected = torch.stack([row.float().eq(row.float().max()).nonzero()[0, 0] for row in logits])
    assert torch.equal(native.argmax(logits), expected)
