"""Two processes on one job, at once or one behind the other, and one that is paused meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_jobs import expected_rows, make_rows, read_output, write_job, write_jsonl
from lives import ForkedLife, let_fork_server_import

from batchgen.dataset.storage import Storage

NUM_ROWS, UNIT_ROWS = 480, 16
WINDOW_ROWS = 8 * UNIT_ROWS
DEADLINE_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedJob:
    """A job that several processes run, each with a window far smaller than the job."""

    path: Path
    output: str
    environment: Mapping[str, str]
    expected: list[dict[str, Any]]

    def start(self) -> ForkedLife:
        return ForkedLife.start(self.path, self.environment, WINDOW_ROWS)

    def commits(self) -> dict[str, bytes]:
        ledger = Storage.open(f"{self.output}/.batchgen")
        return {path: ledger.read(path) for path in ledger.list("commits")}

    def wait_for_commits(self, number: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self.commits()) < number:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def data_files(self) -> dict[str, bytes]:
        output = Storage.open(self.output)
        return {path: output.read(path) for path in output.list("data")}


@pytest.fixture(params=["local", "s3"])
def job(
    tmp_path: Path,
    tiny_model: Path,
    tokenizer: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> SharedJob:
    let_fork_server_import(monkeypatch)
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    output, environment = str(tmp_path / "out"), {}
    if request.param == "s3":
        output = f"{request.getfixturevalue('s3_bucket')}/out"
        environment = request.getfixturevalue("s3_server").environment
    path = write_job(
        tmp_path, tiny_model, output={"uri": output}, checkpoint={"unit_rows": UNIT_ROWS}
    )
    return SharedJob(
        path=path,
        output=output,
        environment=environment,
        expected=expected_rows(rows, str(uri), tokenizer),
    )


def watch_commits(job: SharedJob, *lives: ForkedLife) -> dict[str, bytes]:
    """Each commit as it was when it was first seen, until all lives have ended well."""
    seen: dict[str, bytes] = {}
    deadline = time.monotonic() + DEADLINE_S
    while any(life.is_alive() for life in lives):
        assert time.monotonic() < deadline
        seen = {**job.commits(), **seen}
        time.sleep(0.1)
    assert [life.wait() for life in lives] == [0] * len(lives)
    return {**job.commits(), **seen}


def runners_of(commits: Mapping[str, bytes]) -> set[str]:
    return {json.loads(data)["run_id"] for data in commits.values()}


def check_result(job: SharedJob, seen: Mapping[str, bytes]) -> None:
    """Every row once, in order; no commit was ever another one; nothing is left over."""
    assert read_output(job.output) == job.expected
    assert job.commits() == seen
    assert len(seen) == NUM_ROWS // UNIT_ROWS
    parts = {part["path"] for data in seen.values() for part in json.loads(data)["parts"]}
    assert parts == job.data_files().keys()
    assert Storage.open(f"{job.output}/.batchgen").list("claims") == []


@pytest.mark.parametrize("start", ["together", "late"])
def test_two_runners_share_a_job(job: SharedJob, start: str) -> None:
    first = job.start()
    if start == "late":
        job.wait_for_commits(5)
    seen = watch_commits(job, first, job.start())
    check_result(job, seen)
    assert len(runners_of(seen)) == 2


def test_a_paused_runner_wakes_up_in_a_world_that_went_on(job: SharedJob) -> None:
    paused = job.start()
    job.wait_for_commits(3)
    paused.pause()
    before = job.commits()
    other = job.start()
    seen = {**watch_commits(job, other), **before}
    assert read_output(job.output) == job.expected
    files = job.data_files()
    paused.go_on()
    assert watch_commits(job, paused) == seen
    check_result(job, seen)
    assert job.data_files() == files
    assert len(runners_of(seen)) == 2
