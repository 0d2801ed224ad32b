"""Runs a job from its file to its dataset: the one module that knows every room.

What comes before the model's weights is `startup`. A job that is done loads no torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchgen import __version__
from batchgen.dataset.card import CardFacts, dataset_card
from batchgen.dataset.reader import UnitReader, read_unit
from batchgen.dataset.storage import redact
from batchgen.dataset.writer import check_values, delete_superseded, publish
from batchgen.engine.from_job import engine_options, sampling_options
from batchgen.errors import (
    BatchgenError,
    BudgetReached,
    EngineError,
    Interrupted,
    Preempted,
    StorageError,
)
from batchgen.job.spec import JobSpec
from batchgen.ledger import Commit, Ledger, RunCounts, judged_rows, read_failures
from batchgen.monitor.budget import Budget, budget_text
from batchgen.monitor.failure_gate import FailureGate
from batchgen.monitor.preemption import StopNotice, stop_error, watch_for
from batchgen.monitor.progress import Progress
from batchgen.monitor.summary import RunSummary, summary_text
from batchgen.monitor.watchdog import Watchdog
from batchgen.pipeline import PLANNING_WINDOW_ROWS, Engine, Pipeline, Stages
from batchgen.prompts.builder import PromptBuilder
from batchgen.prompts.row_error import RowError
from batchgen.records import (
    Completion,
    EngineStats,
    FailureKind,
    InputRow,
    Part,
    Prompt,
    RowFailure,
    RowKey,
    RowResult,
    UnfinishedRow,
)
from batchgen.redaction import environment_secrets, redact_message
from batchgen.retry import RetriedUnits, Retry, refuse_unbegun, reopen_failed
from batchgen.startup import OpenJob, TextModel, load_text_model, open_job, probe
from batchgen.supervision import Worker
from batchgen.units import FinishedUnit, UnitSaver, units_to_do


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a run ended."""

    uri: str
    counts: RunCounts
    summary: str  # for people; empty if the dataset was not published


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """Where a run begins: the results of earlier runs by unit, of units that are not committed."""

    flushed: Mapping[int, Sequence[RowResult]]
    recovered: Mapping[int, Sequence[RowResult]]  # these, and in a retry the rows that stay
    gate: FailureGate


EngineFactory = Callable[[JobSpec, TextModel], Engine]


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
    has_grown = False
    if worker is not None and worker.assignment.is_restart:
        spec = _going_on(spec)
    while True:
        job = open_job(spec, takes_new_files=retry is None)
        spec = _going_on(spec)
        commits = None if retry is None else reopen_failed(job, retry)
        # Not if this process has just published, perhaps over what another one has.
        if not has_grown and job.ledger.is_published():
            return _report(job, earlier_rows=job.ledger.counts().ended)
        if worker is not None and worker.assignment.culprits:
            job = _set_aside(job, worker.assignment.culprits)
        earlier, begun = _begin(job, retry, commits)
        budget = Budget(spec.budget, started_s=started_s, output_tokens=earlier.output_tokens)
        stats = _generate(job, begun, budget, make_engine or load_engine, max_rows, worker)
        if worker is not None and worker.assignment.only is not None:
            return RunReport(uri=spec.output.uri, counts=job.ledger.counts(), summary="")
        job.ledger.load_new_commits()
        wall_s = time.monotonic() - started_s
        has_grown = not _publish(job, wall_s)
        if not has_grown or retry is not None:  # who has added files publishes the retry, too
            return _report(job, earlier_rows=earlier.ended, wall_s=wall_s, stats=stats)


def _going_on(spec: JobSpec) -> JobSpec:
    """`resume: never` is for a command's begin: with what it has begun it may go on."""
    checkpoint = spec.checkpoint
    if checkpoint.resume != "never":
        return spec
    going_on = checkpoint.model_copy(update={"resume": "if_possible"})
    return spec.model_copy(update={"checkpoint": going_on})


def _begin(
    job: OpenJob, retry: Retry | None, commits: Mapping[int, Commit] | None
) -> tuple[RunCounts, _Begun]:
    """The counts of what earlier runs have ended, and what of it a run begins with.

    `commits` are those that a retry supersedes.
    """
    flushed = job.ledger.load_partials()
    earlier = job.ledger.counts()
    if retry is None or commits is None:
        return earlier, _Begun(flushed=flushed, recovered=flushed, gate=_gate(job, flushed))
    retried = RetriedUnits(job, retry, commits, flushed)
    return earlier, _Begun(flushed=flushed, recovered=retried, gate=_gate(job, None))


