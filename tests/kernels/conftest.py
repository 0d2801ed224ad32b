"""Kernel tests run on the GPU as they are, and on Triton's interpreter where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def fp8_casts_as_on_a_gpu() -> Iterator[None]:
    """Casts to fp8 by torch, saturated as a GPU's are.

    The interpreter's own (Triton 3.9) lose the carry of a rounding (7.9 becomes 4), truncate
    subnormals and wrap around above 480.
    """

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != tl.float8e4nv or source not in (tl.float32, tl.float16):
            return original(data, source, target, rounding)
        dtype = np.float32 if source == tl.float32 else np.float16
        values = torch.from_numpy(np.ascontiguousarray(data).view(dtype)).float()
        return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    original = interpreter._convert_float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
