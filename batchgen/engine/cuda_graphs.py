"""CUDA graphs of one decode step, for each batch size in use, without and with shared prefixes.

A step reads and writes device state at fixed addresses only, so one graph, replayed k times, is a
window of k steps. A batch is padded to the next captured size with rows that write nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

from batchgen.engine.prefix_groups import MAX_GROUPS


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 16 to 256 and of 32 beyond."""
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, max_num_seqs, 32)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def group_sizes(max_num_seqs: int) -> list[int]:
    """For steps with several groups, which are fewer: 16, 32, 64, then multiples of 128."""
    sizes = [16, 32, 64, *range(128, max_num_seqs, 128)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class StepGraphs:
    """Owns the graphs and the memory pool that they share."""

    def __init__(
        self, step: Callable[[int, int], None], max_num_seqs: int, *, has_prefixes: bool
    ) -> None:
        """`step(size, max_groups)` launches one decode step of `size` rows, in which up to so many
        groups share a prefix."""
        self._step = step
        many = graph_sizes(max_num_seqs)
        self._sizes = {0: many}  # by max_groups
        if has_prefixes:
            self._sizes[1] = [size for size in many if size >= min(16, max_num_seqs)]
            self._sizes[MAX_GROUPS] = group_sizes(max_num_seqs)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, count: int, max_groups: int) -> int:
        sizes = self._sizes[max_groups]
        return sizes[bisect_left(sizes, count)]

    def capture_all(self) -> None:
        """Largest first, so that the smaller ones fit into the memory that it took."""
        keys = [(size, count) for count, sizes in self._sizes.items() for size in sizes]
        for size, max_groups in sorted(keys, reverse=True):
            self._capture(size, max_groups)

    def replay(self, size: int, max_groups: int) -> None:
        self._graphs[size, max_groups].replay()

    def _capture(self, size: int, max_groups: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and takes cuBLAS workspaces outside the capture.
            self._step(size, max_groups)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(size, max_groups)
        self._graphs[size, max_groups] = graph
