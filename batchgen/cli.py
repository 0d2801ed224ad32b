"""The command line. stdout is for results, stderr for progress and logs; exit codes in `errors`.

Everything heavy is imported inside the command that needs it: `batchgen --help` and
`batchgen validate` import neither torch nor triton, nor does `run` when nothing is left to do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from batchgen import __version__
from batchgen.errors import BatchgenError, Interrupted, UnsupportedError, UsageError

if TYPE_CHECKING:
    from batchgen.job.spec import JobSpec

F = TypeVar("F", bound=Callable[..., Any])

EXIT_UNEXPECTED = 1
EXIT_DEAD_LETTERS = 3

# Commands of the design that are not built yet, and what serves until then.
_NOT_BUILT: Mapping[str, str] = MappingProxyType(
    {
        "errors": "dead letters are JSON lines in the folder dead/ of the ledger",
        "retry": "run the failed rows as a job of their own",
        "verify": "each commit of the ledger names its parts with their checksums",
        "doctor": "`batchgen validate JOB` checks a job, `batchgen plan JOB` what it would run",
        "report": "`batchgen status --json JOB` has the counts",
    }
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchgen")
def cli() -> None:
    """Run a language model over a dataset: Parquet or JSONL in, a dataset out."""


def _job_options(command: F) -> F:
    """The job file, and what the command line changes in it."""
    command = click.option(
        "-p", "params", multiple=True, metavar="NAME=VALUE", help="Set a param (repeatable)."
    )(command)
    command = click.option(
        "-o",
        "overrides",
        multiple=True,
        metavar="A.B=VALUE",
        help="Set any key of the job file (repeatable).",
    )(command)
    command = click.option(
        "--limit", type=click.IntRange(min=1), help="Read only so many rows: -o input.limit=N."
    )(command)
    return click.argument("job", type=click.Path(path_type=Path))(command)


def _load_job(
    job: Path,
    overrides: Sequence[str],
    params: Sequence[str],
    limit: int | None,
    resume: str | None = None,
) -> JobSpec:
    from batchgen.job.loading import load_job

    options = {"input.limit": limit, "checkpoint.resume": resume}
    more = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load_job(job, [*overrides, *more], params)


@cli.command()
@_job_options
@click.option(
    "--resume",
    type=click.Choice(["if_possible", "always", "never"]),
    help="What to do about an earlier run's work: -o checkpoint.resume=MODE.",
)
@click.option("--allow-errors", is_flag=True, help="Exit 0 even if some rows are dead letters.")
def run(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    resume: str | None,
    allow_errors: bool,
) -> int:
    """Run a job to its end, or go on with it. Prints the uri of the dataset."""
    spec = _load_job(job, overrides, params, limit, resume)
    from batchgen.runner import run_job

    report = run_job(spec)
    click.echo(report.summary, err=True)
    click.echo(report.uri)
    return EXIT_DEAD_LETTERS if report.counts.failed and not allow_errors else 0


@cli.command()
@_job_options
def validate(
    job: Path, overrides: tuple[str, ...], params: tuple[str, ...], limit: int | None
) -> None:
    """Check a job file against its input, without loading the model."""
    spec = _load_job(job, overrides, params, limit)
    from batchgen.runner import check_job

    planned = check_job(spec)
    num_rows = sum(unit.num_rows for unit in planned.units)
    click.echo(f"{job}: valid; {num_rows} rows, {len(planned.files)} input files")


@cli.command()
@_job_options
@click.option("-n", "num_rows", type=click.IntRange(min=1), default=5, show_default=True)
def preview(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    num_rows: int,
) -> None:
    """Print the first prompts, one JSON object a line."""
    spec = _load_job(job, overrides, params, limit)
    from batchgen.dataset.reader import read_sample
    from batchgen.models.registry import resolve_model
    from batchgen.records import RowFailure
    from batchgen.runner import check_job, load_text_model

    rows = read_sample(spec.input, check_job(spec), num_rows)
    model = load_text_model(spec, resolve_model(spec.model))
    for row, made in zip(rows, model.builder.build(rows), strict=True):
        shown: dict[str, object] = {"row_address": row.address}
        if isinstance(made, RowFailure):
            shown["error"] = f"{made.kind}: {made.message}"
        else:
            token_ids = list(made.token_ids)
            shown["prompt"] = model.tokenizer.decode(token_ids)
            shown["prompt_tokens"] = len(token_ids)
        click.echo(json.dumps(shown, ensure_ascii=False))


@cli.command()
@_job_options
def plan(job: Path, overrides: tuple[str, ...], params: tuple[str, ...], limit: int | None) -> None:
    """Print what a run would do, as one JSON object."""
    spec = _load_job(job, overrides, params, limit)
    from batchgen.dataset.storage import redact
    from batchgen.dataset.writer import output_schema
    from batchgen.runner import check_job, open_ledger_storage

    planned = check_job(spec)
    columns = output_schema(
        spec.output, planned.schema, num_samples=spec.sampling.n, has_beams=spec.has_beams
    )
    shown = {
        "name": spec.name,
        "input": [{"uri": redact(f.uri), "size_bytes": f.size_bytes} for f in planned.files],
        "rows": sum(unit.num_rows for unit in planned.units),
        "units": len(planned.units),
        "model": spec.model.name_or_path,
        "output": {
            "uri": redact(spec.output.uri),
            "format": spec.output.format,
            "columns": {field.name: str(field.type) for field in columns},
        },
        "ledger": redact(open_ledger_storage(spec).uri),
    }
    click.echo(json.dumps(shown, indent=2, ensure_ascii=False))


@cli.command()
@_job_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    as_json: bool,
) -> None:
    """Print how far a job is, from its ledger alone."""
    spec = _load_job(job, overrides, params, limit)
    from batchgen.ledger import read_status
    from batchgen.runner import open_ledger_storage

    state: dict[str, Any] = read_status(open_ledger_storage(spec))
    if as_json:
        click.echo(json.dumps(state))
        return
    rows = state["rows"]
    click.echo(
        f"{spec.name}: {state['state']}; {rows['total']} rows: {rows['ok']} ok, "
        f"{rows['failed']} failed, {rows['skipped']} skipped"
    )


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a job file."""
    from batchgen.job.schema import job_json_schema

    click.echo(json.dumps(job_json_schema(), indent=2))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("job.yaml"))
