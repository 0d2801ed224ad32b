"""The columns of the output: their types, fixed before the first row, and whether values fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.dataset.plan import missing_column, mixed_types
from batchgen.errors import UsageError

if TYPE_CHECKING:
    from batchgen.job.spec import OutputSpec

META_COLUMNS: dict[str, pa.DataType] = {
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "output_tokens": pa.int32(),
    "seed": pa.int64(),
    "row_address": pa.string(),
}
BEAM_META: dict[str, pa.DataType] = {"beam_score": pa.float64()}  # of jobs with beams
# Others belong to the row of input.
PER_SAMPLE_META = ("finish_reason", "output_tokens", "seed", *BEAM_META)
SAMPLE_INDEX = "sample_index"
_MAX_EXACT_FLOAT = 2**53
_SHOWN_CHARS = 60

Problem = Callable[[object], str | None]


def output_schema(
    spec: OutputSpec, input_schema: pa.Schema, *, num_samples: int = 1, has_beams: bool = False
) -> pa.Schema:
    """The kept input columns, the response, then the meta columns if asked for.

    With several samples in one row (`n_layout: list`) the response is a list, and so are the meta
    columns of a sample; with a row each (`explode`) there is a column for the sample's index.

    A column of which the first rows show only nulls is a string; so is any of an input without
    rows. Raises UsageError for a kept column that the input lacks or that has no type to keep it
    in, and for two output columns of one name.
    """
    columns = spec.columns
    fields = [_kept_field(name, input_schema, spec.format) for name in columns.keep]
    is_exploded = spec.n_layout == "explode"
    is_list = num_samples > 1 and not is_exploded
    fields.append(pa.field(columns.response, pa.list_(pa.string()) if is_list else pa.string()))
    if columns.meta:
        fields.extend(
            pa.field(name, pa.list_(kind) if is_list and name in PER_SAMPLE_META else kind)
            for name, kind in (META_COLUMNS | (BEAM_META if has_beams else {})).items()
        )
    if columns.meta and is_exploded:
        fields.append(pa.field(SAMPLE_INDEX, pa.int32()))
    names = [field.name for field in fields]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"output.columns: {repeated[0]!r} would be the name of two columns; change "
            "output.columns.response or keep, or set output.columns.meta to false"
        )
    return pa.schema(fields)


def check_values(schema: pa.Schema, values: Mapping[str, object]) -> str | None:
    """Why the values cannot be stored as the schema's columns; None if they can.

    Null fits everywhere, a missing column is null, and an integer fits a float column. Columns
    that the schema lacks are not looked at.
    """
    return check_rows(schema, [values])[0]


def check_rows(schema: pa.Schema, rows: Sequence[Mapping[str, object]]) -> list[str | None]:
    """`check_values` of many rows, which is faster."""
    finders = _problems(schema)
    return [_first_problem(finders, values) for values in rows]


def _first_problem(
    finders: Sequence[tuple[str, Problem]], values: Mapping[str, object]
) -> str | None:
    for name, problem_of in finders:
        value = values.get(name)
        if value is not None and (problem := problem_of(value)) is not None:
            return f"column {name!r}: {problem}"
    return None


def _kept_field(name: str, input_schema: pa.Schema, output_format: str) -> pa.Field[pa.DataType]:
    if not input_schema.names:
        return pa.field(name, pa.string())
    if name not in input_schema.names:
        raise UsageError(
            f"output.columns.keep: the input has {missing_column(name, input_schema.names)}"
        )
    field = input_schema.field(name)
    if mixed := mixed_types(field):
        raise UsageError(
            f"output.columns.keep: column {name!r} holds values of several types ({mixed}), but "
            "an output column has one; take it out of keep, or give it one type in the input"
        )
    kind = _stored_type(field.type)
    if kind is None or (output_format == "jsonl" and not _is_json(kind)):
        raise UsageError(
            f"output.columns.keep: column {name!r} of type {field.type} cannot be written as "
            f"{output_format}; take it out of keep, or choose another output.format"
        )
    return pa.field(name, kind)


def _stored_type(kind: pa.DataType) -> pa.DataType | None:
    """The type that a value of this type is stored as; None where `datasets` has none."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _stored_type(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return _stored_type(kind.value_type)
    if types.is_null(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if isinstance(kind, pa.StructType):
        children = [(field.name, _stored_type(field.type)) for field in kind]
        if not children or any(child is None for _, child in children):
            return None
        return pa.struct([(name, child) for name, child in children if child is not None])
    if isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        child = _stored_type(kind.value_type)
        if child is None:
            return None
        if isinstance(kind, pa.FixedSizeListType):
            return pa.list_(child, kind.list_size)
        return pa.large_list(child) if isinstance(kind, pa.LargeListType) else pa.list_(child)
    is_stored = (
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal128(kind)
        or types.is_decimal256(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_timestamp(kind)
        or types.is_date(kind)
        or types.is_time(kind)
        or types.is_duration(kind)
    )
    return kind if is_stored else None


def _is_json(kind: pa.DataType) -> bool:
    """Whether `datasets` reads the type back from JSON as what it was."""
    types = pa.types
    if isinstance(kind, pa.StructType):
        return all(_is_json(field.type) for field in kind)
    if isinstance(kind, pa.ListType):
        return _is_json(kind.value_type)
    return (
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_date32(kind)
        or (types.is_timestamp(kind) and kind.tz is None)
    )


@functools.lru_cache(maxsize=16)
def _problems(schema: pa.Schema) -> list[tuple[str, Problem]]:
    return [(field.name, _problem_finder(field.type)) for field in schema]


def _problem_finder(kind: pa.DataType) -> Problem:
    """A function that says why a value that is not None does not fit the type.

    Types that JSON has no values of come from typed columns, whose values fit as they are.
    """
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind):
        return lambda value: None if isinstance(value, str) else _misfit(kind, value)
    if types.is_boolean(kind):
        return lambda value: None if isinstance(value, bool) else _misfit(kind, value)
    if types.is_integer(kind):
        low = -(2 ** (kind.bit_width - 1)) if types.is_signed_integer(kind) else 0
        high = 2 ** (kind.bit_width - (low < 0))
        return lambda value: (
            None if type(value) is int and low <= value < high else _misfit(kind, value)
        )
    if types.is_floating(kind):
        return lambda value: (
            None
            if isinstance(value, float)
            or (type(value) is int and -_MAX_EXACT_FLOAT <= value <= _MAX_EXACT_FLOAT)
            else _misfit(kind, value)
        )
    if isinstance(kind, pa.StructType):
        return _struct_problem_finder(kind)
    if isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        return _list_problem_finder(kind)
    return lambda _: None


def _list_problem_finder(
    kind: pa.ListType[Any] | pa.LargeListType[Any] | pa.FixedSizeListType[Any, Any],
) -> Problem:
    problem_of = _problem_finder(kind.value_type)

    def find(value: object) -> str | None:
        if not isinstance(value, list):
            return _misfit(kind, value)
        return next(
            (p for item in value if item is not None and (p := problem_of(item))),
            None,
        )

    return find


def _struct_problem_finder(kind: pa.StructType) -> Problem:
    problems = {field.name: _problem_finder(field.type) for field in kind}

    def find(value: object) -> str | None:
        if not isinstance(value, dict):
            return _misfit(kind, value)
        for key, item in value.items():
            if key not in problems:
                return f"{kind} has no key {key!r}"
            if item is not None and (problem := problems[key](item)):
                return f"key {key!r}: {problem}"
        return None

    return find


def _misfit(kind: pa.DataType, value: object) -> str:
    return f"{type(value).__name__} {repr(value)[:_SHOWN_CHARS]} does not fit the type {kind}"
