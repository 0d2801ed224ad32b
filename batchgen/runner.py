"""Runs a job from its file to its dataset: the one module that knows every room.

The order of start-up is the order in which things are cheap to find out: the input, the output,
the ledger, the templates, then the tokenizer, and the weights last. A job that cannot run leaves
no ledger behind, and a job that is done loads no torch.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen import __version__
from batchgen.dataset.card import CardFacts, dataset_card
from batchgen.dataset.inputs import resolve_inputs
from batchgen.dataset.reader import InputPlan, UnitReader, plan_input, read_sample
from batchgen.dataset.storage import Storage, redact
from batchgen.dataset.writer import check_values, output_schema, publish
from batchgen.engine.from_job import engine_options, sampling_options
from batchgen.errors import BatchgenError, Interrupted, Preempted, UsageError
from batchgen.job.fingerprint import job_fingerprint
from batchgen.job.spec import JobSpec
from batchgen.ledger import (
    Ledger,
    LedgerPlan,
    RunCounts,
    decode_schema,
    encode_schema,
    read_job,
    read_status,
)
from batchgen.models.config import ModelConfig, resolve_max_model_len
from batchgen.models.registry import ModelFiles, load_config, load_tokenizer, resolve_model
from batchgen.monitor.preemption import SignalWatch, StopReason
from batchgen.monitor.progress import Progress
from batchgen.monitor.summary import RunSummary, summary_text
from batchgen.pipeline import PLANNING_WINDOW_ROWS, Engine, FailureGate, Pipeline, Stages
from batchgen.prompts.builder import PromptBuilder
from batchgen.prompts.checks import check_columns, check_first_row
from batchgen.records import (
    EngineStats,
    InputFile,
    InputRow,
    Part,
    Prompt,
    RowFailure,
    RowResult,
)
from batchgen.units import FinishedUnit, UnitSaver

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LEDGER_FOLDER = ".batchgen"
_PROBE = f"{_LEDGER_FOLDER}/probe"
_OWNER = f"{_LEDGER_FOLDER}/owner"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a run ended that has published its dataset."""

    uri: str
    counts: RunCounts
    summary: str  # for people


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """A model but for its weights."""

    files: ModelFiles
    config: ModelConfig
    tokenizer: PreTrainedTokenizerFast
    builder: PromptBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenJob:
    """A job whose ledger is open."""

    spec: JobSpec
    output: Storage
    ledger_storage: Storage
    ledger: Ledger
    schema: pa.Schema  # of the output
    model_files: ModelFiles
    text_model: TextModel | None  # loaded already, when the ledger is new


EngineFactory = Callable[[JobSpec, TextModel], Engine]


def run_job(
    spec: JobSpec,
    *,
    make_engine: EngineFactory | None = None,
    max_rows: int = PLANNING_WINDOW_ROWS,
) -> RunReport:
    """Run a job to its published dataset, from wherever earlier runs have brought it.

    `make_engine` stands in for the engine in tests; `max_rows` bounds the rows in memory.
    Raises BatchgenError: what stopped the run.
    """
    started = time.monotonic()
    job = open_job(spec)
    if job.ledger.is_complete and read_status(job.ledger_storage)["state"] == "done":
        return _report(job, earlier_rows=job.ledger.counts().ended)
    recovered = job.ledger.load_partials()
    earlier_rows = job.ledger.counts().ended
    stats = _generate(job, recovered, make_engine or load_engine, max_rows)
    counts = job.ledger.counts()
    parts = _committed_parts(job.ledger)
    num_written = sum(part.num_rows for part in parts)
    if counts.ended != counts.total or num_written != counts.ok * spec.output_rows_per_row:
        raise BatchgenError(
            f"the counts do not add up: {counts.ok} ok + {counts.failed} failed + "
            f"{counts.skipped} skipped rows of {counts.total}, and {num_written} rows of output; "
            "nothing was published"
        )
    wall_s = time.monotonic() - started
    card = dataset_card(_card_facts(job, counts, wall_s))
    publish(job.output, spec.output, job.schema, parts, card)
    job.ledger.finish()
    return _report(job, earlier_rows=earlier_rows, wall_s=wall_s, stats=stats)


def check_job(spec: JobSpec) -> InputPlan:
    """Plan the input, and check the output's columns and the templates against it.

    Reads the input and renders its first row; writes nothing and loads no model.
    """
    plan = plan_input(spec.input, spec.checkpoint.unit_rows)
    check_columns(spec.prompt, plan.schema.names)
    output_schema(spec.output, plan.schema, num_samples=spec.sampling.n, has_beams=spec.has_beams)
    for row in read_sample(spec.input, plan, 1):
        check_first_row(spec.prompt, row)
    return plan


def open_ledger_storage(spec: JobSpec) -> Storage:
    """The folder of the job's ledger, which need not exist."""
    return Storage.open(spec.checkpoint.uri or f"{spec.output.uri.rstrip('/')}/{_LEDGER_FOLDER}")


