"""`errors.max_error_rate` holds across restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_jobs import make_rows, write_job, write_jsonl
from standin import StandInEngine

from batchgen.errors import BudgetReached, ErrorRateExceeded
from batchgen.job.loading import load_job
from batchgen.job.spec import JobSpec
from batchgen.runner import RunReport, run_job


def run(spec: JobSpec) -> RunReport:
    return run_job(spec, make_engine=lambda *_: StandInEngine())


def test_starting_again_and_again_does_not_get_past_the_limit(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = make_rows(600)
    for row in rows[100:200:10]:
        row["text"] = None
    write_jsonl(tmp_path / "data.jsonl", rows)
    job = write_job(tmp_path, tiny_model, errors={"window": 100, "max_error_rate": 0.04})
    spec = load_job(job)
    for _ in range(3):
        with pytest.raises(ErrorRateExceeded, match="of the last 100 rows failed") as caught:
            run(spec)
    assert caught.value.exit_code == 4
    assert run(load_job(job, ["errors.max_error_rate=0.2"])).counts.failed == 10


def test_rows_that_failed_ahead_of_the_engine_do_not_look_like_more(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Killed while the engine was at its first rows, when all failures were known already."""
    rows = make_rows(600)
    for row in rows[::20]:
        row["text"] = None
    write_jsonl(tmp_path / "data.jsonl", rows)
    job = write_job(tmp_path, tiny_model, errors={"window": 100, "max_error_rate": 0.06})
    with pytest.raises(BudgetReached):
        run(load_job(job, ["budget.max_output_tokens=60"]))
    assert run(load_job(job)).counts.failed == 30
