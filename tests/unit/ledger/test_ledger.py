import threading

import pytest
from ledger_factories import (
    FINGERPRINT,
    commit_all,
    local_storage,
    make_plan,
    make_results,
    open_ledger,
)

from batchgen.errors import JobChangedError, UsageError
from batchgen.ledger import Ledger, RunCounts, read_status


def refuse_to_plan():
    raise AssertionError("the input was read again")


def reopen(path: object) -> Ledger:
    return Ledger.open(
        local_storage(path),
        resume="if_possible",
        fingerprint=FINGERPRINT,
        make_plan=refuse_to_plan,
    )


def test_input_is_planned_once(tmp_path):
    plan = make_plan(3, 4)
    assert open_ledger(local_storage(tmp_path), plan).plan == plan
    assert reopen(tmp_path).plan == plan


def test_runner_that_begins_second_goes_on_with_the_plan_of_the_first(tmp_path):
    def plan_while_another_begins():
        open_ledger(local_storage(tmp_path), make_plan(3, 4))
        return make_plan(7)

    ledger = Ledger.open(
        local_storage(tmp_path),
        resume="if_possible",
        fingerprint=FINGERPRINT,
        make_plan=plan_while_another_begins,
    )
    assert ledger.plan == make_plan(3, 4)


def test_runner_that_begins_second_with_another_job_is_refused(tmp_path):
    def plan_while_another_begins():
        open_ledger(local_storage(tmp_path))
        return make_plan(7)

    with pytest.raises(JobChangedError):
        Ledger.open(
            local_storage(tmp_path),
            resume="if_possible",
            fingerprint={"sampling": {"temperature": 0.5}},
            make_plan=plan_while_another_begins,
        )


@pytest.mark.parametrize("resume", ["if_possible", "always"])
def test_changed_job_is_refused_by_name(tmp_path, resume):
    open_ledger(local_storage(tmp_path))
    changed = {**FINGERPRINT, "sampling": {"temperature": 0.8, "stop": []}}
    with pytest.raises(JobChangedError, match=r"sampling\.temperature: 0\.0 -> 0\.8") as caught:
        open_ledger(local_storage(tmp_path), resume=resume, fingerprint=changed)
    assert caught.value.exit_code == 5
    assert str(tmp_path) in str(caught.value)


def test_fingerprint_of_tuples_is_that_of_lists(tmp_path):
    open_ledger(local_storage(tmp_path), fingerprint={"stop": ("a", "b")})
    open_ledger(local_storage(tmp_path), fingerprint={"stop": ["a", "b"]})


def test_resume_always_needs_a_ledger(tmp_path):
    with pytest.raises(UsageError, match="holds no ledger"):
        Ledger.open(
            local_storage(tmp_path),
            resume="always",
            fingerprint=FINGERPRINT,
            make_plan=refuse_to_plan,
        )
    assert list(tmp_path.iterdir()) == []


def test_resume_never_refuses_a_ledger_and_deletes_nothing(tmp_path):
    open_ledger(local_storage(tmp_path), resume="never")
    files = local_storage(tmp_path).list()
    with pytest.raises(UsageError, match="Nothing is deleted for you"):
        open_ledger(local_storage(tmp_path), resume="never")
    assert local_storage(tmp_path).list() == files


def test_counts_are_of_committed_and_flushed_rows(tmp_path):
    ledger = open_ledger(local_storage(tmp_path), make_plan(3, 4, 5))
    units = ledger.plan.units
    assert ledger.counts() == RunCounts(total=12)
    ledger.flush_partial([*make_results(units[0], 0, 2), *make_results(units[1], 0, 3)])
    ledger.flush_partial(make_results(units[0], 2))
    flushed = RunCounts(total=12, ok=4, failed=1, skipped=1, prompt_tokens=40, output_tokens=8)
    assert ledger.counts() == flushed
    commit_all(ledger, 0)
    assert ledger.counts() == flushed
    commit_all(ledger, 1)
    expected = RunCounts(total=12, ok=5, failed=1, skipped=1, prompt_tokens=50, output_tokens=10)
    assert ledger.counts() == expected
    again = reopen(tmp_path)
    again.load_partials()
    assert again.counts() == expected