def open_job(spec: JobSpec) -> OpenJob:
    """Check the job against its input and output, and open its ledger or begin it."""
    output = Storage.open(spec.output.uri)
    ledger_storage = open_ledger_storage(spec)
    stored = read_job(ledger_storage)
    text_model = None
    if stored is None:
        plan = check_job(spec)
        if read_job(ledger_storage) is None:  # unless another runner began it meanwhile
            _refuse_foreign_files(output)
        _probe(output)
        model_files = resolve_model(spec.model)
        # Before the ledger begins: a model that cannot be used must not bind the folder to it.
        text_model = load_text_model(spec, model_files)
        files: Sequence[InputFile] = plan.files
        schema = output_schema(
            spec.output, plan.schema, num_samples=spec.sampling.n, has_beams=spec.has_beams
        )
        ledger_plan = LedgerPlan(
            files=plan.files, units=plan.units, schema_base64=encode_schema(schema)
        )
    else:
        ledger_plan = stored.plan
        files = resolve_inputs(spec.input.uri, spec.input.storage_options)
        model_files = resolve_model(spec.model)
    ledger = Ledger.open(
        ledger_storage,
        resume=spec.checkpoint.resume,
        fingerprint=job_fingerprint(
            spec,
            input_files=files,
            model=model_files.identity,
            output_schema=decode_schema(ledger_plan.schema_base64).to_string(),
        ),
        make_plan=lambda: ledger_plan,
    )
    if spec.checkpoint.uri is not None:
        _claim(output, ledger.job_id)
    return OpenJob(
        spec=spec,
        output=output,
        ledger_storage=ledger_storage,
        ledger=ledger,
        schema=decode_schema(ledger.plan.schema_base64),
        model_files=model_files,
        text_model=text_model,
    )


def load_text_model(spec: JobSpec, files: ModelFiles) -> TextModel:
    """Config, tokenizer and templates: what prompts need, without torch."""
    config = load_config(files)
    tokenizer = load_tokenizer(files)
    max_model_len = resolve_max_model_len(config, spec.model.max_model_len)
    return TextModel(
        files=files,
        config=config,
        tokenizer=tokenizer,
        builder=PromptBuilder(spec.prompt, spec.sampling, tokenizer, max_model_len),
    )


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
    make_engine: EngineFactory,
    max_rows: int,
) -> EngineStats | None:
    """Bring every unit to its commit; None if that took no engine.

    `recovered` are the results that earlier runs have left, by unit.
    """
    spec, ledger = job.spec, job.ledger
    _probe(job.output)
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
    with SignalWatch() as signals, Progress(spec.observability.progress) as progress:
        engine = make_engine(spec, model)
        kept = pa.schema([job.schema.field(name) for name in spec.output.columns.keep])

        def watch() -> BatchgenError | None:
            progress.update(saver.progress(engine.stats()))
            return _stop_error(signals.reason)

        with UnitReader(spec.input, ledger.plan.files) as reader:
            stages = Stages(
                read_unit=lambda unit, wanted: reader.read(unit, wanted=wanted),
                make_prompts=lambda rows: _make_prompts(rows, kept, model.builder),
                kept_columns=kept.names,
                engine=engine,
                saver=saver,
                gate=FailureGate(
                    fail_on_first=spec.errors.on_error == "fail",
                    max_error_rate=spec.errors.max_error_rate,
                    window=spec.errors.window,
                ),
                watch=watch,
            )
            flush_interval_s = spec.checkpoint.flush_interval
            pipeline = Pipeline(stages, max_rows=max_rows, flush_interval_s=flush_interval_s)
            try:
                pipeline.run(units, recovered)
            finally:
                watch()  # what is shown last is how it ended
    return engine.stats()


def _stop_error(reason: StopReason | None) -> BatchgenError | None:
    again = "finished rows are saved: run the same command again to go on"
    match reason:
        case "preempted":
            return Preempted(f"preempted; {again}")
        case "interrupted":
            return Interrupted(f"interrupted; {again}")
    return None


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
            letters = job.ledger_storage.read(commit.dead_letters.path).splitlines()
            kinds.update(json.loads(letter)["kind"] for letter in letters)
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
    spec = job.spec
    changed = spec.sampling.model_dump(exclude_defaults=True)
    return CardFacts(
        job_name=spec.name,
        model=spec.model.name_or_path,
        model_revision=job.model_files.identity.get("revision"),
        input_uris=[file.uri for file in job.ledger.plan.files],
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
    return [
        part for unit_id in sorted(ledger.committed) for part in ledger.committed[unit_id].parts
    ]


def _refuse_foreign_files(output: Storage) -> None:
    """Raises UsageError if a folder without our ledger holds files, which are not ours then."""
    found = [path for path in output.list() if path != _PROBE]
    if found:
        raise UsageError(
            f"output.uri {redact(output.uri)} is not empty ({found[0]} and "
            f"{len(found) - 1} more files) and holds no ledger of a run; choose another folder"
        )


def _claim(output: Storage, job_id: str) -> None:
    """Marks the output of a job whose ledger lies elsewhere; raises UsageError if it is taken."""
    try:
        output.create(_OWNER, job_id.encode())
    except FileExistsError:
        if output.read(_OWNER) != job_id.encode():
            raise UsageError(
                f"output.uri {redact(output.uri)} belongs to another job, whose ledger is "
                "elsewhere; choose another folder"
            ) from None


def _probe(output: Storage) -> None:
    """Raises StorageError if the output cannot be written, before anything slow is loaded."""
    output.put(_PROBE, b"")
    output.delete([_PROBE])
