"""Parts are read back as what was written, in every kind, and nothing else passes for them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchgen.dataset.parts import dataset_problems, find_empty_part, read_part
from batchgen.dataset.storage import Storage
from batchgen.dataset.writer import build_parts, output_schema, publish
from batchgen.job.spec import OutputSpec
from batchgen.records import OutputRow, Part, RowKey

KINDS = [
    *(("arrow", codec) for codec in ("zstd", "lz4", None)),
    *(("parquet", codec) for codec in ("zstd", "lz4", "snappy", "gzip", None)),
    *(("jsonl", codec) for codec in ("zstd", "gzip", None)),
]
INPUT = pa.schema(
    [
        ("id", pa.int64()),
        ("score", pa.float64()),
        ("tags", pa.list_(pa.string())),
        ("nested", pa.struct([("a", pa.list_(pa.struct([("c", pa.string())])))])),
        ("date", pa.date32()),
        ("seconds", pa.timestamp("s")),  # which Parquet stores in milliseconds
    ]
)


def make_spec(kind: tuple[str, str | None], *, meta: bool = False) -> OutputSpec:
    output_format, codec = kind
    columns = {"keep": list(INPUT.names), "meta": meta}
    return OutputSpec.model_validate(
        {"uri": "out", "format": output_format, "compression": codec, "columns": columns}
    )


def make_rows(num_rows: int) -> list[OutputRow]:
    return [
        OutputRow(
            key=RowKey(unit_id=0, index=i),
            address=f"in:{i}",
            rows=(
                {
                    "id": i,
                    "score": float("inf") if i % 3 else i,
                    "tags": None if i % 5 == 0 else ["é", None],
                    "nested": {"a": [{"c": "\u2028"}]},
                    "date": datetime.date(2020, 2, 29),
                    "seconds": datetime.datetime(2020, 1, 1, 2, 3, 4),
                    "response": f"answer {i}\n",
                    "finish_reason": "stop",
                    "prompt_tokens": 3,
                    "output_tokens": i,
                    "seed": 2**62 + i,
                    "row_address": f"in:{i}",
                },
            ),
            num_prompt_tokens=3,
            num_output_tokens=i,
        )
        for i in range(num_rows)
    ]


def build(spec: OutputSpec, num_rows: int) -> tuple[Part, bytes, pa.Schema]:
    schema = output_schema(spec, INPUT)
    [(part, data)] = build_parts(spec, schema, 0, make_rows(num_rows))
    return part, data, schema


def read_column(path: str, data: bytes, schema: pa.Schema, name: str) -> list[Any]:
    return [
        value for batch in read_part(path, data, schema, [name]) for value in batch.columns[name]
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("meta", [True, False])
def test_a_part_of_every_kind_is_read_back(kind: tuple[str, str | None], meta: bool) -> None:
    part, data, schema = build(make_spec(kind, meta=meta), 2500)
    assert read_column(part.path, data, schema, "id") == list(range(2500))
    assert sum(batch.num_rows for batch in read_part(part.path, data, schema, [])) == 2500
    if meta:
        addresses = read_column(part.path, data, schema, "row_address")
        assert addresses == [f"in:{i}" for i in range(2500)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_schema_is_refused_by_column(kind: tuple[str, str | None]) -> None:
    part, data, schema = build(make_spec(kind), 10)
    other = schema.set(0, pa.field("number", pa.int64()))
    with pytest.raises(ValueError, match="number"):
        list(read_part(part.path, data, other, []))
    as_text = schema.set(0, pa.field("id", pa.string()))
    with pytest.raises(ValueError, match="id"):
        list(read_part(part.path, data, as_text, []))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_no_part_are_refused(kind: tuple[str, str | None]) -> None:
    part, data, schema = build(make_spec(kind), 10)
    for garbage in (b"garbage", data[:-20], data[20:]):
        with pytest.raises(ValueError, match=r"decoded|JSON|columns"):
            list(read_part(part.path, garbage, schema, []))


def test_a_name_of_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match="exe"):
        list(read_part("data/part.exe", b"", INPUT, []))


def published(folder: Path, kind: tuple[str, str | None], num_rows: Sequence[int]) -> Any:
    """A storage with a published dataset of parts of these many rows, its spec, schema, parts."""
    spec = make_spec(kind)
    schema = output_schema(spec, INPUT)
    storage = Storage.open(str(folder))
    parts = []
    for unit_id, number in enumerate(num_rows):
        for part, data in build_parts(spec, schema, unit_id, make_rows(number)):
            storage.put(part.path, data)
            parts.append(part)
    publish(storage, spec, schema, parts, "# A card\n\n---\n")
    return storage, spec, schema, parts


@pytest.mark.parametrize("kind", [("arrow", "zstd"), ("parquet", "zstd"), ("jsonl", "zstd")])
def test_the_files_of_a_dataset_name_its_parts(
    tmp_path: Path, kind: tuple[str, str | None]
) -> None:
    storage, spec, schema, parts = published(tmp_path, kind, [3, 4, 5])
    assert dataset_problems(storage, spec, schema, parts) == {}
    readme = storage.read("README.md").replace(b"configs:", b"license: mit\nconfigs:") + b"More."
    storage.put("README.md", readme)  # as people do
    assert dataset_problems(storage, spec, schema, parts) == {}
    files = {"README.md"} | ({"state.json"} if kind[0] == "arrow" else set())
    for changed, text in (
        (parts[:2], "names beside"),
        ([*parts, parts[0]], "twice"),
        (parts[::-1], "order"),
    ):
        problems = dataset_problems(storage, spec, schema, changed)
        assert set(problems) == files
        assert all(text in problem for problem in problems.values()), problems
    storage.put("README.md", b"---\n[not: yaml\n---\n")
    assert "front matter" in dataset_problems(storage, spec, schema, parts)["README.md"]
    storage.delete(["README.md"])
    assert dataset_problems(storage, spec, schema, parts) == {"README.md": "is missing"}


def test_a_changed_state_is_seen_even_if_it_names_the_parts(tmp_path: Path) -> None:
    storage, spec, schema, parts = published(tmp_path, ("arrow", None), [3])
    state = json.loads(storage.read("state.json"))
    storage.put("state.json", json.dumps({**state, "_format_columns": ["id"]}).encode())
    assert "not what batchgen wrote" in dataset_problems(storage, spec, schema, parts)["state.json"]
    storage.put("state.json", b"{")
    assert "not JSON" in dataset_problems(storage, spec, schema, parts)["state.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_an_empty_dataset_is_found_and_read(
    tmp_path: Path, kind: tuple[str, str | None]
) -> None:
    storage, spec, schema, _ = published(tmp_path, kind, [])
    part = find_empty_part(storage)
    assert part is not None
    assert dataset_problems(storage, spec, schema, [part]) == {}
    assert sum(b.num_rows for b in read_part(part.path, storage.read(part.path), schema, [])) == 0
    storage.put(part.path, storage.read(part.path) + b"x")
    assert find_empty_part(storage) is None
