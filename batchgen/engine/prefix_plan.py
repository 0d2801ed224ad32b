"""The order in which the prompts of a planning window are admitted. No torch.

A depth-first walk of the radix tree of the window's token ids: what a prompt shares with any
earlier one, it shares with the one just before it. So each node of the tree is computed once, and
its KV is needed only from its first prompt to its last. Of a node's branches the one with the
longest row comes first, so that long rows do not end the run.

The tree is not built token by token. Prompts sorted as bytes have each subtree in one stretch, and
the longest common prefixes (LCP) of neighbours say where its node begins and ends. The bytes stay
in the machine's order: which of two subtrees comes first there does not matter.

Source: Kasai et al., Linear-Time Longest-Common-Prefix Computation in Suffix Arrays and Its
Applications, CPM 2001 (the tree from the LCPs, by a stack); Zheng et al., SGLang, 2024
(depth-first order is the best one for a prefix cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.step_plan import Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPlan:
    """`order`: indices into the window. `shared_lens`: for each place in the order, the leading
    tokens shared with the prompt before it, the most that it shares with any earlier one."""

    order: NDArray[np.int64]
    shared_lens: Int32


def plan_window(token_ids: Sequence[Int32], lengths: Sequence[int]) -> PrefixPlan:
    """`lengths`: tokens that each row may come to, output included.

    Of branches whose longest rows are equally long, the one whose row comes first in the window
    comes first. Empty token ids are a prompt that shares nothing.
    """
    count = len(token_ids)
    by_rank = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").astype(np.int64)
    rank_of = np.empty(count, dtype=np.int64)
    rank_of[by_rank] = np.arange(count)

    keys = [ids.tobytes() for ids in token_ids]
    places = sorted(range(count), key=keys.__getitem__)
    lcps = [_lcp(token_ids[left], token_ids[right]) for left, right in pairwise(places)]
    branches = _find_branches(rank_of[places].tolist(), lcps)
    ranks = _walk(branches)
    return PrefixPlan(
        order=by_rank[ranks], shared_lens=np.array(branches.depths, dtype=np.int32)[ranks]
    )


def _lcp(left: Int32, right: Int32) -> int:
    size = min(len(left), len(right))
    # Half the time of argmax, which also cannot tell "the first" from "none".
    first = (left[:size] != right[:size]).tobytes().find(True)
    return first if first >= 0 else size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branches:
    """The radix tree by rank: a prompt's rank is its place by length alone, the longest has 0.

    A subtree goes by the least rank in it, because that prompt comes first in the walk of it.
    """

    roots: list[int]  # the branches of the root, in their order
    after: list[list[int]]  # by rank: the branches that follow at the nodes it comes first in
    depths: list[int]  # by rank: tokens above the node at which its widest subtree branches off


def _find_branches(ranks: Sequence[int], lcps: Sequence[int]) -> _Branches:
    """`ranks`: of the prompts sorted so that each subtree is one stretch; `lcps`: of neighbours.

    The stack holds the nodes from the root to the current prompt. A node ends where two neighbours
    share less than its depth, inner nodes before outer ones, which is the order of `after`.
    """
    after: list[list[int]] = [[] for _ in ranks]
    depths = [0] * len(ranks)
    node_depths = [0]
    node_branches: list[list[int]] = [[]]
    for rank, lcp in zip(ranks, [*lcps, 0], strict=False):  # no prompt: one LCP too many
        subtree = rank
        while node_depths[-1] > lcp:
            depth = node_depths.pop()
            subtree, *others = sorted([*node_branches.pop(), subtree])
            after[subtree] += others
            for other in others:
                depths[other] = depth
        if node_depths[-1] < lcp:
            node_depths.append(lcp)
            node_branches.append([])
        node_branches[-1].append(subtree)
    return _Branches(roots=sorted(node_branches[0]), after=after, depths=depths)


def _walk(branches: _Branches) -> list[int]:
    """The ranks in depth-first order."""
    order: list[int] = []
    stack = branches.roots[::-1]
    while stack:
        rank = stack.pop()
        order.append(rank)
        stack += reversed(branches.after[rank])
    return order
