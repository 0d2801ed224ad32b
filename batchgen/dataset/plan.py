"""How the input is cut into units: which rows there are, where they begin, what columns they have.

Parquet is planned from footers and Arrow IPC from batch headers. JSON lines and CSV are read once,
streaming, to find where the rows are; `limit` ends that early.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from batchgen.dataset.csv_rows import csv_info
from batchgen.dataset.formats import Codec, Format, decompressed, detect_content, readable
from batchgen.dataset.inputs import open_input, resolve_inputs
from batchgen.dataset.lines import iter_json_lines, parse_json_line
from batchgen.dataset.storage import redact
from batchgen.dataset.tables import arrow_info, parquet_info
from batchgen.errors import InputError
from batchgen.records import InputFile, Unit

if TYPE_CHECKING:
    from batchgen.job.spec import InputSpec

_SAMPLE_ROWS = 1000
_MIXED = b"batchgen.mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputPlan:
    """The input's files, its units in input order, and its columns.

    `schema` has the exact types of Parquet and Arrow columns; those of JSON lines are inferred
    from the first rows (see `mixed_types`). It has no columns when JSON lines have no rows.
    """

    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FilePlan:
    format: Format
    schema: pa.Schema | None  # None: JSON lines, which have none of their own
    units: list[Unit]  # numbered from 0 within the file


def plan_input(spec: InputSpec, unit_rows: int) -> InputPlan:
    """Cut the input into units of `unit_rows` rows, fewer at the end of each file.

    Raises InputError when nothing matches, and as plan_files() does.
    """
    return plan_files(spec, resolve_inputs(spec.uri, spec.storage_options), unit_rows)


def plan_files(spec: InputSpec, files: Sequence[InputFile], unit_rows: int) -> InputPlan:
    """Cut these files of the input into units of `unit_rows` rows, fewer at the end of each.

    Raises InputError when a file is damaged or of another format than the others, a column is
    missing, or two files' columns do not go together.
    """
    units: list[Unit] = []
    sample: list[Mapping[str, object]] = []
    plans: list[tuple[InputFile, _FilePlan]] = []
    rows_left = spec.limit
    for file_index, file in enumerate(files):
        if rows_left == 0:
            break
        with readable(file):
            plan = _plan_file(spec, file, unit_rows, rows_left, sample)
        if plans and plan.format != plans[0][1].format:
            raise InputError(
                f"input.uri mixes formats: {redact(plans[0][0].uri)} is {plans[0][1].format}, "
                f"{redact(file.uri)} is {plan.format}; name files of one format"
            )
        plans.append((file, plan))
        units += [
            replace(unit, unit_id=len(units) + unit.unit_id, file_index=file_index)
            for unit in plan.units
        ]
        if rows_left is not None:
            rows_left -= sum(unit.num_rows for unit in plan.units)
    schema = _common_schema(plans, spec.columns)
    if schema is None:
        schema = _json_schema(sample, spec.columns, files[0])
    return InputPlan(files=tuple(files), units=tuple(units), schema=schema)


def mixed_types(field: pa.Field[Any]) -> str | None:
    """For a JSON lines column whose values have no common type: the types seen, else None."""
    return (field.metadata or {}).get(_MIXED, b"").decode() or None


def missing_column(name: str, columns: Iterable[str]) -> str:
    """The start of a message: which columns there are, and the nearest."""
    names = list(columns)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no column {name!r}; the columns are {', '.join(map(repr, names)) or 'none'}{hint}"


def _plan_file(
    spec: InputSpec,
    file: InputFile,
    unit_rows: int,
    rows_left: int | None,
    sample: list[Mapping[str, object]],
) -> _FilePlan:
    with open_input(file, spec.storage_options) as stream:
        content = detect_content(file, stream, spec.format)
        if content.format == "jsonl":
            units = _plan_json_lines(file, stream, content.codec, unit_rows, rows_left, sample)
            return _FilePlan(format="jsonl", schema=None, units=units)
        if content.format == "csv":
            info = csv_info(file, decompressed(stream, content.codec), rows_left)
    if content.format == "parquet":
        info = parquet_info(file, spec.storage_options)
    elif content.format == "arrow":
        info = arrow_info(file, spec.storage_options)
    num_rows = info.num_rows if rows_left is None else min(info.num_rows, rows_left)
    units = [
        Unit(unit_id=i, file_index=0, row_start=row, num_rows=min(unit_rows, num_rows - row))
        for i, row in enumerate(range(0, num_rows, unit_rows))
    ]
    return _FilePlan(format=content.format, schema=info.schema.remove_metadata(), units=units)


def _plan_json_lines(
    file: InputFile,
    stream: BinaryIO,
    codec: Codec | None,
    unit_rows: int,
    rows_left: int | None,
    sample: list[Mapping[str, object]],
) -> list[Unit]:
    """Units of one file, from a scan that also adds the first rows to `sample`."""
    starts: list[int] = []
    num_rows = 0
    end = file.size_bytes
    for offset, line in iter_json_lines(decompressed(stream, codec)):
        if num_rows == rows_left:
            end = offset
            break
        if num_rows % unit_rows == 0:
            starts.append(offset)
        if num_rows == 0 and line.lstrip().startswith(b"["):
            raise InputError(
                f"{redact(file.uri)} begins with a JSON array; JSON lines have one object a line "
                "(jq -c '.[]' makes them from an array)"
            )
        if len(sample) < _SAMPLE_ROWS and isinstance(row := parse_json_line(line, None), dict):
            sample.append(row)
        num_rows += 1
    ends = [*starts[1:], end]
    return [
        Unit(
            unit_id=i,
            file_index=0,
            row_start=i * unit_rows,
            num_rows=min(unit_rows, num_rows - i * unit_rows),
            byte_start=starts[i] if codec is None else None,
            byte_end=ends[i] if codec is None else None,
        )
        for i in range(len(starts))
    ]


def _common_schema(
    plans: Sequence[tuple[InputFile, _FilePlan]], columns: Sequence[str] | None
) -> pa.Schema | None:
    """The schema of all files, pruned; None for JSON lines. Widths of one type may differ."""
    common: pa.Schema | None = None
    for file, plan in plans:
        if plan.schema is None:
            return None
        schema = _pruned(plan.schema, columns, file)
        if common is None:
            common = schema
            continue
        first = redact(plans[0][0].uri)
        if odd := set(common.names) ^ set(schema.names):
            name = min(odd)
            has, lacks = (file.uri, first) if name in schema.names else (first, file.uri)
            raise InputError(
                f"column {name!r} is in {redact(has)} but not in {redact(lacks)}; "
                "set input.columns to columns that all files have"
            )
        for field in schema:
            try:
                merged = pa.unify_schemas(
                    [pa.schema([common.field(field.name)]), pa.schema([field])],
                    promote_options="permissive",
                )
            except pa.ArrowException as error:
                raise InputError(
                    f"column {field.name!r} is {field.type} in {redact(file.uri)} but "
                    f"{common.field(field.name).type} in {first}; make them one type, or set "
                    "input.columns to leave it out"
                ) from error
            common = common.set(common.get_field_index(field.name), merged.field(0))
    return common


def _pruned(schema: pa.Schema, columns: Sequence[str] | None, file: InputFile) -> pa.Schema:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise InputError(f"{redact(file.uri)} has several columns named {repeated[0]!r}")
    if columns is None:
        return schema
    for name in columns:
        if name not in schema.names:
            raise InputError(
                f"input.columns: {redact(file.uri)} has {missing_column(name, schema.names)}"
            )
    return pa.schema([schema.field(name) for name in columns])


def _json_schema(
    sample: Sequence[Mapping[str, object]], columns: Sequence[str] | None, file: InputFile
) -> pa.Schema:
    names = list(dict.fromkeys(name for row in sample for name in row))
    schema = pa.schema([_json_field(name, [row.get(name) for row in sample]) for name in names])
    return _pruned(schema, columns, file) if sample else schema


def _json_field(name: str, values: list[Any]) -> pa.Field[Any]:
    try:
        return pa.field(name, pa.array(values).type)
    except (pa.ArrowException, OverflowError):
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        return pa.field(name, pa.null(), metadata={_MIXED: ", ".join(kinds).encode()})
