"""Times prefill attention with and without groups on a GPU and prints one JSON object a row.

    python tests/kernels/bench_prefill_groups.py

A step of 16,384 query tokens: groups of chunks with a prefix in common, each chunk with as many
tokens of its own. `plain_us` is one call over all KV; `grouped_us` what takes its place, of which
`own_us` and `prefix_us` are the parts before the merge. `spared` is what prefill_groups weighs
against MERGE_COST_TOKENS: KV tokens that tiles need not attend to, for each tile of a chunk alone.
The constant belongs where the speedup crosses 1.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchgen.engine.prefill_groups import MERGE_COST_TOKENS
from batchgen.kernels.cases import HeadShape
from batchgen.kernels.paged_prefill import paged_prefill
from batchgen.kernels.shared_prefix import merge_attention
from batchgen.kernels.tuning import prefill_tile
from tests.kernels.bench_attention import (
    BLOCK_SIZE,
    COLD_BYTES,
    DTYPE,
    MAX_KV_BYTES,
    heads,
    median_us,
    random_query,
)

STEP_TOKENS = 16384
SHAPES = (heads(16, 8, 128), heads(32, 8, 128))
PREFIXES = (256, 1024, 4096)
OWN = (8, 16, 32, 64, 128, 256)
MEMBERS = (4, 32, 0)  # 0: all chunks are one group
MAX_LAYERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Groups of equal size; lengths in tokens."""

    shape: HeadShape
    prefix: int
    own: int
    members: int
    num_groups: int

    @property
    def num_chunks(self) -> int:
        return self.members * self.num_groups

    @property
    def num_blocks(self) -> int:
        own_blocks = -(-self.own // BLOCK_SIZE)
        return self.num_groups * self.prefix // BLOCK_SIZE + self.num_chunks * own_blocks

    @property
    def layer_bytes(self) -> int:
        token_bytes = 2 * self.shape.num_kv_heads * self.shape.head_size * DTYPE.itemsize
        return self.num_blocks * BLOCK_SIZE * token_bytes

    @property
    def spared(self) -> float:
        """See prefill_groups."""
        tile = prefill_tile(DTYPE, self.shape.head_size, torch.device("cuda"))
        tokens = tile.block_m * self.shape.num_kv_heads // self.shape.num_heads
        alone = self.members * -(-self.own // tokens)
        together = -(-self.members * self.own // tokens)
        return (alone - together) * self.prefix / alone


def cases() -> Iterator[Case]:
    for shape, prefix, own, members in itertools.product(SHAPES, PREFIXES, OWN, MEMBERS):
        num_chunks = STEP_TOKENS // own
        size = members or num_chunks
        case = Case(
            shape=shape, prefix=prefix, own=own, members=size, num_groups=num_chunks // size
        )
        if 2 * case.layer_bytes <= MAX_KV_BYTES:
            yield case


def block_table(case: Case) -> Tensor:
    """Shuffled blocks; the leading ones of a group's rows are the same."""
    order = torch.randperm(case.num_blocks).int()
    num_shared = case.prefix // BLOCK_SIZE
    shared = order[: case.num_groups * num_shared].view(case.num_groups, num_shared)
    own = order[case.num_groups * num_shared :].view(case.num_chunks, -1)
    return torch.cat((shared.repeat_interleave(case.members, 0), own), dim=1).cuda()


def calls(case: Case, kv_PL2KSH: Tensor) -> dict[str, list[Callable[[], object]]]:
    """One layer's work, for each of several layers."""
    table_RX = block_table(case)

    def ints(values: range) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def constant(size: int, value: int) -> Tensor:
        return torch.full((size,), value, dtype=torch.int32, device="cuda")

    rows_B = ints(range(case.num_chunks))
    cu_B1 = ints(range(0, STEP_TOKENS + 1, case.own))
    lens_B = constant(case.num_chunks, case.prefix + case.own)
    starts_B = constant(case.num_chunks, case.prefix)
    rows_G = ints(range(0, case.num_chunks, case.members))
    cu_G1 = ints(range(0, STEP_TOKENS + 1, case.own * case.members))
    lens_G = constant(case.num_groups, case.prefix)
    q_TNH = random_query(case.shape, STEP_TOKENS)

    def plain(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return paged_prefill(q_TNH, k_cache, v_cache, table_RX, rows_B, cu_B1, lens_B, scale=0.1)

    def own(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        queries = (rows_B, cu_B1, lens_B)
        return paged_prefill(
            q_TNH,
            k_cache,
            v_cache,
            table_RX,
            *queries,
            scale=0.1,
            kv_starts_B=starts_B,
            return_lse=True,
        )

    def prefix(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        queries = (rows_G, cu_G1, lens_G)
        return paged_prefill(
            q_TNH, k_cache, v_cache, table_RX, *queries, scale=0.1, is_causal=False, return_lse=True
        )

    def grouped(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return merge_attention(*own(k_cache, v_cache), *prefix(k_cache, v_cache))

    caches = [(kv_PL2KSH[:, i, 0], kv_PL2KSH[:, i, 1]) for i in range(kv_PL2KSH.shape[1])]
    torch.testing.assert_close(grouped(*caches[0]), plain(*caches[0]), rtol=2e-2, atol=2e-2)
    parts = {"plain": plain, "grouped": grouped, "own": own, "prefix": prefix}
    return {
        name: [functools.partial(part, *cache) for cache in caches] for name, part in parts.items()
    }


def measure(case: Case) -> dict[str, object]:
    num_layers = max(2, min(MAX_LAYERS, -(-COLD_BYTES // case.layer_bytes)))
    shape = case.shape
    size = (case.num_blocks, num_layers, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_size)
    kv_PL2KSH = torch.empty(size, dtype=DTYPE, device="cuda").normal_()
    times = {name: median_us(layers) for name, layers in calls(case, kv_PL2KSH).items()}
    return {
        "op": "prefill_groups",
        "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_size}",
        "prefix": case.prefix,
        "own": case.own,
        "groups": f"{case.num_groups} x {case.members}",
        "spared": round(case.spared),
        "is_grouped": case.spared > MERGE_COST_TOKENS,
        **{f"{name}_us": round(us, 1) for name, us in times.items()},
        "speedup": round(times["plain"] / times["grouped"], 2),
    }


def main() -> None:
    torch.manual_seed(0)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    header = {"gpu": torch.cuda.get_device_name(), **versions, "merge_cost": MERGE_COST_TOKENS}
    sys.stdout.write(json.dumps(header) + "\n")
    for case in cases():
        sys.stdout.write(json.dumps(measure(case)) + "\n")
        sys.stdout.flush()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
