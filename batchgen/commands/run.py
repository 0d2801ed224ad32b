"""`batchgen run`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from batchgen.commands.options import job_options, load_spec

EXIT_DEAD_LETTERS = 3


@click.command()
@job_options
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
    started_s = time.monotonic()
    spec = load_spec(job, overrides, params, limit, resume)
    from batchgen.runner import run_job

    report = run_job(spec, started_s=started_s)
    click.echo(report.summary, err=True)
    click.echo(report.uri)
    return EXIT_DEAD_LETTERS if report.counts.failed and not allow_errors else 0
