"""The start of a run: what must be right, in the order in which it is cheap to find out.

The input, the output, the ledger, the templates, then the tokenizer; the weights come after all
of these, in `runner`. A job that cannot run leaves no ledger behind, and no torch is loaded here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.dataset.inputs import resolve_inputs
from batchgen.dataset.reader import InputPlan, plan_files, plan_input, read_sample
from batchgen.dataset.storage import Storage, redact
from batchgen.dataset.writer import output_schema
from batchgen.errors import InputError, UsageError
from batchgen.job.fingerprint import job_fingerprint
from batchgen.job.spec import JobSpec
from batchgen.ledger import (
    Ledger,
    LedgerPlan,
    StoredJob,
    add_files,
    check_fingerprint,
    decode_schema,
    decoded,
    encode_schema,
    read_job,
)
from batchgen.models.config import ModelConfig, resolve_max_model_len
from batchgen.models.registry import ModelFiles, load_config, load_tokenizer, resolve_model
from batchgen.prompts.builder import PromptBuilder
from batchgen.prompts.checks import check_columns, check_first_row
from batchgen.records import InputFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LEDGER_FOLDER = ".batchgen"
_PROBE = f"{_LEDGER_FOLDER}/probe"
_OWNER = f"{_LEDGER_FOLDER}/owner"


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


def open_job(spec: JobSpec, *, takes_new_files: bool = True) -> OpenJob:
    """Check the job against its input and output, and open its ledger or begin it.

    `takes_new_files`: that have come to an incremental input; else they wait for another run.
    """
    output = Storage.open(spec.output.uri)
    ledger_storage = open_ledger_storage(spec)
    stored = read_job(ledger_storage)
    text_model = None
    if stored is None:
        plan = check_job(spec)
        _refuse_foreign_files(output, ledger_storage)
        probe(output)
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
        model_files = resolve_model(spec.model)
        if takes_new_files and spec.input.incremental and spec.checkpoint.resume != "never":
            stored = take_in_new_files(spec, ledger_storage, stored, model_files.identity)
            files = stored.plan.files  # which are the input's: that has just been compared
        else:
            files = resolve_inputs(spec.input.uri, spec.input.storage_options)
            if spec.input.incremental and not takes_new_files:
                known = {file.uri for file in stored.plan.files}
                files = [file for file in files if file.uri in known]
        ledger_plan = stored.plan
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
        job=stored,
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


def check_job(spec: JobSpec) -> InputPlan:
    """Plan the input, and check the output's columns and the templates against it.

    Reads the input and renders its first row; writes nothing and loads no model.
    """
    plan = plan_input(spec.input, spec.checkpoint.unit_rows)
    check_plan(spec, plan)
    return plan


def check_plan(spec: JobSpec, plan: InputPlan) -> None:
    """Check the output's columns and the templates against the planned input."""
    if not plan.units and not plan.schema.names:  # the columns of JSONL are those of its rows
        raise InputError(f"the input has no rows: {redact(plan.files[0].uri)} is empty")
    check_columns(spec.prompt, plan.schema.names)
    output_schema(spec.output, plan.schema, num_samples=spec.sampling.n, has_beams=spec.has_beams)
    for row in read_sample(spec.input, plan, 1):
        check_first_row(spec.prompt, row)


def take_in_new_files(
    spec: JobSpec, storage: Storage, job: StoredJob, model: Mapping[str, str]
) -> StoredJob:
    """The job of this ledger with the files that have come to its input: `input.incremental`.

    `model` is the model's identity. Raises JobChangedError if anything else has changed, as an
    old file, and UsageError if the new files do not go with the prompt or with the output.
    """
    schema = decode_schema(job.plan.schema_base64)
    while True:
        files = resolve_inputs(spec.input.uri, spec.input.storage_options)
        known = {file.uri for file in job.plan.files}
        now = job_fingerprint(
            spec,
            input_files=[file for file in files if file.uri in known],
            model=model,
            output_schema=schema.to_string(),
        )
        check_fingerprint(job, now, storage)
        new_files = [file for file in files if file.uri not in known]
        if not new_files:
            return job
        plan = plan_files(spec.input, new_files, spec.checkpoint.unit_rows)
        if plan.units:
            check_plan(spec, plan)
            _check_kept_types(spec, schema, plan)
        added = LedgerPlan(files=plan.files, units=plan.units, schema_base64=job.plan.schema_base64)
        add_files(storage, job, added, files)
        # Another runner may have been first, with other files: what is stored now counts.
        stored = read_job(storage)
        assert stored is not None
        job = stored


def open_ledger_storage(spec: JobSpec) -> Storage:
    """The folder of the job's ledger, which need not exist."""
    return Storage.open(spec.checkpoint.uri or f"{spec.output.uri.rstrip('/')}/{_LEDGER_FOLDER}")


def load_text_model(spec: JobSpec, files: ModelFiles) -> TextModel:
    """Config, tokenizer and templates: what prompts need, without torch."""
    if (os.cpu_count() or 1) <= 2:
        # One core for the tokenizer and one for Python: two threads of the tokenizer's take the
        # second from the thread that holds the interpreter, and a fifth from the rate.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = load_config(files)
    tokenizer = load_tokenizer(files)
    max_model_len = resolve_max_model_len(config, spec.model.max_model_len)
    return TextModel(
        files=files,
        config=config,
        tokenizer=tokenizer,
        builder=PromptBuilder(spec.prompt, spec.sampling, tokenizer, max_model_len),
    )


def _refuse_foreign_files(output: Storage, ledger_storage: Storage) -> None:
    """Raises UsageError if a folder without our ledger holds files, which are not ours then."""
    found = [path for path in output.list() if path != _PROBE]
    # Asked after the listing: job.json is there before every other file of a runner that began
    # the job meanwhile.
    if found and read_job(ledger_storage) is None:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UsageError(
            f"output.uri {redact(output.uri)} holds files ({found[0]}{more}), but no ledger of a "
            "run; choose another folder"
        )


def _check_kept_types(spec: JobSpec, schema: pa.Schema, plan: InputPlan) -> None:
    """Raises InputError if a kept column of new files does not fit the output's."""
    found = output_schema(
        spec.output, plan.schema, num_samples=spec.sampling.n, has_beams=spec.has_beams
    )
    for name in spec.output.columns.keep:
        if pa.types.is_null(plan.schema.field(name).type):
            continue
        old, new = schema.field(name), found.field(name)
        try:
            both = pa.unify_schemas(
                [pa.schema([old]), pa.schema([new])], promote_options="permissive"
            )
            fits = both.field(0).type == old.type
        except pa.ArrowException:
            fits = False
        if not fits:
            raise InputError(
                f"column {name!r} is {new.type} in the files that were added "
                f"({redact(plan.files[0].uri)} is the first), but {old.type} in the output; make "
                "them one type, or start a new output"
            )


def _claim(output: Storage, job_id: str) -> None:
    """Marks the output of a job whose ledger lies elsewhere; raises UsageError if it is taken."""
    try:
        output.create(_OWNER, job_id.encode())
    except FileExistsError:

        def check(owner: bytes) -> None:
            if owner != job_id.encode():
                raise UsageError(
                    f"output.uri {redact(output.uri)} belongs to another job, whose ledger is "
                    "elsewhere; choose another folder"
                )

        decoded(output, _OWNER, output.read(_OWNER), check)


def probe(output: Storage) -> None:
    """Raises StorageError if the output cannot be written, before anything slow is loaded."""
    output.put(_PROBE, b"")
    output.delete([_PROBE])
