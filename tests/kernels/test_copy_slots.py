"""copy_slots against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HEAD_SHAPES, HeadShape
from batchgen.kernels.copy_slots import copy_slots

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("function", [copy_slots, reference.copy_slots])
def test_tokens_are_copied_and_nothing_else_changes(
    shape: HeadShape, dtype: torch.dtype, count: int, function: object, device: str
) -> None:
    size = (7, 3, 2, shape.num_kv_heads, shape.block_size, shape.head_size)
    kv_PL2KSH = torch.randn(size, device=device).to(dtype)
    kv_PL2KSH[6] = torch.nan  # a free block
    slots = torch.randperm(6 * shape.block_size, device=device)
    source_C, target_C = slots[:count], slots[count : 2 * count]
    expected = kv_PL2KSH.clone()
    for source, target in zip(source_C.tolist(), target_C.tolist(), strict=True):
        block, offset = divmod(source, shape.block_size)
        to_block, to_offset = divmod(target, shape.block_size)
        token = kv_PL2KSH[block, 1, :, :, offset]
        expected[to_block, 1, :, :, to_offset] = token
    function(kv_PL2KSH[:, 1, 0], kv_PL2KSH[:, 1, 1], source_C, target_C)  # type: ignore[operator]
    assert torch.equal(kv_PL2KSH.nan_to_num(7.0), expected.nan_to_num(7.0))
