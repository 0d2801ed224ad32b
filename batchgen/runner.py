"""Runs a job from its file to its dataset, from wherever earlier runs have brought it.

What comes before the model's weights is `startup`, the rows are `generating`, and their dataset is
`publishing`. A job that is done loads no torch.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchgen.dataset.storage import redact
from batchgen.engine.from_job import engine_options, sampling_options
from batchgen.generating import Begun, EngineFactory, generate, set_aside
from batchgen.job.spec import JobSpec
from batchgen.ledger import Commit, RunCounts, judged_rows, read_failures
from batchgen.monitor.budget import Budget, budget_text
from batchgen.monitor.failure_gate import FailureGate
from batchgen.monitor.summary import RunSummary, summary_text
from batchgen.pipeline import PLANNING_WINDOW_ROWS, Engine
from batchgen.publishing import is_published, publish_job
from batchgen.records import EngineStats, RowResult
from batchgen.retry import RetriedUnits, Retry, refuse_unbegun, reopen_failed
from batchgen.startup import OpenJob, TextModel, open_job
from batchgen.supervision import EarlierWork, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a run ended."""

    uri: str
    counts: RunCounts
    summary: str  # for people; empty if the dataset was not published


def run_job(
    spec: JobSpec,
    *,
    make_engine: EngineFactory | None = None,
    max_rows: int = PLANNING_WINDOW_ROWS,
    started_s: float | None = None,
    retry: Retry | None = None,
    worker: Worker | None = None,
) -> RunReport:
    """Run a job to its published dataset, from wherever earlier runs have brought it.

    `make_engine` stands in for the engine in tests; `max_rows` bounds the rows in memory.
    `started_s` is when the command began, by time.monotonic(); now unless given. With `retry`,
    failed rows of a finished job are run again. `worker` says what to do of all this, where the
    process has a supervisor. Raises BatchgenError: what stopped the run.
    """
    started_s = time.monotonic() if started_s is None else started_s
    if retry is not None:
        refuse_unbegun(spec)
    if worker is not None and worker.assignment.is_restart:
        spec = _going_on(spec)
    while True:
        job = open_job(spec, takes_new_files=retry is None)
        spec = _going_on(spec)
        commits = None if retry is None else reopen_failed(job, retry)
        if is_published(job):
            return _report(job, _work_of(job.ledger.counts()))
        if worker is not None and worker.assignment.culprits:
            job = set_aside(job, worker.assignment.culprits)
        counts, begun = _begin(job, retry, commits)
        budget = Budget(spec.budget, started_s=started_s, output_tokens=counts.output_tokens)
        earlier = _work_of(counts)
        if worker is not None:
            worker.begun(earlier)
            earlier = worker.assignment.earlier or earlier
        stats = generate(job, begun, budget, make_engine or load_engine, max_rows, worker)
        if worker is not None and worker.assignment.only is not None:
            return RunReport(uri=spec.output.uri, counts=job.ledger.counts(), summary="")
        job.ledger.load_new_commits()
        wall_s = time.monotonic() - started_s
        has_grown = not publish_job(job, wall_s)
        if not has_grown or retry is not None:  # who has added files publishes the retry, too
            is_restart = worker is not None and worker.assignment.is_restart
            return _report(job, earlier, is_restart=is_restart, wall_s=wall_s, stats=stats)


def _work_of(counts: RunCounts) -> EarlierWork:
    return EarlierWork(counts.ended, counts.prompt_tokens, counts.output_tokens)


def _going_on(spec: JobSpec) -> JobSpec:
    """`resume: never` is for a command's begin: with what it has begun it may go on."""
    checkpoint = spec.checkpoint
    if checkpoint.resume != "never":
        return spec
    going_on = checkpoint.model_copy(update={"resume": "if_possible"})
    return spec.model_copy(update={"checkpoint": going_on})


def _begin(
    job: OpenJob, retry: Retry | None, commits: Mapping[int, Commit] | None
) -> tuple[RunCounts, Begun]:
    """The counts of what earlier runs have ended, and what of it a run begins with.

    `commits` are those that a retry supersedes.
    """
    flushed = job.ledger.load_partials()
    earlier = job.ledger.counts()
    if retry is None or commits is None:
        return earlier, Begun(flushed=flushed, recovered=flushed, gate=_gate(job, flushed))
    retried = RetriedUnits(job, retry, commits, flushed)
    return earlier, Begun(flushed=flushed, recovered=retried, gate=_gate(job, None))


def load_engine(spec: JobSpec, model: TextModel) -> Engine:
    """The engine with the model's weights. This is what imports torch."""
    import torch

    from batchgen.engine.build import build_engine

    gc.collect()  # the engine of an earlier turn of run_job, whose parts refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    def decode(token_ids: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = model.tokenizer.backend_tokenizer.decode_batch(
            [list(ids) for ids in token_ids], skip_special_tokens=False
        )
        return texts

    return build_engine(
        model.config,
        model.files,
        engine_options(spec.engine, spec.model),
        sampling_options(spec.sampling, model.config),
        decode,
    )


def _gate(job: OpenJob, flushed: Mapping[int, Sequence[RowResult]] | None) -> FailureGate:
    """`flushed` is None in a retry: rows that have failed before may fail again."""
    errors = job.spec.errors
    is_retry = flushed is None
    return FailureGate(
        fail_on_first=errors.on_error == "fail",
        max_error_rate=1.0 if is_retry else errors.max_error_rate,
        window=errors.window,
        earlier=() if flushed is None else judged_rows(job.ledger, flushed, errors.window),
    )


def _report(
    job: OpenJob,
    earlier: EarlierWork,
    *,
    is_restart: bool = False,
    wall_s: float = 0.0,
    stats: EngineStats | None = None,
) -> RunReport:
    """`earlier` is what was done when the command began, `stats` are the last worker's."""
    counts = job.ledger.counts()
    tokens = (
        counts.prompt_tokens - earlier.prompt_tokens,
        counts.output_tokens - earlier.output_tokens,
    )
    kinds: Counter[str] = Counter()
    for commit in job.ledger.committed.values():
        failures = read_failures(job.ledger_storage, commit.dead_letters)
        kinds.update(failure.kind for failure in failures)
    summary = RunSummary(
        uri=redact(job.spec.output.uri),
        total_rows=counts.total,
        ok_rows=counts.ok,
        failed_rows=counts.failed,
        skipped_rows=counts.skipped,
        earlier_rows=earlier.rows,
        wall_s=wall_s,
        engine=stats,
        tokens=tokens if is_restart else None,
        dead_letters=kinds,
        dead_letters_uri=redact(f"{job.ledger_storage.uri}/dead"),
        budget=budget_text(job.spec.budget, output_tokens=counts.output_tokens, wall_s=wall_s),
    )
    return RunReport(uri=job.spec.output.uri, counts=counts, summary=summary_text(summary))
