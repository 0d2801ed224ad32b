"""What the commands that take a job have in common: the job file, and what is changed in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from batchgen.job.spec import JobSpec

F = TypeVar("F", bound=Callable[..., Any])


def job_options(command: F) -> F:
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


def load_spec(
    job: Path,
    overrides: Sequence[str],
    params: Sequence[str],
    limit: int | None,
    resume: str | None = None,
) -> JobSpec:
    """The job in this file, with what the options change in it."""
    from batchgen.job.loading import load_job

    options = {"input.limit": limit, "checkpoint.resume": resume}
    more = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load_job(job, [*overrides, *more], params)
