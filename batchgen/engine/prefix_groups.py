"""Which sequences of a decode batch share leading KV blocks, and where reading them once pays.

Sequences are admitted in the order of the prefix plan, so those that share a prefix stand together:
the blocks that neighbours have in common imply a tree. A group of n rows with m common blocks saves
the reading of (n - 1) m blocks, and a row is in one group at most. No torch.

Legend: B batch rows, X blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.step_plan import Int32, PrefixGroups

MAX_GROUPS = 32  # of one decode step


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows, and how many leading blocks they have in common."""

    rows: list[int]
    num_blocks: int

    @property
    def saving(self) -> int:
        """Blocks that are not read."""
        return (len(self.rows) - 1) * self.num_blocks


def find_groups(
    tables_BX: Int32, num_full_B: NDArray[np.int64], min_saving: int
) -> PrefixGroups | None:
    """The groups of at least two rows, those that save most, or None where it does not pay.

    tables_BX: the rows' blocks; num_full_B: how many leading ones of each may be shared, because
    they are full and never written again. min_saving: blocks whose reading a step has to save.
    """
    common = common_with_next(tables_BX, num_full_B)
    if common.sum() < max(min_saving, 1):  # no groups save more than neighbours have in common
        return None
    groups = sorted(_best_groups(common), key=lambda group: group.saving)[-MAX_GROUPS:]
    if sum(group.saving for group in groups) < min_saving:
        return None
    return PrefixGroups(
        members=np.array([row for group in groups for row in group.rows], dtype=np.int32),
        cu_members=np.cumsum([0, *(len(group.rows) for group in groups)]).astype(np.int32),
        blocks=tuple(tables_BX[group.rows[0], : group.num_blocks].copy() for group in groups),
    )


def common_with_next(tables_BX: Int32, num_full_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B - 1]: the leading full blocks that each row has in common with the next one."""
    limit = np.minimum(num_full_B[1:], num_full_B[:-1])
    width = int(limit.max(initial=0))
    if width == 0:
        return limit
    differs = tables_BX[1:, :width] != tables_BX[:-1, :width]
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
    return np.minimum(first, limit)


def tree_nodes(common: NDArray[np.int64]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The nodes of the tree that neighbours' common blocks imply, each after its children.

    A node is a run of rows with `least` common blocks; cut where neighbours have no more than these
    it falls into its children. Yields `least`, and the first row and end of each child; a child of
    more than one row is a node, too.
    """
    nodes = []
    stack = [(0, len(common) + 1)]
    while stack:
        first, end = stack.pop()
        between = common[first : end - 1]
        least = int(between.min())
        cuts = np.flatnonzero(between == least) + first + 1
        children = list(pairwise([first, *cuts.tolist(), end]))
        nodes.append((least, children))
        stack.extend((a, b) for a, b in children if b - a > 1)
    return reversed(nodes)


def _best_groups(common: NDArray[np.int64]) -> list[_Group]:
    """Groups that together save nearly the most blocks.

    A child's rows join its node's group where that saves more than the child's own groups do; rows
    that are in none are offered to the node above.
    """
    best: dict[tuple[int, int], tuple[list[_Group], list[int]]] = {}  # groups, and rows in none
    for least, children in tree_nodes(common):
        chosen: list[_Group] = []
        rows: list[int] = []
        for a, b in children:
            groups, ungrouped = best.pop((a, b), ([], [a]))
            if (b - a - len(ungrouped)) * least > sum(group.saving for group in groups):
                groups, ungrouped = [], list(range(a, b))
            chosen.extend(groups)
            rows.extend(ungrouped)
        if least and len(rows) > 1:
            chosen.append(_Group(rows, least))
            rows = []
        best[children[0][0], children[-1][1]] = chosen, rows
    return best[0, len(common) + 1][0]
