"""Job files to begin with, and what may stand in them: `init`, `schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from batchgen.errors import UsageError


@click.command()
def schema() -> None:
    """Print the JSON Schema of a job file."""
    from batchgen.job.schema import job_json_schema

    click.echo(json.dumps(job_json_schema(), indent=2))


@click.command()
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
