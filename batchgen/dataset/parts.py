"""The output read again: parts decoded as what the writer made, and the dataset's own files.

Nothing here trusts what it reads. A part is decoded batch by batch, so memory is its bytes and one
batch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from batchgen.dataset.formats import Codec
from batchgen.dataset.schema import check_values
from batchgen.dataset.writer import dataset_json, front_matter
from batchgen.records import Part

if TYPE_CHECKING:
    from batchgen.dataset.storage import Storage
    from batchgen.job.spec import OutputSpec

_BATCH_ROWS = 1000
_CODEC_OF_JSON: dict[str, Codec | None] = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}
_EMPTY_PART = "data/part-empty-"
_README = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartBatch:
    """Rows of a part that follow each other, and the values of the columns asked for."""

    num_rows: int
    columns: Mapping[str, Sequence[Any]]  # by name; a value for each row


def read_part(
    path: str, data: bytes, schema: pa.Schema, columns: Sequence[str]
) -> Iterator[PartBatch]:
    """The rows of a part in order, all of it decoded; `columns` are those of `schema` to hand out.

    What kind of file it is, its name says. Raises ValueError when it cannot be decoded or its
    columns are not those of the schema.
    """
    extension = path.rpartition("/")[2].partition(".")[2]
    try:
        if extension == "arrow":
            yield from _read_arrow(data, schema, columns)
        elif extension == "parquet":
            yield from _read_parquet(data, schema, columns)
        elif extension in _CODEC_OF_JSON:
            yield from _read_json_lines(data, schema, columns, _CODEC_OF_JSON[extension])
        else:
            raise ValueError(f"no part is named *.{extension}")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"it cannot be decoded: {' '.join(str(error).split())}") from error


def find_empty_part(storage: Storage) -> Part | None:
    """The file of a dataset without rows, which no commit names; None if none is as named."""
    for path in storage.list("data"):
        if path.startswith(_EMPTY_PART):
            data = storage.read(path)
            sha256 = hashlib.sha256(data).hexdigest()
            if path.startswith(f"{_EMPTY_PART}{sha256[:16]}."):
                return Part(path=path, num_rows=0, size_bytes=len(data), sha256=sha256)
    return None


def dataset_problems(
    storage: Storage, spec: OutputSpec, schema: pa.Schema, parts: Sequence[Part]
) -> dict[str, str]:
    """What is wrong with the files that make `parts`, in this order, the dataset: by file.

    Of the README only the keys that batchgen writes are looked at; the rest is for people.
    """
    problems = {}
    for path, expected in dataset_json(spec, parts).items():
        try:
            found = json.loads(storage.read(path))
        except FileNotFoundError:
            problems[path] = "is missing"
        except (ValueError, RecursionError) as error:
            problems[path] = f"is not JSON: {error}"
        else:
            if found != expected:
                problems[path] = _named_otherwise(_files_of_state(found), parts)
    try:
        front = _read_front_matter(storage.read(_README))
    except FileNotFoundError:
        problems[_README] = "is missing"
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        problems[_README] = f"its front matter cannot be read: {' '.join(str(error).split())}"
    else:
        expected_front = front_matter(spec, schema, parts)
        if {key: front.get(key) for key in expected_front} != expected_front:
            problems[_README] = _named_otherwise(_files_of_front(front), parts)
    return problems


def _read_arrow(data: bytes, schema: pa.Schema, columns: Sequence[str]) -> Iterator[PartBatch]:
    with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
        _check_schema(reader.schema, schema)
        for batch in reader:
            yield _table_batch(batch, columns)


def _read_parquet(data: bytes, schema: pa.Schema, columns: Sequence[str]) -> Iterator[PartBatch]:
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        _check_schema(file.schema_arrow, _parquet_schema(schema))
        for batch in file.iter_batches(_BATCH_ROWS):
            yield _table_batch(batch, columns)


def _read_json_lines(
    data: bytes, schema: pa.Schema, columns: Sequence[str], codec: Codec | None
) -> Iterator[PartBatch]:
    plain = pa.BufferReader(data)
    stream = plain if codec is None else pa.CompressedInputStream(plain, codec)
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(io.BufferedReader(cast(io.RawIOBase, stream))):
        rows.append(_parse_row(line, schema, number))
        if len(rows) == _BATCH_ROWS:
            yield _json_batch(rows, columns)
            rows = []
    if rows:
        yield _json_batch(rows, columns)


def _parse_row(line: bytes, schema: pa.Schema, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its row {number} is not JSON: {error}") from error
    if not isinstance(row, dict) or list(row) != schema.names:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"its row {number} has not the columns {', '.join(schema.names)}: {keys}")
    if problem := check_values(schema, row):
        raise ValueError(f"its row {number}: {problem}")
    return row


def _json_batch(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> PartBatch:
    return PartBatch(
        num_rows=len(rows), columns={name: [row[name] for row in rows] for name in columns}
    )


def _table_batch(batch: pa.RecordBatch, columns: Sequence[str]) -> PartBatch:
    batch.validate(full=True)
    return PartBatch(
        num_rows=batch.num_rows,
        columns={name: batch.column(name).to_pylist() for name in columns},
    )


def _check_schema(found: pa.Schema, expected: pa.Schema) -> None:
    if found.equals(expected):
        return
    was = {field.name: str(field.type) for field in found}
    should = {field.name: str(field.type) for field in expected}
    odd = [
        f"{name}: {was.get(name, 'absent')}, should be {should.get(name, 'absent')}"
        for name in dict.fromkeys([*should, *was])
        if was.get(name) != should.get(name)
    ]
    raise ValueError(f"its columns are not the output's: {'; '.join(odd) or 'another order'}")


def _parquet_schema(schema: pa.Schema) -> pa.Schema:
    """The schema as Parquet gives it back: it has no timestamps in whole seconds, for one."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    return pq.read_schema(pa.BufferReader(sink.getvalue()))


def _read_front_matter(data: bytes) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes; raises ValueError when it has no keys."""
    opening, _, rest = data.decode().partition("---\n")
    front = yaml.safe_load(rest.partition("\n---\n")[0])
    if opening or not isinstance(front, dict):
        raise ValueError("there is none")
    return front


def _files_of_state(state: Any) -> list[str] | None:
    """The files that a state.json names; None if it is none of ours."""
    try:
        return [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError):
        return None


def _files_of_front(front: Mapping[str, Any]) -> list[str] | None:
    """The files that a README names; None if it names them in no way of ours."""
    try:
        return [str(path) for path in front["configs"][0]["data_files"][0]["path"]]
    except (KeyError, TypeError, IndexError):
        return None


def _named_otherwise(found: Sequence[str] | None, parts: Sequence[Part]) -> str:
    """How the files that are named differ from the parts."""
    expected = [part.path for part in parts]
    if found is None or list(found) == expected:
        return "is not what batchgen wrote, though it may name the committed parts"
    named, committed = set(found), set(expected)
    changes = {
        "lacks": [path for path in expected if path not in named],
        "names beside the committed parts": [path for path in found if path not in committed],
    }
    told = [f"{what} {paths[0]} ({len(paths)} in all)" for what, paths in changes.items() if paths]
    return " and ".join(told) or "names the committed parts in another order, or twice"
