"""Commits: one file for each finished unit, and the dead letters that it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError
from batchgen.ledger.additions import has_grown
from batchgen.ledger.files import (
    commit_path,
    damaged,
    dead_letters_path,
    decoded,
    full_name,
    list_generations,
    parse_json,
    read_many,
)
from batchgen.ledger.plan import StoredJob
from batchgen.records import OutputRow, Part, RowFailure, RowResult, RowSkip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """How rows ended, and the tokens of the ones that succeeded.

    `total` counts the rows that there are: once all have ended it is ok + failed + skipped.
    """

    total: int
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def ended(self) -> int:
        return self.ok + self.failed + self.skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetters:
    """The file of a unit's failed rows: JSON lines with `row_address`, `kind`, `message` ..."""

    path: str  # relative to the ledger's folder
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A finished unit. Parts that no commit names do not exist.

    A retry of failed rows writes the whole unit again: new parts, and a commit of the next
    generation, which supersedes the others. Like the first one, it is created exclusively.
    """

    job_id: str  # of the file that planned the unit: job.json, or an addition
    run_id: str  # the process that committed it
    unit_id: int
    parts: tuple[Part, ...]  # in row order; their paths are relative to the output folder
    dead_letters: DeadLetters | None  # None if no row failed
    counts: RunCounts
    wall_s: float  # from the unit's first row read to its commit
    generation: int = 0  # how many retries came before
    retry_id: str = ""  # of the retry that committed it


_COMMIT = TypeAdapter(Commit)


def count_results(results: Sequence[RowResult]) -> RunCounts:
    """The counts of these rows, which are all that there are."""
    outputs = [result for result in results if isinstance(result, OutputRow)]
    return RunCounts(
        total=len(results),
        ok=len(outputs),
        failed=sum(isinstance(result, RowFailure) for result in results),
        skipped=sum(isinstance(result, RowSkip) for result in results),
        prompt_tokens=sum(row.num_prompt_tokens for row in outputs),
        output_tokens=sum(row.num_output_tokens for row in outputs),
    )


def sum_counts(counts: Sequence[RunCounts], *, total: int) -> RunCounts:
    """The sums of several counts, out of `total` rows."""
    return RunCounts(
        total=total,
        ok=sum(c.ok for c in counts),
        failed=sum(c.failed for c in counts),
        skipped=sum(c.skipped for c in counts),
        prompt_tokens=sum(c.prompt_tokens for c in counts),
        output_tokens=sum(c.output_tokens for c in counts),
    )


def subtract_counts(counts: RunCounts, taken: RunCounts) -> RunCounts:
    """The counts of the rows that are left; `total` as it was."""
    return RunCounts(
        total=counts.total,
        ok=counts.ok - taken.ok,
        failed=counts.failed - taken.failed,
        skipped=counts.skipped - taken.skipped,
        prompt_tokens=counts.prompt_tokens - taken.prompt_tokens,
        output_tokens=counts.output_tokens - taken.output_tokens,
    )


def encode_dead_letters(
    unit_id: int, failures: Sequence[RowFailure], generation: int = 0
) -> tuple[DeadLetters, bytes]:
    """The file of these failures, in row order: the same failures give the same bytes."""
    lines = []
    for failure in sorted(failures, key=lambda failure: failure.key.index):
        letter = {
            "row_address": failure.address,
            "unit_id": failure.key.unit_id,
            "index": failure.key.index,
            "kind": failure.kind,
            "message": failure.message,
            "excerpt": failure.excerpt,
        }
        # Broken UTF-16 in a message becomes \udXXX, which is also how JSON spells it.
        lines.append(json.dumps(letter, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    data = b"".join(line + b"\n" for line in lines)
    sha256 = hashlib.sha256(data).hexdigest()
    path = dead_letters_path(unit_id, generation, sha256)
    letters = DeadLetters(path=path, num_rows=len(failures), size_bytes=len(data), sha256=sha256)
    return letters, data


def encode_commit(commit: Commit) -> bytes:
    return _COMMIT.dump_json(commit, indent=1) + b"\n"


def decode_commit(data: bytes, job: StoredJob, path: str, where: str) -> Commit:
    """What encode_commit() wrote to `path` for this job. `where` names the file in errors.

    Raises BatchgenError for a damaged file, and for one of another job.
    """
    commit = parse_json(_COMMIT, data, where)
    if commit.job_id != job.id_of_unit(commit.unit_id):
        raise BatchgenError(
            f"{where} is a commit of another job than the ledger's job.json. Either job.json was "
            "deleted or exchanged, or a runner of a job that had this folder before is still at "
            "work. Stop that runner, and start the job anew with another output.uri."
        )
    is_planned = 0 <= commit.unit_id < len(job.plan.units)
    if not is_planned or commit_path(commit.unit_id, commit.generation) != path:
        raise damaged(where, f"it is a commit of unit {commit.unit_id}")
    num_rows = job.plan.units[commit.unit_id].num_rows
    if not commit.counts.total == commit.counts.ended == num_rows:
        raise damaged(where, f"its counts do not add up to the {num_rows} rows of the unit")
    return commit


def newest_generations(storage: Storage, job: StoredJob) -> dict[int, int]:
    """The generation of each unit's newest commit, but for units of files that were added since
    `job` was read."""
    generations = list_generations(storage)
    num_units = len(job.plan.units)
    if all(unit_id < num_units for unit_id in generations) or not has_grown(storage, job):
        return generations
    return {unit_id: number for unit_id, number in generations.items() if unit_id < num_units}


def newest_commits(storage: Storage, job: StoredJob) -> list[str]:
    """The path of each unit's newest commit, of the same units."""
    return [commit_path(*item) for item in newest_generations(storage, job).items()]


def decode_stored_commit(storage: Storage, job: StoredJob, path: str, data: bytes) -> Commit:
    """decode_commit() of a file that was read as `data`."""
    where = full_name(storage, path)
    return decoded(storage, path, data, lambda stored: decode_commit(stored, job, path, where))


def read_commits(storage: Storage, job: StoredJob) -> dict[int, Commit]:
    """The newest commit of each unit that has one, in unit order."""
    commits = [
        decode_stored_commit(storage, job, path, data)
        for path, data in read_many(storage, newest_commits(storage, job))
    ]
    return {commit.unit_id: commit for commit in sorted(commits, key=lambda c: c.unit_id)}
