"""The gate of a SwiGLU layer: silu(gate) * up.

silu(g) = g / (1 + exp(-g)), in fp32; rounded to the tensor's dtype before the product, as
transformers does. T tokens, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # 8 elements a thread: one 16-byte load of gate and one of up in bf16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    up = tl.load(gate_ptrs + INTERMEDIATE, mask=mask, other=0.0)
    gate_fp32 = gate.to(tl.float32)
    silu = (gate_fp32 / (1.0 + tl.exp(-gate_fp32))).to(gate.dtype)
    y = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * INTERMEDIATE + columns, y.to(gate.dtype), mask=mask)


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate and up side by side; returns [T, I], contiguous.

    bf16, fp16 or fp32. Rows may be strided.
    """
    num_rows, width = gate_up_T2I.shape
    assert gate_up_T2I.dtype in _DTYPES, f"no kernel for {gate_up_T2I.dtype}"
    assert gate_up_T2I.stride(1) == 1, "rows of gate_up must be contiguous"
    assert width % 2 == 0, f"a row of {width} columns is not gate and up"
    intermediate = width // 2
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
