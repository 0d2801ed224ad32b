"""CSV as rows of strings. CSV has no types, and guessing them would turn `007` into 7."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, cast

import pyarrow as pa

from batchgen.dataset.chunks import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    BadRecord,
    Chunk,
    Record,
    TableInfo,
    bad_record,
)
from batchgen.dataset.lines import MAX_LINE_BYTES, iter_lines
from batchgen.dataset.storage import redact
from batchgen.errors import InputError
from batchgen.records import InputFile

_MAX_FIELD_CHARS = 16 << 20

CsvRecord = list[str] | BadRecord


def csv_info(file: InputFile, stream: BinaryIO, max_rows: int | None) -> TableInfo:
    """Columns, and rows up to `max_rows`, of a CSV stream at its start."""
    records = iter_csv_records(file, stream)
    header = next(records, [])
    if isinstance(header, BadRecord):
        raise InputError(f"{redact(file.uri)}: its header is damaged: {header.message}")
    if not _is_unicode("".join(header)):
        raise InputError(f"{redact(file.uri)}: its header is not UTF-8; save the file as UTF-8")
    repeated = sorted({name for name in header if header.count(name) > 1 or not name})
    if repeated:
        raise InputError(
            f"{redact(file.uri)}: its header has columns without a name or with the same "
            f"name: {', '.join(map(repr, repeated))}; give each column its own name"
        )
    num_rows = sum(1 for _ in islice(records, max_rows))
    return TableInfo(schema=pa.schema([(name, pa.string()) for name in header]), num_rows=num_rows)


def iter_csv_records(file: InputFile, stream: BinaryIO) -> Iterator[CsvRecord]:
    """All records of a CSV stream at its start, the header first. Blank lines are none."""
    csv.field_size_limit(_MAX_FIELD_CHARS)  # of the process; the default is 128 Ki
    lines = _csv_lines(file, stream)
    reader = csv.reader(lines, strict=True)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader begins anew at the next line, so that one stray quote costs one record.
            yield bad_record(f"not CSV: {error} (line {reader.line_num})", "")
        else:
            if fields:
                yield fields


def csv_chunks(
    file: InputFile, stream: BinaryIO, *, columns: Sequence[str] | None
) -> Generator[Chunk]:
    """The rows below the header of a CSV stream at its start.

    Values are strings exactly as written; an empty one is None. A record with too many or too
    few fields is a bad record.
    """
    source = iter_csv_records(file, stream)
    header = cast("list[str]", next(source, []))
    records: list[CsvRecord] = []
    row_start = held_bytes = 0
    for record in source:
        records.append(record)
        held_bytes += sum(map(len, record)) if isinstance(record, list) else 0
        if len(records) == CHUNK_ROWS or held_bytes >= CHUNK_BYTES:
            yield _csv_chunk(records, row_start, header, columns)
            row_start += len(records)
            records, held_bytes = [], 0
    if records:
        yield _csv_chunk(records, row_start, header, columns)


def _csv_chunk(
    records: list[CsvRecord], row_start: int, header: list[str], columns: Sequence[str] | None
) -> Chunk:
    places = [header.index(name) for name in columns] if columns is not None else None

    def parse(record: CsvRecord) -> Record:
        if isinstance(record, BadRecord):
            return record
        if len(record) != len(header):
            message = f"not {len(header)} fields, as the header has, but {len(record)}"
            return bad_record(message, ",".join(record))
        if not _is_unicode("".join(record)):
            return bad_record("not UTF-8", ",".join(record))
        if places is None:
            return {name: value or None for name, value in zip(header, record, strict=True)}
        return {header[i]: record[i] or None for i in places}

    return Chunk(
        row_start=row_start,
        num_rows=len(records),
        decode=lambda positions: [parse(records[i]) for i in positions],
    )


def _is_unicode(text: str) -> bool:
    """Whether no byte of the text was not UTF-8 (and became half a surrogate pair)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_lines(file: InputFile, stream: BinaryIO) -> Iterator[str]:
    for number, (_, line) in enumerate(iter_lines(stream), start=1):
        if len(line) > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES >> 20} MiB"
            raise InputError(f"{redact(file.uri)}: line {number} is longer than {limit}")
        yield line.decode(errors="surrogateescape") + "\n"
