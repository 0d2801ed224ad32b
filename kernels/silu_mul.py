"""The gate of a SwiGLU layer: silu(gate) * up.

silu(g) = g / (1 + exp(-g)), in fp32; rounded to the tensor's dtype before the product, as
transformers does. The fp8 form quantizes that same result before it leaves the registers.
T tokens, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchgen.kernels.fp8 import QuantizedRows, empty_rows
from batchgen.kernels.quantize import MAX_WIDTH, row_warps, to_fp8_rows

_BLOCK = 1024  # 8 elements a thread: one 16-byte load of gate and one of up in bf16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _gated(gate_ptrs, up_ptrs, mask):
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    up = tl.load(up_ptrs, mask=mask, other=0.0)
    gate_fp32 = gate.to(tl.float32)
    silu = (gate_fp32 / (1.0 + tl.exp(-gate_fp32))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    stride_gate_up,
    INTERMEDIATE: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // BLOCKS_PER_ROW).to(tl.int64)
    columns = (program % BLOCKS_PER_ROW) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < INTERMEDIATE
    gate_ptrs = gate_up_ptr + row * stride_gate_up + columns
    y = _gated(gate_ptrs, gate_ptrs + INTERMEDIATE, mask)
    tl.store(out_ptr + row * INTERMEDIATE + columns, y, mask=mask)


@triton.jit
def _silu_mul_fp8_kernel(
    gate_up_ptr,
    values_ptr,
    scales_ptr,
    stride_gate_up,
    INTERMEDIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < INTERMEDIATE
    gate_ptrs = gate_up_ptr + row * stride_gate_up + columns
    y = _gated(gate_ptrs, gate_ptrs + INTERMEDIATE, mask)
    values, scale_11 = to_fp8_rows(y.to(tl.float32))
    tl.store(values_ptr + row * INTERMEDIATE + columns, values, mask=mask)
    tl.store(scales_ptr + row + tl.zeros([1, 1], tl.int32), scale_11)


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate and up side by side; returns [T, I], contiguous.

    bf16, fp16 or fp32. Rows may be strided.
    """
    num_rows, intermediate = _check(gate_up_T2I)
    out_TI = torch.empty(
        (num_rows, intermediate), dtype=gate_up_T2I.dtype, device=gate_up_T2I.device
    )
    if num_rows == 0:
        return out_TI
    blocks_per_row = triton.cdiv(intermediate, _BLOCK)
    _silu_mul_kernel[(num_rows * blocks_per_row,)](
        gate_up_T2I,
        out_TI,
        gate_up_T2I.stride(0),
        INTERMEDIATE=intermediate,
        BLOCKS_PER_ROW=blocks_per_row,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out_TI


def silu_mul_fp8(gate_up_T2I: Tensor) -> QuantizedRows:
    """quantize_rows(silu_mul(gate_up_T2I)); I is at most MAX_WIDTH."""
    num_rows, intermediate = _check(gate_up_T2I)
    assert intermediate <= MAX_WIDTH, f"a row of {intermediate} columns exceeds {MAX_WIDTH}"
    out = empty_rows(num_rows, intermediate, gate_up_T2I.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(intermediate)
    _silu_mul_fp8_kernel[(num_rows,)](
        gate_up_T2I,
        out.values_TD,
        out.scales_T1,
        gate_up_T2I.stride(0),
        INTERMEDIATE=intermediate,
        BLOCK=block,
        num_warps=row_warps(block),
    )
    return out


def _check(gate_up_T2I: Tensor) -> tuple[int, int]:
    """Rows and columns of the output."""
    num_rows, width = gate_up_T2I.shape
    assert gate_up_T2I.dtype in _DTYPES, f"no kernel for {gate_up_T2I.dtype}"
    assert gate_up_T2I.stride(1) == 1, "rows of gate_up must be contiguous"
    assert width % 2 == 0, f"a row of {width} columns is not gate and up"
    return num_rows, width // 2
