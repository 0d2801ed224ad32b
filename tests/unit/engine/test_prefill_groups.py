"""Groups of chunks that share leading blocks, against all ways to cut a step into groups."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine import prefill_groups
from batchgen.engine.prefill_groups import find_chunk_groups
from batchgen.engine.step_plan import ChunkGroups

BLOCK_SIZE = 2
TILE = 4
# A chunk's way through the tree of prefixes, full before the chunk, and its tokens.
Chunk = tuple[list[int], int]
steps = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=5), st.integers(1, 6)), min_size=1, max_size=8
)


@pytest.fixture
def free_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_groups, "MERGE_COST_TOKENS", 0)


def find(chunks: list[Chunk], min_saving: int = 1) -> ChunkGroups | None:
    """Equal ways have equal blocks; each chunk has one block more, of its own."""
    names: dict[tuple[int, ...], int] = {}
    table = np.zeros((len(chunks), 6), dtype=np.int32)
    for index, (way, _) in enumerate(chunks):
        for column in range(6):
            node = tuple(way[: column + 1]) if column < len(way) else (index, column, -1)
            table[index, column] = names.setdefault(node, len(names))
    return find_chunk_groups(
        table,
        np.array([len(way) for way, _ in chunks], dtype=np.int64),
        np.array([own for _, own in chunks], dtype=np.int32),
        block_size=BLOCK_SIZE,
        tile_tokens=TILE,
        min_saving=min_saving,
    )


def common_blocks(chunks: list[Chunk]) -> int:
    columns = zip(*(way for way, _ in chunks), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def saving(chunks: list[Chunk], num_blocks: int) -> int:
    alone = sum(-(-own // TILE) for _, own in chunks)
    return (alone - -(-sum(own for _, own in chunks) // TILE)) * num_blocks


def best_saving(chunks: list[Chunk]) -> int:
    """The most that any cut into runs saves."""
    best = [0]
    for end in range(1, len(chunks) + 1):
        runs = [(start, chunks[start:end]) for start in range(end)]
        best.append(max(best[start] + saving(run, common_blocks(run)) for start, run in runs))
    return best[-1]


@pytest.mark.usefixtures("free_merge")
@settings(max_examples=300, deadline=None)
@given(steps)
def test_groups_save_nearly_the_most(chunks: list[Chunk]) -> None:
    chunks = sorted(chunks)
    groups = find(chunks)
    best = best_saving(chunks)
    if groups is None:
        assert best == 0
        return
    assert 0.5 * best <= groups.num_blocks_saved <= best
    bounds = groups.cu_chunks.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(chunks)
    saved = 0
    for (first, end), prefix_len in zip(
        itertools.pairwise(bounds), groups.prefix_lens.tolist(), strict=True
    ):
        assert first < end
        num_blocks = prefix_len // BLOCK_SIZE
        if num_blocks:
            assert num_blocks <= common_blocks(chunks[first:end])
        saved += saving(chunks[first:end], num_blocks)
    assert saved == groups.num_blocks_saved


@pytest.mark.usefixtures("free_merge")
def test_a_saving_below_the_least_is_none() -> None:
    chunks = [([1, 1, 1], 1)] * 4
    found = find(chunks, 9)
    assert found is not None
    assert found.num_blocks_saved == 9
    assert find(chunks, 10) is None


def test_the_merge_of_all_chunks_must_be_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine blocks of two tokens against six tiles, two of them of a chunk that shares nothing."""
    chunks = [*[([1, 1, 1], 1)] * 4, ([0], 8)]
    for cost, pays in ((2, True), (3, False)):
        monkeypatch.setattr(prefill_groups, "MERGE_COST_TOKENS", cost)
        assert (find(chunks) is not None) == pays


@pytest.mark.usefixtures("free_merge")
def test_full_tiles_have_nothing_to_gain() -> None:
    assert find([([1, 1, 1], TILE)] * 8) is None


@pytest.mark.usefixtures("free_merge")
def test_a_deeper_group_stays_apart_where_it_saves_more() -> None:
    deep = [([1, 1, 1, 1, 1], 1)] * 4
    groups = find([([1, 0], 1), ([1, 2], 1), ([1, 3], 1), *deep])
    assert groups is not None
    assert groups.cu_chunks.tolist() == [0, 3, 7]
    assert groups.prefix_lens.tolist() == [BLOCK_SIZE, 5 * BLOCK_SIZE]


def test_a_full_step_takes_milliseconds() -> None:
    """4,096 chunks in groups of 32 with two levels."""
    rng = np.random.default_rng(0)
    table = np.arange(4096 * 256, dtype=np.int32).reshape(4096, 256) + 100_000
    table[:, :64] = np.arange(64)
    table[:, 64:128] = np.arange(4096)[:, None] // 32 * 64 + np.arange(64) + 1000
    num_full = np.full(4096, 128, dtype=np.int64)
    query_lens = rng.integers(1, 16, 4096).astype(np.int32)

    def run() -> float:
        start = time.process_time()
        found = find_chunk_groups(
            table, num_full, query_lens, block_size=16, tile_tokens=64, min_saving=1
        )
        elapsed = time.process_time() - start
        assert found is not None
        return elapsed

    assert min(run() for _ in range(3)) < 0.05
