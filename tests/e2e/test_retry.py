"""A retry of failed rows: merged in place, atomically, by any number of processes at once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_jobs import ROOT, batchgen, make_rows, read_output, write_job, write_jsonl
from retry_jobs import (
    ENGINE_ERRORS,
    NO_TEXT,
    NUM_ROWS,
    load_with,
    make_worker,
    retry_rows,
    run_with_engine_errors,
    verify,
    write_retry_job,
)
from standin import StandInEngine

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError, JobChangedError, UsageError
from batchgen.job.spec import JobSpec
from batchgen.ledger import read_status
from batchgen.publishing import publish_job
from batchgen.records import RowKey
from batchgen.runner import run_job
from batchgen.startup import open_job, open_ledger_storage
from batchgen.supervision import Assignment

KINDS = {
    "arrow": {"format": "arrow"},
    "parquet": {"format": "parquet"},
    "jsonl": {"format": "jsonl"},
    "no meta": {"columns": {"keep": ["id"], "meta": False}},
    "explode": {"n_layout": "explode"},
    "list": {"n_layout": "list"},
}


def written(spec: JobSpec) -> list[dict[str, Any]]:
    return read_output(spec.output.uri, spec.output.format)


def failed_rows(spec: JobSpec) -> list[tuple[int, str]]:
    """Of the commits that count: number and kind of each failed row."""
    ledger = open_job(spec).ledger
    return [
        (int(failure.address.rpartition(":")[2]), failure.kind)
        for unit_id in ledger.committed
        for failure in ledger.failures(unit_id)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_retried_rows_take_their_places(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    sampling = {"n": 3, "temperature": 0.8} if kind in ("explode", "list") else {}
    job = write_retry_job(tmp_path, tiny_model, output=KINDS[kind], sampling=sampling)
    whole = load_with(job, f"output.uri={tmp_path / 'whole'}")
    run_job(whole, make_engine=lambda *_: StandInEngine())
    spec = load_with(job)
    first = run_with_engine_errors(spec)
    assert (first.counts.failed, first.counts.skipped) == (1 + len(ENGINE_ERRORS), 2)
    assert len(written(spec)) < len(written(whole))
    report = retry_rows(spec)
    assert report.counts == open_job(whole).ledger.counts()
    assert written(spec) == written(whole)
    receipt = verify(spec)
    assert (receipt.is_right, receipt.state, receipt.leftovers) == (True, "done", [])
    assert failed_rows(spec) == [(NO_TEXT, "template_error")]
    status: Any = read_status(open_ledger_storage(spec))
    assert status["state"] == "done"
    assert status["rows"] == {"total": NUM_ROWS, "ok": NUM_ROWS - 3, "failed": 1, "skipped": 2}
    # What did not fail is not written again.
    assert not list((tmp_path / "out/.batchgen/commits").glob("00000004.r*"))


def test_only_rows_of_the_type_are_tried(tmp_path: Path, tiny_model: Path) -> None:
    spec = load_with(write_retry_job(tmp_path, tiny_model))
    run_with_engine_errors(spec)
    before = written(spec)
    retry_rows(spec, "too_long")
    assert not list((tmp_path / "out/.batchgen/commits").glob("*.r*"))
    retry_rows(spec, "template_error")
    assert written(spec) == before
    assert (NO_TEXT, "template_error") in failed_rows(spec)
    assert len(list((tmp_path / "out/.batchgen/commits").glob("*.r*"))) == 1
    assert verify(spec).is_right
    retry_rows(spec, "engine_error")
    assert failed_rows(spec) == [(NO_TEXT, "template_error")]
    assert len(written(spec)) == NUM_ROWS - 3
    assert verify(spec).is_right


def test_a_job_that_had_no_row_at_all_gets_a_dataset(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(2))
    spec = load_with(write_job(tmp_path, tiny_model))
    run_with_engine_errors(spec, (0, 1))
    assert verify(spec).is_right
    retry_rows(spec)
    assert [row["id"] for row in written(spec)] == [0, 1]
    assert verify(spec).leftovers == []


def test_a_retry_needs_a_finished_job_that_is_the_same(tmp_path: Path, tiny_model: Path) -> None:
    job = write_retry_job(tmp_path, tiny_model)
    spec = load_with(job)
    with pytest.raises(UsageError, match="holds no ledger; run the job first"):
        retry_rows(spec)
    assert not (tmp_path / "out").exists()

    class DyingEngine(StandInEngine):
        def run(self, source: Any) -> Any:
            yield next(super().run(source))
            raise BatchgenError("enough")

    with pytest.raises(BatchgenError, match="enough"):
        run_job(spec, make_engine=lambda *_: DyingEngine())
    with pytest.raises(UsageError, match=r"is not finished: [0-9]+ units are left"):
        retry_rows(spec)
    run_with_engine_errors(spec)
    changed = load_with(job, "sampling.max_tokens=13")
    with pytest.raises(JobChangedError, match=r"sampling\.max_tokens: 12 -> 13"):
        retry_rows(changed)


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], list[str]]:
    """Ends the process before or after one of its writes; gives the list that names them."""

    def arm(number: int, after: bool) -> list[str]:
        done: list[str] = []
        for name in ("create", "put", "delete"):
            monkeypatch.setattr(Storage, name, _dying(getattr(Storage, name), done, number, after))
        return done

    return arm


def _dying(method: Any, done: list[str], number: int, after: bool) -> Any:
    def wrapped(self: Storage, *arguments: Any) -> Any:
        if len(done) > number:
            raise Killed  # whatever the process would still do
        if len(done) == number and not after:
            done.append(method.__name__)
            raise Killed
        result = method(self, *arguments)
        done.append(method.__name__)
        if len(done) > number:
            raise Killed
        return result

    return wrapped


@pytest.mark.parametrize("after", [False, True])
def test_a_retry_killed_at_any_write_leaves_the_old_or_the_new_state(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    die_at: Callable[[int, bool], list[str]],
    after: bool,
) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(12))
    job = write_job(tmp_path, tiny_model, checkpoint={"unit_rows": 4, "flush_interval": 0.001})
    whole = load_with(job, f"output.uri={tmp_path / 'whole'}")
    run_job(whole, make_engine=lambda *_: StandInEngine())
    number = 0
    while True:
        spec = load_with(job, f"output.uri={tmp_path / f'out-{number}'}")
        run_with_engine_errors(spec, (1, 6, 7), unit_rows=4)
        with monkeypatch.context():
            die_at(number, after)
            try:
                retry_rows(spec, retry_id="killed")
            except Killed:
                pass
            else:
                break
            finally:
                monkeypatch.undo()
        receipt = verify(spec)
        assert receipt.is_right, (number, receipt.differences)
        status: Any = read_status(open_ledger_storage(spec))
        assert status["rows"]["ok"] + status["rows"]["failed"] == 12
        if number % 2:  # both commands go on
            run_job(spec, make_engine=lambda *_: StandInEngine())
            assert verify(spec).is_right
            assert verify(spec).state == "done"
        retry_rows(spec, retry_id="again")
        assert written(spec) == written(whole), number
        assert verify(spec).is_right
        number += 1
    assert number > 10


def _retry_in_a_process(job: str, retry_id: str, barrier: Any) -> None:
    barrier.wait()
    retry_rows(load_with(Path(job)), retry_id=retry_id, delay_s=0.05)


def test_two_retries_at_once_double_nothing(tmp_path: Path, tiny_model: Path) -> None:
    job = write_retry_job(tmp_path, tiny_model)
    whole = load_with(job, f"output.uri={tmp_path / 'whole'}")
    run_job(whole, make_engine=lambda *_: StandInEngine())
    spec = load_with(job)
    run_with_engine_errors(spec)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_retry_in_a_process, args=(str(job), retry_id, barrier))
        for retry_id in "ab"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert 0 in [process.exitcode for process in processes]
    retry_rows(spec, "engine_error", retry_id="c")  # had one been too late to find an old part
    assert written(spec) == written(whole)
    assert verify(spec).is_right


def test_a_late_publisher_cannot_bring_the_old_state_back(tmp_path: Path, tiny_model: Path) -> None:
    spec = load_with(write_retry_job(tmp_path, tiny_model))
    run_with_engine_errors(spec)
    stale = open_job(spec)
    retry_rows(spec)
    before = written(spec)
    publish_job(stale, 1.0)
    assert written(spec) == before
    receipt = verify(spec)
    assert (receipt.is_right, receipt.state) == (True, "done")


def no_engine(*_: object) -> Any:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_run_mends_what_a_late_publisher_left_that_was_killed(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    die_at: Callable[[int, bool], list[str]],
    kind: str,
) -> None:
    spec = load_with(write_retry_job(tmp_path, tiny_model, output=KINDS[kind]))
    run_with_engine_errors(spec)
    late = [open_job(spec) for _ in range(8)]
    retry_rows(spec)
    right = written(spec)
    num_wrong = 0
    for number, stale in enumerate(late):
        die_at(number, True)
        with contextlib.suppress(Killed):
            publish_job(stale, 1.0)
        monkeypatch.undo()
        num_wrong += not verify(spec).is_right
        run_job(spec, make_engine=no_engine)
        assert written(spec) == right
        receipt = verify(spec)
        assert (receipt.is_right, receipt.state, receipt.leftovers) == (True, "done", [])
    assert num_wrong > 0


def test_a_retry_that_ends_the_engine_again_sets_the_row_aside_again(
    tmp_path: Path, tiny_model: Path
) -> None:
    """What a supervisor does of a retry: run some rows alone, then all but the culprit."""
    spec = load_with(write_retry_job(tmp_path, tiny_model))
    run_with_engine_errors(spec)
    alone = (RowKey(unit_id=1, index=9),)  # row 41
    culprit = {RowKey(unit_id=0, index=31): "the engine died again"}
    from batchgen.retry import Retry

    retry = Retry(retry_id="x", only="engine_error")
    for assignment in (Assignment(only=alone), Assignment(culprits=culprit), Assignment()):
        with make_worker(assignment) as worker:
            run_job(spec, make_engine=lambda *_: StandInEngine(), retry=retry, worker=worker)
    assert failed_rows(spec) == [(31, "engine_error"), (NO_TEXT, "template_error")]
    assert verify(spec).is_right


def test_errors_reads_the_ledger_and_loads_no_model(tmp_path: Path, tiny_model: Path) -> None:
    job = write_retry_job(tmp_path, tiny_model)
    run_with_engine_errors(load_with(job))
    code = (
        "import sys\n"
        "from batchgen.cli import main\n"
        "try:\n"
        f"    main(['errors', {str(job)!r}])\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch', 'triton', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 failed rows" in done.stdout


def test_the_commands(tmp_path: Path, tiny_model: Path) -> None:
    job = write_retry_job(tmp_path, tiny_model)
    spec = load_with(job)
    assert "holds no ledger" in batchgen("errors", job).stderr
    run_with_engine_errors(spec)
    listed = batchgen("errors", job, "-n", "2")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert lines[0] == "job: 8 failed rows: 7 engine_error, 1 template_error"
    assert lines[1].endswith("data.jsonl:0: engine_error: the engine died, with this row alone")
    assert "Row 0 says: 0." in lines[2]
    assert lines[-1] == "... and 6 more (-n 8 shows all)"
    errors = json.loads(batchgen("errors", job, "--json", "--type", "template_error").stdout)
    assert (errors["failed"], errors["types"]) == (1, {"template_error": 1})
    assert [(row["index"], row["excerpt"]) for row in errors["rows"]] == [(NO_TEXT % 32, "")]
    done = batchgen("retry", job, "--only", "engine_error")
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == spec.output.uri
    assert "1 template_error" in done.stderr
    assert batchgen("retry", job, "-o", "sampling.seed=8").returncode == 5
