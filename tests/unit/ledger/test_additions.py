"""Files that are added to a job: a chain of files, each written once, by one of many runners."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ledger_factories import (
    FINGERPRINT,
    commit_all,
    local_storage,
    make_plan,
    make_results,
    open_ledger,
)

from batchgen.errors import BatchgenError, JobChangedError
from batchgen.ledger import Ledger, LedgerPlan, StoredJob, add_files, read_job, read_status
from batchgen.ledger.commits import read_commits
from batchgen.records import InputFile

OLD = InputFile(uri="in.parquet", size_bytes=10, etag="1")


def new_plan(uri: str, *unit_rows: int) -> LedgerPlan:
    return make_plan(*unit_rows, uri=uri)


def read(storage: Any) -> StoredJob:
    job = read_job(storage)
    assert job is not None
    return job


def grow(storage: Any, uri: str, *unit_rows: int, before: bool = False) -> bool:
    """Add a file at the end of the input, or before all others."""
    job = read(storage)
    plan = new_plan(uri, *unit_rows)
    old = [job.plan.files[index] for index in job.plan.input_order]
    files = [*plan.files, *old] if before else [*old, *plan.files]
    return add_files(storage, job, plan, files)


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    storage = local_storage(tmp_path)
    open_ledger(storage)
    return storage


def test_units_are_numbered_on_and_ordered_by_their_files(storage: Any) -> None:
    assert grow(storage, "later.parquet", 4, 1)
    assert grow(storage, "early.parquet", 2, before=True)
    plan = read(storage).plan
    assert [file.uri for file in plan.files] == ["in.parquet", "later.parquet", "early.parquet"]
    assert [(u.unit_id, u.file_index, u.row_start, u.num_rows) for u in plan.units] == [
        (0, 0, 0, 3), (1, 0, 3, 2), (2, 1, 0, 4), (3, 1, 4, 1), (4, 2, 0, 2),
    ]  # fmt: skip
    assert [unit.unit_id for unit in plan.units_in_order] == [4, 0, 1, 2, 3]
    assert list(plan.input_order) == [2, 0, 1]
    assert plan.num_rows == 12


def test_the_fingerprint_has_the_files_of_all(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    files = {"in.parquet": {"size_bytes": 10, "etag": "1"}}
    fingerprint = {**FINGERPRINT, "input": {"files": files}}
    open_ledger(storage, fingerprint=fingerprint)
    grow(storage, "new.parquet", 1)
    with pytest.raises(JobChangedError, match=r"1 removed \(new\.parquet\)"):
        open_ledger(storage, fingerprint=fingerprint)
    files["new.parquet"] = {"size_bytes": 10, "etag": "1"}
    assert open_ledger(storage, fingerprint=fingerprint).plan.num_rows == 6


def test_a_published_job_is_incomplete_again_until_it_is_published_again(storage: Any) -> None:
    ledger = open_ledger(storage)
    for unit_id in (0, 1):
        commit_all(ledger, unit_id)
    ledger.finish()
    assert read_status(storage)["state"] == "done"
    before = {path: storage.read(path) for path in storage.list()}
    grow(storage, "new.parquet", 2)
    assert read_status(storage)["state"] == "incomplete"
    ledger = open_ledger(storage)
    assert not ledger.is_complete
    commit_all(ledger, 2)
    assert not ledger.is_published()
    ledger.finish()
    assert open_ledger(storage).is_published()
    assert read_status(storage)["rows"]["total"] == 7  # type: ignore[index]
    assert {path: storage.read(path) for path in before} == before


def test_one_of_two_runners_adds(storage: Any) -> None:
    job = read(storage)
    plans = [new_plan(f"{i}.parquet", 1) for i in range(8)]
    start = threading.Barrier(len(plans))
    won = []

    def add(plan: LedgerPlan) -> None:
        start.wait()
        if add_files(storage, job, plan, [OLD, *plan.files]):
            won.append(plan.files[0].uri)

    threads = [threading.Thread(target=add, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.uri for file in read(storage).plan.files[1:]] == won


def test_a_runner_that_knows_of_fewer_files_goes_on(storage: Any) -> None:
    late = open_ledger(storage)
    grow(storage, "new.parquet", 2)
    other = open_ledger(storage)
    late.flush_partial([])
    for unit_id in (0, 1, 2):
        assert commit_all(other, unit_id)
    assert not commit_all(late, 0)  # the other's commit is read, and understood
    assert late.has_grown()
    assert not other.has_grown()
    job = read(storage)
    first = StoredJob(job_id=job.job_id, fingerprint={}, plan=make_plan())
    assert sorted(read_commits(storage, first)) == [0, 1]
    assert sorted(Ledger(storage, job, read_commits(storage, job)).committed) == [0, 1, 2]


def test_partials_of_other_runners_are_kept_by_one_that_knows_of_fewer_files(
    storage: Any,
) -> None:
    late = open_ledger(storage)
    grow(storage, "new.parquet", 2)
    other = open_ledger(storage)
    other.flush_partial(make_results(other.plan.units[2], 0, 1))
    for unit_id in (0, 1):
        commit_all(late, unit_id)
    late.finish()
    assert list(open_ledger(storage).load_partials()) == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"{", "damaged"),
        (lambda data: data.replace(b'"previous": "', b'"previous": "0'), "follows another job"),
        (lambda data: data.replace(b'"order": [0, 1]', b'"order": [0, 0]'), "not in an order"),
        (lambda data: data.replace(b'"order": [0, 1]', b'"order": [0]'), "not in an order"),
        (lambda data: data.replace(b"new.parquet", b"in.parquet"), "not new"),
        (lambda data: data.replace(b'"row_cuts": [0, 2]', b'"row_cuts": [2, 0]'), "not ranges"),
    ],
)
def test_a_damaged_addition_is_refused(storage: Any, change: Any, message: str) -> None:
    grow(storage, "new.parquet", 2)
    data = storage.read("added/000001.json")
    changed = change(data)
    assert changed != data
    storage.put("added/000001.json", changed)
    with pytest.raises(BatchgenError, match=message):
        read_job(storage)


def test_a_lost_or_exchanged_addition_is_found(storage: Any) -> None:
    for name in "abc":
        grow(storage, name, 2)
    ledger = open_ledger(storage)
    commit_all(ledger, 4)
    last = storage.read("added/000003.json")
    storage.delete(["added/000003.json"])
    with pytest.raises(BatchgenError, match=r"it is a commit of unit 4|another job"):
        open_ledger(storage)
    grow(storage, "other", 2)
    with pytest.raises(BatchgenError, match="commit of another job"):
        open_ledger(storage)
    storage.put("added/000003.json", last)
    assert open_ledger(storage).committed.keys() == {4}
    storage.delete(["added/000002.json"])
    with pytest.raises(BatchgenError, match=r"000002\.json is damaged \(it is missing"):
        open_ledger(storage)


def test_a_listing_that_lags_hides_nothing(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        grow(storage, name, 2)
    expected = read(storage)
    listed = storage.list("added")
    for seen in (listed[:2], listed[1:], []):
        monkeypatch.setattr(storage, "list", lambda _, seen=seen: seen)
        assert read(storage) == expected


def test_files_without_units_and_jsonl_cuts_survive(storage: Any) -> None:
    plan = new_plan("new.jsonl", 2, 3)
    ends = ((5, 20), (20, 41))
    units = tuple(
        replace(unit, byte_start=a, byte_end=b)
        for unit, (a, b) in zip(plan.units, ends, strict=True)
    )
    empty = InputFile(uri="empty", size_bytes=0, etag="")
    plan = replace(plan, files=(*plan.files, empty), units=units)
    assert add_files(storage, read(storage), plan, [empty, OLD, plan.files[0]])
    found = read(storage).plan
    assert [(unit.byte_start, unit.byte_end) for unit in found.units[2:]] == list(ends)
    assert list(found.input_order) == [2, 0, 1]
    document = json.loads(storage.read("added/000001.json"))
    assert document["format"] == "batchgen addition"
