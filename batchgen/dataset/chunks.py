"""What every format gives: its shape, and chunks of rows, decoded only where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

CHUNK_ROWS = 512
CHUNK_BYTES = 4 << 20
_EXCERPT_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A record that is no row: why, and how it begins."""

    message: str
    excerpt: str


Record = dict[str, object] | BadRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some consecutive rows of a file; `decode` makes records of those at given positions."""

    row_start: int
    num_rows: int
    decode: Callable[[Sequence[int]], list[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableInfo:
    """The columns and the number of rows of a file."""

    schema: pa.Schema
    num_rows: int


def bad_record(message: str, raw: bytes | str) -> BadRecord:
    """A bad record with an excerpt that is printable UTF-8."""
    text = raw[: 4 * _EXCERPT_CHARS]
    if isinstance(text, str):
        text = text.encode(errors="surrogateescape")
    return BadRecord(message=message, excerpt=text.decode(errors="replace")[:_EXCERPT_CHARS])
