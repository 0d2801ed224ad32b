"""On a CPU a row's numbers do not depend on how many rows are multiplied with it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from batchgen.engine.cpu_ops import CpuOps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(960, 576), (576, 1536)])
def test_a_row_is_the_same_in_every_batch(
    dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    x = torch.randn(128, num_inputs, generator=generator).to(dtype)
    linear = CpuOps.pack_linear(cast(Any, None), weight, None)
    whole = linear(x)
    torch.testing.assert_close(whole, x @ weight.T, rtol=2e-2, atol=1e-2 * num_inputs**0.5)
    differing = [size for size in range(1, 65) if not torch.equal(linear(x[:size]), whole[:size])]
    assert differing == []
