"""copy_block_starts against a loop over forks and slots."""

from __future__ import annotations

import pytest
import torch

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, HeadShape
from batchgen.kernels.copy_block_starts import copy_block_starts

NUM_BLOCKS = 12
DTYPES = [
    *cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu"),
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("function", [copy_block_starts, reference.copy_block_starts])
def test_filled_slots_are_copied_and_nothing_else_changes(
    shape: HeadShape, dtype: torch.dtype, function: object, device: str
) -> None:
    """Two forks of one block, and two that are not copied, whose numbers mean nothing."""
    size = (NUM_BLOCKS, 3, 2, shape.num_kv_heads, shape.block_size, shape.head_size)
    kv_PL2KSH = torch.randn(size, generator=cases.generator("cpu")).to(dtype).to(device)
    order = torch.randperm(NUM_BLOCKS, generator=cases.generator("cpu"))
    source = [int(order[i]) for i in (0, 0, 1, 2, 3)]
    target = [int(order[i]) for i in (4, 5, 5, 6, 4)]
    num_slots = [1, shape.block_size - 1, 3, shape.block_size // 2, shape.block_size]
    is_copied = [True, True, False, True, False]
    bits = kv_PL2KSH.view(torch.uint8)
    bits[int(order[-1])] = 0xFF  # NaN in every dtype: a free block
    expected = bits.clone()
    for i, j, count, copies in zip(source, target, num_slots, is_copied, strict=True):
        for slot in range(count if copies else 0):
            expected[j, :, :, :, slot] = bits[i, :, :, :, slot]
    numbers = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (source, target, num_slots)
    )
    function(kv_PL2KSH, *numbers, torch.tensor(is_copied, device=device))  # type: ignore[operator]
    assert torch.equal(kv_PL2KSH.view(torch.uint8), expected)


def test_no_forks_at_all(device: str) -> None:
    kv_PL2KSH = torch.ones(2, 1, 2, 1, 4, 16, device=device)
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    copy_block_starts(kv_PL2KSH, nothing, nothing, nothing, nothing.bool())
    assert torch.equal(kv_PL2KSH, torch.ones_like(kv_PL2KSH))
