"""Copies KV blocks between the device and the host's pool.

On a GPU the host pool is pinned and the copies run on a stream of their own; the step that follows
waits for them, because it may write to the blocks that were swapped out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.step_plan import BlockCopies


class SwapSpace:
    """Owns the host's copy of swapped blocks; its memory is taken at the first swap."""

    def __init__(self, memory: KVMemory, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._device_rows = memory.block_rows
        self._host_rows: Tensor | None = None
        is_cuda = self._device_rows.device.type == "cuda"
        self._stream = torch.cuda.Stream() if is_cuda else None  # type: ignore[no-untyped-call]

    def _host(self) -> Tensor:
        if self._host_rows is None:
            self._host_rows = torch.empty(
                self.num_blocks,
                self._device_rows.shape[1],
                dtype=self._device_rows.dtype,
                pin_memory=self._stream is not None,
            )
        return self._host_rows

    def run(self, swap_out: BlockCopies | None, swap_in: BlockCopies | None) -> None:
        """Out first, then in: what comes in may take the place of what went out."""
        if swap_out is None and swap_in is None:
            return
        host = self._host()
        if self._stream is None:
            _copy_blocks(self._device_rows, host, swap_out)
            _copy_blocks(host, self._device_rows, swap_in)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            _copy_blocks(self._device_rows, host, swap_out)
            _copy_blocks(host, self._device_rows, swap_in)
        torch.cuda.current_stream().wait_stream(self._stream)


def _copy_blocks(source: Tensor, target: Tensor, copies: BlockCopies | None) -> None:
    """One copy for each run of blocks that are neighbours on both sides."""
    if copies is None:
        return
    pairs = zip(copies.source.tolist(), copies.target.tolist(), strict=True)
    start_s, start_t, length = -1, -1, 0
    for block_s, block_t in sorted(pairs):
        if length and (block_s, block_t) == (start_s + length, start_t + length):
            length += 1
            continue
        if length:
            target[start_t : start_t + length].copy_(
                source[start_s : start_s + length], non_blocking=True
            )
        start_s, start_t, length = block_s, block_t, 1
    if length:
        target[start_t : start_t + length].copy_(
            source[start_s : start_s + length], non_blocking=True
        )
