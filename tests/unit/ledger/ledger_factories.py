"""Plans, rows and runs of the size that tests need."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings

from batchgen.dataset.storage import Storage
from batchgen.ledger import Ledger, LedgerPlan, encode_schema
from batchgen.ledger.ledger import ResumeMode
from batchgen.records import (
    InputFile,
    OutputRow,
    Part,
    RowFailure,
    RowKey,
    RowResult,
    RowSkip,
    Unit,
)

# The same examples on every machine, and no failure because the machine is busy.
steady = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

SCHEMA = pa.schema([("id", pa.int64()), ("response", pa.string())])
FINGERPRINT: dict[str, object] = {
    "sampling": {"temperature": 0.0, "stop": []},
    "input": [{"uri": "in.parquet", "size_bytes": 10}],
}


def make_plan(*unit_rows: int, schema: pa.Schema = SCHEMA, uri: str = "in.parquet") -> LedgerPlan:
    """A plan of one file with units of these many rows; of two units of 3 and 2 by default."""
    units = []
    row_start = 0
    for unit_id, num_rows in enumerate(unit_rows or (3, 2)):
        units.append(Unit(unit_id=unit_id, file_index=0, row_start=row_start, num_rows=num_rows))
        row_start += num_rows
    files = (InputFile(uri=uri, size_bytes=10, etag="1"),)
    return LedgerPlan(files=files, units=tuple(units), schema_base64=encode_schema(schema))


def make_result(unit_id: int, index: int) -> RowResult:
    """A row's end, always the same: unit 1 begins with a failed and a skipped one."""
    key = RowKey(unit_id=unit_id, index=index)
    address = f"in.parquet:{unit_id}.{index}"
    if (unit_id, index) == (1, 0):
        return RowFailure(key=key, address=address, kind="empty_prompt", message="it is empty")
    if (unit_id, index) == (1, 1):
        return RowSkip(key=key, address=address, reason="bad_record")
    return OutputRow(
        key=key,
        address=address,
        rows=({"id": 100 * unit_id + index, "response": f"réponse {unit_id}.{index}"},),
        num_prompt_tokens=10,
        num_output_tokens=2,
    )


def make_results(unit: Unit, start: int = 0, stop: int | None = None) -> list[RowResult]:
    return [make_result(unit.unit_id, index) for index in range(unit.num_rows)[start:stop]]


def make_part(results: Sequence[RowResult]) -> list[Part]:
    """The part of these rows, named by its content; none if no row succeeded."""
    outputs = [result for result in results if isinstance(result, OutputRow)]
    sha256 = hashlib.sha256(repr(outputs).encode()).hexdigest()
    path = f"data/part-{sha256[:16]}.arrow"
    return [Part(path=path, num_rows=len(outputs), size_bytes=9, sha256=sha256)] if outputs else []


def open_ledger(
    storage: Any,
    plan: LedgerPlan | None = None,
    *,
    resume: ResumeMode = "if_possible",
    fingerprint: dict[str, object] = FINGERPRINT,
) -> Ledger:
    return Ledger.open(
        storage, resume=resume, fingerprint=fingerprint, make_plan=lambda: plan or make_plan()
    )


def commit_all(ledger: Ledger, unit_id: int) -> bool:
    unit = ledger.plan.units[unit_id]
    results = make_results(unit)
    return ledger.commit(unit, make_part(results), results, wall_s=1.5)


def with_keys_as_objects(data: bytes) -> bytes:
    """A partial, or a file of unfinished rows, as versions wrote it whose row keys were objects."""
    magic, body = data[:8], data[8 + hashlib.sha256().digest_size :]
    head_end = 8 + int.from_bytes(body[:8], "big")
    key = rb'"key":\[(\d+),(\d+)\]'
    head = re.sub(key, rb'"key":{"unit_id":\1,"index":\2}', body[8:head_end])
    assert head != body[8:head_end]
    body = len(head).to_bytes(8, "big") + head + body[head_end:]
    return magic + hashlib.sha256(body).digest() + body


def local_storage(path: object) -> Storage:
    return Storage.open(str(path))
