"""Claims on units: who has begun them, until they are committed or given up."""

from __future__ import annotations

from pathlib import Path

from ledger_factories import commit_all, local_storage, make_plan, open_ledger


def test_a_unit_is_claimed_once(tmp_path: Path) -> None:
    ledger = open_ledger(local_storage(tmp_path))
    unit = ledger.plan.units[0]
    assert ledger.claims.take(unit)
    assert not open_ledger(local_storage(tmp_path)).claims.take(unit)


def test_claims_of_what_is_not_committed_are_given_up(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    ledger = open_ledger(storage, make_plan(2, 2, 2))
    units = ledger.plan.units
    assert all(ledger.claims.take(unit) for unit in units)
    commit_all(ledger, 1)
    other = open_ledger(storage)
    assert not other.claims.take(units[0])
    ledger.claims.give_up()
    assert other.claims.take(units[0])
    assert storage.list("claims") == ["claims/00000000.json"]


def test_a_commit_drops_the_claim_of_whoever_has_it(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    dead = open_ledger(storage)
    assert dead.claims.take(dead.plan.units[0])
    commit_all(open_ledger(storage), 0)
    assert storage.list("claims") == []
