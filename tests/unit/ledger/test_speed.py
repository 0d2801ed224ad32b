import sys
import time

import pytest
from ledger_factories import (
    SCHEMA,
    commit_all,
    local_storage,
    make_part,
    make_results,
    open_ledger,
)

from batchgen.ledger import Commit, LedgerPlan, encode_schema, read_job, read_status
from batchgen.ledger.commits import count_results, encode_commit
from batchgen.ledger.files import commit_path
from batchgen.records import InputFile, Unit

NUM_UNITS = 10_000
UNIT_ROWS = 3


def make_large_plan() -> LedgerPlan:
    file = InputFile(uri="in.jsonl", size_bytes=NUM_UNITS * 500, etag="1")
    units = tuple(
        Unit(
            unit_id=i,
            file_index=0,
            row_start=i * UNIT_ROWS,
            num_rows=UNIT_ROWS,
            byte_start=i * 500_000,
            byte_end=(i + 1) * 500_000,
        )
        for i in range(NUM_UNITS)
    )
    return LedgerPlan(files=(file,), units=units, schema_base64=encode_schema(SCHEMA))


@pytest.mark.slow
def test_ten_thousand_commits_open_in_seconds(tmp_path, capsys):
    storage = local_storage(tmp_path)
    plan = make_large_plan()
    commit_all(open_ledger(storage, plan), 0)
    job = read_job(storage)
    assert job is not None
    for unit in plan.units[1:]:
        results = make_results(unit)
        commit = Commit(
            job_id=job.job_id,
            run_id="00",
            unit_id=unit.unit_id,
            parts=tuple(make_part(results)),
            dead_letters=None,
            counts=count_results(results),
            wall_s=1.0,
        )
        (tmp_path / commit_path(unit.unit_id)).write_bytes(encode_commit(commit))
    start = time.perf_counter()
    ledger = open_ledger(storage)
    opened_s = time.perf_counter() - start
    assert ledger.is_complete
    assert ledger.plan == plan
    assert ledger.counts().ended == NUM_UNITS * UNIT_ROWS
    start = time.perf_counter()
    read_status(storage)
    status_s = time.perf_counter() - start
    with capsys.disabled():
        sys.stdout.write(
            f"\n{NUM_UNITS} commits: ledger opened in {opened_s:.2f} s, "
            f"status read in {status_s:.2f} s\n"
        )
    assert opened_s < 5
    assert status_s < 5
