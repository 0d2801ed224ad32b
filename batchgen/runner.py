"""Runs a job from its file to its dataset: the one module that knows every room.

What comes before the model's weights is `startup`. A job that is done loads no torch.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa

from batchgen import __version__
from batchgen.dataset.card import CardFacts, dataset_card
from batchgen.dataset.reader import UnitReader
from batchgen.dataset.storage import redact
from batchgen.dataset.writer import check_values, publish
from batchgen.engine.from_job import engine_options, sampling_options
from batchgen.errors import BatchgenError, BudgetReached, Interrupted, Preempted
from batchgen.job.spec import JobSpec
from batchgen.ledger import Ledger, RunCounts, count_kinds
from batchgen.monitor.budget import Budget, budget_text
from batchgen.monitor.preemption import StopNotice, stop_error, watch_for
from batchgen.monitor.progress import Progress
from batchgen.monitor.summary import RunSummary, summary_text
from batchgen.pipeline import PLANNING_WINDOW_ROWS, Engine, FailureGate, Pipeline, Stages
from batchgen.prompts.builder import PromptBuilder
from batchgen.records import (
    EngineStats,
    InputRow,
    Part,
    Prompt,
    RowFailure,
    RowKey,
    RowResult,
    UnfinishedRow,
)
from batchgen.startup import OpenJob, TextModel, load_text_model, open_job, probe
from batchgen.units import FinishedUnit, UnitSaver, units_to_do


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a run ended that has published its dataset."""

    uri: str
    counts: RunCounts
    summary: str  # for people


EngineFactory = Callable[[JobSpec, TextModel], Engine]


def run_job(
    spec: JobSpec,
    *,
    make_engine: EngineFactory | None = None,
    max_rows: int = PLANNING_WINDOW_ROWS,
    started_s: float | None = None,
) -> RunReport:
    """Run a job to its published dataset, from wherever earlier runs have brought it.

    `make_engine` stands in for the engine in tests; `max_rows` bounds the rows in memory.
    `started_s` is when the command began, by time.monotonic(); now unless given.
    Raises BatchgenError: what stopped the run.
    """
    started_s = time.monotonic() if started_s is None else started_s
    job = open_job(spec)
    if job.ledger.is_published():
        return _report(job, earlier_rows=job.ledger.counts().ended)
    run = partial(_run_to_publication, make_engine or load_engine, max_rows, started_s)
    while (report := run(job)) is None:
        job = open_job(spec)
    return report


def _run_to_publication(
    make_engine: EngineFactory, max_rows: int, started_s: float, job: OpenJob
) -> RunReport | None:
    """Bring the job, as its ledger was opened, to a published dataset.

    None where another run has added files to the job meanwhile. What is published then may lie
    over what the other has published: the job is to be opened again and brought to its end.
    """
    spec = job.spec
    recovered = job.ledger.load_partials()
    earlier = job.ledger.counts()
    budget = Budget(spec.budget, started_s=started_s, output_tokens=earlier.output_tokens)
    stats = _generate(job, recovered, budget, make_engine, max_rows)
    job.ledger.load_new_commits()
    counts = job.ledger.counts()
    parts = _committed_parts(job.ledger)
    num_written = sum(part.num_rows for part in parts)
    if counts.ended != counts.total or num_written != counts.ok * spec.output_rows_per_row:
        raise BatchgenError(
            f"the counts do not add up: {counts.ok} ok + {counts.failed} failed + "
            f"{counts.skipped} skipped rows of {counts.total}, and {num_written} rows of output; "
            "nothing was published"
        )
    wall_s = time.monotonic() - started_s
    if job.ledger.has_grown():
        return None
    card = dataset_card(_card_facts(job, counts, wall_s))
    num_units = len(job.ledger.plan.units)
    publish(job.output, spec.output, job.schema, parts, card, num_units=num_units)
    job.ledger.finish()
    if job.ledger.has_grown():
        return None
    return _report(job, earlier_rows=earlier.ended, wall_s=wall_s, stats=stats)


def load_engine(spec: JobSpec, model: TextModel) -> Engine:
    """The engine with the model's weights. This is what imports torch."""
    from batchgen.engine.build import build_engine

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
    recovered: dict[int, list[RowResult]],
    budget: Budget,
    make_engine: EngineFactory,
    max_rows: int,
) -> EngineStats | None:
    """Bring every unit to its commit; None if that took no engine.

    `recovered` are the results that earlier runs have left, by unit.
    """
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
        results = recovered.get(unit.unit_id, ())
        if len(results) == unit.num_rows:  # killed between its last row and its commit
            saver.commit(FinishedUnit(unit=unit, results=results, wall_s=0.0))
    units = [unit for unit in units if unit.unit_id not in ledger.committed]
    if not units:
        return None
    unfinished = ledger.load_unfinished(recovered)

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

        with UnitReader(spec.input, ledger.plan.files) as reader:
            stages = Stages(
                read_unit=lambda unit, wanted: reader.read(unit, wanted=wanted),
                make_prompts=lambda rows: [
                    _resume(made, unfinished) for made in _make_prompts(rows, kept, model.builder)
                ],
                kept_columns=kept.names,
                engine=engine,
                saver=saver,
                gate=FailureGate(
                    fail_on_first=spec.errors.on_error == "fail",
                    max_error_rate=spec.errors.max_error_rate,
                    window=spec.errors.window,
                ),
                charge=budget.charge,
                watch=watch,
            )
            flush_interval_s = spec.checkpoint.flush_interval
            pipeline = Pipeline(stages, max_rows=max_rows, flush_interval_s=flush_interval_s)
            try:
                pipeline.run(units_to_do(ledger, units), recovered)
            except BudgetReached:
                if not ledger.is_complete:  # else it was reached by the very last rows
                    raise
            except (Preempted, Interrupted) as error:
                if stops.notice is None:
                    raise
                raise stop_error(stops.notice, saver.saved()) from error
            finally:
                watch()  # what is shown last is how it ended
    return engine.stats()


def _resume(
    made: Prompt | RowFailure, unfinished: Mapping[RowKey, UnfinishedRow]
) -> Prompt | RowFailure:
    """The prompt, to go on where an earlier run left it."""
    row = unfinished.get(made.key)
    return replace(made, resumed=row.samples) if row and isinstance(made, Prompt) else made


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
        if commit.dead_letters is not None:
            kinds += count_kinds(job.ledger_storage, commit.dead_letters)
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
        next(built)
        if misfit is None
        else RowFailure(key=row.key, address=row.address, kind="bad_record", message=misfit)
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
