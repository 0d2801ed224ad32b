"""Dead letters read again: for `batchgen errors`, and for a retry of the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import cast

from batchgen.dataset.storage import Storage
from batchgen.ledger.commits import DeadLetters, read_commits
from batchgen.ledger.files import damaged, decoded, full_name
from batchgen.ledger.partials import merge_partials, read_partials
from batchgen.ledger.plan import StoredJob
from batchgen.records import FailureKind, RowFailure, RowKey


def read_failures(storage: Storage, letters: DeadLetters | None) -> list[RowFailure]:
    """The failed rows of a commit, in row order.

    Raises BatchgenError when the file is not the one that was committed.
    """
    if letters is None:
        return []
    where = full_name(storage, letters.path)

    def decode(data: bytes) -> list[RowFailure]:
        if hashlib.sha256(data).hexdigest() != letters.sha256:
            raise damaged(where, "its checksum is not the one in the commit")
        try:
            return [_decode(line) for line in data.splitlines()]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged(where, f"a line of it is no dead letter: {error!r}") from error

    try:
        return decoded(storage, letters.path, storage.read(letters.path), decode)
    except FileNotFoundError:
        raise damaged(where, "it is missing") from None


def read_job_failures(storage: Storage, job: StoredJob) -> Iterator[RowFailure]:
    """All failed rows of a job so far, in input order: of commits, and of partials."""
    commits = read_commits(storage, job)
    partials = merge_partials([rows for _, rows in read_partials(storage, job)], commits)
    for unit in job.plan.units_in_order:
        if unit.unit_id in commits:
            yield from read_failures(storage, commits[unit.unit_id].dead_letters)
        for row in partials.get(unit.unit_id, ()):
            if isinstance(row, RowFailure):
                yield row


def _decode(line: bytes) -> RowFailure:
    letter = json.loads(line)
    return RowFailure(
        key=RowKey(unit_id=int(letter["unit_id"]), index=int(letter["index"])),
        address=str(letter["row_address"]),
        kind=cast(FailureKind, str(letter["kind"])),
        message=str(letter["message"]),
        excerpt=str(letter["excerpt"]),
    )
