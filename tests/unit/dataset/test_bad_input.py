"""Input that is wrong: a clear InputError for a file, a dead letter for a record."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from dataset_factories import (
    arrow_file,
    csv_file,
    json_lines,
    parquet_file,
    read_all,
    values_of,
    write,
)

from batchgen.dataset import csv_rows, lines
from batchgen.dataset.inputs import resolve_inputs
from batchgen.dataset.reader import plan_input, read_unit
from batchgen.errors import InputError, StorageError, UnsupportedError
from batchgen.job.spec import InputSpec
from batchgen.records import InputRow, RowFailure, RowSkip

ROWS = [{"id": f"{i}", "text": f"row {i}"} for i in range(40)]

BAD_LINES = {
    b'{"id": ': "not JSON: Expecting value: line 1 column 8 (char 7)",
    b"oops": "not JSON: Expecting value: line 1 column 1 (char 0)",
    b"[1, 2]": "not a JSON object but an array",
    b"null": "not a JSON object but null",
    b"12": "not a JSON object but a number",
    b'"x"': "not a JSON object but a string",
    b'{"a": "\xff\xfe"}': "not UTF-8: byte 7 is 0xff",
    b'{"a": "\\ud83d"}': "not Unicode: an escape of half a surrogate pair",
    b'{"a": ' + b"[" * 200_000 + b"}": "not readable: nested too deeply",
    b'{"a": ' + b"1" * 5000 + b"}": "not JSON: Exceeds the limit",
    b'{"a": 1} {"b": 2}': "not JSON: Extra data: line 1 column 10 (char 9)",
}


@pytest.mark.parametrize("line", list(BAD_LINES), ids=range(len(BAD_LINES)))
def test_a_bad_json_line_is_a_dead_letter(line: bytes, tmp_path: Path) -> None:
    data = json_lines(ROWS[:1]) + line + b"\n" + json_lines(ROWS[1:2])
    spec = InputSpec(uri=write(tmp_path / "a.jsonl", data))
    first, bad, last = read_all(spec)
    assert values_of([first, last]) == ROWS[:2]
    assert isinstance(bad, RowFailure)
    assert bad.kind == "bad_record"
    assert bad.message.startswith(BAD_LINES[line])
    assert bad.address == f"{spec.uri}:1"
    assert len(bad.excerpt) <= 200
    assert bad.excerpt.encode().startswith(line[:6])


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', {"a": 3, "b": 2}),
        (b'{"a": Infinity}', {"a": float("inf")}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a": null, "b": {"c": [{"d": null}]}}', {"a": None, "b": {"c": [{"d": None}]}}),
        (b' {"a": "\\u0000"} \r', {"a": "\0"}),
        (b"{}", {}),
    ],
)
def test_unusual_json_that_is_a_row(line: bytes, values: dict[str, object], tmp_path: Path) -> None:
    spec = InputSpec(uri=write(tmp_path / "a.jsonl", line))
    assert values_of(read_all(spec)) == [values]


def test_a_line_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 3 << 20)
    long = {"text": "x" * (5 << 20)}
    below = {"text": "x" * ((3 << 20) - 20)}
    data = json_lines([*ROWS[:2], long, below, long, *ROWS[2:4]])
    spec = InputSpec(uri=write(tmp_path / "a.jsonl", data))
    rows = read_all(spec, 2)
    assert values_of([*rows[:2], rows[3], *rows[5:]]) == [*ROWS[:2], below, *ROWS[2:4]]
    for row in (rows[2], rows[4]):
        assert isinstance(row, RowFailure)
        assert row.message == "longer than 3 MiB"
        assert len(row.excerpt) == 200


def test_on_bad_record(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", b"oops\n" + json_lines(ROWS[:1]))
    skip, row = read_all(InputSpec(uri=uri, on_bad_record="skip"))
    assert isinstance(skip, RowSkip)
    assert skip.reason.startswith("bad_record: not JSON")
    assert isinstance(row, InputRow)
    with pytest.raises(InputError, match=r"a\.jsonl:0 is a bad record: not JSON.*'oops'"):
        read_all(InputSpec(uri=uri, on_bad_record="fail"))


def test_bad_csv_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "_MAX_FIELD_CHARS", 1000)
    data = b'id,text\n1,a\n2\n3,b,c\n4,\xff\n5,"a"b\n6,' + b"x" * 2000 + b'\n7,ok\n8,"open\n'
    rows = read_all(InputSpec(uri=write(tmp_path / "a.csv", data)), 3)
    messages = [row.message if isinstance(row, RowFailure) else row.values for row in rows]
    assert messages == [
        {"id": "1", "text": "a"},
        "not 2 fields, as the header has, but 1",
        "not 2 fields, as the header has, but 3",
        "not UTF-8",
        "not CSV: ',' expected after '\"' (line 6)",
        "not CSV: field larger than field limit (1000) (line 7)",
        {"id": "7", "text": "ok"},
        "not CSV: unexpected end of data (line 9)",
    ]


def test_parquet_text_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    good, bad = b"good", b"\xff\xfe!!"
    binary = pa.array([good, bad, good], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    first, failure, last = read_all(InputSpec(uri=str(tmp_path / "a.parquet")))
    assert values_of([first, last]) == [{"text": "good"}] * 2
    assert isinstance(failure, RowFailure)
    assert failure.message.startswith("column 'text' is not readable")


@pytest.mark.parametrize("pattern", ["*.jsonl", "none.jsonl", "sub/**/*.parquet", "empty"])
def test_a_pattern_that_matches_nothing(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for uri in (pattern, str(tmp_path / pattern), f"file://{tmp_path}/{pattern}"):
        with pytest.raises(InputError, match=r"input\.uri .* matches no data file"):
            plan_input(InputSpec(uri=uri), 10)
    with pytest.raises(InputError, match="matches no data file"):
        plan_input(InputSpec(uri="memory://nowhere/*.jsonl"), 10)


def test_a_bucket_that_is_not_there(s3_bucket: str) -> None:
    with pytest.raises(InputError, match="matches no data file"):
        plan_input(InputSpec(uri=f"{s3_bucket}-not/*.jsonl"), 10)


def test_an_s3_server_that_is_not_there() -> None:
    options = {
        "endpoint_url": "http://127.0.0.1:9/",
        "key": "a",
        "secret": "hunter2",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    with pytest.raises(StorageError, match="cannot list s3://bucket") as caught:
        plan_input(InputSpec(uri="s3://bucket/*.jsonl", storage_options=options), 10)
    assert "hunter2" not in str(caught.value)


TRUNCATED = {
    "a.parquet": parquet_file(ROWS)[:-30],
    "middle.parquet": parquet_file(ROWS)[:100],
    "empty.parquet": b"",
    "a.arrow": arrow_file(ROWS)[:-30],
    "empty.arrow": b"",
    "stream.arrow": arrow_file(ROWS, stream=True)[:-500],
    "a.jsonl.gz": gzip.compress(json_lines(ROWS))[:-9],
    "a.jsonl.zst": zstandard.compress(json_lines(ROWS))[:-3],
    "junk.jsonl.gz": gzip.compress(json_lines(ROWS)) + b"junk at the end",
    "a.csv.gz": gzip.compress(csv_file(ROWS))[:-9],
}


@pytest.mark.parametrize("name", sorted(TRUNCATED))
@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_truncated_file_is_named(name: str, store: str, tmp_path: Path) -> None:
    uri = str(tmp_path / name) if store == "local" else f"memory://truncated/{name}"
    with fsspec.open(uri, "wb") as file:
        file.write(TRUNCATED[name])
    with pytest.raises(InputError, match=name) as caught:
        plan_input(InputSpec(uri=uri), 10)
    assert "truncated or damaged" in str(caught.value) or "empty or no" in str(caught.value)


def test_damage_in_the_middle_of_a_parquet_file(tmp_path: Path) -> None:
    data = bytearray(parquet_file([{"text": f"{i}" * 50} for i in range(1000)], 500))
    data[1000:1400] = b"\xff" * 400
    spec = InputSpec(uri=write(tmp_path / "a.parquet", data))
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        read_all(spec)


@pytest.mark.parametrize(
    ("name", "data", "declared", "message"),
    [
        ("a.txt", b"some text", "auto", "neither its name nor its content"),
        ("a.gz", gzip.compress(b"text", mtime=0), "auto", "neither its name nor its content"),
        ("a.jsonl", parquet_file(ROWS), "auto", "is a parquet file, not jsonl"),
        ("a.parquet", json_lines(ROWS), "auto", "empty or no parquet file"),
        ("a.parquet", parquet_file(ROWS), "csv", "is a parquet file, not csv"),
        (
            "a.parquet.gz",
            gzip.compress(parquet_file(ROWS), mtime=0),
            "auto",
            "compressed as a whole",
        ),
        ("a.json", b'[\n  {"a": 1},\n  {"a": 2}\n]', "auto", "begins with a JSON array"),
        ("a.csv", b"id,,id\n1,2,3\n", "auto", "same name: '', 'id'"),
        ("a.csv", b'i"d,"x"y\n1,2\n', "auto", "header is damaged"),
    ],
)
def test_content_that_is_not_the_format(
    name: str, data: bytes, declared: str, message: str, tmp_path: Path
) -> None:
    spec = InputSpec(uri=write(tmp_path / name, data), format=declared)
    with pytest.raises(InputError, match=message) as caught:
        plan_input(spec, 10)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.jsonl"])
def test_a_missing_column_names_the_nearest(name: str, tmp_path: Path) -> None:
    data = {"parquet": parquet_file, "arrow": arrow_file, "csv": csv_file, "jsonl": json_lines}
    uri = write(tmp_path / name, data[name[2:]](ROWS))
    with pytest.raises(InputError, match=r"no column 'txt'; .*'id', 'text'; did you mean 'text'"):
        plan_input(InputSpec(uri=uri, columns=("id", "txt")), 10)


def test_files_of_different_columns(tmp_path: Path) -> None:
    for name, columns in (
        ("a", {"id": [1], "text": ["x"]}),
        ("b", {"id": [1], "txt": ["x"]}),
        ("c", {"id": ["one"], "text": ["x"]}),
    ):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    a, b, c = (str(tmp_path / f"{name}.parquet") for name in "abc")
    with pytest.raises(InputError, match=r"'text' is in .*a\.parquet but not in .*b\.parquet"):
        plan_input(InputSpec(uri=[a, b]), 10)
    with pytest.raises(InputError, match=r"'id' is string in .*c\.parquet but int64 in .*a\.par"):
        plan_input(InputSpec(uri=[a, c]), 10)
    assert len(plan_input(InputSpec(uri=[a, b], columns=("id",)), 10).units) == 2


def test_files_of_different_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json_lines(ROWS))
    write(tmp_path / "b.parquet", parquet_file(ROWS))
    with pytest.raises(InputError, match=r"mixes formats: .*a\.jsonl is jsonl, .* is parquet"):
        plan_input(InputSpec(uri=str(tmp_path)), 10)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_that_shrinks_while_the_job_runs(name: str, tmp_path: Path) -> None:
    pack = gzip.compress if name.endswith("gz") else bytes
    spec = InputSpec(uri=write(tmp_path / name, pack(json_lines(ROWS))))
    plan = plan_input(spec, 10)
    write(tmp_path / name, pack(json_lines(ROWS[:15])))
    with pytest.raises(InputError, match=r"it changed while the job ran"):
        list(read_unit(spec, plan.files, plan.units[1]))
    os.unlink(tmp_path / name)
    with pytest.raises(InputError, match="is not there any more"):
        list(read_unit(spec, plan.files, plan.units[0]))


@pytest.mark.parametrize(
    "uri",
    ["https://me:hunter2@x.org/a.jsonl", "https://x.org/a.jsonl?sig=hunter2", "s3://a:hunter2@b/c"],
)
def test_secrets_in_a_uri_are_refused_without_showing_them(uri: str) -> None:
    with pytest.raises(InputError, match="storage_options") as caught:
        resolve_inputs(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["ftp://x/a.jsonl", "zip://a.jsonl::s3://b/c.zip"])
def test_stores_that_are_not_supported(uri: str) -> None:
    with pytest.raises(UnsupportedError):
        resolve_inputs(uri)


def test_which_files_a_uri_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("b.jsonl", "a.jsonl", "sub/c.jsonl", "odd[1].jsonl", ".hidden.jsonl", "_tmp/d.jsonl"),
        *("README.md", "dataset_info.json", "state.json", ".batchgen/job.jsonl"),
    ):
        write(tmp_path / "in" / name, b"{}\n")
    monkeypatch.chdir(tmp_path)

    def names(uri: str | list[str]) -> list[str]:
        return [file.uri for file in resolve_inputs(uri)]

    folder = ["in/a.jsonl", "in/b.jsonl", "in/odd[1].jsonl", "in/sub/c.jsonl"]
    assert names("in") == names("in/") == names("./in") == folder
    assert names(str(tmp_path / "in")) == [str(tmp_path / name) for name in folder]
    assert names(f"file://{tmp_path}/in") == [f"file://{tmp_path}/{name}" for name in folder]
    assert names("in/*.jsonl") == folder[:3]
    assert names("in/**/*.jsonl") == ["in/_tmp/d.jsonl", *folder]
    assert names("in/.*.jsonl") == ["in/.hidden.jsonl"]
    assert names("in/odd[1].jsonl") == ["in/odd[1].jsonl"]
    assert names("in/[ab].jsonl") == folder[:2]
    assert names(["in/sub/*", "in/a.jsonl", "in/*.jsonl", "in/a.jsonl"]) == [
        "in/sub/c.jsonl",
        *folder[:3],
    ]


def test_the_etag_changes_with_the_file(tmp_path: Path, s3_bucket: str) -> None:
    for uri in (str(tmp_path / "a.jsonl"), "memory://etag/a.jsonl", f"{s3_bucket}/a.jsonl"):
        etags = set()
        for content in (b"{}\n", b"[]\n"):
            with fsspec.open(uri, "wb") as file:
                file.write(content)
            [found] = resolve_inputs(uri)
            [again] = resolve_inputs(uri)
            assert found == again
            assert found.size_bytes == 3
            etags.add(found.etag)
        assert len(etags) == 2
