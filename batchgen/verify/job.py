"""The verification of a job: its commits, their files, the dataset, and the fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pyarrow as pa

from batchgen import __version__
from batchgen.dataset.inputs import resolve_inputs
from batchgen.dataset.storage import Storage, redact
from batchgen.errors import BatchgenError, JobChangedError, StorageError, UsageError, VerifyError
from batchgen.job.fingerprint import fingerprint_difference, job_fingerprint
from batchgen.job.spec import JobSpec
from batchgen.ledger import LedgerPlan, decode_schema, read_job
from batchgen.ledger.audit import audit_commits
from batchgen.ledger.commits import sum_counts
from batchgen.ledger.plan import StoredJob
from batchgen.models.registry import resolve_model
from batchgen.records import InputFile
from batchgen.verify.output import OutputCheck
from batchgen.verify.receipt import FileCounts, FingerprintCheck, Receipt


def verify_job(spec: JobSpec, ledger_storage: Storage) -> Receipt:
    """Read the output of a job again and compare it with its ledger. Writes nothing.

    Of an unfinished job, what is committed is verified; the dataset's own files, which are written
    last, are not looked at. Raises UsageError if there is no ledger, JobChangedError if the job
    writes another output than the ledger's, VerifyError if job.json is damaged. All else that is
    wrong is in the receipt.
    """
    job = _read_job(ledger_storage)
    schema = decode_schema(job.plan.schema_base64)
    _refuse_other_output(spec, job, schema, ledger_storage)
    audit = audit_commits(ledger_storage, job)
    check = OutputCheck(
        spec=spec,
        schema=schema,
        storage=Storage.open(spec.output.uri),
        ledger_storage=ledger_storage,
        files=job.plan.files,
    )
    for path, problem in audit.problems.items():
        check.add(path, problem)
    for unit in job.plan.units_in_order:
        if unit.unit_id in audit.commits:
            check.check_unit(unit, audit.commits[unit.unit_id])
    if audit.is_published:
        check.check_dataset()
    files = _counts_by_file(job.plan, check)
    return Receipt(
        version=__version__,
        time=datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        name=spec.name,
        job_id=job.job_id,
        output_uri=redact(spec.output.uri),
        ledger_uri=redact(ledger_storage.uri),
        state="done" if audit.is_published else "incomplete",
        is_right=not check.differences,
        num_units=len(job.plan.units),
        num_committed=len(audit.commits),
        rows=sum_counts([file.rows for file in files], total=job.plan.num_rows),
        files=files,
        parts=check.parts,
        differences=check.differences,
        leftovers=check.leftovers(),
        fingerprint=_check_fingerprint(spec, job, schema),
    )


def _counts_by_file(plan: LedgerPlan, check: OutputCheck) -> list[FileCounts]:
    num_rows: Counter[int] = Counter()
    for unit in plan.units:
        num_rows[unit.file_index] += unit.num_rows
    return [
        FileCounts(
            uri=redact(plan.files[index].uri),
            rows=sum_counts(check.counts_of_file(index), total=num_rows[index]),
        )
        for index in plan.input_order
    ]


def _read_job(ledger_storage: Storage) -> StoredJob:
    try:
        job = read_job(ledger_storage)
    except (UsageError, StorageError):
        raise
    except BatchgenError as error:
        raise VerifyError(str(error)) from error
    if job is None:
        raise UsageError(
            f"{redact(ledger_storage.uri)} holds no ledger, so there is nothing to verify; "
            "check output.uri and checkpoint.uri, or run the job first"
        )
    return job


def _refuse_other_output(
    spec: JobSpec, job: StoredJob, schema: pa.Schema, ledger_storage: Storage
) -> None:
    """Raises JobChangedError if the job's output keys do not say how to read this output."""
    now = job_fingerprint(spec, input_files=(), model={}, output_schema=schema.to_string())
    if lines := _difference(_how_to_read(job.fingerprint), _how_to_read(now)):
        told = "\n".join(f"  {line}" for line in lines)
        raise JobChangedError(
            f"the job's output changed since the ledger in {redact(ledger_storage.uri)} began, so "
            f"nothing was verified:\n{told}\nUndo the change to verify what was written."
        )


def _how_to_read(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """What of a fingerprint says how rows of input lie in the output."""
    sampling = fingerprint.get("sampling")
    num_samples = sampling.get("n") if isinstance(sampling, Mapping) else None
    return {"output": fingerprint.get("output"), "sampling": {"n": num_samples}}


def _check_fingerprint(spec: JobSpec, job: StoredJob, schema: pa.Schema) -> FingerprintCheck:
    """What `run` would refuse the job for. That the input or the model is gone is no hindrance."""
    differences: Sequence[str] = ()
    not_compared = None
    try:
        files: Sequence[InputFile] = resolve_inputs(spec.input.uri, spec.input.storage_options)
        if spec.input.incremental:  # what was added since then is for the next run
            known = {file.uri for file in job.plan.files}
            files = [file for file in files if file.uri in known]
        model = resolve_model(spec.model).identity
    except (UsageError, StorageError) as error:
        not_compared = redact(str(error))
    else:
        now = job_fingerprint(
            spec, input_files=files, model=model, output_schema=schema.to_string()
        )
        differences = _difference(job.fingerprint, now)
    stored = json.dumps(job.fingerprint, sort_keys=True).encode()
    return FingerprintCheck(
        sha256=hashlib.sha256(stored).hexdigest(),
        differences=differences,
        not_compared=not_compared,
    )


def _difference(stored: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    # As job.json would hold it: tuples are lists.
    lines = fingerprint_difference(stored, json.loads(json.dumps(now)))
    return [redact(line) for line in lines]
