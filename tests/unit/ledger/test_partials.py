import datetime as dt
import decimal
import logging
import math

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_factories import (
    FINGERPRINT,
    SCHEMA,
    commit_all,
    local_storage,
    make_plan,
    make_result,
    make_results,
    open_ledger,
    steady,
    with_keys_as_objects,
)

from batchgen.errors import BatchgenError
from batchgen.ledger.partials import decode_partial, encode_partial
from batchgen.ledger.plan import StoredJob, decode_job, encode_job
from batchgen.records import OutputRow, RowFailure, RowKey

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
times = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 1, 1))
# What each type's values are when a reader has read them with pyarrow.
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy]] = {
    "bool": (pa.bool_(), st.booleans()),
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "uint64": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "double": (pa.float64(), st.floats()),
    "float": (pa.float32(), st.floats(width=32)),
    "string": (pa.string(), text),
    "large_string": (pa.large_string(), text),
    "binary": (pa.binary(), st.binary(max_size=8)),
    "date": (pa.date32(), st.dates()),
    "naive": (pa.timestamp("us"), times),
    "aware": (pa.timestamp("us", "UTC"), times.map(lambda t: t.replace(tzinfo=dt.UTC))),
    "nanoseconds": (pa.timestamp("ns"), st.integers(-(2**61), 2**61).map(pd.Timestamp)),
    "duration": (pa.duration("us"), st.timedeltas(-dt.timedelta(9**5), dt.timedelta(9**5))),
    "decimal": (pa.decimal128(38, 2), st.decimals(-(10**30), 10**30, places=2)),
    "category": (pa.dictionary(pa.int32(), pa.string()), text),
    "null": (pa.null(), st.none()),
    "list": (pa.list_(pa.int64()), st.lists(st.none() | st.integers(-9, 9), max_size=3)),
    "map": (pa.map_(pa.string(), pa.int64()), st.lists(st.tuples(text, st.integers(0, 9)))),
    "nested": (
        pa.struct([("a", pa.list_(pa.struct([("b", pa.binary()), ("c", pa.float64())])))]),
        st.fixed_dictionaries(
            {
                "a": st.none()
                | st.lists(
                    st.fixed_dictionaries(
                        {"b": st.none() | st.binary(max_size=4), "c": st.none() | st.floats()}
                    ),
                    max_size=3,
                )
            }
        ),
    ),
}


def make_job(schema: pa.Schema = SCHEMA) -> StoredJob:
    return decode_job(encode_job(FINGERPRINT, make_plan(schema=schema)), "job.json")


