"""Files that were added to the input of a job after it began: `input.incremental`.

    added/000001.json, added/000002.json, ...     each created exclusively, never changed

job.json stays as it is, and so does every commit. An addition names the checksum of the file
before it, so that the additions of a ledger are a chain: a unit's commit carries the checksum of
the file that planned the unit, and by that of all that came before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import TypeAdapter

from batchgen.dataset.storage import Storage
from batchgen.ledger.files import (
    JOB_PATH,
    addition_path,
    damaged,
    full_name,
    list_additions,
    parse_json,
    read_many,
)
from batchgen.ledger.plan import (
    Addition,
    LedgerPlan,
    StoredFile,
    StoredJob,
    check_cuts,
    decode_job,
    from_cuts,
    to_cuts,
)
from batchgen.records import InputFile


@dataclass(frozen=True, slots=True, kw_only=True)
class _AdditionFile:
    format: Literal["batchgen addition"]
    previous: str  # sha256 of the addition before, or of job.json
    files: tuple[StoredFile, ...]
    order: tuple[int, ...]  # of all files up to these: their positions in input order


_ADDITION = TypeAdapter(_AdditionFile)


def read_job(storage: Storage) -> StoredJob | None:
    """What job.json and the additions of this ledger say; None if there is no ledger."""
    try:
        data = storage.read(JOB_PATH)
    except FileNotFoundError:
        return None
    job = decode_job(data, full_name(storage, JOB_PATH))
    listed = dict(read_many(storage, list_additions(storage)))
    while True:
        path = addition_path(len(job.additions))
        try:  # a store's listing may lag behind its files
            data = listed.pop(path) if path in listed else storage.read(path)
        except FileNotFoundError:
            break
        job = _decode_addition(job, data, full_name(storage, path))
    if listed:
        raise damaged(full_name(storage, path), f"it is missing, but {min(listed)} is there")
    return job


def add_files(
    storage: Storage, job: StoredJob, plan: LedgerPlan, files: Sequence[InputFile]
) -> bool:
    """Adds the files and units of `plan` to the job; False if another process added some before.

    `files` are all files of the input, the old and the new ones, in input order.
    """
    known = [*job.plan.files, *plan.files]
    index_of = {file.uri: index for index, file in enumerate(known)}
    assert len(index_of) == len(known) == len(files), "old files and new ones are all files"
    addition = _AdditionFile(
        format="batchgen addition",
        previous=job.last_id,
        files=to_cuts(plan),
        order=tuple(index_of[file.uri] for file in files),
    )
    document = _ADDITION.dump_python(addition)
    data = json.dumps(document, sort_keys=True, allow_nan=False).encode()
    try:
        storage.create(addition_path(len(job.additions)), data)
    except FileExistsError:
        return False
    return True


def has_grown(storage: Storage, job: StoredJob) -> bool:
    """Whether files have been added since the job was read."""
    return storage.exists(addition_path(len(job.additions)))


def _decode_addition(job: StoredJob, data: bytes, where: str) -> StoredJob:
    """The job with this addition, the next one of its chain."""
    addition = parse_json(_ADDITION, data, where)
    if addition.previous != job.last_id:
        raise damaged(where, "it follows another job.json or addition than the ones that are here")
    for added in addition.files:
        check_cuts(added, where)
    num_files = len(job.plan.files) + len(addition.files)
    uris = {file.uri for file in job.plan.files} | {added.uri for added in addition.files}
    if sorted(addition.order) != list(range(num_files)) or len(uris) != num_files:
        raise damaged(where, "its files are not in an order, or not new")
    plan = from_cuts(addition.files, job.plan.schema_base64)
    num_units = len(job.plan.units)
    units = [
        replace(
            unit,
            unit_id=num_units + unit.unit_id,
            file_index=len(job.plan.files) + unit.file_index,
        )
        for unit in plan.units
    ]
    return StoredJob(
        job_id=job.job_id,
        fingerprint=_with_files(job.fingerprint, plan.files),
        plan=LedgerPlan(
            files=(*job.plan.files, *plan.files),
            units=(*job.plan.units, *units),
            schema_base64=job.plan.schema_base64,
            file_order=addition.order,
        ),
        additions=(
            *job.additions,
            Addition(id=hashlib.sha256(data).hexdigest(), first_unit=num_units),
        ),
    )


def _with_files(
    fingerprint: Mapping[str, object], files: Sequence[InputFile]
) -> Mapping[str, object]:
    """The fingerprint that a job would have which had begun with these files as well."""
    section = fingerprint.get("input")
    old = section.get("files") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(old, Mapping):
        return fingerprint
    new = {file.uri: {"size_bytes": file.size_bytes, "etag": file.etag} for file in files}
    return {**fingerprint, "input": {**section, "files": {**old, **new}}}
