"""`batchgen run` and `batchgen retry`."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from batchgen.commands.options import job_options, load_spec
from batchgen.errors import EngineError
from batchgen.records import FailureKind
from batchgen.redaction import environment_secrets, redact_message
from batchgen.supervision import Worker, supervise

if TYPE_CHECKING:
    from batchgen.job.spec import JobSpec
    from batchgen.runner import RunReport

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

    def work(worker: Worker | None) -> RunReport:
        from batchgen.runner import run_job

        return run_job(spec, started_s=started_s, worker=worker)

    return run_supervised(spec, work, allow_errors)


@click.command()
@job_options
@click.option(
    "--only", type=click.Choice(get_args(FailureKind)), help="Only rows that failed by this type."
)
@click.option("--allow-errors", is_flag=True, help="Exit 0 even if some rows are dead letters.")
def retry(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    only: FailureKind | None,
    allow_errors: bool,
) -> int:
    """Run the failed rows of a finished job again. Prints the uri of the dataset."""
    started_s = time.monotonic()
    spec = load_spec(job, overrides, params, limit)
    retry_id = secrets.token_hex(8)

    def work(worker: Worker | None) -> RunReport:
        from batchgen.retry import Retry
        from batchgen.runner import run_job

        asked = Retry(retry_id=retry_id, only=only)
        return run_job(spec, started_s=started_s, retry=asked, worker=worker)

    return run_supervised(spec, work, allow_errors)


def run_supervised(
    spec: JobSpec, work: Callable[[Worker | None], RunReport], allow_errors: bool
) -> int:
    """The exit code of this process; what is printed is printed by the worker, if there is one."""

    def work_and_print(worker: Worker | None) -> int:
        try:
            report = work(worker)
        except EngineError as error:
            if worker is None or worker.assignment.only is None:  # else it was shown before
                text = "".join(traceback.format_exception(error.__cause__))
                click.echo(redact_message(text, environment_secrets()), err=True)
            if worker is None:
                raise
            return error.exit_code  # the supervisor says what it does about it
        if worker is not None and worker.assignment.only is not None:
            return 0
        click.echo(report.summary, err=True)
        click.echo(report.uri)
        return EXIT_DEAD_LETTERS if report.counts.failed and not allow_errors else 0

    if spec.errors.on_error == "fail":
        return work_and_print(None)
    from batchgen.monitor.preemption import watched_signals

    return supervise(work_and_print, watched_signals(spec.preemption))
