"""The output opens with `datasets` itself, whatever the rows are."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_factories import json_lines, parquet_file, read_all, write

from batchgen.dataset.reader import plan_input
from batchgen.dataset.storage import Storage
from batchgen.dataset.writer import (
    build_parts,
    check_values,
    delete_superseded,
    output_schema,
    publish,
)
from batchgen.errors import UsageError
from batchgen.job.spec import InputSpec, OutputSpec
from batchgen.records import InputRow, OutputRow, Part, RowKey

FORMATS = [
    *(("arrow", codec) for codec in ("zstd", "lz4", None)),
    *(("parquet", codec) for codec in ("zstd", "lz4", "snappy", "gzip", None)),
    *(("jsonl", codec) for codec in ("zstd", "gzip", None)),
]
NESTED = pa.struct([("a", pa.int64()), ("b", pa.list_(pa.struct([("c", pa.string())])))])
INPUT = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("ok", pa.bool_()),
        ("day", pa.string()),  # now and then looks like a date and must stay text
        ("tags", pa.list_(pa.string())),
        (
            "nested",
            pa.struct([("a", pa.int64()), ("b", pa.list_(pa.struct([("c", pa.string())])))]),
        ),
        ("empty", pa.null()),
        ("when", pa.timestamp("us")),
        ("date", pa.date32()),
        ("small", pa.float32()),
        ("matrix", pa.list_(pa.list_(pa.int32()))),
    ]
)
META = {
    "finish_reason": "stop",
    "prompt_tokens": 3,
    "output_tokens": 4,
    "seed": 2**62 + 1,
    "row_address": "in.jsonl:0",
}


@pytest.fixture(scope="module", autouse=True)
def _no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    datasets.enable_progress_bars()


def output_spec(uri: object, output_format: str = "arrow", **options: Any) -> OutputSpec:
    columns = {"keep": INPUT.names, "response": "answer"} | options.pop("columns", {})
    return OutputSpec(uri=str(uri), format=output_format, columns=columns, **options)


def values_of_row(i: int, *, null: bool = False) -> dict[str, object]:
    kept: dict[str, object] = {
        "id": i,
        "text": f'text {i} «é» \n"quoted" \u2028 😀',
        "score": i / 7,
        "ok": i % 2 == 0,
        "day": "2020-01-01" if i % 2 else "no day",
        "tags": ["a", None, f"{i}"],
        "nested": {"a": i, "b": [{"c": None}, {"c": "x"}]},
        "empty": None,
        "when": datetime.datetime(2020, 1, 1, 2, 3, 4, 567890),
        "date": datetime.date(2020, 2, 29),
        "small": 0.5,
        "matrix": [[1, 2], []],
    }
    if null:
        kept = dict.fromkeys(kept)
    return {**kept, "answer": f"answer {i}", **META}


def output_rows(values: Sequence[Mapping[str, object]], unit_id: int = 0) -> list[OutputRow]:
    return [
        OutputRow(
            key=RowKey(unit_id=unit_id, index=i),
            address=f"x:{i}",
            rows=({**row, "not_kept": "x"},),
            num_prompt_tokens=3,
            num_output_tokens=4,
        )
        for i, row in enumerate(values)
    ]


def write_dataset(spec: OutputSpec, schema: pa.Schema, units: Sequence[Sequence[Any]]) -> Storage:
    storage = Storage.open(spec.uri)
    parts: list[Part] = []
    for unit_id, values in enumerate(units):
        for part, data in build_parts(spec, schema, unit_id, output_rows(values, unit_id)):
            storage.put(part.path, data)
            parts.append(part)
    publish(storage, spec, schema, parts, "# a card\n")
    delete_superseded(storage, parts, dict.fromkeys(range(8), 0))
    return storage


def open_dataset(spec: OutputSpec, cache: Path) -> datasets.Dataset:
    if spec.format == "arrow":
        return datasets.load_from_disk(spec.uri)
    return datasets.load_dataset(spec.uri, cache_dir=str(cache))["train"]


@pytest.mark.parametrize(("output_format", "codec"), FORMATS)
def test_datasets_opens_it(output_format: str, codec: str | None, tmp_path: Path) -> None:
    spec = output_spec(tmp_path / "out", output_format, compression=codec, max_shard_rows=40)
    schema = output_schema(spec, INPUT)
    nulls = [values_of_row(i, null=True) for i in range(3)]
    units = [
        nulls,
        [values_of_row(i) for i in range(100)],
        [],
        [values_of_row(i) for i in range(100, 105)],
        nulls,
    ]
    storage = write_dataset(spec, schema, units)
    assert len(storage.list("data")) == 6
    dataset = open_dataset(spec, tmp_path / "cache")
    assert dataset.column_names == [*INPUT.names, "answer", *META]
    assert dataset.to_list() == [row for unit in units for row in unit]
    # What `datasets` makes of the files is the schema that was fixed up front.
    assert dataset.features.arrow_schema.remove_metadata() == schema


def test_the_schema_of_the_output() -> None:
    schema = output_schema(output_spec("out", columns={"keep": ["empty", "id"]}), INPUT)
    assert schema == pa.schema(
        [
            ("empty", pa.string()),
            ("id", pa.int64()),
            ("answer", pa.string()),
            ("finish_reason", pa.string()),
            ("prompt_tokens", pa.int32()),
            ("output_tokens", pa.int32()),
            ("seed", pa.int64()),
            ("row_address", pa.string()),
        ]
    )
    bare = output_spec("out", columns={"keep": ["id"], "meta": False})
    assert output_schema(bare, pa.schema([])).names == ["id", "answer"]


@pytest.mark.parametrize("output_format", ["arrow", "parquet"])
def test_types_that_json_has_not(output_format: str, tmp_path: Path) -> None:
    values = {
        "binary": b"\x00\xff",
        "decimal": decimal.Decimal("1.20"),
        "utc": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        "time": datetime.time(1, 2, 3),
        "duration": datetime.timedelta(seconds=5),
        "large": "x",
        "category": "red",
        "pair": [1.0, 2.0],
        "unsigned": 2**64 - 1,
    }
    table = pa.table(
        {
            "binary": pa.array([values["binary"]]),
            "decimal": pa.array([values["decimal"]], pa.decimal128(10, 2)),
            "utc": pa.array([values["utc"]], pa.timestamp("ms", "UTC")),
            "time": pa.array([values["time"]], pa.time64("us")),
            "duration": pa.array([values["duration"]], pa.duration("s")),
            "large": pa.array([values["large"]], pa.large_string()),
            "category": pa.array([values["category"]]).dictionary_encode(),
            "pair": pa.array([values["pair"]], pa.list_(pa.float32(), 2)),
            "unsigned": pa.array([values["unsigned"]], pa.uint64()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    source = InputSpec(uri=str(tmp_path / "in.parquet"))
    spec = output_spec(tmp_path / "out", output_format, columns={"keep": table.column_names})
    schema = output_schema(spec, plan_input(source, 10).schema)
    [row] = read_all(source)
    assert isinstance(row, InputRow)
    assert check_values(schema, row.values) is None
    write_dataset(spec, schema, [[{**row.values, "answer": "yes", **META}]])
    dataset = open_dataset(spec, tmp_path / "cache")
    assert dataset[0] == {**values, "answer": "yes", **META}
    with pytest.raises(UsageError, match="'binary' of type binary cannot be written as jsonl"):
        output_schema(output_spec("out", "jsonl", columns={"keep": ["binary"]}), table.schema)


@pytest.mark.parametrize("units", [[], [[]]])
def test_an_empty_arrow_dataset_opens(units: list[list[object]], tmp_path: Path) -> None:
    spec = output_spec(tmp_path / "out")
    schema = output_schema(spec, INPUT)
    write_dataset(spec, schema, units)
    dataset = datasets.load_from_disk(spec.uri)
    assert dataset.num_rows == 0
    assert dataset.features.arrow_schema.remove_metadata() == schema


def test_an_empty_parquet_dataset_has_its_schema(tmp_path: Path) -> None:
    spec = output_spec(tmp_path / "out", "parquet")
    schema = output_schema(spec, INPUT)
    storage = write_dataset(spec, schema, [])
    [path] = storage.list("data")
    assert pq.read_schema(tmp_path / "out" / path) == schema


def test_s3(s3_bucket: str, s3_server: Any) -> None:
    spec = output_spec(f"{s3_bucket}/out")
    rows = [values_of_row(i) for i in range(10)]
    write_dataset(spec, output_schema(spec, INPUT), [rows])
    dataset = datasets.load_from_disk(spec.uri, storage_options=s3_server.storage_options)
    assert dataset.to_list() == rows


@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
def test_publishing_again_deletes_what_is_not_committed(output_format: str, tmp_path: Path) -> None:
    spec = output_spec(tmp_path / "out", output_format)
    schema = output_schema(spec, INPUT)
    rows = [values_of_row(i) for i in range(10)]
    storage = write_dataset(spec, schema, [rows])
    content = {path: storage.read(path) for path in storage.list()}
    [(orphan, data)] = build_parts(spec, schema, 0, output_rows(rows[:3], 7))
    storage.put(orphan.path, data)
    [(later, later_data)] = build_parts(spec, schema, 8, output_rows(rows[:3], 8))
    storage.put(later.path, later_data)
    storage.put(".batchgen/job.json", b"{}")
    assert open_dataset(spec, tmp_path / "cache1").to_list() == rows
    write_dataset(spec, schema, [rows])
    assert storage.read(later.path) == later_data  # another run's, which has more units
    storage.delete([".batchgen/job.json", later.path])
    assert {path: storage.read(path) for path in storage.list()} == content


def test_parts_are_named_by_their_content(tmp_path: Path) -> None:
    for output_format, codec in FORMATS:
        spec = output_spec(tmp_path, output_format, compression=codec)
        schema = output_schema(spec, INPUT)
        rows = output_rows([values_of_row(i) for i in range(5)])
        [(part, data)] = build_parts(spec, schema, 12, rows)
        assert [(part, data)] == build_parts(spec, schema, 12, rows)
        assert part.path.startswith(f"data/part-00000012-000-{part.sha256[:16]}.{output_format}")
        assert (part.num_rows, part.size_bytes) == (5, len(data))
        [(other, _)] = build_parts(spec, schema, 12, rows[:4])
        assert other.path != part.path


def test_parts_that_another_process_may_be_about_to_commit_stay(tmp_path: Path) -> None:
    spec = output_spec(tmp_path / "out")
    schema = output_schema(spec, INPUT)
    rows = [values_of_row(i) for i in range(4)]
    storage = write_dataset(spec, schema, [rows, rows])
    kept = {path for path in storage.list("data") if path.startswith("data/part-00000001-")}
    parts = {
        (unit_id, generation): build_parts(
            spec, schema, unit_id, output_rows(rows, unit_id), generation=generation
        )[0]
        for unit_id, generation in [(0, 1), (0, 2), (1, 1), (2, 0)]
    }
    for part, data in parts.values():
        storage.put(part.path, data)
    first = parts[0, 1][0]
    assert first.path.startswith("data/part-00000000-000-r1-")
    second = Part(path=next(iter(kept)), num_rows=4, size_bytes=1, sha256="")
    delete_superseded(storage, [first, second], {0: 1, 1: 0})
    later = {parts[key][0].path for key in [(0, 2), (1, 1), (2, 0)]}
    assert set(storage.list("data")) == {first.path, *kept, *later}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"keep": ["idd"]}, r"no column 'idd'; .* did you mean 'id'"),
        ({"keep": ["id"], "response": "id"}, "'id' would be the name of two columns"),
        ({"keep": ["id", "id"]}, "'id' would be the name of two columns"),
        ({"response": "seed", "keep": []}, "'seed' would be the name of two columns"),
        ({"keep": ["map"]}, "'map' of type map<string, int64> cannot be written as arrow"),
        ({"keep": ["nothing"]}, "'nothing' of type struct<> cannot be written"),
    ],
)
def test_columns_that_cannot_be(columns: dict[str, object], message: str) -> None:
    schema = INPUT.append(pa.field("map", pa.map_(pa.string(), pa.int64()))).append(
        pa.field("nothing", pa.struct([]))
    )
    with pytest.raises(UsageError, match=message):
        output_schema(output_spec("out", columns=columns), schema)


def test_a_json_column_of_mixed_types_cannot_be_kept(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", json_lines([{"a": 1}, {"a": "x"}, {"a": None}]))
    schema = plan_input(InputSpec(uri=uri), 10).schema
    with pytest.raises(UsageError, match=r"'a' holds values of several types \(int, str\)"):
        output_schema(output_spec("out", columns={"keep": ["a"]}), schema)
    assert output_schema(output_spec("out", columns={"keep": []}), schema).names[0] == "answer"


FITTING = [
    ("id", 2**63 - 1),
    ("id", None),
    ("score", 3),
    ("score", float("nan")),
    ("tags", []),
    ("nested", {}),
    ("nested", {"a": None, "b": [None, {"c": "x"}]}),
    ("empty", "now a text"),
    ("not in the schema", object()),
]
MISFITS = [
    ("id", 2**63, "int 9223372036854775808 does not fit the type int64"),
    ("id", 1.0, "float 1.0 does not fit"),
    ("id", True, "bool True does not fit"),
    ("id", "1", "str '1' does not fit"),
    ("score", 2**60 + 1, "does not fit the type double"),
    ("score", True, "bool True does not fit"),
    ("ok", 1, "int 1 does not fit"),
    ("text", 5, "int 5 does not fit the type string"),
    ("text", {"a": "x" * 1000}, "dict {'a': 'xxx"),
    ("tags", ["a", 1], "int 1 does not fit the type string"),
    ("tags", "a", "str 'a' does not fit the type list<item: string>"),
    ("nested", {"z": 1}, "has no key 'z'"),
    ("nested", {"b": [{"c": 1}]}, "key 'b': key 'c': int 1 does not fit"),
    ("nested", [], "list [] does not fit"),
    ("empty", 1, "int 1 does not fit the type string"),
]


@pytest.mark.parametrize(("name", "value"), FITTING)
def test_values_that_fit_are_stored(name: str, value: object) -> None:
    spec = output_spec("out")
    schema = output_schema(spec, INPUT)
    assert check_values(schema, {name: value}) is None
    assert build_parts(spec, schema, 0, output_rows([{name: value}]))


@pytest.mark.parametrize(("name", "value", "message"), MISFITS)
def test_values_that_do_not_fit(name: str, value: object, message: str) -> None:
    problem = check_values(output_schema(output_spec("out"), INPUT), {name: value})
    assert problem is not None
    assert problem.startswith(f"column '{name}': ")
    assert message in problem
    assert len(problem) < 300


def test_not_a_number_survives_json(tmp_path: Path) -> None:
    spec = output_spec(tmp_path / "out", "jsonl", columns={"keep": ["score"]})
    schema = output_schema(spec, INPUT)
    write_dataset(spec, schema, [[{"score": float("nan")}, {"score": 1.5}]])
    first, second = open_dataset(spec, tmp_path / "cache")["score"]
    assert first != first
    assert second == 1.5


def test_json_lines_are_what_json_says(tmp_path: Path) -> None:
    """Read without `datasets`, which turns a block of texts that are all dates into times."""
    spec = output_spec(
        tmp_path / "out", "jsonl", compression=None, columns={"keep": ["day", "when", "nested"]}
    )
    schema = output_schema(spec, INPUT)
    when = datetime.datetime(2020, 1, 1, 0, 0)
    row = {"answer": "«é» \u2028", "day": "2020-01-01", "when": when, "nested": {"a": 1}, **META}
    storage = write_dataset(spec, schema, [[row, {}]])
    [path] = storage.list("data")
    first, second = storage.read(path).decode().rstrip("\n").split("\n")
    assert json.loads(first) == {**row, "when": "2020-01-01T00:00:00"}
    assert json.loads(second) == dict.fromkeys(schema.names)


def test_the_output_can_be_the_next_input(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"t{i}"} for i in range(20)]
    source = InputSpec(uri=write(tmp_path / "in.parquet", parquet_file(rows)))
    for output_format, codec in FORMATS:
        spec = output_spec(
            tmp_path / f"{output_format}-{codec}",
            output_format,
            compression=codec,
            columns={"keep": ["id", "text"], "meta": False},
        )
        schema = output_schema(spec, plan_input(source, 8).schema)
        values = [{**row, "answer": "x"} for row in rows]
        storage = write_dataset(spec, schema, [values[:8], values[8:]])
        storage.put(".batchgen/dead/x.jsonl", b'{"id": 99}\n')
        again = read_all(InputSpec(uri=spec.uri))
        assert [row.values for row in again if isinstance(row, InputRow)] == values
        if output_format == "arrow":
            assert json.loads(fsspec.open(f"{spec.uri}/state.json").open().read())
