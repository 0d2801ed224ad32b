"""Rows that end the engine's process: found, set aside, and nothing else is touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from dying_standin import run_dying
from e2e_jobs import (
    ROOT,
    TIMEOUT_S,
    batchgen,
    expected_rows,
    make_rows,
    read_output,
    write_job,
    write_jsonl,
)
from retry_jobs import load_with, retry_rows, verify

from batchgen.ledger import read_job, read_job_failures, read_status
from batchgen.records import RowFailure
from batchgen.startup import open_ledger_storage

NUM_ROWS = 150


class Deaths:
    """A job, and a way to run it with an engine that dies."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.rows = make_rows(NUM_ROWS)
        self.uri = str(write_jsonl(folder / "data.jsonl", self.rows))
        self.job = write_job(folder, model, checkpoint={"unit_rows": 32})
        self.folder = folder

    def start(self, *options: str) -> ForkServerProcess:
        """Forked from a server that has imported everything, which takes seconds otherwise."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["standin", "dying_standin", "transformers.models.llama.configuration_llama"]
        )
        arguments = [str(self.job), str(self.folder / "log"), *options]
        process = context.Process(target=run_dying, args=(arguments, str(self.folder / "errors")))
        process.start()
        return process

    def finish(self, process: ForkServerProcess, code: int) -> str:
        """What it wrote to stderr, once it has ended with this code."""
        process.join(TIMEOUT_S)
        errors = (self.folder / "errors").read_text()
        assert process.exitcode == code, errors
        return errors

    def run(self, *options: str, code: int) -> str:
        return self.finish(self.start(*options), code)

    def workers(self) -> list[str]:
        """What each worker ran: `all`, or so many rows."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line.split()[1] for line in lines]

    def worker_pids(self) -> list[int]:
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(line.split()[0]) for line in lines]

    def failures(self) -> list[RowFailure]:
        ledger = open_ledger_storage(load_with(self.job))
        stored = read_job(ledger)
        assert stored is not None
        return list(read_job_failures(ledger, stored))

    def check(self, tokenizer: Any, *failed: int) -> None:
        """Exactly these rows are dead letters, and all others are right."""
        found = [int(failure.address.rpartition(":")[2]) for failure in self.failures()]
        assert found == list(failed)
        expected = expected_rows(self.rows, self.uri, tokenizer)
        output = read_output(self.folder / "out")
        assert output == [row for i, row in enumerate(expected) if i not in failed]
        assert verify(load_with(self.job)).is_right


