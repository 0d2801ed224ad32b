from __future__ import annotations

import math
import random
from collections.abc import Set as AbstractSet

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.errors import BatchgenError
from batchgen.records import RowKey
from batchgen.supervision.hunt import Hunt

WHY = "the engine's process was ended by SIGSEGV"


def key(row: int) -> RowKey:
    return RowKey(unit_id=row // 10, index=row % 10)


class Machine:
    """An engine of `pool` rows that dies, at some step, when it has a poisoned one."""

    def __init__(self, num_rows: int, poison: AbstractSet[int], pool: int, seed: int = 0) -> None:
        self.left = [key(row) for row in range(num_rows)]
        self.poison = {key(row) for row in poison}
        self.set_aside: list[RowKey] = []
        self.num_starts = 0
        self._pool = pool
        self._random = random.Random(seed)

    def run(self, hunt: Hunt) -> bool:
        """One worker's life; whether the job is done."""
        self.num_starts += 1
        assignment = hunt.next()
        self.set_aside += assignment.culprits
        self.left = [row for row in self.left if row not in assignment.culprits]
        waiting = self.left if assignment.only is None else assignment.only
        rows = [row for row in waiting if row in self.left]
        num_ended = 0
        while rows:
            taken = rows[: self._pool]
            if self.poison.intersection(taken):
                hunt.died(WHY, taken, num_ended=num_ended)
                return False
            done = self._random.sample(taken, self._random.randint(1, len(taken)))
            self.left = [row for row in self.left if row not in done]
            rows = [row for row in rows if row not in done]
            num_ended += len(done)
        if assignment.only is not None:
            hunt.ended()
            return False
        return True


@example(poison=set(range(8)), pool=1, seed=0)
@example(poison=set(range(8)), pool=3, seed=0)
@given(
    poison=st.sets(st.integers(0, 199), max_size=8),
    pool=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_every_row_that_kills_is_found_and_no_other(poison: set[int], pool: int, seed: int) -> None:
    machine = Machine(400, poison, pool, seed)
    hunt = Hunt()
    while not machine.run(hunt):
        assert machine.num_starts < 500
    assert not machine.left
    assert sorted(machine.set_aside, key=lambda k: (k.unit_id, k.index)) == [
        key(row) for row in sorted(poison)
    ]


@pytest.mark.parametrize("pool", [1, 2, 3, 16, 100, 1000])
@pytest.mark.parametrize("row", [0, 1, 700, 998, 999])
def test_the_restarts_that_it_takes(pool: int, row: int) -> None:
    machine = Machine(1000, {row}, pool)
    hunt = Hunt()
    while not machine.run(hunt):
        pass
    assert machine.num_starts - 1 <= 2 * math.ceil(math.log2(pool)) + 2


def test_a_death_that_does_not_repeat_sets_nothing_aside() -> None:
    hunt = Hunt()
    machine = Machine(100, set(), 16)
    hunt.died(WHY, [key(row) for row in range(16)], num_ended=5)
    while not machine.run(hunt):
        pass
    assert machine.num_starts == 3
    assert machine.set_aside == []


def test_deaths_that_no_row_repeats_are_given_up_in_the_end() -> None:
    hunt = Hunt()
    rows = [key(row) for row in range(4)]
    for _ in range(8):
        hunt.died(WHY, rows, num_ended=100)
        hunt.ended()
        hunt.ended()
        assert hunt.next().only is None
    with pytest.raises(BatchgenError, match="for the 9th time, and no row alone is the reason"):
        hunt.died(WHY, rows, num_ended=100)


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_death_without_rows_is_no_rows_fault(is_alone: bool) -> None:
    hunt = Hunt()
    if is_alone:
        hunt.died(WHY, [key(0)], num_ended=0)
    with pytest.raises(BatchgenError, match="while it had no row"):
        hunt.died(WHY, [], num_ended=0)


def test_an_engine_that_dies_of_everything_is_given_up() -> None:
    machine = Machine(1000, set(range(1000)), 64)
    hunt = Hunt()

    def run_to_the_end() -> None:
        while not machine.run(hunt):
            pass

    with pytest.raises(BatchgenError, match="and not the rows"):
        run_to_the_end()
    assert len(machine.set_aside) <= 8
    assert machine.num_starts < 150
