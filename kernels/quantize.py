"""Rows to fp8 with a scale each, for matrix products in fp8: a row's largest magnitude becomes 448.

scale = max(amax, 1e-12) / 448; values = round(x / scale). A row is read once and is one tile in
registers. T rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.fp8 import FP8_MAX, MIN_AMAX, QuantizedRows, empty_rows

MAX_WIDTH = 32768
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TILE = 4096  # elements a program works on when rows are short
_FP8_MAX = tl.constexpr(FP8_MAX)
_MIN_AMAX = tl.constexpr(MIN_AMAX)


@triton.jit
def to_fp8_rows(x_RD):
    """The fp8 values of fp32 rows and their scales, [R, 1]. What is masked must be 0."""
    amax_R1 = tl.maximum(tl.max(tl.abs(x_RD), axis=1, keep_dims=True), _MIN_AMAX)
    # Correctly rounded, one a row: the values are then those of torch to the bit.
    inverse_R1 = tl.div_rn(tl.full(amax_R1.shape, _FP8_MAX, tl.float32), amax_R1)
    return (x_RD * inverse_R1).to(tl.float8e4nv), amax_R1 * (1.0 / _FP8_MAX)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    stride_x,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < num_rows) & (columns < D)
    x_RD = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0)
    values_RD, scales_R1 = to_fp8_rows(x_RD.to(tl.float32))
    tl.store(values_ptr + rows * D + columns, values_RD, mask=mask)
    tl.store(scales_ptr + rows, scales_R1, mask=rows < num_rows)


def quantize_rows(x_TD: Tensor) -> QuantizedRows:
    """x_TD in fp8: bf16, fp16 or fp32, D at most MAX_WIDTH. Rows may be strided."""
    num_rows, width = x_TD.shape
    assert x_TD.dtype in DTYPES, f"no kernel for {x_TD.dtype}"
    assert x_TD.stride(1) == 1, "rows of x must be contiguous"
    assert width <= MAX_WIDTH, f"a row of {width} columns exceeds {MAX_WIDTH}"
    out = empty_rows(num_rows, width, x_TD.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    _quantize_rows_kernel[(triton.cdiv(num_rows, rows),)](
        x_TD,
        out.values_TD,
        out.scales_T1,
        num_rows,
        x_TD.stride(0),
        D=width,
        ROWS=rows,
        BLOCK_D=block,
        num_warps=row_warps(block),
    )
    return out


def row_warps(block: int) -> int:
    """Warps of a program that holds whole rows: 32 elements a thread, 4 to 32 warps."""
    return max(4, min(32, block // 1024))
