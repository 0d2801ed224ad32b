"""A retry: which failed rows run again, and what the other rows of their units have come to.

A retry writes the units of these rows anew: what had succeeded is read from the old parts and put
together with the new rows, in order, into new parts, which a commit of the next generation names.
Until that commit is created, exclusively, the old one holds; after it, the old one is nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchgen.dataset.parts import read_part
from batchgen.dataset.reader import read_unit
from batchgen.dataset.storage import redact
from batchgen.errors import BatchgenError, UsageError
from batchgen.job.spec import JobSpec
from batchgen.ledger import Commit, read_job
from batchgen.records import (
    FailureKind,
    OutputRow,
    Part,
    RowFailure,
    RowKey,
    RowResult,
    RowSkip,
    Unit,
)
from batchgen.startup import OpenJob, open_ledger_storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """What `batchgen retry` was asked for. All its processes have the same id."""

    retry_id: str
    only: FailureKind | None  # None is every kind

    def takes(self, failure: RowFailure) -> bool:
        return self.only is None or failure.kind == self.only


def refuse_unbegun(spec: JobSpec) -> None:
    """Raises UsageError if the job has no ledger: opening it would begin one."""
    storage = open_ledger_storage(spec)
    if read_job(storage) is None:
        raise UsageError(f"{redact(storage.uri)} holds no ledger; run the job first")


def reopen_failed(job: OpenJob, retry: Retry) -> dict[int, Commit]:
    """Open the units that have rows to try again, but for those that this retry has committed.

    Their commits, which hold until then. Raises UsageError if the job has not been run to its end.
    """
    ledger = job.ledger
    if not ledger.is_complete:
        raise UsageError(
            f"{redact(job.spec.output.uri)} is not finished: "
            f"{len(ledger.plan.units) - len(ledger.committed)} units are left; run the job to its "
            "end with `batchgen run`, then retry what has failed"
        )
    num_retried = {}
    for unit_id, commit in ledger.committed.items():
        if commit.counts.failed and commit.retry_id != retry.retry_id:
            num_retried[unit_id] = sum(map(retry.takes, ledger.failures(unit_id)))
    num_retried = {unit_id: count for unit_id, count in num_retried.items() if count}
    return ledger.reopen(num_retried, retry_id=retry.retry_id)


class RetriedUnits(Mapping[int, Sequence[RowResult]]):
    """The rows of reopened units that have a result, by unit: read when they are asked for."""

    def __init__(
        self,
        job: OpenJob,
        retry: Retry,
        commits: Mapping[int, Commit],
        flushed: Mapping[int, Sequence[RowResult]],
    ) -> None:
        """`commits` are the units' old ones, `flushed` what a killed process has left."""
        self._flushed = flushed
        self._job = job
        self._retry = retry
        self._commits = commits
        self._files = job.ledger.plan.files
        self._units = {unit.unit_id: unit for unit in job.ledger.plan.units}

    def __iter__(self) -> Iterator[int]:
        return iter(self._commits)

    def __len__(self) -> int:
        return len(self._commits)

    def __getitem__(self, unit_id: int) -> list[RowResult]:
        """What is there of the unit, in row order. Raises BatchgenError if its part is damaged."""
        unit, commit = self._units[unit_id], self._commits[unit_id]
        failures = self._job.ledger.failures(unit_id)
        skips = self._skips(unit) if commit.counts.skipped else []
        others = {row.key.index for row in failures} | {row.key.index for row in skips}
        outputs = self._outputs(unit, commit, others)
        kept: list[RowResult] = [*outputs, *skips]
        kept += [failure for failure in failures if not self._retry.takes(failure)]
        rows = {row.key.index: row for row in (*kept, *self._flushed.get(unit_id, ()))}
        return [rows[index] for index in sorted(rows)]

    def _skips(self, unit: Unit) -> list[RowSkip]:
        """A commit has only the number of rows that were skipped: the input says which."""
        rows = read_unit(self._job.spec.input, self._files, unit)
        return [row for row in rows if isinstance(row, RowSkip)]

    def _outputs(self, unit: Unit, commit: Commit, others: set[int]) -> list[OutputRow]:
        """The rows that succeeded; `others` are the indices of the unit's other rows."""
        values = [row for part in commit.parts for row in self._read_part(part)]
        indices = [index for index in range(unit.num_rows) if index not in others]
        step = self._job.spec.output_rows_per_row
        if len(values) != step * len(indices):
            raise BatchgenError(
                f"unit {unit.unit_id} has {len(values)} rows of output for {len(indices)} rows of "
                "input; nothing was changed; `batchgen verify` says more"
            )
        uri = redact(self._files[unit.file_index].uri)
        return [
            OutputRow(
                key=RowKey(unit_id=unit.unit_id, index=index),
                address=f"{uri}:{unit.row_start + index}",
                rows=tuple(values[step * i : step * (i + 1)]),
                num_prompt_tokens=0,  # the commit has the unit's sums
                num_output_tokens=0,
            )
            for i, index in enumerate(indices)
        ]

    def _read_part(self, part: Part) -> Iterator[Mapping[str, object]]:
        schema = self._job.schema
        where = f"{redact(self._job.output.uri)}/{part.path}"
        try:
            data = self._job.output.read(part.path)
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ValueError("its bytes are not those that were committed")
            for batch in read_part(part.path, data, schema, schema.names):
                columns = [batch.columns[name] for name in schema.names]
                for row in zip(*columns, strict=True):
                    yield dict(zip(schema.names, row, strict=True))
        except FileNotFoundError as error:
            raise BatchgenError(
                f"{where} is gone: another retry may have been faster. Run the same command again; "
                "`batchgen verify` says whether the output is right"
            ) from error
        except ValueError as error:
            raise BatchgenError(
                f"{where} cannot be used: {error}. Nothing was changed; restore it from a copy, "
                "or start the job anew with another output.uri"
            ) from error
