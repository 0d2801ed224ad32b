"""Runs that end at a budget, and go on: no row is lost, doubled or changed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_jobs import (
    ROOT,
    TIMEOUT_S,
    batchgen,
    expected_rows,
    make_rows,
    read_output,
    start_stand_in,
    write_job,
    write_jsonl,
)
from standin import StandInEngine

from batchgen.errors import BudgetReached
from batchgen.job.loading import load_job
from batchgen.ledger import read_status
from batchgen.monitor.budget import Budget
from batchgen.records import Completion, EngineStats, Prompt, PromptSource
from batchgen.runner import RunReport, run_job
from batchgen.startup import open_ledger_storage
from batchgen.units import UnitSaver

NUM_ROWS = 300


class CountingEngine(StandInEngine):
    """Notes the prompts that it finishes."""

    def __init__(self, prompted: list[Prompt], **options: Any) -> None:
        super().__init__(**options)
        self._prompted = prompted

    def _complete(self, prompt: Prompt) -> Any:
        self._prompted.append(prompt)
        return super()._complete(prompt)

    def stats(self) -> EngineStats:
        return EngineStats(swapped_out_blocks=self._num_finished)


def run_stand_in(job: Path, *overrides: str, prompted: list[Prompt] | None = None) -> RunReport:
    """A run in this process; `prompted` takes the prompts that it finishes."""
    noted = [] if prompted is None else prompted
    return run_job(load_job(job, overrides), make_engine=lambda *_: CountingEngine(noted))


def status_of(job: Path) -> dict[str, Any]:
    return read_status(open_ledger_storage(load_job(job)))


def no_engine(*_: object) -> Any:
    raise AssertionError("the model was loaded")


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Path:
    write_jsonl(tmp_path / "data.jsonl", make_rows(NUM_ROWS))
    return write_job(tmp_path, tiny_model)


@pytest.fixture
def expected(job: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a run that nothing ends early."""
    return expected_rows(make_rows(NUM_ROWS), str(job.with_name("data.jsonl")), tokenizer)


def count_tokens(rows: list[dict[str, Any]]) -> int:
    return sum(row["output_tokens"] for row in rows)


