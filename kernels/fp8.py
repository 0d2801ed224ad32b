"""What "fp8" means here: float8_e4m3fn, alone or with one fp32 scale a row.

Four exponent and three mantissa bits, no infinity, largest value 448. Source: FP8 Formats for Deep
Learning (arXiv 2209.05433). T rows, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MIN_AMAX = 1e-12  # a row of zeros gets the scale of this, so that nothing divides by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRows:
    """A matrix whose row t is values_TD[t] * scales_T1[t]; its largest magnitudes are +-448."""

    values_TD: Tensor  # float8_e4m3fn, contiguous
    scales_T1: Tensor  # float32, contiguous


def empty_rows(num_rows: int, width: int, device: torch.device) -> QuantizedRows:
    """Memory for quantized rows."""
    return QuantizedRows(
        values_TD=torch.empty((num_rows, width), dtype=FP8, device=device),
        scales_T1=torch.empty((num_rows, 1), dtype=torch.float32, device=device),
    )
