"""job.json: what the job is, and how its input is cut into units. Written once, never changed.

Files that come to the input later are in `additions`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pydantic import TypeAdapter

from batchgen.dataset.storage import Storage, redact
from batchgen.errors import JobChangedError, UnsupportedError
from batchgen.job.fingerprint import fingerprint_difference
from batchgen.ledger.files import damaged, parse_json
from batchgen.records import InputFile, Unit

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPlan:
    """How the input is cut into units, and the schema of the output.

    The position of a unit is its `unit_id`, and those of one file follow each other without a gap,
    in rows and in bytes. A unit has at least one row. Files and units are in input order, but for
    files that were added later: `file_order` has the positions of all files in input order then.
    """

    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    schema_base64: str  # of the output, from encode_schema()
    file_order: tuple[int, ...] | None = None  # None where the files are in input order

    @property
    def input_order(self) -> Sequence[int]:
        """The positions of the files, in input order."""
        return range(len(self.files)) if self.file_order is None else self.file_order

    @property
    def units_in_order(self) -> tuple[Unit, ...]:
        """The units in input order."""
        rank = {index: position for position, index in enumerate(self.input_order)}
        return tuple(sorted(self.units, key=lambda unit: (rank[unit.file_index], unit.unit_id)))

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """An addition that has been read."""

    id: str  # the checksum of its file
    first_unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJob:
    """What job.json says, and the additions to it.

    `job_id` is the checksum of job.json. Commits and partials carry it, or that of an addition, so
    that those of a runner of some other job, which once had the same folder, are never taken for
    this job's.
    """

    job_id: str
    fingerprint: Mapping[str, object]
    plan: LedgerPlan
    additions: tuple[Addition, ...] = ()

    @property
    def last_id(self) -> str:
        """Stands for the job with all its additions."""
        return self.additions[-1].id if self.additions else self.job_id

    @property
    def ids(self) -> frozenset[str]:
        """Of job.json and of every addition."""
        return frozenset([self.job_id, *(addition.id for addition in self.additions)])

    def id_of_unit(self, unit_id: int) -> str:
        """The checksum of the file that planned the unit."""
        count = bisect_right(self.additions, unit_id, key=lambda addition: addition.first_unit)
        return self.additions[count - 1].id if count else self.job_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of input with its n units as n + 1 cuts: far smaller than an object for each unit."""

    uri: str
    size_bytes: int
    etag: str
    row_cuts: tuple[int, ...]  # empty for a file without units
    byte_cuts: tuple[int, ...] | None  # as many as row_cuts, where units are addressed by bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _JobFile:
    format: Literal["batchgen ledger"]
    version: int
    fingerprint: dict[str, Any]
    files: tuple[StoredFile, ...]
    schema_base64: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _JobFileHead:
    """What every version of job.json begins with."""

    format: Literal["batchgen ledger"]
    version: int


_JOB_FILE = TypeAdapter(_JobFile)
_JOB_FILE_HEAD = TypeAdapter(_JobFileHead)


