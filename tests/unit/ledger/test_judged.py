from __future__ import annotations

from pathlib import Path

from ledger_factories import commit_all, local_storage, make_plan, make_results, open_ledger

from batchgen.ledger import judged_rows


def indices(tmp_path: Path, max_rows: int, *, committed: int, partial_rows: int) -> list[int]:
    """1 for each judged row that has failed: unit 1 begins with a failure."""
    ledger = open_ledger(local_storage(tmp_path), make_plan(3, 4, 5))
    for unit_id in range(committed):
        commit_all(ledger, unit_id)
    unit = ledger.plan.units[committed]
    rows = {committed: make_results(unit, 0, partial_rows)} if partial_rows else {}
    return [int(row is not None) for row in judged_rows(ledger, rows, max_rows)]


def test_a_new_job_has_none(tmp_path: Path) -> None:
    assert indices(tmp_path, 10, committed=0, partial_rows=0) == []


def test_commits_and_partials_in_input_order(tmp_path: Path) -> None:
    assert indices(tmp_path, 100, committed=2, partial_rows=2) == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert indices(tmp_path / "2", 100, committed=1, partial_rows=1) == [0, 0, 0, 1]
    assert indices(tmp_path / "3", 6, committed=2, partial_rows=2) == [1, 0, 0, 0, 0, 0]


def test_rows_before_the_last_one_that_ended_were_judged_too(tmp_path: Path) -> None:
    ledger = open_ledger(local_storage(tmp_path), make_plan(3, 4, 5))
    last = make_results(ledger.plan.units[1], 3, 4)
    failed = make_results(ledger.plan.units[1], 0, 1)
    rows = [row is not None for row in judged_rows(ledger, {1: [*failed, *last]}, 100)]
    assert rows == [False, False, False, True, False, False, False]
