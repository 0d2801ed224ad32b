"""On a CPU a row's numbers do not depend on how many rows are multiplied with it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from batchgen.engine.cpu_ops import CpuFp8Ops, CpuOps


@pytest.mark.parametrize("ops", [CpuOps, CpuFp8Ops])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(960, 576), (576, 1536)])
def test_a_row_is_the_same_in_every_batch(
    ops: type[CpuOps | CpuFp8Ops], dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    x = torch.randn(128, num_inputs, generator=generator).to(dtype)
    linear = ops.pack_linear(cast(Any, None), weight, None)
    whole = linear(x)
    error = (whole - x @ weight.T).float().norm() / whole.float().norm()
    assert error < (0.05 if ops is CpuFp8Ops else 0.01)
    differing = [size for size in range(1, 65) if not torch.equal(linear(x[:size]), whole[:size])]
    assert differing == []
