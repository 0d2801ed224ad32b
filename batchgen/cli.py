"""The command line. stdout is for results, stderr for progress and logs; exit codes in `errors`.

Everything heavy is imported inside the command that needs it: `batchgen --help` and
`batchgen validate` import neither torch nor triton, nor does `run` when nothing is left to do.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import click

from batchgen import __version__
from batchgen.commands.bench import bench
from batchgen.commands.check import plan, preview, validate
from batchgen.commands.job_files import init, schema
from batchgen.commands.outcome import errors, status, verify
from batchgen.commands.run import retry, run
from batchgen.commands.stderr import keep_stderr
from batchgen.errors import BatchgenError, Interrupted, Preempted, UnsupportedError
from batchgen.redaction import environment_secrets, mask_values, redact, redact_message

EXIT_UNEXPECTED = 1

# Commands of the design that are not built yet, and what serves until then.
_NOT_BUILT: Mapping[str, str] = MappingProxyType(
    {
        "doctor": "`batchgen validate JOB` checks a job, `batchgen plan JOB` what it would run",
        "report": "`batchgen status --json JOB` has the counts",
    }
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchgen")
def cli() -> None:
    """Run a language model over a dataset: Parquet or JSONL in, a dataset out."""


for _command in (
    run,
    validate,
    preview,
    plan,
    status,
    errors,
    retry,
    verify,
    schema,
    init,
    bench,
):
    cli.add_command(_command)


def _add_not_built(name: str, instead: str) -> None:
    @cli.command(name, hidden=True, context_settings={"ignore_unknown_options": True})
    @click.argument("_args", nargs=-1, type=click.UNPROCESSED)
    def refuse(_args: tuple[str, ...]) -> None:
        raise UnsupportedError(f"`batchgen {name}` is not built yet; {instead}")


for _name, _instead in _NOT_BUILT.items():
    _add_not_built(_name, _instead)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit the process with the code that the contract gives."""
    process_id = os.getpid()
    keep_stderr()
    code = _run_command(argv)
    # A worker, forked by `supervise`: what the caller does next is the parent's alone. After a
    # notice all is saved, and to take the interpreter apart takes seconds that may not be left.
    if os.getpid() != process_id or code == Preempted.exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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
        click.echo(f"error: {redact(mask_values(str(error), environment_secrets()))}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("error: interrupted", err=True)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of stdout has gone; the interpreter's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except Exception as error:
        click.echo(redact_message(traceback.format_exc(), environment_secrets()), err=True)
        why = redact_message(str(error), environment_secrets())
        click.echo(
            f"error: unexpected {type(error).__name__}: {why}; what the ledger has is kept, "
            "run the same command again to go on",
            err=True,
        )
        return EXIT_UNEXPECTED
