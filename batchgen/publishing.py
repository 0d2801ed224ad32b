"""Publishing: the dataset's own files are made to name the parts of all commits."""

from __future__ import annotations

from collections.abc import Sequence

from batchgen import __version__
from batchgen.dataset.card import CardFacts, dataset_card
from batchgen.dataset.parts import dataset_problems, find_empty_part
from batchgen.dataset.writer import delete_superseded, publish
from batchgen.errors import BatchgenError
from batchgen.job.spec import JobSpec
from batchgen.ledger import Ledger, RunCounts
from batchgen.records import Part
from batchgen.startup import OpenJob


def is_published(job: OpenJob) -> bool:
    """Whether nothing is left to do: all units are committed, and the dataset has their parts.

    That the ledger says so is not enough. A process that was paused while it published may have
    written what it knew over what others have published since, and then have been killed.
    """
    if not job.ledger.is_published():
        return False
    parts = _committed_parts(job.ledger)
    if not parts and (empty := find_empty_part(job.output)) is not None:
        parts = [empty]
    return not dataset_problems(job.output, job.spec.output, job.schema, parts)


def publish_job(job: OpenJob, wall_s: float) -> bool:
    """Make the commits the dataset, those of other processes' retries as well.

    False where another run has added files to the job meanwhile. What is published then may lie
    over what the other has published: the job is to be opened again and brought to its end.
    """
    spec, ledger = job.spec, job.ledger
    while not ledger.has_grown():
        counts = ledger.counts()
        parts = _committed_parts(ledger)
        _check_counts(spec, counts, parts)
        card = dataset_card(_card_facts(job, counts, wall_s))
        publish(job.output, spec.output, job.schema, parts, card)
        if ledger.adopt_retries():
            continue
        generations = {unit_id: commit.generation for unit_id, commit in ledger.committed.items()}
        delete_superseded(job.output, parts, generations)
        ledger.finish()
        return not ledger.has_grown()
    return False


def _check_counts(spec: JobSpec, counts: RunCounts, parts: Sequence[Part]) -> None:
    num_written = sum(part.num_rows for part in parts)
    if counts.ended != counts.total or num_written != counts.ok * spec.output_rows_per_row:
        raise BatchgenError(
            f"the counts do not add up: {counts.ok} ok + {counts.failed} failed + "
            f"{counts.skipped} skipped rows of {counts.total}, and {num_written} rows of output; "
            "nothing was published"
        )


def _card_facts(job: OpenJob, counts: RunCounts, wall_s: float) -> CardFacts:
    spec, plan = job.spec, job.ledger.plan
    changed = spec.sampling.model_dump(exclude_defaults=True)
    return CardFacts(
        job_name=spec.name,
        model=spec.model.name_or_path,
        model_revision=job.model_files.identity.get("revision"),
        input_uris=[plan.files[index].uri for index in plan.input_order],
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
    committed = ledger.committed
    return [
        part
        for unit in ledger.plan.units_in_order
        if unit.unit_id in committed
        for part in committed[unit.unit_id].parts
    ]
