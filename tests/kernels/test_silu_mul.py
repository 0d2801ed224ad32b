"""silu_mul against its reference, and the reference against torch's silu."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import ROUNDINGS, SILU_SHAPES, random_tensor
from batchgen.kernels.silu_mul import silu_mul

DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_is_torchs_silu(dtype: torch.dtype, device: str) -> None:
    gate_up_T2I = random_tensor(4, 600, dtype=dtype, device=device, scale=4.0)
    expected = functional.silu(gate_up_T2I[:, :300]) * gate_up_T2I[:, 300:]
    bounds = ROUNDINGS[dtype]
    torch.testing.assert_close(
        reference.silu_mul(gate_up_T2I), expected, rtol=bounds.rtol, atol=bounds.atol
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SILU_SHAPES, ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    num_tokens, intermediate = shape
    gate_up_T2I = random_tensor(num_tokens, 2 * intermediate, dtype=dtype, device=device, scale=4.0)
    bounds = ROUNDINGS[dtype]
    torch.testing.assert_close(
        silu_mul(gate_up_T2I), reference.silu_mul(gate_up_T2I), rtol=bounds.rtol, atol=bounds.atol
    )


# The interpreter's numpy warns where a GPU goes to infinity and back to 0.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extremes(device: str) -> None:
    """A gate far from zero neither overflows nor turns into NaN."""
    gate = torch.tensor([[-3e38, -200.0, -90.0, 0.0, 90.0, 200.0, 3e38, 1.0]], device=device)
    result = silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(result, functional.silu(gate))


def test_strided_rows(device: str) -> None:
    memory = torch.full((3, 100), torch.nan, device=device)
    memory[:, 10:74] = random_tensor(3, 64, dtype=torch.float32, device=device)
    gate_up_T2I = memory[:, 10:74]
    torch.testing.assert_close(silu_mul(gate_up_T2I), reference.silu_mul(gate_up_T2I))
