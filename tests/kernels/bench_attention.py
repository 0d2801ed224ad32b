"""Times the paged attention kernels on a GPU and prints one JSON object a row.

    python tests/kernels/bench_attention.py [decode] [prefill] [prefix] [--sweep]

A row has the GPU, the versions, the shape, the median in microseconds, and GB/s with the share of
a copy measured in this run, or TFLOP/s with the share of a bf16 product. Each call of a CUDA graph
works on another layer of the cache, and the layers together exceed the L2 several times.
--sweep tries other launch parameters on a few shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn import functional as torch_functional

from batchgen.engine.prefix_groups import MAX_GROUPS
from batchgen.kernels import decode_plan, paged_decode, paged_prefill, shared_prefix
from batchgen.kernels.cases import HeadShape
from batchgen.kernels.tuning import TileShape

BLOCK_SIZE = 16
COLD_BYTES = 512 << 20  # several times the L2
MAX_KV_BYTES = 40 << 30
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A cache of several layers in the engine's layout, with a shuffled block table."""

    kv_PL2KSH: Tensor
    block_table_RX: Tensor
    slot_ids_B: Tensor
    seq_lens_B: Tensor
    kv_bytes: int  # of one layer, counting stored tokens

    @property
    def num_layers(self) -> int:
        return self.kv_PL2KSH.shape[1]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a kernel wants to know of a layer's cache."""
        k_cache, v_cache = self.kv_PL2KSH[:, index, 0], self.kv_PL2KSH[:, index, 1]
        return k_cache, v_cache, self.block_table_RX, self.slot_ids_B


def heads(num_heads: int, num_kv_heads: int, head_size: int) -> HeadShape:
    return HeadShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=BLOCK_SIZE,
    )


