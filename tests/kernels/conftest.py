"""Kernel tests run on the GPU as they are, and on Triton's interpreter where there is none."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Triton reads this when it is first imported, which transformers does, too: before these tests only
# where tests/kernels is not the first folder that needs it.
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError("triton is already imported: set TRITON_INTERPRET=1 for this order")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no GPU, unless BATCHGEN_REQUIRE_GPU=1."""
    if torch.cuda.is_available() or os.environ.get("BATCHGEN_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _require_gpu() -> None:
    if os.environ.get("BATCHGEN_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        pytest.fail("BATCHGEN_REQUIRE_GPU=1, but torch sees no CUDA device")