def init(path: Path) -> None:
    """Write a first job file, and its schema for editors beside it."""
    from batchgen.job.schema import job_json_schema
    from batchgen.job.starter import init_job_text

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(init_job_text(path.stem))
        schema_text = json.dumps(job_json_schema(), indent=2)
        path.with_name("job.schema.json").write_text(f"{schema_text}\n", encoding="utf-8")
    except FileExistsError:
        raise UsageError(f"{path} exists already; choose another name") from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    click.echo(path)


@cli.command()
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model-config", type=click.Path(path_type=Path), help="A config.json.")
@click.option("--model", help="A model as in model.name_or_path; its own config.json is used.")
@click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy: random weights.",
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
)
@click.option(
    "-o",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of engine, model.KEY, such as model.quantization=fp8, or a key of beams, such as "
    "sampling.beam_width=4 (repeatable).",
)
def bench(
    requests: Path,
    model_config: Path | None,
    model: str | None,
    load_format: Literal["auto", "dummy"],
    device: str,
    dtype: Literal["auto", "bfloat16", "float16", "float32"],
    overrides: tuple[str, ...],
) -> None:
    """Time the engine alone on a file of token ids. Prints one JSON object."""
    if model is not None and model_config is not None:
        raise UsageError("give one of --model and --model-config, not both")
    if model_config is not None and load_format != "dummy":
        raise UsageError("--model-config has no weights: add --load-format dummy, or give --model")
    from batchgen.engine.bench import run_bench
    from batchgen.engine.from_job import engine_options, sampling_options
    from batchgen.models.registry import load_config, read_config, resolve_model

    options = [f"device={device}", f"model.dtype={dtype}", *overrides]
    spec = _bench_spec(model or "config", options)
    files = None
    if model is not None:
        files = resolve_model(spec.model)
        config = load_config(files)
    elif model_config is not None:
        config = read_config(model_config)
    else:
        raise UsageError("bench needs --model or --model-config")
    result = run_bench(
        requests,
        config,
        files,
        dataclasses.replace(engine_options(spec.engine, spec.model), load_format=load_format),
        sampling_options(spec.sampling, config),
    )
    click.echo(json.dumps(result))


def _bench_spec(model: str, overrides: Sequence[str]) -> JobSpec:
    """A job with these `key=value` texts in its engine, model and beams, the values in YAML."""
    import yaml
    from pydantic import ValidationError

    from batchgen.job.problems import Problem, spec_problems
    from batchgen.job.spec import JobSpec
    from batchgen.job.unbuilt import unbuilt_problems

    def told(problems: Sequence[Problem]) -> str:
        return "\n".join(f"-o {'.'.join(map(str, each.path))}: {each.text}" for each in problems)

    of_beams = ("beam_width", "length_penalty", "early_stopping")
    sections: dict[str, dict[str, object]] = {
        "engine": {},
        "model": {"name_or_path": model},
        "sampling": {},
    }
    for text in overrides:
        key, equals, value = text.partition("=")
        section, _, name = key.rpartition(".")
        is_known = (section or "engine") in sections and (section != "sampling" or name in of_beams)
        if not equals or not is_known:
            raise UsageError(
                f"-o {text}: should be key=value with a key of engine or model, such as "
                "max_num_seqs=64 or model.quantization=fp8, or one of beams, such as "
                "sampling.beam_width=4"
            )
        sections[section or "engine"][name] = yaml.safe_load(value)
    unused = {"input": {"uri": "-"}, "prompt": {"template": "-"}, "output": {"uri": "-"}}
    try:
        spec = JobSpec.model_validate(sections | unused)
    except ValidationError as error:
        raise UsageError(told(spec_problems(error, sections))) from None
    if problems := unbuilt_problems(spec):
        raise UnsupportedError(told(problems))
    return spec


def _add_not_built(name: str, instead: str) -> None:
    @cli.command(name, hidden=True, context_settings={"ignore_unknown_options": True})
    @click.argument("_args", nargs=-1, type=click.UNPROCESSED)
    def refuse(_args: tuple[str, ...]) -> None:
        raise UnsupportedError(f"`batchgen {name}` is not built yet; {instead}")


for _name, _instead in _NOT_BUILT.items():
    _add_not_built(_name, _instead)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit the process with the code that the contract gives."""
    sys.exit(_run_command(argv))


def _run_command(argv: Sequence[str] | None) -> int:
    try:
        # Not click's standalone mode: it would make its own of Ctrl-C and of a broken pipe.
        code = cli.main(args=argv, prog_name="batchgen", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BatchgenError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("error: interrupted", err=True)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of stdout has gone; the interpreter's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except Exception as error:
        traceback.print_exc()
        click.echo(
            f"error: unexpected {type(error).__name__}: {error}; finished rows are kept, "
            "run the same command again to go on",
            err=True,
        )
        return EXIT_UNEXPECTED
