"""The prefix plan against a trie of dicts and a comparison of every pair."""

from __future__ import annotations

import time
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.prefix_plan import PrefixPlan, plan_window

# Few ids, of one byte and of several, make shared prefixes, prefixes of others and equal prompts.
TOKENS = st.sampled_from([0, 1, 255, 256, 65_536, 151_643])
BASES = st.lists(st.lists(TOKENS, max_size=8), min_size=1, max_size=3)


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Prompts that begin with some of a base, and the tokens that each row may come to."""
    bases = draw(BASES)
    prompts = []
    for _ in range(draw(st.integers(0, 16))):
        base = draw(st.sampled_from(bases))
        prompts.append(base[: draw(st.integers(0, 8))] + draw(st.lists(TOKENS, max_size=4)))
    lengths = [len(prompt) + draw(st.integers(1, 6)) for prompt in prompts]
    return prompts, lengths


def plan(prompts: list[list[int]], lengths: list[int]) -> PrefixPlan:
    return plan_window([np.array(ids, dtype=np.int32) for ids in prompts], lengths)


def lcp(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def num_trie_nodes(prompts: list[list[int]]) -> int:
    """Nodes of a trie with one token an edge, the root not counted."""
    root: dict[int, dict] = {}
    count = 0
    for ids in prompts:
        node = root
        for token in ids:
            count += token not in node
            node = node.setdefault(token, {})
    return count


def walk_by_definition(members: list[int], prompts, lengths, depth: int = 0) -> list[int]:
    """The subtree of `members`, which share `depth` tokens: the branch of the longest row first,
    and of equally long ones that of the first row."""
    branches: dict[object, list[int]] = {}
    for index in members:
        ids = prompts[index]
        branch = ("token", ids[depth]) if len(ids) > depth else ("ends here", index)
        branches.setdefault(branch, []).append(index)
    ordered = sorted(
        branches.items(), key=lambda item: min((-lengths[index], index) for index in item[1])
    )
    return [
        index
        for (kind, _), branch in ordered
        for index in (
            branch
            if kind == "ends here"
            else walk_by_definition(branch, prompts, lengths, depth + 1)
        )
    ]


@given(windows())
@settings(max_examples=500, deadline=None)
def test_prompt_shares_most_with_the_one_before_it(window):
    prompts, lengths = window
    planned = plan(prompts, lengths)
    order = planned.order.tolist()
    assert sorted(order) == list(range(len(prompts)))
    walked = [prompts[index] for index in order]
    most = [
        max((lcp(ids, other) for other in walked[:i]), default=0) for i, ids in enumerate(walked)
    ]
    before = [lcp(ids, other) for ids, other in zip(walked[1:], walked, strict=False)]
    assert planned.shared_lens.tolist() == most == [0, *before][: len(walked)]
    assert sum(map(len, prompts)) - sum(most) == num_trie_nodes(prompts)


@given(windows())
@settings(max_examples=500, deadline=None)
def test_order_is_the_walk_with_the_longest_branch_first(window):
    prompts, lengths = window
    expected = walk_by_definition(list(range(len(prompts))), prompts, lengths)
    assert plan(prompts, lengths).order.tolist() == expected


@given(windows(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_plan_does_not_depend_on_the_order_of_arrival(window, random):
    """Apart from ties: here every length is another."""
    prompts, lengths = window
    lengths = [length * len(prompts) + i for i, length in enumerate(lengths)]
    arrival = list(range(len(prompts)))
    random.shuffle(arrival)
    shuffled = plan([prompts[i] for i in arrival], [lengths[i] for i in arrival])
    planned = plan(prompts, lengths)
    assert [arrival[i] for i in shuffled.order.tolist()] == planned.order.tolist()
    assert shuffled.shared_lens.tolist() == planned.shared_lens.tolist()


def test_types():
    for prompts in ([], [[1, 2]], [[1, 2], [1, 3]]):
        planned = plan(prompts, [9] * len(prompts))
        assert planned.order.dtype == np.int64
        assert planned.shared_lens.dtype == np.int32
        assert len(planned.order) == len(planned.shared_lens) == len(prompts)


def test_single_prompt():
    planned = plan([[5, 6]], [2])
    assert planned.order.tolist() == planned.shared_lens.tolist() == [0]


def test_longest_first_without_sharing():
    planned = plan([[1, 1], [2], [3, 3, 3], [4]], [5, 9, 5, 7])
    assert planned.order.tolist() == [1, 3, 0, 2]
    assert planned.shared_lens.tolist() == [0, 0, 0, 0]


def test_equal_prompts_keep_their_order():
    planned = plan([[7, 8, 9]] * 3, [4, 4, 4])
    assert planned.order.tolist() == [0, 1, 2]
    assert planned.shared_lens.tolist() == [0, 3, 3]


def test_row_longer_than_those_that_its_prompt_begins():
    planned = plan([[1, 2, 3], [1, 2], [4]], [8, 50, 20])
    assert planned.order.tolist() == [1, 0, 2]
    assert planned.shared_lens.tolist() == [0, 2, 0]


def test_chain_of_nested_prefixes():
    """Deeper than Python's stack. Each prompt is a prefix of the next longer one."""
    count = 4096
    ids = np.arange(count, dtype=np.int32)
    arrival = np.random.default_rng(0).permutation(count) + 1
    planned = plan_window([ids[:size] for size in arrival], arrival.tolist())
    assert arrival[planned.order].tolist() == list(range(count, 0, -1))
    assert planned.shared_lens.tolist() == [0, *range(count - 1, 0, -1)]
    shortest_first = plan_window([ids[:size] for size in arrival], (-arrival).tolist())
    assert arrival[shortest_first.order].tolist() == list(range(1, count + 1))
    assert shortest_first.shared_lens.tolist() == list(range(count))


@pytest.mark.parametrize("num_groups", [1, 64])
def test_full_window_is_planned_in_two_seconds(num_groups):
    """64k prompts that share 512 tokens, all of them or in groups."""
    rng = np.random.default_rng(0)
    count, shared = 65_536, 512
    own = rng.integers(1, 189, count)
    groups = rng.integers(0, num_groups, count)
    prefixes = rng.integers(0, 151_643, (num_groups, shared), dtype=np.int32)
    tokens = np.split(rng.integers(0, 151_643, own.sum(), dtype=np.int32), np.cumsum(own)[:-1])
    prompts = [np.concatenate([prefixes[g], ids]) for g, ids in zip(groups, tokens, strict=True)]
    lengths = (own + shared + 128).tolist()

    began = time.process_time()
    planned = plan_window(prompts, lengths)
    assert time.process_time() - began < 2.0
    assert np.count_nonzero(planned.shared_lens < shared) == num_groups
