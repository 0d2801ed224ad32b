"""The block pool against a plain model of it, over random operations."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.block_pool import BlockPool


def test_allocate_gives_each_block_once() -> None:
    pool = BlockPool(8)
    a, b = pool.allocate(3), pool.allocate(5)
    assert sorted([*a.tolist(), *b.tolist()]) == list(range(8))
    assert (pool.num_free, pool.num_used) == (0, 8)


def test_released_prefix_is_found_until_its_block_is_needed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.register(int(blocks[0]), b"first")
    pool.register(int(blocks[1]), b"second")
    pool.release(blocks)
    assert pool.lookup([b"first", b"second", b"third"]).tolist() == blocks.tolist()
    assert pool.num_free == 4
    pool.allocate(3)  # takes the two free blocks and evicts the end of the prefix
    assert pool.lookup([b"first", b"second"]).tolist() == [blocks[0]]
    assert len(pool.lookup([b"second"])) == 0


def test_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.register(int(blocks[0]), b"content")
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_used == 1
    pool.check_integrity([blocks])
    pool.release(blocks)
    pool.share(blocks)  # taken up again from the evictable ones
    pool.check_integrity([blocks])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("arsl"), st.integers(0, 9)), max_size=80))
def test_random_operations_keep_integrity(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(12)
    owners: list[np.ndarray] = []
    for operation, number in operations:
        if operation == "a" and 0 < number <= pool.num_free:
            owners.append(pool.allocate(number))
        elif operation == "r" and owners:
            pool.release(owners.pop(number % len(owners)))
        elif operation == "s" and owners:
            block = int(owners[number % len(owners)][0])
            if block not in pool._hash_of:
                pool.register(block, bytes([number]))
        elif operation == "l":
            found = pool.lookup([bytes([number]), bytes([(number + 1) % 10])])
            if len(found):
                pool.share(found)
                owners.append(found)
        pool.check_integrity(owners)
        assert pool.num_free + len({int(b) for o in owners for b in o}) == pool.num_blocks
