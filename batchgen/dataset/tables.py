"""Parquet and Arrow IPC as chunks of rows: a slice of a row group or record batch at a time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.dataset.chunks import CHUNK_ROWS, Chunk, Record, TableInfo, bad_record
from batchgen.dataset.inputs import open_input
from batchgen.dataset.storage import local_path, protocol_of, redact
from batchgen.errors import InputError
from batchgen.records import InputFile

MAX_FOOTER_BYTES = 64 << 20
MAX_BATCH_BYTES = 1 << 30
_MAX_THRIFT_ITEMS = 1_000_000  # of a list, such as the row groups
_TRAILER_BYTES = 8  # the footer's length, and PAR1
_BUFFER_BYTES = 1 << 20
_FILE_MAGIC = b"ARROW1"


def parquet_info(file: InputFile, options: Mapping[str, object]) -> TableInfo:
    """Schema and row count from the footer alone."""
    with _open_parquet(file, options) as source:
        return TableInfo(schema=source.schema_arrow, num_rows=source.metadata.num_rows)


def parquet_chunks(
    file: InputFile,
    options: Mapping[str, object],
    *,
    columns: Sequence[str] | None,
    first_row: int,
) -> Generator[Chunk]:
    """Rows from the row group of `first_row` on; row groups before it are not read."""
    with _open_parquet(file, options) as source:
        metadata = source.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        ends = list(accumulate(sizes))
        group = next((i for i, end in enumerate(ends) if end > first_row), len(ends))
        batches = source.iter_batches(
            batch_size=CHUNK_ROWS,
            row_groups=list(range(group, len(ends))),
            columns=None if columns is None else list(columns),
            use_threads=False,
        )
        yield from _chunks(file, batches, ends[group] - sizes[group] if group < len(ends) else 0)


def arrow_info(file: InputFile, options: Mapping[str, object]) -> TableInfo:
    """Schema and row count, from the headers of the record batches."""
    # One column's buffers are enough to count: the file format skips the others.
    with _open_native(file, options, mapped=True) as source:
        schema = _ipc_reader(source, None).schema
    with _open_native(file, options, mapped=True) as source:
        reader = _ipc_reader(source, [0] if schema.names else None)
        num_rows = sum(batch.num_rows for batch in _ipc_batches(reader))
    return TableInfo(schema=schema, num_rows=num_rows)


def arrow_chunks(
    file: InputFile, options: Mapping[str, object], *, columns: Sequence[str] | None
) -> Generator[Chunk]:
    """All rows of an Arrow IPC file, in its file or its stream format.

    A local file is mapped: only the touched pages of a huge record batch are in memory, and the
    system can drop them.
    """
    fields: list[int] | None = None
    if columns is not None:
        with _open_native(file, options, mapped=True) as source:
            schema = _ipc_reader(source, None).schema
        fields = [schema.get_field_index(name) for name in columns]
    with _open_native(file, options, mapped=True) as source:
        yield from _chunks(file, _ipc_batches(_ipc_reader(source, fields)), 0)


def _chunks(file: InputFile, batches: Iterator[pa.RecordBatch], row_start: int) -> Generator[Chunk]:
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK_ROWS):
            piece = batch.slice(start, CHUNK_ROWS)
            is_valid = _is_valid(piece)
            if (
                is_valid and piece.nbytes > MAX_BATCH_BYTES
            ):  # a dictionary repeats a long text for nothing
                raise InputError(
                    f"{redact(file.uri)}: the {piece.num_rows} rows from row {row_start} on take "
                    f"{piece.nbytes:,} bytes, more than {MAX_BATCH_BYTES:,}; shorten their values"
                )
            yield _table_chunk(piece, row_start, is_valid)
            row_start += piece.num_rows


def _is_valid(batch: pa.RecordBatch) -> bool:
    """Whether offsets and indices lie within their buffers, and text is UTF-8.

    Those of a hostile Arrow file point anywhere in memory: without this even `nbytes` may crash.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowException:
        return False
    return True


def _table_chunk(batch: pa.RecordBatch, row_start: int, is_valid: bool) -> Chunk:
    def decode(positions: Sequence[int]) -> list[Record]:
        if is_valid:
            some = batch if len(positions) == batch.num_rows else batch.take(pa.array(positions))
            with contextlib.suppress(ValueError, OverflowError, pa.ArrowException):
                return list(some.to_pylist())
        return [_decode_row(batch.slice(i, 1)) for i in positions]

    return Chunk(row_start=row_start, num_rows=batch.num_rows, decode=decode)


def _decode_row(row: pa.RecordBatch) -> Record:
    """One row, or why Python has no value for it (text that is not UTF-8, a year 20000)."""
    values: dict[str, object] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
            values[name] = column[0].as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            return bad_record(f"column {name!r} is not readable: {error}", "")
    return values


@contextlib.contextmanager
def _open_parquet(file: InputFile, options: Mapping[str, object]) -> Iterator[pq.ParquetFile]:
    with _open_native(file, options, mapped=False) as source:
        _check_footer(file, source)
        # Buffered column streams keep a huge row group out of memory; pre-buffering would hold it.
        with pq.ParquetFile(
            source,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=_MAX_THRIFT_ITEMS,
        ) as parquet:
            metadata = parquet.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
                raise InputError(
                    f"{redact(file.uri)} is damaged: its footer claims {metadata.num_rows:,} "
                    f"rows and row groups of {sum(sizes):,}; write it again"
                )
            yield parquet


def _check_footer(file: InputFile, source: pa.NativeFile) -> None:
    """Raises InputError for a Parquet footer that takes gigabytes once it is parsed."""
    size_bytes = source.size()
    if size_bytes < _TRAILER_BYTES:
        return
    source.seek(size_bytes - _TRAILER_BYTES)
    footer_bytes = int.from_bytes(source.read(4), "little")
    is_whole = source.read(4) == b"PAR1" and footer_bytes <= size_bytes  # else pyarrow says so
    source.seek(0)
    if is_whole and footer_bytes > MAX_FOOTER_BYTES:
        raise InputError(
            f"{redact(file.uri)} has a footer of {footer_bytes:,} bytes, more than "
            f"{MAX_FOOTER_BYTES:,}: it is damaged, or write it with fewer, larger row groups"
        )


def _open_native(file: InputFile, options: Mapping[str, object], *, mapped: bool) -> pa.NativeFile:
    if protocol_of(file.uri) in {"file", "local"}:
        path = local_path(file.uri)
        return pa.memory_map(path) if mapped else pa.OSFile(path, "r")
    stream = open_input(file, options, random_access=not mapped)
    return pa.PythonFile(cast(io.IOBase, stream), mode="r")


def _ipc_reader(
    source: pa.NativeFile, fields: list[int] | None
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    read_options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    magic = source.read(len(_FILE_MAGIC))
    source.seek(0)
    if magic == _FILE_MAGIC:
        return pa.ipc.open_file(source, options=read_options)
    return pa.ipc.open_stream(source, options=read_options)


def _ipc_batches(
    reader: pa.RecordBatchFileReader | pa.RecordBatchStreamReader,
) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from reader
