"""Every format gives the same rows, cut into units in any way, read in any order."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_factories import (
    WRITERS,
    arrow_file,
    csv_file,
    json_lines,
    parquet_file,
    read_all,
    values_of,
    write,
)

from batchgen.dataset import chunks, csv_rows, lines, tables
from batchgen.dataset.reader import UnitReader, plan_input, read_sample, read_unit
from batchgen.job.spec import InputSpec
from batchgen.records import InputRow, RowKey

# Strings, so that CSV can say the same.
ROWS = [{"id": f"{i}", "text": f"row «{i}» " + "x" * (i % 5)} for i in range(53)]
NAMES = sorted(WRITERS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunks, lines, csv_rows, tables):
        monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    monkeypatch.setattr(lines, "_READ_BYTES", 40)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit_rows", [1, 10, 53, 1000])
def test_rows_keys_and_addresses(
    name: str, unit_rows: int, tmp_path: Path, small_chunks: None
) -> None:
    uri = write(tmp_path / name, WRITERS[name](ROWS))
    rows = read_all(InputSpec(uri=uri), unit_rows)
    assert rows == [
        InputRow(
            key=RowKey(unit_id=i // unit_rows, index=i % unit_rows),
            address=f"{uri}:{i}",
            values=row,
        )
        for i, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_units_in_any_order_with_wanted_rows(name: str, tmp_path: Path, small_chunks: None) -> None:
    spec = InputSpec(uri=write(tmp_path / name, WRITERS[name](ROWS)))
    plan = plan_input(spec, 10)
    randomness = random.Random(0)
    with UnitReader(spec, plan.files) as reader:
        for _ in range(20):
            unit = randomness.choice(plan.units)
            wanted = set(randomness.sample(range(10), 4))
            expected = [i for i in sorted(wanted) if i < unit.num_rows]
            rows = list(reader.read(unit, wanted=wanted))
            assert [row.key.index for row in rows] == expected
            assert values_of(rows) == [ROWS[unit.row_start + i] for i in expected]


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_left_in_the_middle_of_a_unit(
    name: str, tmp_path: Path, small_chunks: None
) -> None:
    spec = InputSpec(uri=write(tmp_path / name, WRITERS[name](ROWS)))
    plan = plan_input(spec, 20)
    with UnitReader(spec, plan.files) as reader:
        assert next(reader.read(plan.units[0])).key.index == 0
        assert values_of(list(reader.read(plan.units[1]))) == ROWS[20:40]
        assert values_of(list(reader.read(plan.units[0]))) == ROWS[:20]
    assert values_of(list(read_unit(spec, plan.files, plan.units[2]))) == ROWS[40:]


@pytest.mark.parametrize("name", NAMES)
def test_limit_and_columns(name: str, tmp_path: Path, small_chunks: None) -> None:
    uri = write(tmp_path / name, WRITERS[name](ROWS))
    spec = InputSpec(uri=uri, limit=25, columns=("text",))
    plan = plan_input(spec, 10)
    assert [unit.num_rows for unit in plan.units] == [10, 10, 5]
    assert plan.schema == pa.schema([("text", pa.string())])
    assert values_of(read_all(spec)) == [{"text": row["text"]} for row in ROWS[:25]]


def test_limit_over_files(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", json_lines(ROWS[:10]))
    spec = InputSpec(uri=str(tmp_path), limit=12)
    plan = plan_input(spec, 4)
    assert [(u.unit_id, u.file_index, u.row_start, u.num_rows) for u in plan.units] == [
        (0, 0, 0, 4),
        (1, 0, 4, 4),
        (2, 0, 8, 2),
        (3, 1, 0, 2),
    ]
    assert len(plan.files) == 3
    assert plan.num_rows == 12


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "stream.arrow", "a.csv"])
@pytest.mark.parametrize("store", ["memory", "s3"])
def test_stores(name: str, store: str, request: pytest.FixtureRequest) -> None:
    base = f"memory://{uuid.uuid4().hex}"
    if store == "s3":
        base = f"{request.getfixturevalue('s3_bucket')}/in"
    for part, rows in (("1", ROWS[:30]), ("2", ROWS[30:])):
        with fsspec.open(f"{base}/part{part}.{name[2:]}", "wb") as file:
            file.write(WRITERS[name](rows))
    for uri in (base, f"{base}/*", [f"{base}/part1*", f"{base}/part2*"]):
        spec = InputSpec(uri=uri)
        rows = read_all(spec)
        assert values_of(rows) == ROWS
        assert rows[30].address.startswith(base)
        assert rows[30].address.endswith(f"{name[2:]}:0")
        plan = plan_input(spec, 10)
        assert all(file.etag and file.size_bytes for file in plan.files)
        assert values_of(list(read_unit(spec, plan.files, plan.units[4]))) == ROWS[40:50]


def test_the_storage_options_of_the_job_are_used(
    s3_bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fsspec.open(f"{s3_bucket}/a.jsonl", "wb") as file:
        file.write(json_lines(ROWS))
    for name in s3_server.environment:
        monkeypatch.delenv(name)
    spec = InputSpec(uri=f"{s3_bucket}/a.jsonl", storage_options=s3_server.storage_options)
    assert values_of(read_all(spec)) == ROWS


def test_a_parquet_unit_reads_only_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write(tmp_path / "a.parquet", parquet_file(ROWS, row_group_size=10))
    data = bytearray(Path(uri).read_bytes())
    metadata = pq.read_metadata(uri)
    damaged = metadata.row_group(0).column(0)
    start = damaged.dictionary_page_offset or damaged.data_page_offset
    data[start : start + 20] = b"\xff" * 20
    Path(uri).write_bytes(data)
    spec = InputSpec(uri=uri)
    plan = plan_input(spec, 10)
    assert values_of(list(read_unit(spec, plan.files, plan.units[3]))) == ROWS[30:40]


def test_typed_columns_keep_their_types(tmp_path: Path) -> None:
    rows = [{"i": 1, "f": 2.5, "l": [1, None], "s": {"a": "x"}, "n": None, "b": b"\x00\xff"}]
    for name, data in (("a.parquet", parquet_file(rows)), ("a.arrow", arrow_file(rows))):
        spec = InputSpec(uri=write(tmp_path / name, data))
        assert plan_input(spec, 10).schema == pa.Table.from_pylist(rows).schema
        assert values_of(read_all(spec)) == rows


def test_json_types_are_inferred_from_the_first_rows(tmp_path: Path) -> None:
    rows = [{"i": 1, "f": 1, "mixed": 1}, {"f": 2.5, "mixed": "x", "late": {"a": [None, "x"]}}]
    plan = plan_input(InputSpec(uri=write(tmp_path / "a.jsonl", json_lines(rows))), 10)
    assert plan.schema.names == ["i", "f", "mixed", "late"]
    assert plan.schema.types == [
        pa.int64(),
        pa.float64(),
        pa.null(),
        pa.struct([("a", pa.list_(pa.string()))]),
    ]


def test_read_sample_gives_the_first_good_rows(tmp_path: Path) -> None:
    data = b"not json\n" + json_lines(ROWS[:3])
    spec = InputSpec(uri=write(tmp_path / "a.jsonl", data))
    plan = plan_input(spec, 2)
    assert values_of(read_sample(spec, plan, 2)) == ROWS[:2]
    assert values_of(read_sample(spec, plan, 100)) == ROWS[:3]


def test_csv_values_are_strings_as_written(tmp_path: Path) -> None:
    data = b'id,text,n\r\n007,"a ""b"",\r\nc",\r\n\r\n1.50,NA,""\n'
    spec = InputSpec(uri=write(tmp_path / "a.csv", data))
    assert values_of(read_all(spec)) == [
        {"id": "007", "text": 'a "b",\r\nc', "n": None},
        {"id": "1.50", "text": "NA", "n": None},
    ]
    assert plan_input(spec, 1).schema == pa.schema([(n, pa.string()) for n in ("id", "text", "n")])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_byte_order_mark_crlf_and_no_last_newline(name: str, tmp_path: Path) -> None:
    data = WRITERS[name](ROWS).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")[:-2]
    spec = InputSpec(uri=write(tmp_path / name, b"\xef\xbb\xbf" + data))
    assert values_of(read_all(spec)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_an_empty_text_file_has_no_rows(name: str, tmp_path: Path) -> None:
    plan = plan_input(InputSpec(uri=write(tmp_path / name, b"")), 10)
    assert plan.units == ()
    assert plan.schema.names == []


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.csv"])
def test_a_file_with_columns_and_no_rows(name: str, tmp_path: Path) -> None:
    if name == "a.csv":
        data = csv_file(ROWS).splitlines(keepends=True)[0]
    else:
        table = pa.schema([("id", pa.string()), ("text", pa.string())]).empty_table()
        sink = pa.BufferOutputStream()
        if name == "a.parquet":
            pq.write_table(table, sink)
        else:
            new = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
            new(sink, table.schema).close()
        data = sink.getvalue().to_pybytes()
    plan = plan_input(InputSpec(uri=write(tmp_path / name, data)), 10)
    assert plan.units == ()
    assert plan.schema.names == ["id", "text"]


def test_blank_json_lines_are_not_rows(tmp_path: Path) -> None:
    data = b"\n  \r\n" + json_lines(ROWS).replace(b"\n", b"\n\n \t\n") + b"\n\n"
    spec = InputSpec(uri=write(tmp_path / "a.jsonl", data))
    assert values_of(read_all(spec, 7)) == ROWS
    plan = plan_input(spec, 7)
    assert values_of(list(read_unit(spec, plan.files, plan.units[3]))) == ROWS[21:28]


def test_files_may_differ_in_width_and_null_columns(tmp_path: Path) -> None:
    tables_ = [
        pa.table({"a": pa.array([1], pa.int32()), "b": pa.array([None], pa.null())}),
        pa.table({"b": pa.array(["x"], pa.large_string()), "a": pa.array([2], pa.int64())}),
    ]
    for i, table in enumerate(tables_):
        pq.write_table(table, tmp_path / f"{i}.parquet")
    spec = InputSpec(uri=str(tmp_path))
    assert plan_input(spec, 10).schema == pa.schema([("a", pa.int64()), ("b", pa.large_string())])
    assert values_of(read_all(spec)) == [{"a": 1, "b": None}, {"b": "x", "a": 2}]
