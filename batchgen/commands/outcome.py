"""What a job has come to: `status`, `errors`, `verify`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import click

from batchgen.commands.options import job_options, load_spec
from batchgen.errors import StorageError, UsageError
from batchgen.records import FailureKind, RowFailure


@click.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    as_json: bool,
) -> None:
    """Print how far a job is, from its ledger alone."""
    spec = load_spec(job, overrides, params, limit)
    from batchgen.ledger import read_status
    from batchgen.monitor.summary import kv_text
    from batchgen.records import EngineStats
    from batchgen.startup import open_ledger_storage

    state: dict[str, Any] = read_status(open_ledger_storage(spec))
    used, max_tokens = state["tokens"]["output"], spec.budget.max_output_tokens
    state["budget"] = {"output_tokens": {"used": used, "max": max_tokens}}
    if as_json:
        click.echo(json.dumps(state))
        return
    rows = state["rows"]
    click.echo(
        f"{spec.name}: {state['state']}; {rows['total']} rows: {rows['ok']} ok, "
        f"{rows['failed']} failed, {rows['skipped']} skipped"
        + ("" if max_tokens is None else f"; {used} of {max_tokens} output tokens used")
    )
    if (totals := state["runs"]["engine"]) is not None:
        click.echo(kv_text(EngineStats(**totals)))


@click.command()
@job_options
@click.option(
    "--type", "kind", type=click.Choice(get_args(FailureKind)), help="Only rows of this type."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "-n", "num_shown", type=click.IntRange(min=0), default=20, show_default=True, help="Rows shown."
)
def errors(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    kind: FailureKind | None,
    as_json: bool,
    num_shown: int,
) -> None:
    """Print which rows failed and why, from the job's ledger alone."""
    spec = load_spec(job, overrides, params, limit)
    from batchgen.dataset.storage import redact
    from batchgen.ledger import read_job, read_job_failures
    from batchgen.startup import open_ledger_storage

    ledger = open_ledger_storage(spec)
    stored = read_job(ledger)
    if stored is None:
        raise UsageError(f"{redact(ledger.uri)} holds no ledger; run the job first")
    counts: Counter[str] = Counter()
    shown: list[RowFailure] = []
    for failure in read_job_failures(ledger, stored):
        if kind is None or failure.kind == kind:
            counts[failure.kind] += 1
            if len(shown) < num_shown:
                shown.append(failure)
    if as_json:
        click.echo(_errors_json(counts, shown))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    click.echo(f"{spec.name}: {counts.total()} failed rows" + (f": {kinds}" if kinds else ""))
    for failure in shown:
        click.echo(f"{failure.address}: {failure.kind}: {failure.message}")
        if failure.excerpt:
            click.echo(f"    {failure.excerpt!r}")
    if counts.total() > len(shown):
        click.echo(f"... and {counts.total() - len(shown)} more (-n {counts.total()} shows all)")


def _errors_json(counts: Counter[str], shown: list[RowFailure]) -> str:
    rows = [
        {
            "row_address": failure.address,
            **failure.key._asdict(),
            "type": failure.kind,
            "message": failure.message,
            "excerpt": failure.excerpt,
        }
        for failure in shown
    ]
    return json.dumps({"failed": counts.total(), "types": counts, "rows": rows})


@click.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print the receipt: one JSON object.")
def verify(
    job: Path,
    overrides: tuple[str, ...],
    params: tuple[str, ...],
    limit: int | None,
    as_json: bool,
) -> None:
    """Read the output again, compare it with the ledger, and leave a receipt there."""
    spec = load_spec(job, overrides, params, limit)
    from batchgen.dataset.storage import redact
    from batchgen.startup import open_ledger_storage
    from batchgen.verify import encode_receipt, receipt_text, verdict, verify_job, write_receipt

    ledger = open_ledger_storage(spec)
    receipt = verify_job(spec, ledger)
    error = verdict(receipt)
    # Shown first: a store that refuses the receipt must not withhold the answer.
    if as_json:
        click.echo(encode_receipt(receipt))
    else:
        click.echo(receipt_text(receipt), err=True)
    try:
        path = write_receipt(ledger, receipt)
    except StorageError as refused:
        if error is None:
            raise
        click.echo(f"no receipt was kept: {refused}", err=True)
    else:
        click.echo(f"receipt: {redact(ledger.uri)}/{path}", err=True)
    if error is not None:
        raise error
