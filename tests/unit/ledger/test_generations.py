"""Commits of later generations: the newest counts, each is created once, and nothing is mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_factories import (
    commit_all,
    local_storage,
    make_part,
    make_result,
    make_results,
    open_ledger,
)

from batchgen.errors import BatchgenError
from batchgen.ledger import Ledger, RunCounts, read_job, read_status
from batchgen.ledger.audit import audit_commits
from batchgen.records import OutputRow, RowKey, RowResult


def finished(folder: Path) -> Ledger:
    """A published ledger whose unit 1 has a failed and a skipped row."""
    ledger = open_ledger(local_storage(folder))
    commit_all(ledger, 0)
    commit_all(ledger, 1)
    ledger.finish()
    return ledger


def reopened(folder: Path, retry_id: str = "x") -> Ledger:
    ledger = open_ledger(local_storage(folder))
    ledger.reopen({1: 1}, retry_id=retry_id)
    return ledger


def mended(text: str = "now right") -> OutputRow:
    """The row that had failed."""
    return OutputRow(
        key=RowKey(unit_id=1, index=0),
        address="in.parquet:1.0",
        rows=({"id": 100, "response": text},),
        num_prompt_tokens=10,
        num_output_tokens=2,
    )


def commit_mended(ledger: Ledger, text: str = "now right") -> bool:
    results: list[RowResult] = [mended(text), make_result(1, 1)]
    return ledger.commit(ledger.plan.units[1], make_part(results), results, wall_s=1.0)


def state(folder: Path) -> object:
    return read_status(local_storage(folder))["state"]


def test_a_reopened_row_counts_again_when_its_unit_is_committed(tmp_path: Path) -> None:
    before = finished(tmp_path).counts()
    assert (before.ok, before.failed, before.skipped) == (3, 1, 1)
    ledger = reopened(tmp_path)
    assert not ledger.is_complete
    assert not ledger.is_published()
    assert (ledger.counts().ok, ledger.counts().failed, ledger.counts().ended) == (3, 0, 4)
    assert state(tmp_path) == "done"  # the old commit holds
    assert commit_mended(ledger)
    assert ledger.counts() == RunCounts(total=5, ok=4, skipped=1, prompt_tokens=40, output_tokens=8)
    assert ledger.is_complete
    assert not ledger.is_published()
    assert state(tmp_path) == "incomplete"
    ledger.finish()
    assert ledger.is_published()
    assert state(tmp_path) == "done"
    again = open_ledger(local_storage(tmp_path))
    assert (again.counts(), again.is_published()) == (ledger.counts(), True)
    assert (again.committed[1].generation, again.committed[1].retry_id) == (1, "x")
    assert again.failures(1) == []


def test_dead_letters_go_when_a_newer_commit_is_published(tmp_path: Path) -> None:
    finished(tmp_path)
    [old] = (tmp_path / "dead").iterdir()
    later = old.with_name("00000001-r2-0123456789abcdef.jsonl")
    later.write_text("{}\n")  # of a retry that is about to commit
    ledger = reopened(tmp_path)
    assert [failure.message for failure in ledger.failures(1)] == ["it is empty"]
    commit_mended(ledger)
    assert old.exists()
    ledger.finish()
    assert list((tmp_path / "dead").iterdir()) == [later]


def test_one_of_two_retries_commits(tmp_path: Path) -> None:
    finished(tmp_path)
    first, second = reopened(tmp_path, "a"), reopened(tmp_path, "b")
    assert commit_mended(first)
    assert not commit_mended(second, "late")
    assert second.committed == first.committed
    assert second.counts() == first.counts()
    assert open_ledger(local_storage(tmp_path)).committed[1].retry_id == "a"


def test_a_publisher_adopts_newer_commits(tmp_path: Path) -> None:
    stale = finished(tmp_path)
    assert not stale.adopt_retries()
    ledger = reopened(tmp_path)
    commit_mended(ledger)
    assert stale.adopt_retries()
    assert stale.committed == ledger.committed
    assert stale.counts() == ledger.counts()
    assert not stale.adopt_retries()


def test_partials_are_for_the_commit_that_comes_next(tmp_path: Path) -> None:
    finished(tmp_path)
    ledger = reopened(tmp_path)
    ledger.flush_partial([mended()])
    assert ledger.counts().ok == 4
    assert state(tmp_path) == "done"
    assert open_ledger(local_storage(tmp_path)).load_partials() == {}  # not a retry
    again = reopened(tmp_path)
    assert again.load_partials() == {1: [mended()]}
    assert again.counts().ended == 5
    commit_mended(again)
    later = open_ledger(local_storage(tmp_path))
    later.reopen({1: 0}, retry_id="y")
    assert later.load_partials() == {}  # of a generation that is over


def test_an_audit_takes_the_newest_commits(tmp_path: Path) -> None:
    finished(tmp_path)
    storage = local_storage(tmp_path)
    job = read_job(storage)
    assert job is not None
    ledger = reopened(tmp_path)
    commit_mended(ledger)
    audit = audit_commits(storage, job)
    assert (audit.is_published, dict(audit.problems)) == (False, {})
    assert audit.commits[1].generation == 1
    ledger.finish()
    assert audit_commits(storage, job).is_published
    (tmp_path / "commits/00000001.r1.json").write_text("{}")
    assert list(audit_commits(storage, job).problems) == ["commits/00000001.r1.json"]


def test_a_commit_under_the_name_of_another_generation_is_damage(tmp_path: Path) -> None:
    finished(tmp_path)
    commits = tmp_path / "commits"
    (commits / "00000001.r1.json").write_bytes((commits / "00000001.json").read_bytes())
    with pytest.raises(BatchgenError, match="it is a commit of unit 1"):
        open_ledger(local_storage(tmp_path))


def test_rows_that_stay_keep_their_tokens_in_the_sums(tmp_path: Path) -> None:
    """They are read from parts, which need not have them."""
    ledger = open_ledger(local_storage(tmp_path))
    commit_all(ledger, 0)
    unit = ledger.plan.units[0]
    ledger.reopen({0: 0}, retry_id="x")
    kept = [
        OutputRow(
            key=row.key,
            address=row.address,
            rows=row.rows,
            num_prompt_tokens=0,
            num_output_tokens=0,
        )
        for row in make_results(unit)
        if isinstance(row, OutputRow)
    ]
    ledger.commit(unit, make_part(kept), kept, wall_s=1.0)
    assert (ledger.counts().prompt_tokens, ledger.counts().output_tokens) == (30, 6)
