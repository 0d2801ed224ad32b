"""The ledger: which units are done, and what the others have so far. Files and nothing else."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from batchgen.dataset.storage import Storage, redact
from batchgen.errors import UsageError
from batchgen.ledger.additions import has_grown, read_job
from batchgen.ledger.claims import Claims
from batchgen.ledger.commits import (
    Commit,
    DeadLetters,
    RunCounts,
    count_results,
    decode_stored_commit,
    encode_commit,
    encode_dead_letters,
    read_commits,
    subtract_counts,
    sum_counts,
)
from batchgen.ledger.failures import read_failures
from batchgen.ledger.files import (
    JOB_PATH,
    commit_path,
    done_path,
    list_claims,
    list_dead_letters,
    list_generations,
    list_partials,
    list_unfinished,
    read_many,
    run_path,
)
from batchgen.ledger.partials import Partials, merge_partials
from batchgen.ledger.plan import LedgerPlan, StoredJob, check_fingerprint, encode_job
from batchgen.ledger.runs import RunRecord, encode_run
from batchgen.ledger.unfinished import UnfinishedRows
from batchgen.records import (
    EngineStats,
    OutputRow,
    Part,
    RowFailure,
    RowKey,
    RowResult,
    UnfinishedRow,
    Unit,
)

ResumeMode = Literal["if_possible", "always", "never"]


@dataclass(frozen=True, slots=True)
class _Reopened:
    """A unit of which some failed rows are tried again."""

    commit: Commit  # holds until there is a newer one
    kept: RunCounts  # of its rows that are not tried again


class Ledger:
    """An open ledger of one process. Any number of processes may have the same one open.

    The methods that write are called by one thread at a time; `counts()`, `has_commit()` and
    `claims.take()` by any thread. An error in any of them leaves the files such that a restart
    goes on from there. Nothing needs closing.
    """

    def __init__(self, storage: Storage, job: StoredJob, committed: dict[int, Commit]) -> None:
        self._storage = storage
        self._job = job
        self._committed = committed
        self._reopened: dict[int, _Reopened] = {}
        self._retry_id = ""
        self._run_id = secrets.token_hex(8)
        self.claims = Claims(storage, self._run_id)
        self._partials = Partials(storage, job, self._run_id)
        self._unfinished = UnfinishedRows(storage, job, self._run_id)
        self._recorded: EngineStats | None = None  # what this run's record has
        self._flushed: dict[int, RunCounts] = {}  # of uncommitted units
        self._committed_counts = sum_counts(
            [commit.counts for commit in committed.values()], total=job.plan.num_rows
        )
        # Those of units that a retry has reopened count but for the rows that are tried again.
        self._counts = self._committed_counts  # with the flushed; replaced whole, never changed

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        resume: ResumeMode,
        fingerprint: Mapping[str, object],
        make_plan: Callable[[], LedgerPlan],
        job: StoredJob | None = None,
    ) -> Ledger:
        """Opens the ledger in this folder, or begins it.

        `make_plan` reads the input; it is called only if there is no ledger. If another process
        begins the ledger meanwhile, its plan counts. `job` is what was read of the ledger before:
        files that were added since then are not of this process.

        Raises JobChangedError if the ledger is of another fingerprint, UsageError if `resume`
        forbids what would happen, BatchgenError if the ledger is damaged.
        """
        job = job or read_job(storage)
        if job is None:
            if resume == "always":
                raise UsageError(
                    f"resume is `always`, but {redact(storage.uri)} holds no ledger to go on "
                    "with. Check output.uri and checkpoint.uri, or begin anew with resume "
                    "`if_possible`."
                )
            job = _begin(storage, fingerprint, make_plan())
        elif resume == "never":
            raise UsageError(
                f"resume is `never`, but {redact(storage.uri)} holds the ledger of a run. Nothing "
                "is deleted for you: go on with it by resume `if_possible`, choose another "
                "output.uri, or delete the output folder yourself."
            )
        check_fingerprint(job, fingerprint, storage)
        return cls(storage, job, read_commits(storage, job))

    @property
    def plan(self) -> LedgerPlan:
        return self._job.plan

    @property
    def committed(self) -> Mapping[int, Commit]:
        """The commits that this process knows of, by unit."""
        return MappingProxyType(self._committed)

    @property
    def is_complete(self) -> bool:
        """Whether every unit is committed."""
        return len(self._committed) == len(self.plan.units)

    def is_published(self) -> bool:
        """Whether every unit is committed and the dataset is published: nothing is left to do."""
        return self.is_complete and self._storage.exists(self._done_path())

    def failures(self, unit_id: int) -> list[RowFailure]:
        """The failed rows of a unit that is committed, or was until `reopen`, in row order."""
        reopened = self._reopened.get(unit_id)
        commit = self._committed[unit_id] if reopened is None else reopened.commit
        return read_failures(self._storage, commit.dead_letters)

    def reopen(self, num_retried: Mapping[int, int], *, retry_id: str) -> dict[int, Commit]:
        """Takes committed units as open again, for a retry; their commits.

        Their next commits carry `retry_id`. `num_retried` is how many of each unit's failed rows
        are tried again: these do not count as ended any more. Until such a unit is committed
        anew, its old commit holds.
        """
        self._retry_id = retry_id
        for unit_id, num_rows in num_retried.items():
            commit = self._committed.pop(unit_id)
            retried = RunCounts(total=num_rows, failed=num_rows)
            self._reopened[unit_id] = _Reopened(commit, subtract_counts(commit.counts, retried))
            self._committed_counts = subtract_counts(self._committed_counts, retried)
        self._count()
        return {unit_id: self._reopened[unit_id].commit for unit_id in num_retried}

    def adopt_retries(self) -> bool:
        """Takes over newer commits, of a retry by another process; False if there are none."""
        newer = [
            commit_path(unit_id, generation)
            for unit_id, generation in list_generations(self._storage).items()
            if unit_id in self._committed and generation > self._committed[unit_id].generation
        ]
        for path, data in read_many(self._storage, newer):
            commit = decode_stored_commit(self._storage, self._job, path, data)
            superseded = self._committed[commit.unit_id].counts
            self._committed_counts = subtract_counts(self._committed_counts, superseded)
            self._add_commit(commit)
        return bool(newer)

    def has_grown(self) -> bool:
        """Whether another process has added files to the job since this one opened it."""
        return has_grown(self._storage, self._job)

    def counts(self) -> RunCounts:
        """How the rows of committed units, and those flushed as partials, ended."""
        return self._counts

    @property
    def job_id(self) -> str:
        """Names the job by the content of its job.json."""
        return self._job.job_id

    def load_partials(self) -> dict[int, list[RowResult]]:
        """The finished rows of uncommitted units by unit, each row once, in row order.

        A partial that cannot be understood is left out with a warning in the log.
        """
        waiting = [  # without the rows of committed units, which are many
            [
                row
                for row in results
                if row.key.unit_id not in self._committed
                and self.generation(row.key.unit_id) == generation
            ]
            for generation, results in self._partials.load()
        ]
        merged = merge_partials(waiting, self._committed)
        self._flushed = {unit_id: count_results(rows) for unit_id, rows in merged.items()}
        self._count()
        return merged

    def has_commit(self, unit: Unit) -> bool:
        """Whether any runner has committed the unit by now."""
        return self._storage.exists(commit_path(unit.unit_id, self.generation(unit.unit_id)))

    def load_new_commits(self) -> None:
        """Take note of what other runners have committed."""
        paths = [
            commit_path(unit.unit_id, self.generation(unit.unit_id))
            for unit in self.plan.units
            if unit.unit_id not in self._committed
        ]
        for path, data in read_many(self._storage, paths):
            self._add_commit(decode_stored_commit(self._storage, self._job, path, data))

    def load_unfinished(
        self, finished: Mapping[int, Sequence[RowResult]]
    ) -> dict[RowKey, UnfinishedRow]:
        """What earlier runs have of rows that they could not finish, each as far as it came.

        `finished` is what `load_partials` gave: rows in it are left out, as are committed ones.
        """
        return self._unfinished.load(self._committed, finished)

    def save_unfinished(self, rows: Sequence[UnfinishedRow]) -> None:
        """Keeps the tokens of rows that this run cannot finish; called once, at its end."""
        self._unfinished.save(rows)

    def flush_partial(self, results: Sequence[RowResult]) -> None:
        """Keeps finished rows of uncommitted units, each of which is given to one flush only."""
        by_generation: dict[int, list[RowResult]] = {}
        for result in results:
            by_generation.setdefault(self.generation(result.key.unit_id), []).append(result)
        for generation, rows in by_generation.items():
            self._flush_partial(rows, generation)

    def _flush_partial(self, results: Sequence[RowResult], generation: int) -> None:
        self._partials.write(results, generation)
        self._unfinished.forget(results)
        for unit_id, rows in merge_partials([results], self._committed).items():
            before = self._flushed.get(unit_id, RunCounts(total=0))
            self._flushed[unit_id] = sum_counts(
                [before, count_results(rows)], total=before.total + len(rows)
            )
        self._count()

    def commit(
        self, unit: Unit, parts: Sequence[Part], results: Sequence[RowResult], *, wall_s: float
    ) -> bool:
        """Commits a unit whose parts are written; False if another runner did so before.

        `results` are all rows of the unit, in a retry those that stay without their tokens.
        `parts` hold those that succeeded, `wall_s` is since the unit's first row was read. Either
        way the unit is in `committed` after it.
        """
        if unit.unit_id in self._committed:
            return False
        counts = count_results(results)
        if unit.unit_id in self._reopened:  # rows that stay do not know their tokens
            kept = self._reopened[unit.unit_id].kept
            counts = replace(
                counts,
                prompt_tokens=counts.prompt_tokens + kept.prompt_tokens,
                output_tokens=counts.output_tokens + kept.output_tokens,
            )
        assert {result.key.index for result in results} == set(range(unit.num_rows))
        assert all(result.key.unit_id == unit.unit_id for result in results)
        assert counts.total == counts.ended == unit.num_rows, f"rows of unit {unit.unit_id}"
        num_rows = sum(len(result.rows) for result in results if isinstance(result, OutputRow))
        assert num_rows == sum(part.num_rows for part in parts), f"parts of unit {unit.unit_id}"
        commit = Commit(
            job_id=self._job.id_of_unit(unit.unit_id),
            run_id=self._run_id,
            unit_id=unit.unit_id,
            parts=tuple(parts),
            dead_letters=self._put_dead_letters(unit, results),
            counts=counts,
            wall_s=wall_s,
            generation=self.generation(unit.unit_id),
            retry_id=self._retry_id,
        )
        path = commit_path(unit.unit_id, commit.generation)
        try:
            self._storage.create(path, encode_commit(commit))
        except FileExistsError:
            # Another runner's, or ours: a store's client may try again after a write that had
            # succeeded. The run_id within makes the two differ.
            stored = self._storage.read(path)
            commit = decode_stored_commit(self._storage, self._job, path, stored)
        self._add_commit(commit)
        self.claims.drop(unit)
        self._unfinished.forget(results)
        return commit.run_id == self._run_id

    def record_run(self, engine: EngineStats, *, wall_s: float) -> None:
        """Keeps what the engine has done in this run, in the place of what was kept before.

        Writes nothing where only the time has gone on: flushes come in idle hours, too.
        """
        if engine == self._recorded:
            return
        run_id = self._run_id
        run = RunRecord(job_id=self._job.job_id, run_id=run_id, wall_s=wall_s, engine=engine)
        self._storage.put(run_path(run_id), encode_run(run))
        self._recorded = engine

    def clean(self) -> None:
        """Deletes the partials that hold rows of committed units only; once all are committed,
        claims and the tokens of unfinished rows, too."""
        if self.is_complete and not self.has_grown():
            lists = (list_partials, list_claims, list_unfinished)
            self._storage.delete([path for each in lists for path in each(self._storage)])
        else:
            self._partials.delete_those_of(self._committed.keys())

    def finish(self) -> None:
        """Notes that the dataset is published: from now on its status is "done"."""
        assert self.is_complete
        self.clean()
        done = {"job_id": self._job.last_id}
        self._storage.put(self._done_path(), json.dumps(done).encode())
        self._delete_superseded()

    def generation(self, unit_id: int) -> int:
        """That of the unit's next commit, for which its rows are now; of its last one, if it has
        been committed."""
        reopened = self._reopened.get(unit_id)
        if unit_id in self._committed:
            return self._committed[unit_id].generation
        return 0 if reopened is None else reopened.commit.generation + 1

    def _delete_superseded(self) -> None:
        """Deletes dead letters that only older commits name. Those of later ones stay: they are
        another process' retry."""
        committed = self._committed
        named = {commit.dead_letters.path for commit in committed.values() if commit.dead_letters}
        self._storage.delete(
            path
            for path, (unit_id, generation) in list_dead_letters(self._storage).items()
            if path not in named
            and unit_id in committed
            and generation <= committed[unit_id].generation
        )

    def _done_path(self) -> str:
        generations = {unit_id: commit.generation for unit_id, commit in self._committed.items()}
        return done_path(self._job.last_id, generations)

    def _put_dead_letters(self, unit: Unit, results: Sequence[RowResult]) -> DeadLetters | None:
        failures = [result for result in results if isinstance(result, RowFailure)]
        if not failures:
            return None
        generation = self.generation(unit.unit_id)
        letters, data = encode_dead_letters(unit.unit_id, failures, generation)
        self._storage.put(letters.path, data)
        return letters

    def _add_commit(self, commit: Commit) -> None:
        self._committed[commit.unit_id] = commit
        self._flushed.pop(commit.unit_id, None)
        reopened = self._reopened.pop(commit.unit_id, None)
        if reopened is not None:
            self._committed_counts = subtract_counts(self._committed_counts, reopened.kept)
        counts = [self._committed_counts, commit.counts]
        self._committed_counts = sum_counts(counts, total=self._counts.total)
        self._count()

    def _count(self) -> None:
        counts = [self._committed_counts, *self._flushed.values()]
        self._counts = sum_counts(counts, total=self._counts.total)


def _begin(storage: Storage, fingerprint: Mapping[str, object], plan: LedgerPlan) -> StoredJob:
    """Creates job.json, or reads the one that another process has created meanwhile."""
    with contextlib.suppress(FileExistsError):
        storage.create(JOB_PATH, encode_job(fingerprint, plan))
    job = read_job(storage)
    assert job is not None
    return job
