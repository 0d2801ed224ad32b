"""The KV tensor on the device, and how large it may be.

Legend: P blocks, L layers, 2 for keys and values, K kv heads, S block size, H head size.
All layers of a block lie together, so that a sequence is swapped by one copy a block.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

from batchgen.engine.inputs import to_device
from batchgen.engine.step_plan import BlockCopies
from batchgen.errors import UsageError
from batchgen.models.config import ModelConfig

_COPY_BYTES = 64 << 20


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    return per_token * block_size


class KVMemory:
    """Owns kv_PL2KSH."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # On a CPU a free slot is read and masked, so it must hold a number. The kernels of a GPU do
        # not read free slots at all.
        if device.type == "cpu":
            self.kv_PL2KSH = _untouched_zeros((num_blocks, *shape), dtype)
            _use_huge_pages(self.kv_PL2KSH)
        else:
            self.kv_PL2KSH = torch.empty(num_blocks, *shape, dtype=dtype, device=device)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views k_cache_PKSH and v_cache_PKSH."""
        return self.kv_PL2KSH[:, layer, 0], self.kv_PL2KSH[:, layer, 1]

    @property
    def block_rows(self) -> Tensor:
        """[P, elements of a block]: what a swap copies."""
        return self.kv_PL2KSH.view(self.num_blocks, -1)

    def copy(self, copies: BlockCopies) -> None:
        """Copies blocks within the device, through a buffer of at most _COPY_BYTES."""
        # index_copy_ knows no fp8; a block is a multiple of four bytes.
        rows = self.block_rows.view(torch.int32)
        step = max(1, _COPY_BYTES // rows[0].nbytes)
        source = to_device(copies.source.astype(np.int64), rows.device)
        target = to_device(copies.target.astype(np.int64), rows.device)
        for start in range(0, len(source), step):
            chunk = slice(start, start + step)
            rows.index_copy_(0, target[chunk], rows.index_select(0, source[chunk]))


def check_room(num_blocks: int, max_model_len: int, block_size: int, *, has_samples: bool) -> None:
    """Raises UsageError when not even one sequence of `max_model_len` fits.

    `has_samples`: it is one of several of its prompt, whose last block stays for the others.
    """
    needed = -(-max_model_len // block_size) + has_samples
    if num_blocks < needed:
        raise UsageError(
            f"the KV cache has room for {max(num_blocks, 0) * block_size} tokens, but one sequence "
            f"of model.max_model_len={max_model_len} needs {needed * block_size}: lower "
            "model.max_model_len, or raise engine.num_gpu_blocks or engine.gpu_memory_utilization"
        )


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system gives page by page, when they are written: torch's are all written at
    once, which takes 0.7 s a GiB, and the memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = np.zeros(num_bytes + mmap.PAGESIZE, dtype=np.uint8)
    start = -pages.ctypes.data % mmap.PAGESIZE
    return torch.from_numpy(pages[start : start + num_bytes]).view(dtype).view(shape)


def _use_huge_pages(tensor: Tensor) -> None:
    """Asks Linux for huge pages: blocks are read in random order, and with pages of 4 KiB half of
    the time goes to finding them (decode attention of 256 x 120 tokens: 3.8 ms, then 1.7 ms)."""
    if not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
