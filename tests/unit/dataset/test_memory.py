"""Peak memory of reading does not grow with the input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_READ = """
import resource, sys
from batchgen.dataset.reader import UnitReader, plan_input
from batchgen.job.spec import InputSpec
spec = InputSpec(uri=sys.argv[1])
plan = plan_input(spec, 4096)
num_rows = 0
with UnitReader(spec, plan.files) as reader:
    for unit in plan.units:
        for row in reader.read(unit):
            num_rows += 1
print(num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
# What an allocator and a decoder's buffers may differ by; a million rows are 60 MB on disk.
_SLACK_KIB = 24 << 10


def _write(path: Path, num_rows: int) -> None:
    batch_rows = 10_000
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            for i in range(num_rows):
                file.write(f'{{"id": {i}, "text": "row number {i} with a bit of text"}}\n')
        return
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, batch_rows):
            ids = range(start, start + batch_rows)
            text = [f"row number {i} with a bit of text" for i in ids]
            writer.write_table(pa.table({"id": list(ids), "text": text}, schema=schema))


def _peak_kib(path: Path, num_rows: int) -> int:
    _write(path, num_rows)
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(path)], check=True, capture_output=True, text=True
    )
    rows_read, peak = done.stdout.split()
    assert int(rows_read) == num_rows
    return int(peak)


@pytest.mark.slow
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_a_million_rows_need_the_memory_of_ten_thousand(extension: str, tmp_path: Path) -> None:
    small = _peak_kib(tmp_path / f"small.{extension}", 10_000)
    large = _peak_kib(tmp_path / f"large.{extension}", 1_000_000)
    assert large < small + _SLACK_KIB
