"""Generates what is left of an open job: every unit is brought to its commit.

First all is made that this takes but for the engine, then the engine, and the pipeline around it,
whose ends are told as the user is to read them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchgen.dataset.reader import UnitReader, read_unit
from batchgen.dataset.writer import check_rows
from batchgen.errors import (
    BatchgenError,
    BudgetReached,
    EngineError,
    Interrupted,
    Preempted,
    StorageError,
)
from batchgen.job.spec import JobSpec
from batchgen.monitor.budget import Budget
from batchgen.monitor.failure_gate import FailureGate
from batchgen.monitor.preemption import StopNotice, stop_error, watch_for
from batchgen.monitor.progress import Progress
from batchgen.monitor.watchdog import Watchdog
from batchgen.pipeline import Engine, Pipeline, Stages
from batchgen.prompts.builder import PromptBuilder
from batchgen.prompts.row_error import RowError
from batchgen.records import (
    Completion,
    EngineStats,
    FailureKind,
    InputRow,
    Prompt,
    RowFailure,
    RowKey,
    RowResult,
    UnfinishedRow,
    Unit,
)
from batchgen.redaction import environment_secrets, redact_message
from batchgen.startup import OpenJob, TextModel, load_text_model, probe
from batchgen.supervision import Worker
from batchgen.units import FinishedUnit, UnitSaver, units_to_do


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Where a run begins: the results of earlier runs by unit, of units that are not committed."""

    flushed: Mapping[int, Sequence[RowResult]]
    recovered: Mapping[int, Sequence[RowResult]]  # these, and in a retry the rows that stay
    gate: FailureGate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What is left to generate, and all that this takes but for the engine."""

    job: OpenJob
    begun: Begun
    model: TextModel
    saver: UnitSaver
    units: Sequence[Unit]
    only: Mapping[int, set[int]] | None  # the rows of each unit to run; None is all
    unfinished: Mapping[RowKey, UnfinishedRow]  # of earlier runs


EngineFactory = Callable[[JobSpec, TextModel], Engine]


def generate(
    job: OpenJob,
    begun: Begun,
    budget: Budget,
    make_engine: EngineFactory,
    max_rows: int,
    worker: Worker | None,
) -> EngineStats | None:
    """Bring every unit to its commit, or run the rows that the worker was given; None if that
    took no engine."""
    counts = job.ledger.counts()
    reached = budget.reached()
    if reached is not None and counts.ended < counts.total:
        raise reached
    probe(job.output)
    only = None if worker is None else _indices_by_unit(worker.assignment.only)
    work = _prepare(job, begun, only)
    return _run_engine(work, budget, make_engine, max_rows, worker) if work.units else None


def _prepare(job: OpenJob, begun: Begun, only: Mapping[int, set[int]] | None) -> _Work:
    """Commit the units that need nothing else, and load all but the engine for the others."""
    spec, ledger = job.spec, job.ledger
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
    for unit in ledger.plan.units:
        if unit.unit_id in begun.flushed and unit.unit_id not in ledger.committed:
            results = begun.recovered[unit.unit_id]
            if len(results) == unit.num_rows:  # killed between its last row and its commit
                saver.commit(FinishedUnit(unit=unit, results=results, wall_s=0.0))
    units = [
        unit
        for unit in ledger.plan.units
        if unit.unit_id not in ledger.committed and (only is None or unit.unit_id in only)
    ]
    return _Work(
        job=job,
        begun=begun,
        model=model,
        saver=saver,
        units=units,
        only=only,
        unfinished=ledger.load_unfinished(begun.flushed) if units else {},
    )


def _run_engine(
    work: _Work, budget: Budget, make_engine: EngineFactory, max_rows: int, worker: Worker | None
) -> EngineStats:
    """Run the pipeline to the end of the work; the engine's last counters.

    Raises what ended it early, as the user is to read it.
    """
    spec, ledger, saver = work.job.spec, work.job.ledger, work.saver

    def say_late(notice: StopNotice) -> None:
        sys.stderr.write(f"error: {stop_error(notice, saver.saved())}; no time for more\n")

    with (
        watch_for(spec.preemption, say_late) as stops,
        Progress(spec.observability.progress) as progress,
    ):
        engine = make_engine(spec, work.model)
        saver.follow(engine.stats)

        def watch() -> BatchgenError | None:
            progress.update(saver.progress(engine.stats(), budget.used_share()))
            if stops.notice is not None:
                return stop_error(stops.notice, saver.saved())
            return budget.reached()

        with UnitReader(spec.input, ledger.plan.files) as reader:
            stages = _make_stages(work, engine, reader, watch, budget, worker)
            flush_interval_s = spec.checkpoint.flush_interval
            pipeline = Pipeline(stages, max_rows=max_rows, flush_interval_s=flush_interval_s)
            try:
                to_do = units_to_do(ledger, work.units) if work.only is None else iter(work.units)
                pipeline.run(to_do, work.begun.recovered, work.only)
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


def _make_stages(
    work: _Work,
    engine: Engine,
    reader: UnitReader,
    watch: Callable[[], BatchgenError | None],
    budget: Budget,
    worker: Worker | None,
) -> Stages:
    spec, builder = work.job.spec, work.model.builder
    kept = pa.schema([work.job.schema.field(name) for name in spec.output.columns.keep])

    def make_prompts(rows: Sequence[InputRow]) -> list[Prompt | RowFailure]:
        return [_resume(made, work.unfinished) for made in _make_prompts(rows, kept, builder)]

    def charge(completions: Sequence[Completion]) -> BatchgenError | None:
        if worker is not None:
            worker.ended(completions)
        return budget.charge(completions)

    return Stages(
        read_unit=lambda unit, wanted: reader.read(unit, wanted=wanted),
        make_prompts=make_prompts,
        kept_columns=kept.names,
        engine=engine,
        saver=work.saver,
        gate=work.begun.gate,
        given=(lambda _: None) if worker is None else worker.given,
        charge=charge,
        watch=watch,
        watchdog=Watchdog(spec.errors.watchdog),
        abandon=_abandon,
    )


def set_aside(job: OpenJob, culprits: Mapping[RowKey, str]) -> OpenJob:
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


def _indices_by_unit(keys: Sequence[RowKey] | None) -> dict[int, set[int]] | None:
    if keys is None:
        return None
    indices: dict[int, set[int]] = {}
    for key in keys:
        indices.setdefault(key.unit_id, set()).add(key.index)
    return indices


def _make_prompts(
    rows: Sequence[InputRow], kept: pa.Schema, builder: PromptBuilder
) -> list[Prompt | RowFailure]:
    """A prompt for each row, unless it has none or its kept values do not fit their columns."""
    misfits = check_rows(kept, [row.values for row in rows])
    fitting = [row for row, misfit in zip(rows, misfits, strict=True) if misfit is None]
    built = iter(builder.build(fitting))
    return [
        next(built) if misfit is None else _failure("bad_record", misfit, row, builder)
        for row, misfit in zip(rows, misfits, strict=True)
    ]


def _resume(
    made: Prompt | RowFailure, unfinished: Mapping[RowKey, UnfinishedRow]
) -> Prompt | RowFailure:
    """The prompt, to go on where an earlier run left it."""
    row = unfinished.get(made.key)
    return replace(made, resumed=row.samples) if row and isinstance(made, Prompt) else made


def _failure(kind: FailureKind, message: str, row: InputRow, builder: PromptBuilder) -> RowFailure:
    """The failure of a row that may have a prompt."""
    shown = builder.show(row)
    return RowError(kind, message, shown if isinstance(shown, str) else "").failure(row)


def _abandon(reason: BaseException) -> None:
    """End a process in which a thread hangs that cannot be ended."""
    sys.stderr.write(f"error: {reason}\n")
    sys.stderr.flush()
    os._exit(BatchgenError.exit_code)
