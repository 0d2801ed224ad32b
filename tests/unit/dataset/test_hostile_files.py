"""Files that claim or become far more than they are: an InputError names the file and the limit."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from dataset_factories import json_lines, read_all, write

from batchgen.dataset import formats, plan, tables
from batchgen.dataset.reader import plan_input
from batchgen.dataset.storage import Storage
from batchgen.dataset.writer import delete_superseded, output_schema, publish
from batchgen.errors import InputError, StorageError
from batchgen.job.spec import InputSpec, OutputSpec
from batchgen.records import RowFailure

LINE = b'{"a": "' + b"x" * 1000 + b'"}\n'
BOMBS = {
    "a.jsonl.gz": gzip.compress(LINE * 50_000),
    "a.jsonl.zst": zstandard.compress(LINE * 50_000),
    "one_line.jsonl.gz": gzip.compress(b"x" * (50 << 20)),
    "a.csv.gz": gzip.compress(b"a\n" + b"x" * 1000 + b"\n" * (50 << 20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_PLAIN_BYTES", 1 << 20)
    monkeypatch.setattr(formats, "MAX_EXPANSION", 20)
    spec = InputSpec(uri=write(tmp_path / name, BOMBS[name]))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"{name} .* decompresses to more than .* 20 times"):
            plan_input(spec, 10)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_text_that_repeats_itself_is_no_bomb(tmp_path: Path) -> None:
    rows = [{"a": "the same again"}] * 20_000
    data = gzip.compress(json_lines(rows))
    assert len(read_all(InputSpec(uri=write(tmp_path / "a.jsonl.gz", data)), 4096)) == 20_000


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("bzip2", bz2.compress(LINE)),
        ("xz", lzma.compress(LINE)),
        ("zip", b"PK\x03\x04" + LINE),
        ("pickle", pickle.dumps([{"a": 1}])),
        ("pickle", pickle.dumps([{"a": 1}], protocol=2)),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "noname"])
def test_what_is_not_read_is_refused_by_name(
    kind: str, data: bytes, name: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{name} is a {kind} file, which is not read"):
        plan_input(InputSpec(uri=write(tmp_path / name, data)), 10)


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_billions_of_rows_of_nothing(tmp_path: Path) -> None:
    nulls = pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])
    batch = pa.RecordBatch.from_arrays([nulls], ["a"])
    data = arrow(pa.Table.from_batches([batch, batch]))
    assert len(data) < 1000
    with pytest.raises(InputError, match=r"a\.arrow claims 4,294,967,294 rows; at most 2,147"):
        plan_input(InputSpec(uri=write(tmp_path / "a.arrow", data)), 1)


def test_more_columns_than_any_table_has(tmp_path: Path) -> None:
    data = arrow(pa.table({f"c{i}": [1] for i in range(plan.MAX_FILE_COLUMNS + 1)}))
    with pytest.raises(InputError, match=r"a\.arrow has 10,001 columns; at most 10,000"):
        plan_input(InputSpec(uri=write(tmp_path / "a.arrow", data)), 1)


def test_a_parquet_schema_nested_too_deeply(tmp_path: Path) -> None:
    kind: pa.DataType = pa.int64()
    for _ in range(2000):
        kind = pa.struct([("a", kind)])
    data = parquet(pa.table({"a": pa.nulls(1, kind)}))
    with pytest.raises(InputError, match=r"a\.parquet cannot be read.*nested.*limit is 100"):
        plan_input(InputSpec(uri=write(tmp_path / "a.parquet", data)), 1)


def test_a_parquet_footer_of_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet(pa.table({"a" * 5000: [1]}))
    uri = write(tmp_path / "a.parquet", data)
    monkeypatch.setattr(tables, "MAX_FOOTER_BYTES", 4000)
    with pytest.raises(
        InputError, match=r"a\.parquet has a footer of [\d,]+ bytes, more than 4,00"
    ):
        plan_input(InputSpec(uri=uri), 1)


def test_a_parquet_footer_with_a_list_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": list(range(300))}), sink, row_group_size=1)
    uri = write(tmp_path / "a.parquet", sink.getvalue().to_pybytes())
    monkeypatch.setattr(tables, "_MAX_THRIFT_ITEMS", 200)
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        plan_input(InputSpec(uri=uri), 1)


def test_a_text_that_a_dictionary_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_BATCH_BYTES", 16 << 20)
    data = parquet(pa.table({"a": ["x" * (100 << 10)] * 1000}))
    assert len(data) < 1 << 20
    uri = write(tmp_path / "a.parquet", data)
    with pytest.raises(InputError, match=r"a\.parquet: the 512 rows from row 0 on take [\d,]+ byt"):
        read_all(InputSpec(uri=uri), 1000)


def test_arrow_offsets_that_point_elsewhere(tmp_path: Path) -> None:
    """Read as they are, these crash the process or show its memory."""
    data = arrow(pa.table({"a": ["one", "two", "three"]}))
    offsets = (0).to_bytes(4, "little") + (3).to_bytes(4, "little") + (6).to_bytes(4, "little")
    start = data.index(offsets)
    forged = data[: start + 4] + (2**31 - 1).to_bytes(4, "little") + data[start + 8 :]
    first, second, third = read_all(InputSpec(uri=write(tmp_path / "a.arrow", forged)))
    assert isinstance(first, RowFailure)
    assert isinstance(second, RowFailure)
    assert (first.kind, first.message[:27]) == ("bad_record", "column 'a' is not readable:")
    assert third.values == {"a": "three"}  # type: ignore[union-attr]


@pytest.mark.parametrize("extension", ["parquet", "arrow"])
def test_a_column_name_that_is_not_utf8(extension: str, tmp_path: Path) -> None:
    make = parquet if extension == "parquet" else arrow
    data = make(pa.table({"nnnn": [1]})).replace(b"nnnn", b"\xff\xff\xff\xff")
    with pytest.raises(InputError, match=rf"a\.{extension} cannot be read"):
        plan_input(InputSpec(uri=write(tmp_path / f"a.{extension}", data)), 1)


def test_a_csv_header_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv: its header is not UTF-8"):
        plan_input(InputSpec(uri=write(tmp_path / "a.csv", b"a,\xff\n1,2\n")), 1)


@pytest.mark.parametrize("depth", [100, 500, 900, 100_000])
def test_deep_json(depth: int, tmp_path: Path) -> None:
    line = b'{"a": ' + b"[" * depth + b"]" * depth + b"}\n"
    (row,) = read_all(InputSpec(uri=write(tmp_path / "a.jsonl", line)))
    assert hasattr(row, "values") or row.kind == "bad_record"  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "..", "a\0b"])
@pytest.mark.parametrize("store", ["local", "memory"])
def test_no_path_leads_out_of_a_folder(path: str, store: str, tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path / "out") if store == "local" else "memory://paths/out")
    for act in (
        lambda: storage.put(path, b"x"),
        lambda: storage.create(path, b"x"),
        lambda: storage.read(path),
        lambda: storage.delete([path]),
        lambda: storage.list(path),
        lambda: storage.exists(path),
    ):
        with pytest.raises(StorageError, match="leads out of this folder"):
            act()
    assert not (tmp_path / "x").exists()


def test_publishing_deletes_parts_and_nothing_else(tmp_path: Path) -> None:
    spec = OutputSpec(uri=str(tmp_path / "out"))
    schema = output_schema(spec, pa.schema([]))
    storage = Storage.open(spec.uri)
    for name in ("data/part-00000001-000-0123456789abcdef.arrow", "data/mine.arrow", "mine.txt"):
        storage.put(name, b"x")
    publish(storage, spec, schema, [], "card")
    delete_superseded(storage, [], {1: 0})
    assert {"data/mine.arrow", "mine.txt"} < set(storage.list())
    assert not storage.exists("data/part-00000001-000-0123456789abcdef.arrow")


def test_a_link_in_the_output_is_seen(tmp_path: Path) -> None:
    """Through it, parts would be written, and others' files deleted, elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "data")
    assert Storage.open(str(tmp_path / "out")).list() == ["data"]
