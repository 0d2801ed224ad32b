import base64
import contextlib
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_factories import FINGERPRINT, SCHEMA, local_storage, make_plan, open_ledger, steady

from batchgen.errors import BatchgenError, UnsupportedError
from batchgen.ledger import LedgerPlan, decode_schema, encode_schema
from batchgen.ledger.plan import decode_job, encode_job
from batchgen.records import InputFile, Unit


def make_byte_plan() -> LedgerPlan:
    files = tuple(
        InputFile(uri=f"s3://b/é {i}.jsonl", size_bytes=1000, etag=f'"{i}"') for i in range(3)
    )
    units = (
        Unit(unit_id=0, file_index=0, row_start=0, num_rows=4, byte_start=0, byte_end=37),
        Unit(unit_id=1, file_index=0, row_start=4, num_rows=2, byte_start=37, byte_end=99),
        # The second file is empty, the third is of rows only.
        Unit(unit_id=2, file_index=2, row_start=0, num_rows=7),
    )
    return LedgerPlan(files=files, units=units, schema_base64=encode_schema(SCHEMA))


def test_job_file_holds_plan_and_fingerprint_exactly():
    plan = make_byte_plan()
    job = decode_job(encode_job(FINGERPRINT, plan), "job.json")
    assert job.plan == plan
    assert job.plan.num_rows == 13
    assert job.fingerprint == FINGERPRINT


def test_job_file_of_the_same_job_is_the_same_bytes():
    swapped = dict(reversed(list(FINGERPRINT.items())))
    assert encode_job(FINGERPRINT, make_byte_plan()) == encode_job(swapped, make_byte_plan())


@pytest.mark.parametrize(("row_start", "num_rows"), [(5, 4), (3, 4), (4, 0)])
def test_units_with_a_gap_or_without_rows_are_our_bug(row_start, num_rows):
    units = (
        Unit(unit_id=0, file_index=0, row_start=0, num_rows=4),
        Unit(unit_id=1, file_index=0, row_start=row_start, num_rows=num_rows),
    )
    plan = LedgerPlan(files=make_plan().files, units=units, schema_base64=encode_schema(SCHEMA))
    with pytest.raises(AssertionError):
        encode_job(FINGERPRINT, plan)


def test_schema_keeps_metadata_and_nested_types():
    schema = pa.schema(
        [pa.field("a", pa.list_(pa.struct([("b", pa.timestamp("ns", "UTC"))])), nullable=False)],
        metadata={"huggingface": "{}"},
    )
    assert decode_schema(encode_schema(schema)).equals(schema, check_metadata=True)


def test_job_file_of_a_newer_format_is_refused_by_its_number():
    document = json.dumps({"format": "batchgen ledger", "version": 2, "shards": 3}).encode()
    with pytest.raises(UnsupportedError, match=r"job\.json is of ledger format 2"):
        decode_job(document, "job.json")


def change(**changes: object) -> bytes:
    document = json.loads(encode_job(FINGERPRINT, make_byte_plan()))
    return json.dumps({**document, **changes}).encode()


def change_file(**changes: object) -> bytes:
    document = json.loads(encode_job(FINGERPRINT, make_byte_plan()))
    document["files"][0].update(changes)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        encode_job(FINGERPRINT, make_byte_plan())[:-20],
        change(format="something else"),
        change(version="1"),
        change(fingerprint=None),
        change(files=[{}]),
        change(schema_base64="%%%"),
        change(schema_base64=base64.b64encode(b"not a schema at all").decode()),
        change(schema_base64=encode_schema(SCHEMA)[: len(encode_schema(SCHEMA)) // 8 * 4]),
        change_file(row_cuts=[0, 4, 3]),
        change_file(row_cuts=[-1, 4, 6]),
        change_file(row_cuts=[0]),
        change_file(byte_cuts=[0, 37]),
    ],
)
def test_damaged_job_file_is_named(tmp_path, data):
    (tmp_path / "job.json").write_bytes(data)
    with pytest.raises(BatchgenError, match=r"job\.json is damaged"):
        open_ledger(local_storage(tmp_path))
    assert (tmp_path / "job.json").read_bytes() == data


@steady
@given(st.binary(max_size=300))
def test_random_bytes_are_no_job_file(data):
    with pytest.raises(BatchgenError, match=r"^job\.json is damaged"):
        decode_job(data, "job.json")


@steady
@given(st.data())
def test_job_file_with_changed_bytes_is_read_or_refused(data):
    encoded = bytearray(encode_job(FINGERPRINT, make_byte_plan()))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BatchgenError):
        decode_job(bytes(encoded), "job.json")