def _publish(job: OpenJob, wall_s: float) -> bool:
    """Make the commits the dataset, those of other processes' retries as well.

    False where another run has added files to the job meanwhile. What is published then may lie
    over what the other has published: the job is to be opened again and brought to its end.
    """
    spec, ledger = job.spec, job.ledger
    while not ledger.has_grown():
        counts = ledger.counts()
        parts = _committed_parts(ledger)
        _check_counts(spec, counts, parts)
        card = dataset_card(_card_facts(job, counts, wall_s))
        publish(job.output, spec.output, job.schema, parts, card)
        if ledger.adopt_retries():
            continue
        generations = {unit_id: commit.generation for unit_id, commit in ledger.committed.items()}
        delete_superseded(job.output, parts, generations)
        ledger.finish()
        return not ledger.has_grown()
    return False


def _check_counts(spec: JobSpec, counts: RunCounts, parts: Sequence[Part]) -> None:
    num_written = sum(part.num_rows for part in parts)
    if counts.ended != counts.total or num_written != counts.ok * spec.output_rows_per_row:
        raise BatchgenError(
            f"the counts do not add up: {counts.ok} ok + {counts.failed} failed + "
            f"{counts.skipped} skipped rows of {counts.total}, and {num_written} rows of output; "
            "nothing was published"
        )


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


def _generate(
    job: OpenJob,
    begun: _Begun,
    budget: Budget,
    make_engine: EngineFactory,
    max_rows: int,
    worker: Worker | None,
) -> EngineStats | None:
    """Bring every unit to its commit, or run the rows that the worker was given; None if that
    took no engine."""
    spec, ledger = job.spec, job.ledger
    reached = budget.reached()
    if reached is not None and ledger.counts().ended < ledger.counts().total:
        raise reached
    probe(job.output)
    model = job.text_model or load_text_model(spec, job.model_files)
    ends = set(spec.sampling.stop_token_ids)
    if not spec.sampling.ignore_eos:
        ends.update(model.config.eos_token_ids)
    saver = UnitSaver(
        spec=spec,
        schema=job.schema,
        storage=job.output,
        ledger=ledger,
        tokenizer=model.tokenizer,
        stop_token_ids=ends,
    )
    units = [unit for unit in ledger.plan.units if unit.unit_id not in ledger.committed]
    for unit in units:
        results = begun.recovered[unit.unit_id] if unit.unit_id in begun.flushed else ()
        if len(results) == unit.num_rows:  # killed between its last row and its commit
            saver.commit(FinishedUnit(unit=unit, results=results, wall_s=0.0))
    only = None if worker is None else _indices_by_unit(worker.assignment.only)
    units = [
        unit
        for unit in units
        if unit.unit_id not in ledger.committed and (only is None or unit.unit_id in only)
    ]
    if not units:
        return None
    unfinished = ledger.load_unfinished(begun.flushed)

    def say_late(notice: StopNotice) -> None:
        sys.stderr.write(f"error: {stop_error(notice, saver.saved())}; no time for more\n")

    with (
        watch_for(spec.preemption, say_late) as stops,
        Progress(spec.observability.progress) as progress,
    ):
        engine = make_engine(spec, model)
        saver.follow(engine.stats)
        kept = pa.schema([job.schema.field(name) for name in spec.output.columns.keep])

        def watch() -> BatchgenError | None:
            progress.update(saver.progress(engine.stats(), budget.used_share()))
            if stops.notice is not None:
                return stop_error(stops.notice, saver.saved())
            return budget.reached()

        def charge(completions: Sequence[Completion]) -> BatchgenError | None:
            if worker is not None:
                worker.ended(completions)
            return budget.charge(completions)

        with UnitReader(spec.input, ledger.plan.files) as reader:
            stages = Stages(
                read_unit=lambda unit, wanted: reader.read(unit, wanted=wanted),
                make_prompts=lambda rows: [
                    _resume(made, unfinished) for made in _make_prompts(rows, kept, model.builder)
                ],
                kept_columns=kept.names,
                engine=engine,
                saver=saver,
                gate=begun.gate,
                given=(lambda _: None) if worker is None else worker.given,
                charge=charge,
                watch=watch,
                watchdog=Watchdog(spec.errors.watchdog),
                abandon=_abandon,
            )
            flush_interval_s = spec.checkpoint.flush_interval
            pipeline = Pipeline(stages, max_rows=max_rows, flush_interval_s=flush_interval_s)
            try:
                to_do = units_to_do(ledger, units) if only is None else iter(units)
                pipeline.run(to_do, begun.recovered, only)
            except EngineError as error:
                if worker is not None:
                    why = f"{type(error.__cause__).__name__}: {error.__cause__}"
                    worker.failed(redact_message(why, environment_secrets()))
                raise
            except BudgetReached:
                if not ledger.is_complete:  # else it was reached by the very last rows
                    raise
            except (Preempted, Interrupted) as error:
                if stops.notice is None:
                    raise
                raise stop_error(stops.notice, saver.saved()) from error
            finally:
                watch()  # what is shown last is how it ended
                with contextlib.suppress(StorageError):
                    ledger.claims.give_up()
    return engine.stats()


