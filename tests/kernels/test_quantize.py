"""quantize_rows and the fused forms: torch's float8 casts are the independent truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import NORM_SHAPES, SILU_SHAPES, random_tensor
from batchgen.kernels.fp8 import FP8, MIN_AMAX, QuantizedRows
from batchgen.kernels.quantize import MAX_WIDTH, quantize_rows
from batchgen.kernels.rms_norm import add_rms_norm_fp8, rms_norm_fp8
from batchgen.kernels.silu_mul import silu_mul_fp8

EPS = 1e-5
DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")
# A row of one program that is no power of two, and the widest.
SHAPES = [*NORM_SHAPES, (2, 14336), (1, MAX_WIDTH)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_stands_for(rows: QuantizedRows, y_TD: Tensor, *, roundings: float = 0.0) -> None:
    """Each value is y to half a step of fp8, where `roundings` is y's own relative error.

    A step is 2^-3 of a number's power of two, but never less than 2^-9 times the scale.
    """
    y_fp32 = y_TD.float()
    stood_for = rows.values_TD.float() * rows.scales_T1
    bound = y_fp32.abs() * (2.0**-4 + roundings) + rows.scales_T1 * 2.0**-10 * 1.001 + 1e-9
    assert bool(((stood_for - y_fp32).abs() <= bound).all())
    amax_T1 = y_fp32.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rows.scales_T1 * 448, amax_T1, rtol=1e-6 + roundings, atol=MIN_AMAX)
    assert rows.values_TD.dtype == FP8
    assert rows.scales_T1.dtype == torch.float32
    assert rows.values_TD.is_contiguous()
    assert rows.scales_T1.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_is_torchs_cast(dtype: torch.dtype, device: str) -> None:
    x_TD = random_tensor(5, 576, dtype=dtype, device=device, scale=3.0)
    rows = reference.quantize_rows(x_TD)
    assert_stands_for(rows, x_TD)
    for row in range(5):
        scaled_D = x_TD[row].double() / x_TD[row].double().abs().max() * 448
        nearest_D = scaled_D.float().to(FP8)
        # Numbers in the middle of two may go either way.
        assert (nearest_D.float() != rows.values_TD[row].float()).float().mean() < 0.01
    assert bool((rows.values_TD.float().abs().amax(-1) == 448).all())


def test_reference_saturates(device: str) -> None:
    x = torch.tensor([0.0, 448.0, 460.0, 1e9, -1e9, torch.nan], device=device)
    expected = torch.tensor([0.0, 448.0, 448.0, 448.0, -448.0, torch.nan], device=device)
    assert torch.equal(reference.to_fp8(x).float().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_rows_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x_TD = random_tensor(*shape, dtype=dtype, device=device, scale=0.02)
    expected, rows = reference.quantize_rows(x_TD), quantize_rows(x_TD)
    assert torch.equal(rows.scales_T1, expected.scales_T1)
    assert same_bits(rows.values_TD, expected.values_TD)


def test_rows_of_zeros_outliers_and_strides(device: str) -> None:
    memory = torch.full((4, 300), torch.nan, device=device)
    x_TD = memory[:, 100:200]
    x_TD.copy_(random_tensor(4, 100, dtype=torch.float32, device=device))
    x_TD[1] = 0.0
    x_TD[2, 7] = -1e6  # so large that the others become 0
    rows = quantize_rows(x_TD)
    assert_stands_for(rows, x_TD)
    assert bool((rows.values_TD[1].float() == 0).all())
    assert rows.values_TD[2].float().count_nonzero() == 1
    assert int(memory.isnan().sum()) == 4 * 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm_fp8(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x_TD = random_tensor(*shape, dtype=dtype, device=device, scale=3.0)
    weight_D = random_tensor(shape[1], dtype=dtype, device=device, seed=1)
    rows = rms_norm_fp8(x_TD, weight_D, EPS)
    roundings = cases.ROUNDINGS[dtype].rtol
    assert_stands_for(rows, reference.rms_norm(x_TD, weight_D, EPS), roundings=roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_add_rms_norm_fp8(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x_TD = random_tensor(*shape, dtype=dtype, device=device)
    residual_TD = random_tensor(*shape, dtype=dtype, device=device, seed=2, scale=9.0)
    weight_D = random_tensor(shape[1], dtype=dtype, device=device, seed=1)
    expected_residual = residual_TD.clone()
    expected = reference.add_rms_norm(x_TD, expected_residual, weight_D, EPS)
    rows = add_rms_norm_fp8(x_TD, residual_TD, weight_D, EPS)
    assert torch.equal(residual_TD, expected_residual)
    assert_stands_for(rows, expected, roundings=cases.ROUNDINGS[dtype].rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SILU_SHAPES, (2, 14336)], ids=str)
def test_silu_mul_fp8(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    num_tokens, intermediate = shape
    gate_up_T2I = random_tensor(num_tokens, 2 * intermediate, dtype=dtype, device=device, scale=4.0)
    rows = silu_mul_fp8(gate_up_T2I)
    expected = reference.silu_mul(gate_up_T2I)
    assert_stands_for(rows, expected, roundings=cases.ROUNDINGS[dtype].rtol)


def test_silu_mul_fp8_of_strided_rows(device: str) -> None:
    memory = torch.full((3, 100), torch.nan, device=device)
    memory[:, 10:74] = random_tensor(3, 64, dtype=torch.float32, device=device)
    gate_up_T2I = memory[:, 10:74]
    assert_stands_for(silu_mul_fp8(gate_up_T2I), reference.silu_mul(gate_up_T2I), roundings=1e-5)


def test_no_rows(device: str) -> None:
    empty = torch.empty(0, 64, device=device)
    for rows in (quantize_rows(empty), rms_norm_fp8(empty, torch.ones(64, device=device), EPS)):
        assert rows.values_TD.shape == (0, 64)
        assert rows.scales_T1.shape == (0, 1)
    assert silu_mul_fp8(empty).values_TD.shape == (0, 32)


def test_refuses_what_it_cannot_do(device: str) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        quantize_rows(torch.zeros(1, MAX_WIDTH + 1, device=device))
    with pytest.raises(AssertionError, match="exceeds"):
        silu_mul_fp8(torch.zeros(1, 2 * MAX_WIDTH + 2, device=device))
    with pytest.raises(AssertionError, match="no kernel"):
        quantize_rows(torch.zeros(1, 8, dtype=torch.float64, device=device))


def test_reference_linear_is_that_of_what_the_rows_stand_for(device: str) -> None:
    rows = reference.quantize_rows(random_tensor(5, 64, dtype=torch.float32, device=device))
    weight = reference.quantize_rows(
        random_tensor(48, 64, dtype=torch.float32, device=device, seed=1)
    )
    bias_O = random_tensor(48, dtype=torch.float32, device=device, seed=2)
    x_TD = rows.values_TD.double() * rows.scales_T1
    weight_OD = weight.values_TD.double() * weight.scales_T1
    expected = torch.nn.functional.linear(x_TD, weight_OD, bias_O.double())
    y_TO = reference.scaled_linear(rows, weight, bias_O, torch.float32)
    torch.testing.assert_close(y_TO.double(), expected, rtol=1e-4, atol=1e-4)


# One token, no multiple of a tile, many; the bias as in Qwen2; the widest matrix of an 8B model.
@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "width", "outputs"),
    [(1, 576, 960), (17, 4096, 6144), (1000, 4096, 28672), (300, 14336, 4096), (0, 64, 48)],
)
def test_linear_on_a_gpu(num_tokens: int, width: int, outputs: int, has_bias: bool) -> None:
    """The device's scaled product against the fp32 product of what both sides stand for."""
    from batchgen.engine.cuda_ops import CudaFp8Ops

    x_TD = random_tensor(num_tokens, width, dtype=torch.bfloat16, device="cuda")
    weight_OD = random_tensor(
        outputs, width, dtype=torch.bfloat16, device="cuda", seed=1, scale=0.02
    )
    bias_O = random_tensor(outputs, dtype=torch.bfloat16, device="cuda", seed=2)
    bias = bias_O if has_bias else None
    linear = CudaFp8Ops().pack_linear(weight_OD, bias)
    rows, weight = reference.quantize_rows(x_TD), reference.quantize_rows(weight_OD)
    expected = reference.scaled_linear(rows, weight, bias, torch.float32)
    for fed in (x_TD, quantize_rows(x_TD)):
        y_TO = linear(fed)
        assert y_TO.dtype == torch.bfloat16
        assert y_TO.shape == (num_tokens, outputs)
        # bf16 rounds the result; fast accumulation keeps 14 bits of each partial sum.
        error = (y_TO.float() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < 1e-2
