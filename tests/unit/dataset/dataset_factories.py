"""Input files of every format, and reading them whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from batchgen.dataset.reader import InputResult, UnitReader, plan_input
from batchgen.job.spec import InputSpec

Rows = Sequence[Mapping[str, object]]


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_file(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_file(rows: Rows, row_group_size: int = 7) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


def arrow_file(rows: Rows, *, stream: bool = False, codec: str | None = None) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=11)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "a.jsonl": json_lines,
    "a.JSONL": json_lines,
    "a.ndjson": json_lines,
    "a.json": json_lines,
    "a.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "two_members.jsonl.gz": lambda rows: (
        gzip.compress(json_lines(rows[:5])) + gzip.compress(json_lines(rows[5:]))
    ),
    "a.jsonl.zst": lambda rows: zstandard.compress(json_lines(rows)),
    "no_extension_jsonl": json_lines,
    "no_extension_gz": lambda rows: gzip.compress(json_lines(rows)),
    "a.parquet": parquet_file,
    "one_group.parquet": lambda rows: parquet_file(rows, 10_000),
    "no_extension_parquet": parquet_file,
    "a.arrow": arrow_file,
    "stream.arrow": lambda rows: arrow_file(rows, stream=True),
    "zstd.arrow": lambda rows: arrow_file(rows, codec="zstd"),
    "lz4_stream.arrow": lambda rows: arrow_file(rows, stream=True, codec="lz4"),
    "no_extension_arrow": lambda rows: arrow_file(rows, stream=True),
    "a.csv": csv_file,
    "a.csv.gz": lambda rows: gzip.compress(csv_file(rows)),
}


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read_all(spec: InputSpec, unit_rows: int = 10) -> list[InputResult]:
    """Every row of the input, through one UnitReader."""
    plan = plan_input(spec, unit_rows)
    with UnitReader(spec, plan.files) as reader:
        return [row for unit in plan.units for row in reader.read(unit)]


def values_of(rows: Sequence[InputResult]) -> list[object]:
    return [getattr(row, "values", row) for row in rows]
