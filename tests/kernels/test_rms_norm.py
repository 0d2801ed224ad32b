"""rms_norm and add_rms_norm against their reference, and the reference against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import NORM_SHAPES, ROUNDINGS, random_tensor
from batchgen.kernels.rms_norm import MAX_HIDDEN, add_rms_norm, rms_norm

EPS = 1e-5
DTYPES = cases.dtypes_for("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_is_transformers_norm(dtype: torch.dtype, device: str) -> None:
    x_TD = random_tensor(5, 576, dtype=dtype, device=device, scale=3.0)
    norm = LlamaRMSNorm(576, eps=EPS).to(device, dtype)
    norm.weight.data = random_tensor(576, dtype=dtype, device=device, seed=1)
    expected = norm(x_TD).detach()
    torch.testing.assert_close(
        reference.rms_norm(x_TD, norm.weight.data, EPS), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    num_tokens, hidden = shape
    x_TD = random_tensor(num_tokens, hidden, dtype=dtype, device=device, scale=3.0)
    weight_D = random_tensor(hidden, dtype=dtype, device=device, seed=1)
    expected = reference.rms_norm(x_TD, weight_D, EPS)
    bounds = ROUNDINGS[dtype]
    torch.testing.assert_close(
        rms_norm(x_TD, weight_D, EPS), expected, rtol=bounds.rtol, atol=bounds.atol
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    num_tokens, hidden = shape
    x_TD = random_tensor(num_tokens, hidden, dtype=dtype, device=device)
    residual_TD = random_tensor(num_tokens, hidden, dtype=dtype, device=device, seed=2, scale=9.0)
    weight_D = random_tensor(hidden, dtype=dtype, device=device, seed=1)
    expected_residual = residual_TD.clone()
    expected = reference.add_rms_norm(x_TD, expected_residual, weight_D, EPS)
    result = add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert torch.equal(residual_TD, expected_residual)
    bounds = ROUNDINGS[dtype]
    torch.testing.assert_close(result, expected, rtol=bounds.rtol, atol=bounds.atol)


def test_strided_rows_and_nothing_beside_them(device: str) -> None:
    """Rows apart in memory; what lies between them is neither read nor written."""
    memory = torch.full((5, 300), torch.nan, device=device)
    x_TD, residual_TD = memory[:, :100], memory[:, 150:250]
    x_TD.copy_(random_tensor(5, 100, dtype=torch.float32, device=device))
    residual_TD.copy_(random_tensor(5, 100, dtype=torch.float32, device=device, seed=2))
    weight_D = random_tensor(100, dtype=torch.float32, device=device, seed=1)
    expected = reference.rms_norm(x_TD + residual_TD, weight_D, EPS)
    torch.testing.assert_close(add_rms_norm(x_TD, residual_TD, weight_D, EPS), expected)
    assert int(memory.isnan().sum()) == 5 * 100


def test_no_rows(device: str) -> None:
    assert rms_norm(
        torch.empty(0, 64, device=device), torch.ones(64, device=device), EPS
    ).shape == (
        0,
        64,
    )


def test_refuses_what_it_cannot_do(device: str) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        rms_norm(
            torch.zeros(1, MAX_HIDDEN + 1, device=device),
            torch.zeros(MAX_HIDDEN + 1, device=device),
            EPS,
        )
    with pytest.raises(AssertionError, match="one row"):
        rms_norm(torch.zeros(1, 64, device=device), torch.zeros(32, device=device), EPS)
