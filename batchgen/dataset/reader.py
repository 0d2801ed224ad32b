"""Rows of units, in order, never holding more than a chunk of a file."""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from batchgen.dataset.chunks import BadRecord, Chunk, Record
from batchgen.dataset.csv_rows import csv_chunks
from batchgen.dataset.formats import decompressed, detect_content, readable
from batchgen.dataset.inputs import open_input
from batchgen.dataset.lines import json_chunks
from batchgen.dataset.plan import InputPlan, plan_files, plan_input
from batchgen.dataset.storage import redact
from batchgen.dataset.tables import arrow_chunks, parquet_chunks
from batchgen.errors import InputError
from batchgen.records import InputFile, InputRow, RowFailure, RowKey, RowSkip, Unit

if TYPE_CHECKING:
    from batchgen.job.spec import InputSpec

__all__ = [
    "InputPlan",
    "InputResult",
    "UnitReader",
    "plan_files",
    "plan_input",
    "read_sample",
    "read_unit",
]

InputResult = InputRow | RowFailure | RowSkip


def read_unit(
    spec: InputSpec,
    files: Sequence[InputFile],
    unit: Unit,
    *,
    wanted: Container[int] | None = None,
) -> Iterator[InputResult]:
    """The rows of one unit; see `UnitReader.read`, which is faster over several units."""
    with UnitReader(spec, files) as reader:
        yield from reader.read(unit, wanted=wanted)


def read_sample(spec: InputSpec, plan: InputPlan, max_rows: int) -> list[InputRow]:
    """The first `max_rows` rows that are readable, to show or to try a prompt on."""
    rows: list[InputRow] = []
    with UnitReader(spec, plan.files) as reader:
        for unit in plan.units:
            for row in reader.read(unit):
                if len(rows) == max_rows:
                    return rows
                if isinstance(row, InputRow):
                    rows.append(row)
    return rows


class UnitReader:
    """Reads units. The file of the last one stays open, so that the next one goes on from there
    and a compressed file is decompressed once. For one thread."""

    def __init__(self, spec: InputSpec, files: Sequence[InputFile]) -> None:
        self._spec = spec
        self._files = files
        self._cursor: _Cursor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file, if any."""
        if self._cursor is not None:
            self._cursor.chunks.close()
            self._cursor.stream.close()
            self._cursor = None

    def read(self, unit: Unit, *, wanted: Container[int] | None = None) -> Iterator[InputResult]:
        """The rows of the unit in order, or those whose index within it is `wanted`.

        A record that cannot be read becomes what `input.on_bad_record` says. Raises InputError
        for a damaged file, and for a bad record if that says `fail`.
        """
        file = self._files[unit.file_index]
        uri = redact(file.uri)
        with readable(file):
            cursor = self._cursor_at(unit)
        row, end = unit.row_start, unit.row_start + unit.num_rows
        while row < end:
            with readable(file):
                chunk = cursor.chunk_with(row)
                if chunk is None:
                    raise InputError(
                        f"{uri} has only {row} rows, {end} or more were planned: it changed "
                        "while the job ran; restore it, or start a new output"
                    )
                stop = min(end, chunk.row_start + chunk.num_rows)
                rows = [
                    i for i in range(row, stop) if wanted is None or i - unit.row_start in wanted
                ]
                records = chunk.decode([i - chunk.row_start for i in rows]) if rows else []
            row = cursor.next_row = stop
            for i, record in zip(rows, records, strict=True):
                key = RowKey(unit_id=unit.unit_id, index=i - unit.row_start)
                yield self._result(key, f"{uri}:{i}", record)

    def _result(self, key: RowKey, address: str, record: Record) -> InputResult:
        if not isinstance(record, BadRecord):
            return InputRow(key=key, address=address, values=record)
        if self._spec.on_bad_record == "fail":
            raise InputError(
                f"{address} is a bad record: {record.message}: {record.excerpt!r}; mend it, or "
                "set input.on_bad_record to skip or dead_letter"
            )
        if self._spec.on_bad_record == "skip":
            return RowSkip(key=key, address=address, reason=f"bad_record: {record.message}")
        return RowFailure(
            key=key,
            address=address,
            kind="bad_record",
            message=record.message,
            excerpt=record.excerpt,
        )

    def _cursor_at(self, unit: Unit) -> _Cursor:
        cursor = self._cursor
        if cursor is not None and cursor.file_index == unit.file_index:
            ahead = unit.row_start - cursor.next_row
            if ahead == 0 or (ahead > 0 and not cursor.can_seek):
                return cursor
        self.close()
        self._cursor = self._open(unit)
        return self._cursor

    def _open(self, unit: Unit) -> _Cursor:
        file = self._files[unit.file_index]
        options = self._spec.storage_options
        columns = self._spec.columns
        stream = open_input(file, options)
        content = detect_content(file, stream, self._spec.format)
        row_start = 0
        if content.format == "parquet":
            chunks = parquet_chunks(file, options, columns=columns, first_row=unit.row_start)
        elif content.format == "arrow":
            chunks = arrow_chunks(file, options, columns=columns)
        elif content.format == "csv":
            chunks = csv_chunks(file, decompressed(stream, content.codec), columns=columns)
        else:
            byte_start = unit.byte_start or 0
            row_start = unit.row_start if unit.byte_start is not None else 0
            stream.seek(byte_start)
            chunks = json_chunks(
                decompressed(stream, content.codec),
                columns=columns,
                row_start=row_start,
                byte_start=byte_start,
            )
        return _Cursor(
            file_index=unit.file_index,
            stream=stream,
            chunks=chunks,
            can_seek=content.format == "parquet" or unit.byte_start is not None,
            next_row=row_start,
        )


@dataclass(slots=True, kw_only=True)
class _Cursor:
    """An open file and the next row that it gives."""

    file_index: int
    stream: BinaryIO
    chunks: Generator[Chunk]
    can_seek: bool  # whether opening again at a later row costs less than reading up to it
    next_row: int
    chunk: Chunk | None = None

    def chunk_with(self, row: int) -> Chunk | None:
        """The chunk that holds `row`, at or after `next_row`; None past the end of the file."""
        while self.chunk is None or row >= self.chunk.row_start + self.chunk.num_rows:
            self.chunk = next(self.chunks, None)
            if self.chunk is None:
                return None
        return self.chunk
