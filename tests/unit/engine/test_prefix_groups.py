"""Groups of rows that share leading blocks, against all possible groupings."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.prefix_groups import MAX_GROUPS, find_groups
from batchgen.engine.step_plan import PrefixGroups

# A row's blocks are named by the way to them, as blocks shared by content are.
paths = st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=5), min_size=1, max_size=7)


def tables(rows: list[list[int]], width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows as block tables: equal prefixes have equal blocks, the rest is a row's own."""
    names: dict[tuple[int, ...], int] = {}
    table = np.zeros((len(rows), width), dtype=np.int32)
    for index, row in enumerate(sorted(rows)):
        for column in range(width):
            way = tuple(row[: column + 1]) if column < len(row) else (index, column, -1)
            table[index, column] = names.setdefault(way, len(names))
    return table, np.array([len(row) for row in sorted(rows)], dtype=np.int64)


def saving(groups: PrefixGroups | None) -> int:
    if groups is None:
        return 0
    sizes = np.diff(groups.cu_members)
    return sum(int(n - 1) * len(b) for n, b in zip(sizes, groups.blocks, strict=True))


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for index, group in enumerate(rest):
            yield [*rest[:index], [rows[0], *group], *rest[index + 1 :]]


def best_saving(table: np.ndarray, num_full: np.ndarray) -> int:
    """The most that any partition of the rows saves."""

    def saved(group: list[int]) -> int:
        width = int(num_full[group].min())
        same = (table[group, :width] == table[group[0], :width]).all(axis=0)
        return (len(group) - 1) * (width if same.all() else int(same.argmin()))

    return max(sum(map(saved, groups)) for groups in partitions(list(range(len(table)))))


@settings(max_examples=300, deadline=None)
@given(paths)
def test_groups_save_nearly_the_most_reads(rows: list[list[int]]) -> None:
    table, num_full = tables(rows)
    groups = find_groups(table, num_full, 1)
    best = best_saving(table, num_full)
    assert 0.75 * best <= saving(groups) <= best
    if groups is None:
        return
    assert len(set(groups.members.tolist())) == len(groups.members)
    assert groups.cu_members[0] == 0
    assert groups.cu_members[-1] == len(groups.members)
    for index, blocks in enumerate(groups.blocks):
        members = groups.members[groups.cu_members[index] : groups.cu_members[index + 1]]
        assert len(members) > 1
        assert (num_full[members] >= len(blocks)).all()
        assert (table[members, : len(blocks)] == blocks).all()


def test_a_saving_below_the_least_is_none() -> None:
    table, num_full = tables([[1, 1, 1]] * 3)
    assert saving(find_groups(table, num_full, 6)) == 6
    assert find_groups(table, num_full, 7) is None


def test_of_many_groups_those_that_save_most_are_kept() -> None:
    sizes = [2 + index % 5 for index in range(MAX_GROUPS + 9)]
    rows = [[group, 1] for group, size in enumerate(sizes) for _ in range(size)]
    groups = find_groups(*tables(rows), 1)
    assert groups is not None
    assert len(groups.blocks) == MAX_GROUPS
    assert saving(groups) == sum(sorted((2 * (size - 1) for size in sizes), reverse=True)[:32])


def test_a_full_batch_is_grouped_in_milliseconds() -> None:
    rows = [[index // 16, index // 4, 1, 1] * 16 for index in range(2048)]
    table, num_full = tables(rows, width=96)
    find_groups(table, num_full, 1)
    start = time.process_time()
    assert find_groups(table, num_full, 1) is not None
    assert time.process_time() - start < 0.1