@pytest.fixture
def deaths(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Deaths:
    # The fork server, which is not told of sys.path before CPython 3.13.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    return Deaths(tmp_path, tiny_model)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "raise"])
def test_a_row_that_kills_becomes_a_dead_letter(deaths: Deaths, tokenizer: Any, how: str) -> None:
    err = deaths.run("--poison", f"77:{how}", code=3)
    deaths.check(tokenizer, 77)
    [failure] = deaths.failures()
    assert failure.kind == "engine_error"
    assert "Row 77 says" in failure.excerpt
    assert len(failure.excerpt) <= 200
    reason = "OutOfMemory: CUDA out of memory" if how == "raise" else how
    assert reason in failure.message
    assert "; the row that it had alone becomes a dead letter, and the run goes on" in err
    assert "1 engine_error" in err
    groups = deaths.workers()
    assert (groups[0], groups[-2:]) == ("all", ["1", "all"])
    assert len(groups) <= 2 + 2 * 5, groups  # of 16 rows in the engine


def test_a_restarted_worker_goes_on_with_what_the_command_has_begun(
    deaths: Deaths, tokenizer: Any
) -> None:
    deaths.run("--poison", "77:SIGKILL", "-o", "checkpoint.resume=never", code=3)
    deaths.check(tokenizer, 77)


def test_two_rows_that_kill(deaths: Deaths, tokenizer: Any) -> None:
    deaths.run("--poison", "64:SIGKILL", "--poison", "65:SIGSEGV", code=3)
    deaths.check(tokenizer, 64, 65)
    kinds = [failure.message for failure in deaths.failures()]
    assert ["SIGKILL" in kinds[0], "SIGSEGV" in kinds[1]] == [True, True]


@pytest.mark.parametrize("how", ["SIGKILL", "raise"])
def test_a_death_that_does_not_repeat_costs_restarts_only(
    deaths: Deaths, tokenizer: Any, how: str
) -> None:
    deaths.run("--once", how, code=0)
    deaths.check(tokenizer)
    assert len(deaths.workers()) == 4  # the rows that it had, in two halves, and all again


def test_a_death_before_any_row_is_no_rows_fault(deaths: Deaths) -> None:
    err = deaths.run("--at-start", "SIGSEGV", code=1)
    assert "ended by SIGSEGV, while it had no row" in err
    assert "run the same command again" in err
    assert deaths.workers() == ["all"]


def test_an_engine_that_completes_nothing_is_not_its_rows_fault(deaths: Deaths) -> None:
    poison = [text for row in range(NUM_ROWS) for text in ("--poison", f"{row}:SIGABRT")]
    err = deaths.run(*poison, code=1)
    assert "the model, the engine or the device fails, and not the rows" in err
    assert len(deaths.failures()) == 8


def test_on_error_fail_has_no_supervisor(deaths: Deaths) -> None:
    err = deaths.run("--poison", "77:raise", "-o", "errors.on_error=fail", code=1)
    assert "the engine failed: OutOfMemory: CUDA out of memory" in err
    assert deaths.workers() == ["all"]
    deaths.run("--poison", "77:SIGKILL", "-o", "errors.on_error=fail", code=-signal.SIGKILL)
    assert deaths.failures() == []


def test_a_retry_of_rows_that_killed(deaths: Deaths, tokenizer: Any) -> None:
    deaths.run("--poison", "20:SIGKILL", "--poison", "100:SIGKILL", code=3)
    deaths.check(tokenizer, 20, 100)
    deaths.run("--retry", "--poison", "100:raise", code=3)  # one is mended, one kills again
    deaths.check(tokenizer, 100)
    assert "OutOfMemory" in deaths.failures()[0].message
    retry_rows(load_with(deaths.job))
    deaths.check(tokenizer)


def test_a_hang_ends_with_a_report_and_keeps_what_was_finished(
    deaths: Deaths, tokenizer: Any
) -> None:
    options = ("-o", "errors.watchdog=1", "-o", "checkpoint.flush_interval=60")
    err = deaths.run("--once", "hang", *options, code=1)
    assert err.startswith("error: no progress for 0:01")
    assert "\n  engine: wait (" in err
    assert "< die (e2e/dying_standin.py:" in err
    assert deaths.workers() == ["all"]
    counts: Any = read_status(open_ledger_storage(load_with(deaths.job)))["rows"]
    assert counts["ok"] > 40
    deaths.run(code=0)
    deaths.check(tokenizer)


def wait_for_partials(deaths: Deaths) -> None:
    partials = deaths.folder / "out/.batchgen/partials"
    deadline = time.monotonic() + TIMEOUT_S
    while not (partials.exists() and any(partials.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
)
def test_signals_reach_the_worker_once(
    deaths: Deaths, number: signal.Signals, code: int, tokenizer: Any
) -> None:
    process = deaths.start("--delay-ms", "300")
    wait_for_partials(deaths)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert "run the same command again" in deaths.finish(process, code)
    assert not any(map(is_running, deaths.worker_pids()))
    deaths.run(code=0)
    deaths.check(tokenizer)


@pytest.mark.parametrize("worker", [1, 2])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
)
def test_signals_while_a_worker_starts(
    deaths: Deaths, worker: int, number: signal.Signals, code: int, tokenizer: Any
) -> None:
    """The first one, and the one that comes after a death."""
    process = deaths.start("--once", "raise", "--wait-in", str(worker))
    deadline = time.monotonic() + TIMEOUT_S
    while len(deaths.worker_pids()) < worker and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    error = deaths.finish(process, code).splitlines()[-1]
    assert f"({number.name}); what was flushed is saved; run the same command again" in error
    assert len(deaths.worker_pids()) == worker
    assert not any(map(is_running, deaths.worker_pids()))
    if worker > 1:
        counts: Any = read_status(open_ledger_storage(load_with(deaths.job)))["rows"]
        assert counts["ok"] > 40
    deaths.run(code=0)
    deaths.check(tokenizer)


def test_a_worker_whose_supervisor_is_killed_ends(deaths: Deaths, tokenizer: Any) -> None:
    process = deaths.start("--delay-ms", "300")
    wait_for_partials(deaths)
    process.kill()
    process.join(TIMEOUT_S)
    [worker] = deaths.worker_pids()
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)
    deaths.run(code=0)
    deaths.check(tokenizer)


def test_the_real_command_is_supervised(deaths: Deaths) -> None:
    """The worker of the command is killed, once: the job is done all the same."""
    options = ["-o", "sampling.max_tokens=64", "-o", "engine.max_num_seqs=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchgen", "run", str(deaths.job), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_for_partials(deaths)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    modules = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in modules
    os.kill(int(children[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "the engine's process was ended by SIGKILL; to find the row that did it," in err
    assert "warning: no row did it alone; the run goes on with all" in err
    assert out.strip() == str(deaths.folder / "out")
    status = json.loads(batchgen("status", "--json", deaths.job).stdout)
    assert status["rows"]["ok"] == NUM_ROWS
    # The summary is the command's, not the last worker's.
    assert "done before this run" not in err
    assert f" {status['tokens']['output']:,} output tokens (" in err
    assert "since the last start, KV: " in err