def test_a_run_stops_at_its_tokens_and_goes_on_when_they_are_raised(
    job: Path, expected: list[dict[str, Any]]
) -> None:
    total = count_tokens(expected)
    prompted: list[Prompt] = []
    for limit in (total // 4, total // 2):
        override = f"budget.max_output_tokens={limit}"
        with pytest.raises(BudgetReached, match=f"{override} is used up"):
            run_stand_in(job, override, prompted=prompted)
        status = status_of(job)
        assert status["state"] == "incomplete"
        assert status["rows"]["ok"] == len(prompted) < NUM_ROWS
        assert limit <= status["tokens"]["output"] < limit + 48 * 12  # a batch of the stand-in
    run_stand_in(job, f"budget.max_output_tokens={2 * total}", prompted=prompted)
    assert len(prompted) == len({prompt.key for prompt in prompted}) == NUM_ROWS
    assert read_output(job.parent / "out") == expected


def test_the_status_sums_what_the_engine_did_in_every_run(job: Path) -> None:
    with pytest.raises(BudgetReached):
        run_stand_in(job, "budget.max_output_tokens=500")
    first = status_of(job)
    assert first["runs"]["count"] == 1
    assert first["runs"]["engine"]["swapped_out_blocks"] == first["rows"]["ok"] > 0
    run_stand_in(job)
    runs = status_of(job)["runs"]
    assert runs["count"] == 2
    assert runs["wall_s"] > first["runs"]["wall_s"]
    assert runs["engine"]["swapped_out_blocks"] == NUM_ROWS
    run_job(load_job(job), make_engine=no_engine)
    assert status_of(job)["runs"] == runs


def test_a_used_up_budget_ends_a_run_before_the_model_loads(job: Path) -> None:
    with pytest.raises(BudgetReached):
        run_stand_in(job, "budget.max_output_tokens=500")
    before = status_of(job)
    spec = load_job(job, ["budget.max_output_tokens=500"])
    with pytest.raises(BudgetReached, match=r"-o budget\.max_output_tokens=1000"):
        run_job(spec, make_engine=no_engine)
    assert status_of(job) == before


def test_tokens_of_a_run_that_was_killed_count(job: Path) -> None:
    process = start_stand_in(job, "--delay-ms", "200")
    partials = job.parent / "out/.batchgen/partials"
    deadline = time.monotonic() + TIMEOUT_S
    while not any(partials.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    spent = status_of(job)["tokens"]["output"]
    assert spent > 0
    spec = load_job(job, [f"budget.max_output_tokens={spent}"])
    with pytest.raises(BudgetReached, match=f"{spent} output tokens"):
        run_job(spec, make_engine=no_engine)


@pytest.mark.parametrize("spare", [0, 1])
def test_a_job_that_finishes_within_its_tokens_is_done(
    job: Path, expected: list[dict[str, Any]], spare: int
) -> None:
    total = count_tokens(expected)
    report = run_stand_in(job, f"budget.max_output_tokens={total + spare}")
    assert report.counts.ok == NUM_ROWS
    assert f"budget: {total:,} of {total + spare:,} output tokens" in report.summary.splitlines()
    assert read_output(job.parent / "out") == expected
    # Done is done, even under a limit that the job could not have been run under.
    again = run_job(load_job(job, ["budget.max_output_tokens=1"]), make_engine=no_engine)
    assert again.counts.ok == NUM_ROWS


def flush_and_fail(saver: UnitSaver, *_: object) -> None:
    saver.flush()
    raise OSError("the store is gone")


def fail(*_: object, **__: object) -> None:
    raise OSError("the store is gone")


@pytest.mark.parametrize(
    ("place", "failing"),
    [("batchgen.units.UnitSaver.commit", flush_and_fail), ("batchgen.publishing.publish", fail)],
)
def test_committing_and_publishing_what_is_finished_needs_no_budget(
    job: Path,
    expected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    failing: Callable[..., None],
) -> None:
    one_unit = f"checkpoint.unit_rows={NUM_ROWS}"
    with monkeypatch.context() as patch:
        patch.setattr(place, failing)
        with pytest.raises(OSError, match="the store is gone"):
            run_stand_in(job, one_unit)
    assert status_of(job)["state"] == "incomplete"
    nothing_left = ["budget.max_output_tokens=1", "budget.max_wall_time=0.001"]
    run_job(load_job(job, nothing_left), make_engine=no_engine)
    assert read_output(job.parent / "out") == expected


def test_a_run_stops_at_its_wall_time_and_the_next_one_goes_on(
    job: Path, expected: list[dict[str, Any]]
) -> None:
    prompted: list[Prompt] = []
    started = time.monotonic()
    # Three rows a second: the whole job would take minutes.
    with pytest.raises(BudgetReached, match=r"budget\.max_wall_time is used up: 0:0\d of 0:04"):
        run_job(
            load_job(job, ["budget.max_wall_time=4s"]),
            make_engine=lambda *_: CountingEngine(prompted, delay_s=0.3, pool=1),
            started_s=started,
        )
    assert 4 <= time.monotonic() - started < 9
    assert 0 < status_of(job)["rows"]["ok"] == len(prompted) < NUM_ROWS
    run_stand_in(job, "budget.max_wall_time=1h", prompted=prompted)
    assert len(prompted) == len({prompt.key for prompt in prompted}) == NUM_ROWS
    assert read_output(job.parent / "out") == expected


def test_time_that_is_up_before_the_model_loads_loads_none(job: Path) -> None:
    with pytest.raises(BudgetReached, match="max_wall_time"):
        run_job(
            load_job(job, ["budget.max_wall_time=30m"]),
            make_engine=no_engine,
            started_s=time.monotonic() - 1801,
        )
    assert run_stand_in(job).counts.ok == NUM_ROWS


def test_a_budget_that_is_reached_before_the_last_commits_is_of_no_account(
    job: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reached, is_stopped = threading.Event(), threading.Event()

    class LateBudget(Budget):
        def reached(self) -> BudgetReached | None:
            return BudgetReached("late") if is_reached.is_set() else None

    class LateEngine(StandInEngine):
        def run(self, source: PromptSource) -> Iterator[list[Completion]]:
            finished = list(super().run(source))
            is_reached.set()
            assert is_stopped.wait(TIMEOUT_S)
            yield from finished

        def stop(self) -> None:
            is_stopped.set()

    monkeypatch.setattr("batchgen.runner.Budget", LateBudget)
    report = run_job(load_job(job), make_engine=lambda *_: LateEngine())
    assert report.counts.ok == NUM_ROWS
    assert read_output(job.parent / "out") == expected


def test_what_is_used_stands_in_the_progress_and_in_the_summary(
    job: Path, expected: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    total = count_tokens(expected)
    log = "observability.progress=log"
    with pytest.raises(BudgetReached):
        run_stand_in(job, f"budget.max_output_tokens={total // 2}", log)
    spent = status_of(job)["tokens"]["output"]
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert f" 0 failed, budget {spent / (total // 2):.0%}, " in last_line
    report = run_stand_in(job, f"budget.max_output_tokens={2 * total}", "budget.max_wall_time=1h")
    (line,) = [line for line in report.summary.splitlines() if line.startswith("budget: ")]
    assert line.startswith(f"budget: {total:,} of {2 * total:,} output tokens, 0:")
    assert line.endswith(" of 1:00:00")


@pytest.mark.slow
def test_the_real_command_stops_at_its_tokens_with_7_and_goes_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(60))
    job = write_job(
        tmp_path,
        tiny_model,
        sampling={"max_tokens": 20, "ignore_eos": True, "temperature": 0.8, "seed": 3},
        engine={"max_num_seqs": 8},
    )
    whole = tmp_path / "whole"
    done = batchgen("run", job, "-o", f"output.uri={whole}")
    assert done.returncode == 0, done.stderr

    limit = "budget.max_output_tokens=400"
    stopped = batchgen("run", job, "-o", limit)
    assert stopped.returncode == 7, stopped.stderr
    assert stopped.stdout == ""
    assert f"error: {limit} is used up" in stopped.stderr
    status = json.loads(batchgen("status", "--json", job, "-o", limit).stdout)
    used = status["tokens"]["output"]
    assert status["state"] == "incomplete"
    assert 400 <= used == 20 * status["rows"]["ok"] <= 400 + 8 * 20
    assert status["budget"] == {"output_tokens": {"used": used, "max": 400}}
    assert f"{used} of 400 output tokens used" in batchgen("status", job, "-o", limit).stdout
    assert json.loads(batchgen("status", "--json", job).stdout)["budget"] == {
        "output_tokens": {"used": used, "max": None}
    }

    code = (
        "import sys\n"
        "from batchgen.cli import main\n"
        "try:\n"
        # Without a parent process, which never imports them.
        f"    main(['run', {str(job)!r}, '-o', {limit!r}, '-o', 'errors.on_error=fail'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 7, end.code\n"
        "assert not {'torch', 'triton', 'transformers'} & set(sys.modules)\n"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert again.returncode == 0, again.stderr
    assert "-o budget.max_output_tokens=800" in again.stderr

    done = batchgen("run", job, "-o", "budget.max_output_tokens=1200")  # all rows, and no more
    assert done.returncode == 0, done.stderr
    assert "budget: 1,200 of 1,200 output tokens" in done.stderr
    assert read_output(tmp_path / "out") == read_output(whole)


@pytest.mark.slow
def test_the_real_command_stops_at_its_wall_time_with_7(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(5000))
    job = write_job(
        tmp_path,
        tiny_model,
        sampling={"max_tokens": 200, "ignore_eos": True},
        engine={"max_num_seqs": 1},
    )
    started = time.monotonic()
    stopped = batchgen("run", job, "-o", "budget.max_wall_time=20s")
    wall_s = time.monotonic() - started
    assert stopped.returncode == 7, stopped.stderr
    assert "error: budget.max_wall_time is used up" in stopped.stderr
    # The whole job would take many minutes. How many rows fit, and how long the end takes beyond a
    # few seconds, is a matter of what else the machine does.
    assert 20 <= wall_s < 60
    rows = json.loads(batchgen("status", "--json", job).stdout)["rows"]
    assert rows["ok"] < 5000
