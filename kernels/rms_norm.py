"""Root mean square norm, alone or of a sum with the residual stream.

y = weight * (x / sqrt(mean(x^2) + eps)), accumulated in fp32. The normalised row is rounded to the
tensor's dtype before the weight, as transformers does, so that both agree to the bit but for the
order of the sum. The fp8 forms quantize that same result before it leaves the registers.
T tokens, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.fp8 import QuantizedRows, empty_rows
from batchgen.kernels.quantize import to_fp8_rows

MAX_HIDDEN = 16384  # a row is one tile in registers
_TILE = 4096  # elements a program works on when rows are short
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    num_rows,
    stride_x,
    stride_residual,
    eps,
    D: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < num_rows) & (columns < D)
    rows = rows.to(tl.int64)
    x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0)
    if ADD_RESIDUAL:
        residual_ptrs = residual_ptr + rows * stride_residual + columns
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptrs, x, mask=mask)
    x_fp32 = x.to(tl.float32)
    mean_square = tl.sum(x_fp32 * x_fp32, axis=1, keep_dims=True) / D
    normed = (x_fp32 * tl.rsqrt(mean_square + eps)).to(x.dtype)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0)
    y = (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    if scales_ptr is not None:
        y, scales = to_fp8_rows(y.to(tl.float32))
        tl.store(scales_ptr + rows, scales, mask=rows < num_rows)
    tl.store(out_ptr + rows * D + columns, y, mask=mask)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of each row of x_TD, contiguous, in its dtype (bf16, fp16 or fp32).

    Rows of x_TD may be strided. D is at most MAX_HIDDEN.
    """
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, None, weight_D, eps, out_TD, None)
    return out_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`residual_TD += x_TD` in place, rounded to the dtype; then the norm of that sum."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, residual_TD, weight_D, eps, out_TD, None)
    return out_TD


def rms_norm_fp8(x_TD: Tensor, weight_D: Tensor, eps: float) -> QuantizedRows:
    """quantize_rows(rms_norm(x_TD, weight_D, eps))."""
    out = empty_rows(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    _launch(x_TD, None, weight_D, eps, out.values_TD, out.scales_T1)
    return out


def add_rms_norm_fp8(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> QuantizedRows:
    """quantize_rows(add_rms_norm(x_TD, residual_TD, weight_D, eps))."""
    out = empty_rows(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    _launch(x_TD, residual_TD, weight_D, eps, out.values_TD, out.scales_T1)
    return out


def _launch(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    scales_T1: Tensor | None,
) -> None:
    num_rows, hidden = x_TD.shape
    assert x_TD.dtype in _DTYPES, f"no kernel for {x_TD.dtype}"
    assert x_TD.stride(1) == 1, "rows of x must be contiguous"
    assert hidden <= MAX_HIDDEN, f"hidden size {hidden} exceeds {MAX_HIDDEN}"
    assert weight_D.shape == (hidden,), "weight must be one row"
    assert weight_D.is_contiguous(), "weight must be contiguous"
    assert weight_D.device == x_TD.device, "weight and x are on different devices"
    if residual_TD is not None:
        assert residual_TD.shape == x_TD.shape, "residual and x differ in shape"
        assert residual_TD.dtype == x_TD.dtype, "residual and x differ in dtype"
        assert residual_TD.device == x_TD.device, "residual and x are on different devices"
        assert residual_TD.stride(1) == 1, "rows of residual must be contiguous"
    if num_rows == 0:
        return
    block = triton.next_power_of_2(hidden)
    rows = max(1, _TILE // block)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        scales_T1,
        num_rows,
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        eps,
        D=hidden,
        ADD_RESIDUAL=residual_TD is not None,
        ROWS=rows,
        BLOCK_D=block,
        num_warps=max(4, min(16, block // 1024)),
    )
