"""The same life of a ledger on each kind of store, S3 being a real server's."""

import threading
import uuid

import pytest
from ledger_factories import commit_all, make_plan, make_results, open_ledger

from batchgen.dataset.storage import Storage
from batchgen.errors import StorageError
from batchgen.ledger import read_status


@pytest.fixture(params=["local", "memory", "s3"])
def store_uri(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/out/.batchgen"
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_ledger_lives_on_any_store(store_uri):
    storage = Storage.open(store_uri)
    assert read_status(storage)["state"] == "absent"
    first = open_ledger(storage, make_plan(3, 4, 2))
    units = first.plan.units
    first.flush_partial([*make_results(units[0], 0, 2), *make_results(units[1], 0, 3)])
    assert commit_all(first, 0)

    second = open_ledger(Storage.open(store_uri))
    assert second.plan == first.plan
    assert list(second.committed) == [0]
    assert second.load_partials() == {1: make_results(units[1], 0, 3)}
    assert not commit_all(second, 0)
    assert commit_all(second, 1)
    second.clean()
    assert storage.list("partials") == []
    assert not commit_all(first, 1)
    assert first.committed[1] == second.committed[1]

    letters = second.committed[1].dead_letters
    assert letters is not None
    assert b"in.parquet:1.0" in storage.read(letters.path)
    assert commit_all(second, 2)
    second.finish()
    assert read_status(storage)["state"] == "done"
    assert read_status(storage)["rows"] == {"total": 9, "ok": 7, "failed": 1, "skipped": 1}


def test_runners_commit_a_unit_once_on_any_store(store_uri):
    num_units, num_runners = 5, 3
    plan = make_plan(*[2] * num_units)
    barrier = threading.Barrier(num_runners)
    wins: list[tuple[int, bool]] = []

    def run() -> None:
        barrier.wait()
        ledger = open_ledger(Storage.open(store_uri), plan)
        for unit_id in range(num_units):
            barrier.wait()
            wins.append((unit_id, commit_all(ledger, unit_id)))

    threads = [threading.Thread(target=run) for _ in range(num_runners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(unit_id for unit_id, has_won in wins if has_won) == list(range(num_units))
    assert len(wins) == num_units * num_runners


def test_bucket_that_is_not_there_is_an_error_of_the_store(s3_bucket):
    with pytest.raises(StorageError, match="cannot write s3://"):
        open_ledger(Storage.open(f"{s3_bucket}-absent/out"))
