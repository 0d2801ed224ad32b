"""Partials: finished rows of units that are not committed yet, so that a killed run loses little.

A file holds the rows of one flush, of any units:

    "BGPART2\\n" | sha256 of all that follows | length of the head | head | Arrow IPC stream

The head is JSON: the job, failures, skips, and the keys and counts of the output rows. A key is a
list of its two numbers; objects, as earlier versions wrote them, are read, too. The values of the
output rows are a record batch of the output schema, so that they come back as the types that went
in, which JSON could not promise.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import pyarrow as pa
from pydantic import TypeAdapter

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError, StorageError
from batchgen.ledger.files import (
    damaged,
    decoded,
    full_name,
    generation_of_partial,
    list_partials,
    parse_json,
    partial_path,
    read_many,
)
from batchgen.ledger.plan import StoredJob, decode_schema
from batchgen.records import OutputRow, RowFailure, RowKey, RowResult, RowSkip

_MAGIC = b"BGPART2\n"
_HASH_BYTES = hashlib.sha256().digest_size
_LENGTH_BYTES = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OutputHead:
    """An output row but for its values."""

    key: RowKey
    address: str
    num_rows: int  # of the record batch
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    job_id: str  # of the last addition that the run knew, or of job.json
    outputs: tuple[_OutputHead, ...]  # in the order of the record batch
    failures: tuple[RowFailure, ...]
    skips: tuple[RowSkip, ...]


_HEAD = TypeAdapter(_Head)


def encode_partial(results: Sequence[RowResult], *, job_id: str, schema: pa.Schema) -> bytes:
    """The bytes of one flush. The values of the rows must fit the output schema."""
    outputs = [result for result in results if isinstance(result, OutputRow)]
    head = _HEAD.dump_json(
        _Head(
            job_id=job_id,
            outputs=tuple(
                _OutputHead(
                    key=row.key,
                    address=row.address,
                    num_rows=len(row.rows),
                    num_prompt_tokens=row.num_prompt_tokens,
                    num_output_tokens=row.num_output_tokens,
                )
                for row in outputs
            ),
            failures=tuple(_printable(r) for r in results if isinstance(r, RowFailure)),
            skips=tuple(result for result in results if isinstance(result, RowSkip)),
        )
    )
    rows = [values for output in outputs for values in output.rows]
    columns = [
        pa.array([values[field.name] for values in rows], type=field.type) for field in schema
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    body = len(head).to_bytes(_LENGTH_BYTES, "big") + head + sink.getvalue().to_pybytes()
    return _MAGIC + hashlib.sha256(body).digest() + body


def decode_partial(data: bytes, job: StoredJob, where: str) -> list[RowResult]:
    """The rows of one flush. `where` names the file in errors.

    Raises BatchgenError for a file that is damaged or truncated, and for one of another job.
    """
    body_start = len(_MAGIC) + _HASH_BYTES
    body = data[body_start:]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != data[8:body_start]:
        raise damaged(where, "its checksum does not match")
    head_end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    head = parse_json(_HEAD, body[_LENGTH_BYTES:head_end], where)
    if head.job_id not in job.ids:
        raise BatchgenError(f"{where} is of another job.")
    try:
        with pa.ipc.open_stream(body[head_end:]) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise damaged(where, str(error)) from None
    schema = decode_schema(job.plan.schema_base64)
    num_rows = sum(output.num_rows for output in head.outputs)
    if not table.schema.equals(schema) or table.num_rows != num_rows:
        raise damaged(where, "its output rows are not those that its head announces")
    rows = iter(table.to_pylist())
    outputs = [
        OutputRow(
            key=row.key,
            address=row.address,
            rows=tuple(islice(rows, row.num_rows)),
            num_prompt_tokens=row.num_prompt_tokens,
            num_output_tokens=row.num_output_tokens,
        )
        for row in head.outputs
    ]
    return [*outputs, *head.failures, *head.skips]


class Partials:
    """The partials of a ledger, as far as this process has read or written them."""

    def __init__(self, storage: Storage, job: StoredJob, run_id: str) -> None:
        self._storage = storage
        self._job = job
        self._schema = decode_schema(job.plan.schema_base64)
        self._run_id = run_id
        self._num_written = 0
        self._units: dict[str, frozenset[int]] = {}  # whose rows it holds, by path

    def load(self) -> Iterator[tuple[int, list[RowResult]]]:
        """The rows of each partial, and the generation of the commits that they are for."""
        for path, results in read_partials(self._storage, self._job):
            self._units[path] = _units_of(results)
            yield generation_of_partial(path), results

    def write(self, results: Sequence[RowResult], generation: int) -> None:
        """One more partial, with these rows, for commits of this generation."""
        self._num_written += 1
        path = partial_path(self._run_id, self._num_written, generation)
        data = encode_partial(results, job_id=self._job.last_id, schema=self._schema)
        # It exists already where the store's client has repeated a write that had succeeded:
        # nobody else writes under this run's name.
        with contextlib.suppress(FileExistsError):
            self._storage.create(path, data)
        self._units[path] = _units_of(results)

    def delete_those_of(self, unit_ids: Set[int]) -> None:
        """Delete the partials that hold rows of these units only."""
        stale = [path for path, units in self._units.items() if units <= unit_ids]
        self._storage.delete(stale)
        for path in stale:
            del self._units[path]


def read_partials(storage: Storage, job: StoredJob) -> Iterator[tuple[str, list[RowResult]]]:
    """Each partial with its rows. One that cannot be understood is left out with a warning:
    its rows are generated again, which costs work and nothing else."""
    for path, data in read_many(storage, list_partials(storage)):
        try:
            where = full_name(storage, path)
            yield path, decoded(storage, path, data, partial(decode_partial, job=job, where=where))
        except StorageError:
            raise
        except (BatchgenError, FileNotFoundError) as error:
            _log.warning("its finished rows are generated again: %s", error)


def merge_partials(
    partials: Sequence[Sequence[RowResult]], committed: Mapping[int, object]
) -> dict[int, list[RowResult]]:
    """The rows of uncommitted units by unit, each row once, in row order."""
    merged: dict[int, dict[int, RowResult]] = {}
    for results in partials:
        for result in results:
            if result.key.unit_id not in committed:
                merged.setdefault(result.key.unit_id, {}).setdefault(result.key.index, result)
    return {
        unit_id: [rows[index] for index in sorted(rows)] for unit_id, rows in sorted(merged.items())
    }


def _units_of(results: Sequence[RowResult]) -> frozenset[int]:
    return frozenset(result.key.unit_id for result in results)


def _printable(failure: RowFailure) -> RowFailure:
    """The failure without broken UTF-16 in what it quotes: JSON could not hold that."""
    return replace(
        failure,
        message=failure.message.encode("utf-8", "backslashreplace").decode(),
        excerpt=failure.excerpt.encode("utf-8", "backslashreplace").decode(),
    )