def encode_schema(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode("ascii")


def decode_schema(schema_base64: str) -> pa.Schema:
    """The schema that encode_schema() wrote; raises ValueError for anything else."""
    try:
        data = base64.b64decode(schema_base64, validate=True)
        schema = pa.ipc.read_schema(pa.py_buffer(data))
        ",".join(schema.names)  # names that are not UTF-8 fail here and not later
        return schema
    except (binascii.Error, pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"not an Arrow schema: {error}") from error


def encode_job(fingerprint: Mapping[str, object], plan: LedgerPlan) -> bytes:
    """The bytes of job.json: the same job and the same plan give the same bytes."""
    files = to_cuts(plan)
    job_file = _JobFile(
        format="batchgen ledger",
        version=FORMAT_VERSION,
        fingerprint=dict(fingerprint),
        files=files,
        schema_base64=plan.schema_base64,
    )
    document = _JOB_FILE.dump_python(job_file)
    return json.dumps(document, sort_keys=True, allow_nan=False).encode()


def decode_job(data: bytes, where: str) -> StoredJob:
    """What encode_job() wrote. `where` names the file in errors.

    Raises BatchgenError if the file is damaged, UnsupportedError if it is of another version.
    """
    head = parse_json(_JOB_FILE_HEAD, data, where)
    if head.version != FORMAT_VERSION:
        raise UnsupportedError(
            f"{where} is of ledger format {head.version}, and this batchgen reads format "
            f"{FORMAT_VERSION}. Go on with the batchgen that began this job, "
            "or start the job anew with another output.uri."
        )
    job_file = parse_json(_JOB_FILE, data, where)
    for file in job_file.files:
        check_cuts(file, where)
    try:
        decode_schema(job_file.schema_base64)
    except ValueError as error:
        raise damaged(where, f"schema_base64: {error}") from None
    plan = from_cuts(job_file.files, job_file.schema_base64)
    return StoredJob(
        job_id=hashlib.sha256(data).hexdigest(), fingerprint=job_file.fingerprint, plan=plan
    )


def from_cuts(files: Sequence[StoredFile], schema_base64: str) -> LedgerPlan:
    """What to_cuts() was given."""
    return LedgerPlan(
        files=tuple(
            InputFile(uri=file.uri, size_bytes=file.size_bytes, etag=file.etag) for file in files
        ),
        units=_to_units(files),
        schema_base64=schema_base64,
    )


def to_cuts(plan: LedgerPlan) -> tuple[StoredFile, ...]:
    """The files of a plan with the cuts between their units."""
    units_by_file: list[list[Unit]] = [[] for _ in plan.files]
    for unit in plan.units:
        units_by_file[unit.file_index].append(unit)
    files = []
    for file, units in zip(plan.files, units_by_file, strict=True):
        row_cuts = [unit.row_start for unit in units]
        row_cuts += [unit.row_start + unit.num_rows for unit in units[-1:]]
        byte_cuts = [unit.byte_start for unit in units] + [unit.byte_end for unit in units[-1:]]
        bounds = tuple(cut for cut in byte_cuts if cut is not None)
        files.append(
            StoredFile(
                uri=file.uri,
                size_bytes=file.size_bytes,
                etag=file.etag,
                row_cuts=tuple(row_cuts),
                byte_cuts=bounds or None,
            )
        )
    assert _to_units(files) == plan.units, "units of a file must follow each other without a gap"
    assert all(unit.num_rows > 0 for unit in plan.units), "a unit has at least one row"
    return tuple(files)


def _to_units(files: Sequence[StoredFile]) -> tuple[Unit, ...]:
    units: list[Unit] = []
    for file_index, file in enumerate(files):
        for i, row_start in enumerate(file.row_cuts[:-1]):
            units.append(
                Unit(
                    unit_id=len(units),
                    file_index=file_index,
                    row_start=row_start,
                    num_rows=file.row_cuts[i + 1] - row_start,
                    byte_start=None if file.byte_cuts is None else file.byte_cuts[i],
                    byte_end=None if file.byte_cuts is None else file.byte_cuts[i + 1],
                )
            )
    return tuple(units)


def check_cuts(file: StoredFile, where: str) -> None:
    """Raises the error of a damaged file if the cuts are not ranges of at least one row each."""
    for cuts in (file.row_cuts, file.byte_cuts or ()):
        rising = all(cuts[i] < cuts[i + 1] for i in range(len(cuts) - 1))
        if len(cuts) == 1 or not rising or (cuts and cuts[0] < 0):
            raise damaged(where, f"the units of {file.uri} are not ranges")
    if file.byte_cuts is not None and len(file.byte_cuts) != len(file.row_cuts):
        raise damaged(where, f"the units of {file.uri} have other bytes than rows")


def check_fingerprint(job: StoredJob, fingerprint: Mapping[str, object], storage: Storage) -> None:
    """Raises JobChangedError if the ledger is of another job."""
    new = json.loads(json.dumps(fingerprint))  # as job.json would hold it: tuples are lists
    if new == job.fingerprint:
        return
    differences = "\n".join(f"  {line}" for line in fingerprint_difference(job.fingerprint, new))
    raise JobChangedError(
        f"the job or its input changed since the ledger in {redact(storage.uri)} began:\n"
        f"{differences}\n"
        "Undo the change to go on, or choose another output.uri for the changed job."
    )
