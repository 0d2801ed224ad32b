"""Host memory for swapped blocks, in chunks that are taken when they are needed.

To pin 256 MiB takes 0.13 s, in which no kernel can be launched; nearly all of it goes to pages that
the operating system has to find and clear. Once another thread has touched the pages, 0.015 s are
left (H200 machine, see benchmarks.md). So the next chunks are always touched ahead.

What an engine has pinned stays so, for the next engine of the process: an engine ends when it is
collected, perhaps while another one captures its graphs, when nothing may be unpinned.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUM_AHEAD = 2
_idle_chunks: list[NDArray[np.uint8]] = []  # pinned, of engines that are gone


class HostChunks:
    """Makes chunks of `chunk_bytes`, in all `num_chunks` at most."""

    def __init__(self, chunk_bytes: int, num_chunks: int, *, is_pinned: bool) -> None:
        self._chunk_bytes = chunk_bytes
        self._is_pinned = is_pinned
        self._num_left = num_chunks
        self._touched: deque[Future[NDArray[np.uint8]]] = deque()
        self._pinned: list[NDArray[np.uint8]] = []
        if is_pinned:
            self._threads = ThreadPoolExecutor(_NUM_AHEAD, thread_name_prefix="host-memory")
            self._touch_ahead(1)
            weakref.finalize(self, _give_up, self._pinned)

    def take(self) -> Tensor:
        """[chunk_bytes] uint8. Raises RuntimeError if the system does not let it be pinned."""
        if not self._is_pinned:
            return torch.empty(self._chunk_bytes, dtype=torch.uint8)
        if (idle := self._take_idle()) is not None:
            return torch.from_numpy(idle)
        self._touch_ahead(1)
        chunk = self._touched.popleft().result()
        self._touch_ahead(_NUM_AHEAD)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(chunk.ctypes.data, chunk.nbytes, 0))
        self._pinned.append(chunk)
        return torch.from_numpy(chunk)

    def _take_idle(self) -> NDArray[np.uint8] | None:
        """A pinned chunk of the right size that no engine uses."""
        for index, chunk in enumerate(_idle_chunks):
            if chunk.nbytes == self._chunk_bytes:
                torch.cuda.synchronize()  # copies of the engine that had it
                self._pinned.append(_idle_chunks.pop(index))
                return chunk
        return None

    def _touch_ahead(self, count: int) -> None:
        while self._num_left and len(self._touched) < count:
            self._num_left -= 1
            self._touched.append(self._threads.submit(_touched_bytes, self._chunk_bytes))


def _touched_bytes(count: int) -> NDArray[np.uint8]:
    """Memory that begins at a page and is there: each page has been written."""
    pages = np.frombuffer(mmap.mmap(-1, count), dtype=np.uint8)
    pages[:: mmap.PAGESIZE] = 0
    return pages


def _give_up(chunks: list[NDArray[np.uint8]]) -> None:
    _idle_chunks.extend(chunks)
