"""The jobs that ship with batchgen, on the demo model, with the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_jobs import ROOT, batchgen, read_output

JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def test_three_jobs_ship() -> None:
    assert [job.stem for job in JOBS] == ["sentiment", "summarize", "translate"]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_shipped_job_is_valid_and_has_rows(job: Path) -> None:
    assert job.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=")
    plan = json.loads(batchgen("plan", job).stdout)
    assert plan["rows"] >= 50


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_shipped_job_runs_on_the_demo_model(tmp_path: Path, job: Path) -> None:
    # A few rows and short answers: what is tested is that the job runs, not what it says.
    options = ["-o", f"output.uri={tmp_path / 'out'}", "-o", "sampling.max_tokens=16"]
    done = batchgen("run", job, "--limit", "12", *options)
    assert done.returncode == 0, done.stderr
    output_format = json.loads(batchgen("plan", job).stdout)["output"]["format"]
    rows = read_output(tmp_path / "out", output_format)
    assert len(rows) == 12
    columns = json.loads(batchgen("plan", job).stdout)["output"]["columns"]
    assert list(rows[0]) == list(columns)