def are_same(a: object, b: object) -> bool:
    """Equal and of one type, where NaN equals NaN and 0.0 differs from -0.0."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(are_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(are_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or a.hex() == b.hex()
    return type(a) is type(b) and a == b


@steady
@given(st.data())
def test_values_come_back_exactly(data):
    names = data.draw(st.lists(st.sampled_from(sorted(COLUMNS)), unique=True, min_size=1))
    schema = pa.schema([(name, COLUMNS[name][0]) for name in names], metadata={"k": "v"})
    row_values = st.fixed_dictionaries({name: st.none() | COLUMNS[name][1] for name in names})
    rows = [
        OutputRow(
            key=RowKey(unit_id=0, index=i),
            address=f"in.parquet:{i}",
            rows=(values,),
            num_prompt_tokens=i,
            num_output_tokens=2**40,
        )
        for i, values in enumerate(data.draw(st.lists(row_values, max_size=4)))
    ]
    job = make_job(schema)
    encoded = encode_partial(rows, job_id=job.job_id, schema=schema)
    decoded = decode_partial(encoded, job, "where")
    assert len(decoded) == len(rows)
    for row, back in zip(rows, decoded, strict=True):
        assert isinstance(back, OutputRow)
        assert are_same(list(row.rows), list(back.rows))
        assert (back.key, back.address) == (row.key, row.address)
        assert (back.num_prompt_tokens, back.num_output_tokens) == (row.num_prompt_tokens, 2**40)
    assert encode_partial(decoded, job_id=job.job_id, schema=schema) == encoded


def test_rows_of_earlier_versions_come_back():
    job = make_job()
    rows = [make_result(unit.unit_id, i) for unit in job.plan.units for i in range(unit.num_rows)]
    data = encode_partial(rows, job_id=job.job_id, schema=SCHEMA)
    decoded = decode_partial(with_keys_as_objects(data), job, "where")
    assert decoded == decode_partial(data, job, "where")
    assert {type(row.key) for row in decoded} == {RowKey}
    assert len(decoded) == len(rows)


def test_extremes_come_back_exactly():
    schema = pa.schema([("d", pa.decimal128(38, 10)), ("t", pa.timestamp("ns", "Asia/Tokyo"))])
    values = {
        "d": decimal.Decimal("1234567890123456789012345678.0123456789"),
        "t": pd.Timestamp("2026-01-01 00:00:00.123456789", tz="Asia/Tokyo"),
    }
    row = OutputRow(
        key=RowKey(unit_id=0, index=0),
        address="a:0",
        rows=(values,),
        num_prompt_tokens=1,
        num_output_tokens=1,
    )
    job = make_job(schema)
    (back,) = decode_partial(encode_partial([row], job_id=job.job_id, schema=schema), job, "where")
    assert isinstance(back, OutputRow)
    assert back.rows == (values,)


def test_rows_that_became_several_come_back_with_their_own():
    rows = [
        OutputRow(
            key=RowKey(unit_id=0, index=i),
            address=f"in.parquet:{i}",
            rows=tuple({"id": i, "response": f"{i}.{sample}"} for sample in range(count)),
            num_prompt_tokens=1,
            num_output_tokens=count,
        )
        for i, count in enumerate((2, 1, 3))
    ]
    job = make_job()
    encoded = encode_partial(rows, job_id=job.job_id, schema=SCHEMA)
    assert decode_partial(encoded, job, "where") == rows


def test_failures_and_skips_come_back():
    job = make_job()
    results = [make_result(1, index) for index in range(4)]
    decoded = decode_partial(
        encode_partial(results, job_id=job.job_id, schema=SCHEMA), job, "where"
    )
    assert sorted(decoded, key=lambda result: result.key.index) == results


def test_broken_text_in_a_failure_is_spelled_out():
    failure = RowFailure(
        key=RowKey(unit_id=0, index=0),
        address="a:0",
        kind="template_error",
        message="has \udcff",
        excerpt="\ud83d",
    )
    job = make_job()
    (back,) = decode_partial(
        encode_partial([failure], job_id=job.job_id, schema=SCHEMA), job, "where"
    )
    assert isinstance(back, RowFailure)
    assert (back.message, back.excerpt) == (r"has \udcff", r"\ud83d")


def test_every_truncation_and_every_changed_byte_is_noticed():
    job = make_job()
    data = encode_partial([make_result(1, i) for i in range(4)], job_id=job.job_id, schema=SCHEMA)
    damaged = [data[:length] for length in range(len(data))] + [data + b"\0"]
    for i in range(len(data)):
        damaged.append(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
    for bad in damaged:
        with pytest.raises(BatchgenError, match=r"^where is damaged"):
            decode_partial(bad, job, "where")


@steady
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_no_partial(data, has_magic):
    with pytest.raises(BatchgenError, match=r"^where is damaged"):
        decode_partial(b"BGPART2\n" * has_magic + data, make_job(), "where")


def test_partials_of_several_units_are_merged_without_doubles(tmp_path):
    first = open_ledger(local_storage(tmp_path), make_plan(3, 4, 2))
    assert first.load_partials() == {}
    units = first.plan.units
    first.flush_partial([*make_results(units[1], 2, 3), *make_results(units[0], 1)])
    first.flush_partial(make_results(units[1], 0, 2))
    first.flush_partial([])
    second = open_ledger(local_storage(tmp_path))
    second.flush_partial([*make_results(units[1], 1, 3), *make_results(units[2])])
    commit_all(first, 2)
    loaded = open_ledger(local_storage(tmp_path)).load_partials()
    assert loaded == {0: make_results(units[0], 1), 1: make_results(units[1], 0, 3)}
    assert len(local_storage(tmp_path).list("partials")) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x"])
def test_damaged_partial_only_costs_its_rows(tmp_path, caplog, damage):
    ledger = open_ledger(local_storage(tmp_path))
    unit = ledger.plan.units[0]
    ledger.flush_partial(make_results(unit, 0, 1))
    ledger.flush_partial(make_results(unit, 1, 2))
    path = sorted((tmp_path / "partials").iterdir())[0]
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert open_ledger(local_storage(tmp_path)).load_partials() == {0: make_results(unit, 1, 2)}
    assert path.name in caplog.text


def test_partial_of_another_job_is_left_out(tmp_path, caplog):
    zombie = open_ledger(local_storage(tmp_path), make_plan(3, 2, uri="old.parquet"))
    (tmp_path / "job.json").unlink()
    ledger = open_ledger(local_storage(tmp_path))
    zombie.flush_partial(make_results(zombie.plan.units[0]))
    assert ledger.load_partials() == {}
    assert "is of another job" in caplog.text