def test_counts_after_a_restart_hold_flushed_rows_once(tmp_path):
    ledger = open_ledger(local_storage(tmp_path))
    for _ in range(2):
        ledger.flush_partial(make_results(ledger.plan.units[0], 0, 2))
    again = reopen(tmp_path)
    assert again.counts().ok == 0
    again.load_partials()
    assert again.counts().ok == 2


def test_clean_keeps_partials_that_hold_a_row_of_an_uncommitted_unit(tmp_path):
    ledger = open_ledger(local_storage(tmp_path))
    units = ledger.plan.units
    ledger.flush_partial(make_results(units[0], 0, 1))
    ledger.flush_partial([*make_results(units[0], 1), *make_results(units[1], 0, 1)])
    commit_all(ledger, 0)
    ledger.clean()
    assert len(local_storage(tmp_path).list("partials")) == 1
    assert reopen(tmp_path).load_partials() == {1: make_results(units[1], 0, 1)}


def test_clean_deletes_the_partials_of_earlier_runs(tmp_path):
    open_ledger(local_storage(tmp_path)).flush_partial(make_results(make_plan().units[0], 0, 1))
    ledger = reopen(tmp_path)
    ledger.load_partials()
    commit_all(ledger, 0)
    ledger.clean()
    assert local_storage(tmp_path).list("partials") == []


def test_finish_deletes_every_partial_damaged_ones_too(tmp_path):
    ledger = open_ledger(local_storage(tmp_path))
    ledger.flush_partial(make_results(ledger.plan.units[0], 0, 1))
    (tmp_path / "partials" / "00-000001.partial").write_bytes(b"damaged")
    for unit in ledger.plan.units:
        commit_all(ledger, unit.unit_id)
    ledger.finish()
    ledger.finish()
    assert local_storage(tmp_path).list("partials") == []


def test_status_tells_where_the_job_stands(tmp_path):
    storage = local_storage(tmp_path)
    assert read_status(storage) == {
        "state": "absent",
        "rows": {"total": 0, "ok": 0, "failed": 0, "skipped": 0},
        "units": {"total": 0, "committed": 0},
        "tokens": {"prompt": 0, "output": 0},
        "runs": {"count": 0, "wall_s": 0, "engine": None},
    }
    ledger = open_ledger(storage)
    assert read_status(storage)["state"] == "incomplete"
    ledger.flush_partial(make_results(ledger.plan.units[1]))
    commit_all(ledger, 0)
    ledger.flush_partial(make_results(ledger.plan.units[1]))
    files = storage.list()
    assert read_status(storage) == {
        "state": "incomplete",
        "rows": {"total": 5, "ok": 3, "failed": 1, "skipped": 1},
        "units": {"total": 2, "committed": 1},
        "tokens": {"prompt": 30, "output": 6},
        "runs": {"count": 0, "wall_s": 0, "engine": None},
    }
    assert storage.list() == files
    commit_all(ledger, 1)
    assert read_status(storage)["state"] == "incomplete"  # nothing is published yet
    ledger.finish()
    assert read_status(storage)["state"] == "done"


def test_status_of_an_empty_input(tmp_path):
    storage = local_storage(tmp_path)
    empty = make_plan(0)
    ledger = open_ledger(
        storage, type(empty)(files=(), units=(), schema_base64=empty.schema_base64)
    )
    assert ledger.is_complete
    ledger.finish()
    assert read_status(storage)["state"] == "done"


def test_threads_commit_a_unit_once(tmp_path):
    num_units, num_runners = 20, 4
    ledgers = [
        open_ledger(local_storage(tmp_path), make_plan(*[2] * num_units))
        for _ in range(num_runners)
    ]
    wins: list[list[bool]] = [[] for _ in ledgers]
    barrier = threading.Barrier(num_runners)

    def run(runner: int) -> None:
        for unit_id in range(num_units):
            barrier.wait()
            wins[runner].append(commit_all(ledgers[runner], unit_id))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num_runners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(won) for won in zip(*wins, strict=True)] == [1] * num_units
    assert all(ledger.committed == ledgers[0].committed for ledger in ledgers)