def _resume(
    made: Prompt | RowFailure, unfinished: Mapping[RowKey, UnfinishedRow]
) -> Prompt | RowFailure:
    """The prompt, to go on where an earlier run left it."""
    row = unfinished.get(made.key)
    return replace(made, resumed=row.samples) if row and isinstance(made, Prompt) else made


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


def _indices_by_unit(keys: Sequence[RowKey] | None) -> dict[int, set[int]] | None:
    if keys is None:
        return None
    indices: dict[int, set[int]] = {}
    for key in keys:
        indices.setdefault(key.unit_id, set()).add(key.index)
    return indices


def _set_aside(job: OpenJob, culprits: Mapping[RowKey, str]) -> OpenJob:
    """Note rows as dead letters that have ended the engine; the job with its templates loaded.

    `culprits` are these rows, and how they did it.
    """
    spec, plan = job.spec, job.ledger.plan
    model = job.text_model or load_text_model(spec, job.model_files)
    failures = []
    for key, why in culprits.items():
        if key.unit_id in job.ledger.committed:  # by another runner
            continue
        message = f"{why}, with this row alone"
        for row in read_unit(spec.input, plan.files, plan.units[key.unit_id], wanted={key.index}):
            assert isinstance(row, InputRow), "it had become a prompt"
            failures.append(_failure("engine_error", message, row, model.builder))
    job.ledger.flush_partial(failures)
    return replace(job, text_model=model)


def _failure(kind: FailureKind, message: str, row: InputRow, builder: PromptBuilder) -> RowFailure:
    """The failure of a row that may have a prompt."""
    shown = builder.show(row)
    return RowError(kind, message, shown if isinstance(shown, str) else "").failure(row)


def _abandon(reason: BaseException) -> None:
    """End a process in which a thread hangs that cannot be ended."""
    sys.stderr.write(f"error: {reason}\n")
    sys.stderr.flush()
    os._exit(BatchgenError.exit_code)


def _report(
    job: OpenJob,
    *,
    earlier_rows: int,
    wall_s: float = 0.0,
    stats: EngineStats | None = None,
) -> RunReport:
    counts = job.ledger.counts()
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
        earlier_rows=earlier_rows,
        wall_s=wall_s,
        engine=stats,
        dead_letters=kinds,
        dead_letters_uri=redact(f"{job.ledger_storage.uri}/dead"),
        budget=budget_text(job.spec.budget, output_tokens=counts.output_tokens, wall_s=wall_s),
    )
    return RunReport(uri=job.spec.output.uri, counts=counts, summary=summary_text(summary))


def _make_prompts(
    rows: Sequence[InputRow], kept: pa.Schema, builder: PromptBuilder
) -> list[Prompt | RowFailure]:
    """A prompt for each row, unless it has none or its kept values do not fit their columns."""
    misfits = [check_values(kept, row.values) for row in rows]
    fitting = [row for row, misfit in zip(rows, misfits, strict=True) if misfit is None]
    built = iter(builder.build(fitting))
    return [
        next(built) if misfit is None else _failure("bad_record", misfit, row, builder)
        for row, misfit in zip(rows, misfits, strict=True)
    ]


def _card_facts(job: OpenJob, counts: RunCounts, wall_s: float) -> CardFacts:
    spec, plan = job.spec, job.ledger.plan
    changed = spec.sampling.model_dump(exclude_defaults=True)
    return CardFacts(
        job_name=spec.name,
        model=spec.model.name_or_path,
        model_revision=job.model_files.identity.get("revision"),
        input_uris=[plan.files[index].uri for index in plan.input_order],
        sampling={"temperature": spec.sampling.temperature, **changed},
        columns={field.name: str(field.type) for field in job.schema},
        rows_total=counts.total,
        rows_written=counts.ok * spec.output_rows_per_row,
        rows_failed=counts.failed,
        rows_skipped=counts.skipped,
        prompt_tokens=counts.prompt_tokens,
        output_tokens=counts.output_tokens,
        wall_s=wall_s,
        output_uri=spec.output.uri,
        output_format=spec.output.format,
        version=__version__,
    )


def _committed_parts(ledger: Ledger) -> list[Part]:
    """The parts of the dataset, in input order."""
    committed = ledger.committed
    return [
        part
        for unit in ledger.plan.units_in_order
        if unit.unit_id in committed
        for part in committed[unit.unit_id].parts
    ]
