"""Jobs with failed rows of all sorts, and what they should come to once these are retried."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2e_jobs import make_rows, write_job, write_jsonl
from standin import StandInEngine

from batchgen.job.loading import load_job
from batchgen.job.spec import JobSpec
from batchgen.records import FailureKind, RowKey
from batchgen.retry import Retry
from batchgen.runner import RunReport, run_job
from batchgen.startup import open_ledger_storage
from batchgen.supervision import Assignment, Worker
from batchgen.verify import Receipt, verify_job

NUM_ROWS = 150  # in units of 32, the last of 22
NO_TEXT = 40  # a template error, whatever is tried
BAD_RECORDS = (3, 70)  # skipped
# Rows whose engine is said to have died: the first and last of units, neighbours of others.
ENGINE_ERRORS = (0, 31, 41, 71, 96, 97, 127)


def write_retry_job(folder: Path, model: Path, **sections: Mapping[str, Any]) -> Path:
    rows = make_rows(NUM_ROWS)
    rows[NO_TEXT]["text"] = None
    path = write_jsonl(folder / "data.jsonl", rows)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number in BAD_RECORDS:
        lines[number] = "{not json}\n"
    path.write_text("".join(lines), encoding="utf-8")
    defaults: dict[str, dict[str, Any]] = {
        "input": {"on_bad_record": "skip"},
        "output": {"max_shard_rows": 20},
        "checkpoint": {"unit_rows": 32},
    }
    for name, values in sections.items():
        defaults[name] = {**defaults.get(name, {}), **values}
    return write_job(folder, model, **defaults)


@contextmanager
def make_worker(assignment: Assignment) -> Iterator[Worker]:
    """A worker without a supervisor: what it tells goes nowhere."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        yield Worker(assignment, descriptor)
    finally:
        os.close(descriptor)


def run_with_engine_errors(
    spec: JobSpec, failing: Sequence[int] = ENGINE_ERRORS, *, unit_rows: int = 32
) -> RunReport:
    """Run a job whose engine is said to have died of these rows."""
    culprits = {
        RowKey(unit_id=row // unit_rows, index=row % unit_rows): "the engine died"
        for row in failing
    }
    with make_worker(Assignment(culprits=culprits)) as worker:
        return run_job(spec, make_engine=lambda *_: StandInEngine(), worker=worker)


def retry_rows(
    spec: JobSpec,
    only: FailureKind | None = None,
    *,
    retry_id: str | None = None,
    delay_s: float = 0.0,
) -> RunReport:
    return run_job(
        spec,
        make_engine=lambda *_: StandInEngine(delay_s=delay_s),
        retry=Retry(retry_id=retry_id or secrets.token_hex(8), only=only),
    )


def verify(spec: JobSpec) -> Receipt:
    return verify_job(spec, open_ledger_storage(spec))


def load_with(job: Path, *overrides: str) -> JobSpec:
    return load_job(job, overrides)
