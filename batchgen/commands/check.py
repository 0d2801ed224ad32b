"""What can be known before a run: `validate`, `preview`, `plan`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from batchgen.commands.options import job_options, load_spec
from batchgen.redaction import redact


@click.command()
@job_options
def validate(
    job: Path, overrides: tuple[str, ...], params: tuple[str, ...], limit: int | None
) -> None:
    """Check a job file against its input, without loading the model."""
    spec = load_spec(job, overrides, params, limit)
    from batchgen.startup import check_job

    planned = check_job(spec)
    num_rows = sum(unit.num_rows for unit in planned.units)
    click.echo(f"{job}: valid; {num_rows} rows, {len(planned.files)} input files")


@click.command()
@job_options
@click.option("-n", "num_rows", type=click.IntRange(min=1), default=5, show_default=True)
def preview(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    num_rows: int,
) -> None:
    """Print the first prompts, one JSON object a line."""
    spec = load_spec(job, overrides, params, limit)
    from batchgen.dataset.reader import read_sample
    from batchgen.models.registry import resolve_model
    from batchgen.records import RowFailure
    from batchgen.startup import check_job, load_text_model

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


@click.command()
@job_options
def plan(job: Path, overrides: tuple[str, ...], params: tuple[str, ...], limit: int | None) -> None:
    """Print what a run would do, as one JSON object."""
    spec = load_spec(job, overrides, params, limit)
    from batchgen.dataset.writer import output_schema
    from batchgen.startup import check_job, open_ledger_storage

    planned = check_job(spec)
    columns = output_schema(
        spec.output, planned.schema, num_samples=spec.sampling.n, has_beams=spec.has_beams
    )
    shown = {
        "name": spec.name,
        "input": [{"uri": redact(f.uri), "size_bytes": f.size_bytes} for f in planned.files],
        "rows": sum(unit.num_rows for unit in planned.units),
        "units": len(planned.units),
        "model": redact(spec.model.name_or_path),
        "output": {
            "uri": redact(spec.output.uri),
            "format": spec.output.format,
            "columns": {field.name: str(field.type) for field in columns},
        },
        "ledger": redact(open_ledger_storage(spec).uri),
    }
    click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
