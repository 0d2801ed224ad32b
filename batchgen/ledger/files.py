"""Names of the ledger's files, and reading them: many at once, and never trusting what they hold.

    job.json                         what the job is, and how its input is cut into units
    added/<number>.json              files that came to the input later, and their units
    commits/<unit>.json              one for each finished unit; created exclusively, never changed
    commits/<unit>.r<generation>.json   the same after a retry of failed rows: the newest counts
    dead/<unit>-<sha256>.jsonl       the rows of a unit that failed; named by its commit
    dead/<unit>-r<generation>-<sha256>.jsonl   the same after a retry
    partials/<run>-<sequence>.partial   finished rows of units that are not committed yet
    partials/<run>-<sequence>.r<generation>.partial   the same of a retry
    claims/<unit>.json               some runner is, or was, at work on the unit: a hint, no lock
    unfinished/<run>.tokens          what a stopped run had of rows that it was generating
    done-<job>.json                  the dataset is published: nothing is left to do
    done-<job>-<retries>.json        the same for the commits of these retries
    runs/<run>.json                  what the engine did in a run, for `batchgen status`
    receipts/<utc time>.json         what `batchgen verify` found; nothing reads them

Every path is relative to the ledger's folder. A file that is in none of these shapes (such as the
temporary file of a killed writer) does not exist for the ledger.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from batchgen.dataset.storage import Storage, redact
from batchgen.errors import BatchgenError

JOB_PATH = "job.json"
_ADDITION_PATTERN = re.compile(r"added/\d{6,}\.json")
_COMMIT_PATTERN = re.compile(r"commits/(\d{8,})(?:\.r([1-9]\d{0,8}))?\.json")
_DEAD_LETTERS_PATTERN = re.compile(r"dead/(\d{8,})(?:-r([1-9]\d{0,8}))?-[0-9a-f]+\.jsonl")
_RUN_PATTERN = re.compile(r"runs/[0-9a-f]+\.json")
_CLAIM_PATTERN = re.compile(r"claims/\d{8,}\.json")
_PARTIAL_PATTERN = re.compile(r"partials/[0-9a-f]+-\d+(?:\.r([1-9]\d{0,8}))?\.partial")
_UNFINISHED_PATTERN = re.compile(r"unfinished/[0-9a-f]+\.tokens")

# A read from an object store is latency and nothing else; on a local disk this many do no harm.
_MAX_CONCURRENT_READS = 32
_MAX_READS = 5

T = TypeVar("T")


def addition_path(index: int) -> str:
    """Of the addition at `index`, from 0."""
    return f"added/{index + 1:06d}.json"


def commit_path(unit_id: int, generation: int = 0) -> str:
    """`generation` counts the retries of the unit's failed rows."""
    return f"commits/{unit_id:08d}{f'.r{generation}' if generation else ''}.json"


def claim_path(unit_id: int) -> str:
    return f"claims/{unit_id:08d}.json"


def dead_letters_path(unit_id: int, generation: int, sha256: str) -> str:
    return f"dead/{unit_id:08d}{f'-r{generation}' if generation else ''}-{sha256[:16]}.jsonl"


def partial_path(run_id: str, sequence: int, generation: int = 0) -> str:
    """`generation` is that of the commits that its rows are for."""
    return f"partials/{run_id}-{sequence:06d}{f'.r{generation}' if generation else ''}.partial"


def generation_of_partial(path: str) -> int:
    match = _PARTIAL_PATTERN.fullmatch(path)
    return int(match[1] or 0) if match else 0


def run_path(run_id: str) -> str:
    return f"runs/{run_id}.json"


def unfinished_path(run_id: str) -> str:
    return f"unfinished/{run_id}.tokens"


def done_path(job_id: str, generations: Mapping[int, int]) -> str:
    """`generations` are those of the units whose commits are published. A retry leaves the name."""
    retried = sorted(item for item in generations.items() if item[1])
    retries = hashlib.sha256(repr(retried).encode()).hexdigest()[:16]
    return f"done-{job_id[:16]}{f'-{retries}' if retried else ''}.json"


def receipt_path(time: str) -> str:
    """`time` in ISO 8601; without colons, which not every disk has in names."""
    return f"receipts/{time.replace(':', '')}.json"


def full_name(storage: Storage, path: str) -> str:
    """A file's name as people may see it."""
    return redact(f"{storage.uri}/{path}")


def list_additions(storage: Storage) -> list[str]:
    return [path for path in storage.list("added") if _ADDITION_PATTERN.fullmatch(path)]


def list_generations(storage: Storage) -> dict[int, int]:
    """The generation of the newest commit of each unit that has one, in unit order."""
    newest: dict[int, int] = {}
    for path in storage.list("commits"):
        if match := _COMMIT_PATTERN.fullmatch(path):
            unit_id, generation = int(match[1]), int(match[2] or 0)
            newest[unit_id] = max(generation, newest.get(unit_id, 0))
    return dict(sorted(newest.items()))


def list_dead_letters(storage: Storage) -> dict[str, tuple[int, int]]:
    """The unit and the generation of each file of dead letters, by path."""
    matches = map(_DEAD_LETTERS_PATTERN.fullmatch, storage.list("dead"))
    return {match[0]: (int(match[1]), int(match[2] or 0)) for match in matches if match}


def is_dead_letters(path: str) -> bool:
    return _DEAD_LETTERS_PATTERN.fullmatch(path) is not None


def list_claims(storage: Storage) -> list[str]:
    return [path for path in storage.list("claims") if _CLAIM_PATTERN.fullmatch(path)]


def list_partials(storage: Storage) -> list[str]:
    return [path for path in storage.list("partials") if _PARTIAL_PATTERN.fullmatch(path)]


def list_runs(storage: Storage) -> list[str]:
    return [path for path in storage.list("runs") if _RUN_PATTERN.fullmatch(path)]


def list_unfinished(storage: Storage) -> list[str]:
    return [path for path in storage.list("unfinished") if _UNFINISHED_PATTERN.fullmatch(path)]


def read_many(storage: Storage, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Each path with its bytes, in the given order; one that is gone by now is left out."""

    def read(path: str) -> bytes | None:
        try:
            return storage.read(path)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_MAX_CONCURRENT_READS, "ledger-read") as pool:
        for path, data in zip(paths, pool.map(read, paths), strict=True):
            if data is not None:
                yield path, data


def decoded(storage: Storage, path: str, data: bytes, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the file, which was read as `data`.

    Where it raises, the file is read again: the answer may have been cut short on its way. The
    error of bytes that come twice is the file's, and is raised.
    """
    for _ in range(_MAX_READS):
        try:
            return decode(data)
        except BatchgenError:
            again = storage.read(path)
            if again == data:
                raise
            data = again
    return decode(data)


def parse_json(adapter: TypeAdapter[T], data: bytes, where: str) -> T:
    """The JSON in `data` as the adapter's type; raises the error of a damaged file otherwise."""
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(str(step) for step in first["loc"])
        raise damaged(where, f"{key}: {first['msg']}" if key else first["msg"]) from None


def damaged(where: str, why: str) -> BatchgenError:
    """The error of a ledger file that does not hold what batchgen wrote there."""
    return BatchgenError(
        f"{where} is damaged ({why}). Nothing was changed. Restore this file from a copy, "
        "or start the job anew with another output.uri."
    )