def make_cache(shape: HeadShape, seq_lens: list[int], shared_blocks: int = 0) -> Cache:
    """Random KV; the first `shared_blocks` blocks of every row are the same ones."""
    num_blocks = [-(-length // BLOCK_SIZE) - shared_blocks for length in seq_lens]
    pool = sum(num_blocks) + shared_blocks
    token_bytes = 2 * shape.num_kv_heads * shape.head_size * DTYPE.itemsize
    layer_bytes = pool * BLOCK_SIZE * token_bytes
    num_layers = max(2, -(-COLD_BYTES // layer_bytes))
    size = (pool, num_layers, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_size)
    order = torch.randperm(pool).int()
    table = torch.zeros(len(seq_lens), max(num_blocks) + shared_blocks, dtype=torch.int32)
    table[:, :shared_blocks] = order[:shared_blocks]
    next_block = shared_blocks
    for row, blocks in enumerate(num_blocks):
        own = order[next_block : next_block + blocks]
        table[row, shared_blocks : shared_blocks + blocks] = own
        next_block += blocks
    return Cache(
        kv_PL2KSH=torch.empty(size, dtype=DTYPE, device="cuda").normal_(),
        block_table_RX=table.cuda(),
        slot_ids_B=torch.arange(len(seq_lens), dtype=torch.int32, device="cuda"),
        seq_lens_B=torch.tensor(seq_lens, dtype=torch.int32, device="cuda"),
        kv_bytes=sum(seq_lens) * token_bytes,
    )


def random_query(shape: HeadShape, num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, shape.num_heads, shape.head_size, dtype=DTYPE, device="cuda")


def median_us(calls: list[Callable[[], object]], rounds: int = 15) -> float:
    """The median time of one call: all calls in a CUDA graph, replayed `rounds` times."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times_ms: list[float] = []
    for _ in range(rounds):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return sorted(times_ms)[rounds // 2] * 1000 / len(calls)


def measure_ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s, read and written bytes counted, and bf16 TFLOP/s of a product."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not in a graph: there the driver may leave the copy to a copy engine, which is slower.
    copy_ms = float(triton.testing.do_bench(lambda: target.copy_(source), return_mode="median"))
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device="cuda") for _ in range(2))
    product_us = median_us([lambda: a @ b] * 4)
    return {
        "copy_gb_s": 2 * source.numel() / copy_ms / 1e6,
        "product_tflop_s": 2 * 8192**3 / product_us / 1e6,
    }


def zipf_lengths(num_rows: int, mean: int) -> list[int]:
    """Lengths proportional to 1 / rank, shuffled, with about this mean."""
    total = num_rows * mean / sum(1 / rank for rank in range(1, num_rows + 1))
    lengths = torch.tensor([max(1, round(total / rank)) for rank in range(1, num_rows + 1)])
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    return [int(length) for length in lengths[order]]


def decode_us(shape: HeadShape, cache: Cache, num_shares: int | None = None) -> tuple[float, float]:
    """Microseconds of one layer's decode, and of a step's plan."""
    q_BNH = random_query(shape, cache.slot_ids_B.shape[0])

    def make_plan() -> decode_plan.DecodePlan:
        return decode_plan.plan_decode(
            cache.seq_lens_B, num_kv_heads=shape.num_kv_heads, num_shares=num_shares
        )

    plan = make_plan()

    def call(layer: int) -> Callable[[], object]:
        return lambda: paged_decode.paged_decode(
            q_BNH, *cache.layer(layer), cache.seq_lens_B, plan, scale=0.1
        )

    layer_us = median_us([call(layer) for layer in range(cache.num_layers)])
    return layer_us, median_us([make_plan] * 8)


DECODE_SHAPES = [
    heads(16, 16, 64),
    heads(9, 3, 64),
    heads(16, 8, 128),
    heads(32, 8, 128),
    heads(32, 4, 128),
]


def bench_decode(ceilings: dict[str, float]) -> Iterator[dict[str, object]]:
    points = itertools.product(DECODE_SHAPES, (256, 1024, 8192), (64, 512, 2048), (False, True))
    for shape, context, num_rows, is_zipf in points:
        token_bytes = 2 * shape.num_kv_heads * shape.head_size * DTYPE.itemsize
        if 2 * num_rows * context * token_bytes > MAX_KV_BYTES:
            continue
        lengths = zipf_lengths(num_rows, context) if is_zipf else [context] * num_rows
        cache = make_cache(shape, lengths)
        layer_us, plan_us = decode_us(shape, cache)
        io_bytes = 2 * num_rows * shape.num_heads * shape.head_size * DTYPE.itemsize
        gb_s = (cache.kv_bytes + io_bytes) / layer_us / 1e3
        yield {
            "op": "paged_decode",
            "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_size}",
            "batch": num_rows,
            "context": context,
            "lengths": "zipf" if is_zipf else "equal",
            "median_us": round(layer_us, 1),
            "plan_us": round(plan_us, 1),
            "gb_s": round(gb_s),
            "share_of_copy": round(gb_s / ceilings["copy_gb_s"], 3),
        }


def prefill_us(shape: HeadShape, cache: Cache, query_len: int) -> float:
    num_rows = cache.slot_ids_B.shape[0]
    q_TNH = random_query(shape, num_rows * query_len)
    cu_seqlens_q = torch.arange(num_rows + 1, dtype=torch.int32, device="cuda") * query_len

    def call(layer: int) -> Callable[[], object]:
        return lambda: paged_prefill.paged_prefill(
            q_TNH, *cache.layer(layer), cu_seqlens_q, cache.seq_lens_B, scale=0.1
        )

    return median_us([call(layer) for layer in range(min(cache.num_layers, 8))])


def torch_prefill_us(shape: HeadShape, num_rows: int, length: int) -> float:
    """torch's attention on contiguous tensors, as a yardstick."""

    def tensor(num_heads: int) -> Tensor:
        size = (num_rows, num_heads, length, shape.head_size)
        return torch.randn(size, dtype=DTYPE, device="cuda")

    q, k, v = tensor(shape.num_heads), tensor(shape.num_kv_heads), tensor(shape.num_kv_heads)

    def call() -> Tensor:
        return torch_functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    return median_us([call] * 4)


def bench_prefill(ceilings: dict[str, float]) -> Iterator[dict[str, object]]:
    points = [(length, 0) for length in (256, 1024, 2048, 4096, 8192)] + [(2048, 6144)]
    for shape, (query_len, cached) in itertools.product(
        (heads(32, 8, 128), heads(16, 8, 128), heads(9, 3, 64)), points
    ):
        num_rows = 16384 // query_len
        cache = make_cache(shape, [query_len + cached] * num_rows)
        pairs = num_rows * (query_len * cached + query_len * (query_len + 1) // 2)
        flop = 4 * shape.num_heads * shape.head_size * pairs
        ours_us = prefill_us(shape, cache, query_len)
        row = {
            "op": "paged_prefill",
            "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_size}",
            "batch": num_rows,
            "query_len": query_len,
            "cached": cached,
            "median_us": round(ours_us, 1),
            "tflop_s": round(flop / ours_us / 1e6, 1),
            "share_of_product": round(flop / ours_us / 1e6 / ceilings["product_tflop_s"], 3),
        }
        if cached == 0:
            torch_us = torch_prefill_us(shape, num_rows, query_len)
            row["torch_tflop_s"] = round(flop / torch_us / 1e6, 1)
        yield row


def shared_cache(shape: HeadShape, prefix_len: int, own_len: int, sizes: list[int]) -> Cache:
    """Rows in groups of these sizes, each group with a prefix of its own."""
    cache = make_cache(shape, [prefix_len + own_len] * sum(sizes), prefix_len // BLOCK_SIZE)
    count = prefix_len // BLOCK_SIZE
    spare = torch.randperm(cache.kv_PL2KSH.shape[0], dtype=torch.int32, device="cuda")
    table = cache.block_table_RX.clone()
    ends = itertools.accumulate(sizes)
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        table[end - size : end, :count] = spare[group * count : (group + 1) * count]
    return dataclasses.replace(cache, block_table_RX=table)


def prefix_us(
    shape: HeadShape, cache: Cache, prefix_len: int, sizes: list[int]
) -> tuple[float, float]:
    """Microseconds of a layer's prefixes, own tokens and merge together, and of the prefixes alone.

    `sizes`: members of each group; for several, the launch is that of the engine's graphs.
    """
    num_rows = cache.slot_ids_B.shape[0]
    q_BNH = random_query(shape, num_rows)
    kv_starts_B = torch.full_like(cache.seq_lens_B, prefix_len)
    plan = decode_plan.plan_decode(cache.seq_lens_B, kv_starts_B, num_kv_heads=shape.num_kv_heads)
    max_groups = 1 if len(sizes) == 1 else MAX_GROUPS
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0).int()
    cu_members = torch.full((max_groups + 1,), num_rows, dtype=torch.int32)
    cu_members[0] = 0
    cu_members[1 : len(sizes) + 1] = ends
    lens = torch.zeros(max_groups, dtype=torch.int32)
    lens[: len(sizes)] = prefix_len
    table = torch.zeros_like(cache.block_table_RX[:1]).repeat(max_groups, 1)
    table[: len(sizes)] = cache.block_table_RX[(ends - 1).long().cuda()]
    members = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    groups = (table, lens.cuda(), members, cu_members.cuda())

    def prefix(layer: int) -> tuple[Tensor, Tensor]:
        k_cache, v_cache, _, _ = cache.layer(layer)
        return shared_prefix.shared_prefix(q_BNH, k_cache, v_cache, *groups, scale=0.1)

    def whole(layer: int) -> Tensor:
        own = paged_decode.paged_decode(
            q_BNH,
            *cache.layer(layer),
            cache.seq_lens_B,
            plan,
            scale=0.1,
            kv_starts_B=kv_starts_B,
            return_lse=True,
        )
        return shared_prefix.merge_attention(*prefix(layer), *own)

    layers = range(cache.num_layers)
    whole_us = median_us([functools.partial(whole, layer) for layer in layers])
    return whole_us, median_us([functools.partial(prefix, layer) for layer in layers])


# Prefix, own tokens, members of each group.
PREFIX_CASES = [
    (2048, 128, [64]),
    (2048, 128, [512]),
    (2048, 128, [64] * 8),
    (2048, 128, [16] * 32),
    (512, 128, [512]),
    (512, 128, [32] * 16),
    (256, 128, [1024]),
    *[(prefix, 512, [rows]) for prefix in (64, 256, 1024) for rows in (16, 128, 1024)],
]


def bench_prefix(_ceilings: dict[str, float]) -> Iterator[dict[str, object]]:
    """Rows that share prefixes, decoded with and without the shared kernel: where it pays."""
    for shape, (prefix_len, own_len, sizes) in itertools.product(
        (heads(32, 8, 128), heads(16, 8, 128)), PREFIX_CASES
    ):
        cache = shared_cache(shape, prefix_len, own_len, sizes)
        whole_us, prefix_part_us = prefix_us(shape, cache, prefix_len, sizes)
        separate_us, _ = decode_us(shape, cache)
        saved = (sum(sizes) - len(sizes)) * prefix_len
        yield {
            "op": "shared_prefix",
            "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_size}",
            "groups": f"{len(sizes)} x {sizes[0]}",
            "prefix": prefix_len,
            "own": own_len,
            "saved_mib": saved * 2 * shape.num_kv_heads * shape.head_size * DTYPE.itemsize >> 20,
            "median_us": round(whole_us, 1),
            "prefix_part_us": round(prefix_part_us, 1),
            "without_us": round(separate_us, 1),
            "speedup": round(separate_us / whole_us, 2),
        }


def sweep(_ceilings: dict[str, float]) -> Iterator[dict[str, object]]:
    """Other launch parameters on shapes that matter; a configuration that does not fit is left."""
    shape = heads(32, 8, 128)
    cache = make_cache(shape, [2048] * 8)
    for block_m, block_l, num_warps, num_stages in itertools.product(
        (64, 128), (64, 128), (4, 8), (2, 3, 4)
    ):
        tile = TileShape(
            block_m=block_m, block_l=block_l, num_warps=num_warps, num_stages=num_stages
        )
        with mock.patch.object(paged_prefill, "prefill_tile", lambda *_, tile=tile: tile):
            try:
                us = prefill_us(shape, cache, 2048)
            except triton.runtime.errors.OutOfResources:
                continue
        yield {"sweep": "paged_prefill 8 x 2048", "tile": str(tile), "median_us": round(us, 1)}
    del cache
    caches = {
        "64 x 8192": make_cache(shape, [8192] * 64),
        "1024 x 640": make_cache(shape, [640] * 1024),
        "512 x zipf 1024": make_cache(shape, zipf_lengths(512, 1024)),
    }
    for (name, cache), block_l, num_warps, num_stages, shares in itertools.product(
        caches.items(), (32, 64, 128), (2, 4), (2, 3, 4), (66, 132, 264)
    ):
        tile = TileShape(block_m=16, block_l=block_l, num_warps=num_warps, num_stages=num_stages)
        with mock.patch.object(paged_decode, "tile_shape", lambda *_, tile=tile: tile):
            us, _ = decode_us(shape, cache, num_shares=shares)
        yield {
            "sweep": f"paged_decode {name}",
            "tile": str(tile),
            "shares": shares,
            "median_us": round(us, 1),
            "gb_s": round(cache.kv_bytes / us / 1e3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    benches = {"decode": bench_decode, "prefill": bench_prefill, "prefix": bench_prefix}
    parser.add_argument("ops", nargs="*", help=" ".join(benches))
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not benches.keys() >= set(options.ops):
        parser.error(f"one of {', '.join(benches)} expected")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    header = versions | {name: round(value, 1) for name, value in ceilings.items()}
    sys.stdout.write(json.dumps(header) + "\n")
    chosen = options.ops or ([] if options.sweep else list(benches))
    runs = [benches[op] for op in chosen] + ([sweep] if options.sweep else [])
    for run in runs:
        for row in run(ceilings):
            assert math.isfinite(float(str(row["median_us"])))
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
