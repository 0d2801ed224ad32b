"""What `batchgen status` shows: read from the ledger's files, without writing anything."""

from __future__ import annotations

from collections.abc import Sequence

from batchgen.dataset.storage import Storage
from batchgen.ledger.additions import read_job
from batchgen.ledger.commits import RunCounts, count_results, read_commits, sum_counts
from batchgen.ledger.files import done_path
from batchgen.ledger.partials import merge_partials, read_partials
from batchgen.ledger.runs import RunRecord, read_runs, runs_status


def read_status(storage: Storage) -> dict[str, object]:
    """`state`, counts of `rows`, `units` and `tokens`, and what the engine did in all `runs`.

    `state` is "absent" (no ledger), "done" (the dataset is complete and published) or
    "incomplete". Whether a runner is at work right now cannot be known from files, so no state
    claims it. `rows.ok`, `failed` and `skipped` count the rows of committed units and those that
    are flushed as partials: what a killed run would not have to generate again.

    Raises BatchgenError if the ledger is damaged.
    """
    job = read_job(storage)
    if job is None:
        return _status("absent", RunCounts(total=0), [], num_units=0, num_committed=0)
    commits = read_commits(storage, job)
    partials = [results for _, results in read_partials(storage, job)]
    counts = [commit.counts for commit in commits.values()]
    counts += [count_results(rows) for rows in merge_partials(partials, commits).values()]
    generations = {unit_id: commit.generation for unit_id, commit in commits.items()}
    done = done_path(job.last_id, generations)
    is_done = len(commits) == len(job.plan.units) and storage.exists(done)
    return _status(
        "done" if is_done else "incomplete",
        sum_counts(counts, total=job.plan.num_rows),
        read_runs(storage, job),
        num_units=len(job.plan.units),
        num_committed=len(commits),
    )


def _status(
    state: str,
    counts: RunCounts,
    runs: Sequence[RunRecord],
    *,
    num_units: int,
    num_committed: int,
) -> dict[str, object]:
    return {
        "state": state,
        "rows": {
            "total": counts.total,
            "ok": counts.ok,
            "failed": counts.failed,
            "skipped": counts.skipped,
        },
        "units": {"total": num_units, "committed": num_committed},
        "tokens": {"prompt": counts.prompt_tokens, "output": counts.output_tokens},
        "runs": runs_status(runs),
    }
