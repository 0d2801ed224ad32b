"""Tokens of rows that a stop cut off, so that the next run goes on from there.

A file holds all such rows of one run, in units that were not committed then:

    "BGTOKS1\\n" | sha256 of all that follows | length of the head | head | tokens

The head is JSON: the job, and for each row its key, and of its samples the number of tokens and
how they ended. The tokens are int32, little-endian, sample after sample.

Losing such a file costs work and nothing else: its rows are generated from their start.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError
from batchgen.ledger.files import (
    damaged,
    full_name,
    list_unfinished,
    parse_json,
    read_many,
    unfinished_path,
)
from batchgen.ledger.plan import StoredJob
from batchgen.records import FinishReason, RowKey, RowResult, SampleProgress, UnfinishedRow

_MAGIC = b"BGTOKS1\n"
_BODY_START = len(_MAGIC) + hashlib.sha256().digest_size
_LENGTH_BYTES = 8
_TOKEN = np.dtype("<i4")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SampleHead:
    num_tokens: Annotated[int, Field(ge=0)]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowHead:
    key: RowKey
    samples: tuple[_SampleHead, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    job_id: str
    rows: tuple[_RowHead, ...]  # in the order of the tokens


_HEAD = TypeAdapter(_Head)


def encode_unfinished(rows: Sequence[UnfinishedRow], *, job_id: str) -> bytes:
    """The bytes of one file."""
    head = _HEAD.dump_json(
        _Head(
            job_id=job_id,
            rows=tuple(
                _RowHead(
                    key=row.key,
                    samples=tuple(
                        _SampleHead(
                            num_tokens=len(sample.token_ids), finish_reason=sample.finish_reason
                        )
                        for sample in row.samples
                    ),
                )
                for row in rows
            ),
        )
    )
    token_ids = [t for row in rows for sample in row.samples for t in sample.token_ids]
    body = len(head).to_bytes(_LENGTH_BYTES, "big") + head + np.array(token_ids, _TOKEN).tobytes()
    return _MAGIC + hashlib.sha256(body).digest() + body


def decode_unfinished(data: bytes, job: StoredJob, where: str) -> list[UnfinishedRow]:
    """The rows of one file. `where` names it in errors.

    Raises BatchgenError for a file that is damaged or truncated, and for one of another job.
    """
    body = data[_BODY_START:]
    digest = data[len(_MAGIC) : _BODY_START]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise damaged(where, "its checksum does not match")
    head_end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
    head = parse_json(_HEAD, body[_LENGTH_BYTES:head_end], where)
    if head.job_id not in job.ids:
        raise BatchgenError(f"{where} is of another job.")
    num_tokens = sum(sample.num_tokens for row in head.rows for sample in row.samples)
    if len(body) - head_end != num_tokens * _TOKEN.itemsize:
        raise damaged(where, "its tokens are not those that its head announces")
    if any(all(sample.finish_reason for sample in row.samples) for row in head.rows):
        raise damaged(where, "it holds a row of which every sample has ended")
    token_ids = iter(np.frombuffer(body[head_end:], _TOKEN).tolist())
    return [
        UnfinishedRow(
            key=row.key,
            samples=tuple(
                SampleProgress(
                    token_ids=tuple(islice(token_ids, sample.num_tokens)),
                    finish_reason=sample.finish_reason,
                )
                for sample in row.samples
            ),
        )
        for row in head.rows
    ]


class UnfinishedRows:
    """The tokens that earlier runs have left, and that this run is to leave."""

    def __init__(self, storage: Storage, job: StoredJob, run_id: str) -> None:
        self._storage = storage
        self._job = job
        self._run_id = run_id
        self._rows: dict[RowKey, UnfinishedRow] = {}  # of earlier runs, not finished since
        self._paths: list[str] = []  # the files that these rows are from

    def load(
        self, committed: Container[int], finished: Mapping[int, Sequence[RowResult]]
    ) -> dict[RowKey, UnfinishedRow]:
        """Each row as far as it came, but for those in committed units and finished ones."""
        files = dict(read_unfinished(self._storage, self._job))
        rows = furthest(row for rows in files.values() for row in rows)
        done = {result.key for results in finished.values() for result in results}
        self._paths = list(files)
        self._rows = {
            key: row
            for key, row in rows.items()
            if key.unit_id not in committed and key not in done
        }
        return dict(self._rows)

    def forget(self, results: Sequence[RowResult]) -> None:
        """These rows are finished and saved."""
        for result in results:
            self._rows.pop(result.key, None)

    def save(self, rows: Sequence[UnfinishedRow]) -> None:
        """Write a file that takes the place of those that were loaded: it has their rows, too."""
        kept = furthest([*self._rows.values(), *rows])
        data = encode_unfinished(list(kept.values()), job_id=self._job.last_id)
        self._storage.put(unfinished_path(self._run_id), data)
        self._storage.delete(self._paths)


def read_unfinished(storage: Storage, job: StoredJob) -> Iterator[tuple[str, list[UnfinishedRow]]]:
    """Each file with its rows. One that cannot be understood is left out with a warning."""
    for path, data in read_many(storage, list_unfinished(storage)):
        try:
            yield path, decode_unfinished(data, job, full_name(storage, path))
        except BatchgenError as error:
            _log.warning("its unfinished rows are generated from their start: %s", error)


def furthest(rows: Iterable[UnfinishedRow]) -> dict[RowKey, UnfinishedRow]:
    """Each row once, as far as it came."""
    best: dict[RowKey, UnfinishedRow] = {}
    for row in rows:
        other = best.get(row.key)
        if other is None or row.num_output_tokens > other.num_output_tokens:
            best[row.key] = row
    return best
