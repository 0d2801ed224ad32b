"""What `batchgen verify` needs of a ledger: its commits one by one, and dead letters.

A run refuses a ledger with one damaged file. Here each file's damage is a finding beside others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError
from batchgen.ledger.commits import (
    Commit,
    DeadLetters,
    decode_commit,
    newest_commits,
    newest_generations,
)
from batchgen.ledger.files import (
    commit_path,
    done_path,
    full_name,
    is_dead_letters,
    read_many,
)
from batchgen.ledger.plan import StoredJob


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAudit:
    """The commits as they are found."""

    is_published: bool  # the dataset was complete once
    commits: Mapping[int, Commit]  # by unit, in unit order
    problems: Mapping[str, str]  # of commits that are missing or cannot be used: by file


def audit_commits(storage: Storage, job: StoredJob) -> CommitAudit:
    """All commits of the ledger. Once the dataset is published, a missing one is a problem."""
    # Asked before the commits are listed: a runner may be at work, and publishes after the last.
    generations = newest_generations(storage, job)
    is_published = storage.exists(done_path(job.last_id, generations))
    commits: dict[int, Commit] = {}
    problems: dict[str, str] = {}
    for path, data in read_many(storage, newest_commits(storage, job)):
        try:
            commit = decode_commit(data, job, path, full_name(storage, path))
        except BatchgenError as error:
            problems[path] = str(error)
        else:
            commits[commit.unit_id] = commit
    if any(commit.generation > generations.get(unit_id, 0) for unit_id, commit in commits.items()):
        is_published = False  # a retry is at work
    if is_published:
        for unit in job.plan.units:
            path = commit_path(unit.unit_id, generations.get(unit.unit_id, 0))
            if unit.unit_id not in commits and path not in problems:
                problems[path] = "is missing, but the dataset was published"
    return CommitAudit(
        is_published=is_published, commits=dict(sorted(commits.items())), problems=problems
    )


def read_dead_letters(storage: Storage, letters: DeadLetters) -> list[str]:
    """The addresses of these failed rows, in the file's order.

    Raises ValueError when the file is not the one that was committed.
    """
    if not is_dead_letters(letters.path):
        raise ValueError("is no path of dead letters")
    try:
        data = storage.read(letters.path)
    except FileNotFoundError:
        raise ValueError("is missing") from None
    if problem := content_problem(data, letters.size_bytes, letters.sha256):
        raise ValueError(problem)
    try:
        addresses = [str(json.loads(line)["row_address"]) for line in data.splitlines()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"a line of it is no dead letter: {error!r}") from error
    if len(addresses) != letters.num_rows:
        raise ValueError(f"has {len(addresses)} rows, its commit says {letters.num_rows}")
    return addresses


def content_problem(data: bytes, size_bytes: int, sha256: str) -> str | None:
    """How a file's bytes differ from the committed ones; None if they do not."""
    if len(data) != size_bytes:
        return f"has {len(data)} bytes, its commit says {size_bytes}"
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        return f"has other bytes than were committed: sha256 {found}, its commit says {sha256}"
    return None
