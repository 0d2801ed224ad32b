"""Parts of the output, and what makes a folder of parts a dataset that `datasets` opens.

`datasets` itself is not imported: a saved dataset is Arrow files in the stream format beside two
small JSON files, and a loadable one is any files that the README's front matter names.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from batchgen.dataset.schema import check_rows, check_values, output_schema
from batchgen.records import OutputRow, Part

if TYPE_CHECKING:
    from batchgen.dataset.storage import Storage
    from batchgen.job.spec import OutputSpec

__all__ = [
    "build_parts",
    "check_rows",
    "check_values",
    "dataset_json",
    "delete_superseded",
    "front_matter",
    "output_schema",
    "publish",
]

Values = Mapping[str, object]  # of one row of output, by column

_DATA = "data"
_EMPTY = f"{_DATA}/part-empty-"
_PART = re.compile(rf"{_DATA}/part-(\d{{8,18}})-\d+(?:-r(\d{{1,9}}))?-[\w-]+\.[a-z.]+")
_BATCH_ROWS = 1000  # rows of one Arrow record batch, as `datasets` writes them
_JSON_EXTENSIONS = {None: "jsonl", "gzip": "jsonl.gz", "zstd": "jsonl.zst"}
_DATASETS_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"} | {
    "date32[day]": "date32"
}


def build_parts(
    spec: OutputSpec,
    schema: pa.Schema,
    unit_id: int,
    rows: Sequence[OutputRow],
    *,
    generation: int = 0,
) -> list[tuple[Part, bytes]]:
    """The files of a unit's rows of output, in order, each of at most `max_shard_rows` rows.

    A part's name holds its content's hash and, after a retry of failed rows, its generation. The
    same rows give the same bytes. No rows, no parts. The values must fit the schema
    (`check_values`).
    """
    step = spec.max_shard_rows
    retry = f"-r{generation}" if generation else ""
    values = [each for row in rows for each in row.rows]
    return [
        _build_part(spec, schema, f"{unit_id:08d}-{i:03d}{retry}", values[start : start + step])
        for i, start in enumerate(range(0, len(values), step))
    ]


def publish(
    storage: Storage,
    spec: OutputSpec,
    schema: pa.Schema,
    parts: Sequence[Part],
    card: str,
) -> None:
    """Make the committed `parts`, in this order, a dataset.

    Arrow opens with `datasets.load_from_disk`, the others with `datasets.load_dataset`, which
    refuses a dataset without rows. `card` is the text of README.md. May be repeated.
    """
    if not parts:
        part, data = _build_part(spec, schema, "empty", [])
        storage.put(part.path, data)
        parts = [part]
    for path, value in dataset_json(spec, parts).items():
        storage.put(path, _json_file(value))
    front = yaml.safe_dump(front_matter(spec, schema, parts), sort_keys=False, allow_unicode=True)
    storage.put("README.md", f"---\n{front}---\n\n{card}".encode())


def delete_superseded(
    storage: Storage, parts: Sequence[Part], generations: Mapping[int, int]
) -> None:
    """Delete data files that the dataset of these parts does not need.

    `generations` has the units' by their id. Parts of later generations or of other units stay:
    they are another process', which is about to commit them.
    """
    named = {part.path for part in parts}
    stale = [
        path
        for path in storage.list(_DATA)
        if path not in named and _is_superseded(path, generations)
    ]
    # A dataset without rows has a part that no commit names.
    storage.delete(path for path in stale if parts or not path.startswith(_EMPTY))


def dataset_json(spec: OutputSpec, parts: Sequence[Part]) -> dict[str, object]:
    """The JSON files, by name, that make `parts` a saved dataset; none but for Arrow."""
    if spec.format != "arrow":
        return {}
    return {"dataset_info.json": _dataset_info(), "state.json": _dataset_state(parts)}


def front_matter(spec: OutputSpec, schema: pa.Schema, parts: Sequence[Part]) -> dict[str, object]:
    """The README's metadata: the parts by name, so that no other file is ever read."""
    files = [{"split": "train", "path": [part.path for part in parts]}]
    front: dict[str, object] = {"configs": [{"config_name": "default", "data_files": files}]}
    if spec.format == "jsonl":
        # Else `datasets` guesses: a text that looks like a date would become one.
        front["dataset_info"] = {"features": list(_features(schema))}
    return front


def _build_part(
    spec: OutputSpec, schema: pa.Schema, name: str, rows: Sequence[Values]
) -> tuple[Part, bytes]:
    if spec.format == "jsonl":
        data, extension = _json_lines(spec, schema, rows), _JSON_EXTENSIONS[spec.compression]
    elif spec.format == "parquet":
        data, extension = _parquet(spec, _table(schema, rows)), "parquet"
    else:
        data, extension = _arrow_stream(spec, _table(schema, rows)), "arrow"
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{_DATA}/part-{name}-{sha256[:16]}.{extension}"
    return Part(path=path, num_rows=len(rows), size_bytes=len(data), sha256=sha256), data


def _is_superseded(path: str, generations: Mapping[int, int]) -> bool:
    match = _PART.fullmatch(path)
    if match is None:
        return path.startswith(_EMPTY)
    return int(match[2] or 0) <= generations.get(int(match[1]), -1)


def _table(schema: pa.Schema, rows: Sequence[Values]) -> pa.Table:
    columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _arrow_stream(spec: OutputSpec, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    codec = pa.Codec(spec.compression) if spec.compression else None
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=_BATCH_ROWS)
    return sink.getvalue().to_pybytes()


def _parquet(spec: OutputSpec, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression=spec.compression or "none") as writer:
        if table.num_rows:  # `datasets` cannot read a row group without rows
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _json_lines(spec: OutputSpec, schema: pa.Schema, rows: Sequence[Values]) -> bytes:
    data = b"".join(_json_line(schema.names, row) for row in rows)
    if spec.compression == "gzip":
        return gzip.compress(data, mtime=0)
    if spec.compression == "zstd":
        return bytes(pa.Codec("zstd").compress(data, asbytes=True))
    return data


def _json_line(names: Sequence[str], row: Values) -> bytes:
    values = {name: row.get(name) for name in names}
    return json.dumps(values, ensure_ascii=False, default=_json_value).encode() + b"\n"


def _json_value(value: date) -> str:
    return value.isoformat()  # of a datetime, the time as well


def _json_file(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _dataset_info() -> dict[str, object]:
    # Without "features", `datasets` takes the columns' types from the Arrow files, which is exact.
    return {"citation": "", "description": "", "homepage": "", "license": ""}


def _dataset_state(parts: Sequence[Part]) -> dict[str, object]:
    content = hashlib.sha256("".join(part.sha256 for part in parts).encode())
    return {
        "_data_files": [{"filename": part.path} for part in parts],
        "_fingerprint": content.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


def _features(fields: pa.Schema | pa.StructType) -> Iterator[dict[str, object]]:
    for field in fields:
        yield {"name": field.name, **_feature(field.type)}


def _feature(kind: pa.DataType) -> dict[str, object]:
    """A type as `datasets` writes it in a README."""
    if isinstance(kind, pa.StructType):
        return {"struct": list(_features(kind))}
    if isinstance(kind, pa.ListType):
        feature = _feature(kind.value_type)
        return {"list": feature.get("dtype") or feature.get("struct") or feature}
    return {"dtype": _DATASETS_NAMES.get(str(kind), str(kind))}
