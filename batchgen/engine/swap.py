"""Copies KV blocks between the device and the host's pool.

On a GPU the host pool is pinned and the copies run on a stream of their own, beside the step that
they are planned with. The next one waits for them: it may write to the blocks that were swapped
out, and read those that were swapped in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchgen.engine.block_pool import Blocks
from batchgen.engine.host_memory import HostChunks
from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.step_plan import BlockCopies

_CHUNK_BYTES = 256 << 20


class SwapSpace:
    """Owns the host's copy of swapped blocks; its memory is taken in chunks, as swaps need it."""

    def __init__(self, memory: KVMemory, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._device_rows = memory.block_rows
        whole = max(1, _CHUNK_BYTES // self._device_rows[0].nbytes)
        self._chunk_blocks = max(1, min(whole, num_blocks))
        self._chunks: list[Tensor] = []
        is_cuda = self._device_rows.device.type == "cuda"
        self._memory = HostChunks(
            self._chunk_blocks * self._device_rows[0].nbytes,
            -(-num_blocks // self._chunk_blocks),
            is_pinned=is_cuda,
        )
        self._stream = torch.cuda.Stream() if is_cuda else None  # type: ignore[no-untyped-call]
        self._is_busy = False  # copies run that no step has waited for

    def _host(self, block: int) -> tuple[Tensor, int]:
        """The chunk that holds a block of the host's pool, and the block's place in it."""
        chunk, place = divmod(block, self._chunk_blocks)
        while len(self._chunks) <= chunk:
            rows = self._memory.take().view(self._device_rows.dtype)
            self._chunks.append(rows.view(self._chunk_blocks, -1))
        return self._chunks[chunk], place

    def run(
        self, swap_out: BlockCopies | None, swap_in: BlockCopies | None, *, is_awaited: bool
    ) -> None:
        """Out first, then in: what comes in may take the place of what went out.

        What is queued on the current stream from now on waits for the copies of the last call, and
        for these ones where `is_awaited`.
        """
        if self._stream is None:
            self._copy(swap_out, swap_in)
            return
        compute = torch.cuda.current_stream()
        if self._is_busy:
            compute.wait_stream(self._stream)
            self._is_busy = False
        if swap_out is None and swap_in is None:
            return
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            self._copy(swap_out, swap_in)
        if is_awaited:
            compute.wait_stream(self._stream)
        else:
            self._is_busy = True

    def _copy(self, swap_out: BlockCopies | None, swap_in: BlockCopies | None) -> None:
        if swap_out is not None:
            for device, host, length in self._runs(swap_out.source, swap_out.target):
                chunk, place = self._host(host)
                chunk[place : place + length].copy_(
                    self._device_rows[device : device + length], non_blocking=True
                )
        if swap_in is not None:
            for device, host, length in self._runs(swap_in.target, swap_in.source):
                chunk, place = self._host(host)
                self._device_rows[device : device + length].copy_(
                    chunk[place : place + length], non_blocking=True
                )

    def _runs(self, device: Blocks, host: Blocks) -> list[tuple[int, int, int]]:
        """First block on the device, on the host, and length of each run of blocks that are
        neighbours on both sides and in one chunk of the host."""
        if len(device) == 0:
            return []
        order = np.argsort(device)
        device, host = device[order], host[order]
        breaks = (
            (np.diff(device) != 1) | (np.diff(host) != 1) | (host[1:] % self._chunk_blocks == 0)
        )
        starts = np.flatnonzero(np.concatenate([[True], breaks]))
        lengths = np.diff(np.append(starts, len(device)))
        return list(
            zip(device[starts].tolist(), host[starts].tolist(), lengths.tolist(), strict=True)
        )
