"""A run that dies at any operation on the store loses no flushed row and doubles none."""

import uuid
from dataclasses import dataclass, field
from typing import Literal

import pytest
from ledger_factories import make_part, make_plan, make_result, make_results, open_ledger

from batchgen.dataset.storage import Storage
from batchgen.errors import StorageError
from batchgen.ledger import RunCounts, read_status
from batchgen.records import RowKey

UNIT_ROWS = (3, 4, 2)
ALL_KEYS = {RowKey(unit_id=u, index=i) for u, n in enumerate(UNIT_ROWS) for i in range(n)}
FLUSH_ROWS = 2

Moment = Literal["before", "after"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of batchgen's catches it."""


@dataclass
class FaultyStorage:
    """A store on which one operation fails, before or after it took effect."""

    storage: Storage
    fail_at: int
    moment: Moment
    error: type[BaseException] = Killed
    num_operations: int = 0
    failed_operation: str = ""

    @property
    def uri(self) -> str:
        return self.storage.uri

    def __getattr__(self, name: str):
        method = getattr(self.storage, name)

        def operation(*args):
            self.num_operations += 1
            is_failing = self.num_operations == self.fail_at
            if is_failing:
                self.failed_operation = name
            if is_failing and self.moment == "before":
                raise self.error
            try:
                return method(*args)
            finally:
                if is_failing:
                    raise self.error

        return operation


@dataclass
class Witness:
    """What has been promised: rows whose flush returned, commits that returned True."""

    flushed: set[RowKey] = field(default_factory=set)
    won: list[int] = field(default_factory=list)


def run(storage: Storage | FaultyStorage, witness: Witness) -> None:
    """A whole run as a runner does it: open, load, flush every few rows, commit, clean, finish."""
    ledger = open_ledger(storage, make_plan(*UNIT_ROWS))
    finished = {result.key: result for rows in ledger.load_partials().values() for result in rows}
    done = {unit for unit in ledger.plan.units if unit.unit_id in ledger.committed}
    committed_keys = {
        RowKey(unit_id=unit.unit_id, index=i) for unit in done for i in range(unit.num_rows)
    }
    assert witness.flushed <= finished.keys() | committed_keys
    # Rows finish out of order: a flush holds rows of several units.
    waiting = sorted(
        ALL_KEYS - finished.keys() - committed_keys, key=lambda key: (key.index, key.unit_id)
    )
    for start in range(0, max(len(waiting), 1), FLUSH_ROWS):
        keys = waiting[start : start + FLUSH_ROWS]
        results = [make_result(key.unit_id, key.index) for key in keys]
        ledger.flush_partial(results)
        witness.flushed.update(keys)
        finished.update({result.key: result for result in results})
        for unit in ledger.plan.units:
            rows = [
                finished[key]
                for key in sorted(finished, key=lambda k: k.index)
                if key.unit_id == unit.unit_id
            ]
            if unit not in done and len(rows) == unit.num_rows:
                if ledger.commit(unit, make_part(rows), rows, wall_s=1.0):
                    witness.won.append(unit.unit_id)
                done.add(unit)
        ledger.clean()
    ledger.finish()


def check_finished(storage: Storage, witness: Witness) -> None:
    ledger = open_ledger(storage)
    assert ledger.is_complete
    assert ledger.counts() == RunCounts(
        total=9, ok=7, failed=1, skipped=1, prompt_tokens=70, output_tokens=14
    )
    for unit in ledger.plan.units:
        assert list(ledger.committed[unit.unit_id].parts) == make_part(make_results(unit))
    assert len(set(witness.won)) == len(witness.won)
    assert len(storage.list("commits")) == len(UNIT_ROWS)
    assert storage.list("partials") == []
    assert read_status(storage)["state"] == "done"


def new_storage() -> Storage:
    return Storage.open(f"memory://faults-{uuid.uuid4().hex}")


def count_operations() -> int:
    counting = FaultyStorage(new_storage(), 0, "before")
    run(counting, Witness())
    return counting.num_operations


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_at_every_operation(moment):
    failed_operations = set()
    for fail_at in range(1, count_operations() + 1):
        storage, witness = new_storage(), Witness()
        faulty = FaultyStorage(storage, fail_at, moment)
        with pytest.raises(Killed):
            run(faulty, witness)
        failed_operations.add(faulty.failed_operation)
        read_status(storage)
        run(storage, witness)
        check_finished(storage, witness)
    assert failed_operations == {"read", "list", "exists", "create", "put", "delete"}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_at_every_two_operations(moment):
    num_operations = count_operations()
    for first in range(1, num_operations + 1, 2):
        for second in range(1, num_operations + 1, 3):
            storage, witness = new_storage(), Witness()
            with pytest.raises(Killed):
                run(FaultyStorage(storage, first, moment), witness)
            try:
                run(FaultyStorage(storage, second, moment), witness)
            except Killed:
                run(storage, witness)
            check_finished(storage, witness)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_error_of_the_store_is_not_swallowed(moment):
    for fail_at in range(1, count_operations() + 1):
        storage, witness = new_storage(), Witness()
        with pytest.raises(StorageError):
            run(FaultyStorage(storage, fail_at, moment, StorageError), witness)
        run(storage, witness)
        check_finished(storage, witness)


def test_write_that_the_client_repeats_is_ours():
    """The reply to a PUT is lost, the store's client tries again and meets its own file."""
    for fail_at in range(1, count_operations() + 1):
        storage, witness = new_storage(), Witness()
        faulty = FaultyStorage(storage, fail_at, "after", FileExistsError)
        try:
            run(faulty, witness)
        except FileExistsError:
            assert faulty.failed_operation != "create"
            continue
        check_finished(storage, witness)
        assert witness.won == [2, 0, 1]
