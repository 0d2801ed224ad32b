"""CUDA graphs of one decode step, one for each batch size in use, with and without a shared prefix.

A step reads and writes device state at fixed addresses only, so one graph, replayed k times, is a
window of k steps. A batch is padded to the next captured size with rows that write nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 16 to 256 and of 32 beyond."""
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, max_num_seqs, 32)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class StepGraphs:
    """Owns the graphs and the memory pool that they share."""

    def __init__(self, step: Callable[[int, bool], None], max_num_seqs: int) -> None:
        """`step(size, has_prefix)` launches one decode step of `size` rows."""
        self._step = step
        self._sizes = graph_sizes(max_num_seqs)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, count: int) -> int:
        return self._sizes[bisect_left(self._sizes, count)]

    def capture_all(self, min_prefix_rows: int) -> None:
        """Largest first, so that the smaller ones fit into the memory that it took."""
        for size in reversed(self._sizes):
            self._capture(size, has_prefix=False)
            if size >= min_prefix_rows:
                self._capture(size, has_prefix=True)

    def replay(self, size: int, *, has_prefix: bool) -> None:
        self._graphs[size, has_prefix].replay()

    def _capture(self, size: int, *, has_prefix: bool) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and takes cuBLAS workspaces outside the capture.
            self._step(size, has_prefix)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(size, has_prefix)
        self._graphs[size, has_prefix] = graph
