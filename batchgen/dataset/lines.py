"""Lines of bounded length, and JSON lines as rows."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from typing import BinaryIO

from batchgen.dataset.chunks import CHUNK_BYTES, CHUNK_ROWS, Chunk, Record, bad_record

MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_JSON_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def iter_lines(stream: BinaryIO, byte_start: int = 0) -> Iterator[tuple[int, bytes]]:
    r"""Every line with its byte offset, without its \n, blank ones too.

    Of a line longer than MAX_LINE_BYTES comes only its start, one byte longer than that.
    A byte order mark at the start of the file belongs to no line.
    """
    offset = byte_start
    block = stream.read(_READ_BYTES)
    if byte_start == 0 and block.startswith(_BYTE_ORDER_MARK):
        offset = len(_BYTE_ORDER_MARK)
        block = block[offset:]
    tail: list[bytes] = []  # what is kept of a line that goes on in the next block
    tail_bytes = kept_bytes = 0
    while block:
        lines = block.split(b"\n")
        last = lines.pop()
        for line in lines:
            num_bytes = tail_bytes + len(line)
            if tail:
                line = b"".join([*tail, line[: MAX_LINE_BYTES + 1 - kept_bytes]])
                tail, tail_bytes, kept_bytes = [], 0, 0
            yield offset, line
            offset += num_bytes + 1
        if last:
            tail_bytes += len(last)
            last = last[: MAX_LINE_BYTES + 1 - kept_bytes]
            kept_bytes += len(last)
            tail.append(last)
        block = stream.read(_READ_BYTES)
    if tail:
        yield offset, b"".join(tail)


def iter_json_lines(stream: BinaryIO, byte_start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines that are rows: all but the blank ones, with their byte offsets."""
    for offset, line in iter_lines(stream, byte_start):
        if line and not line.isspace():
            yield offset, line


def parse_json_line(line: bytes, columns: Sequence[str] | None) -> Record:
    """The JSON object of a line, pruned to `columns`.

    Where JSON's readers differ, this is Python's and pyarrow's reading: a key that comes twice
    has its last value, and NaN and Infinity are numbers.
    """
    if len(line) > MAX_LINE_BYTES:
        return bad_record(f"longer than {MAX_LINE_BYTES >> 20} MiB", line)
    try:
        values = json.loads(line.decode())
        if _SURROGATE_ESCAPE.search(line):
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return bad_record(f"not UTF-8: byte {error.start} is {line[error.start]:#04x}", line)
    except UnicodeEncodeError:
        return bad_record("not Unicode: an escape of half a surrogate pair", line)
    except RecursionError:
        return bad_record("not readable: nested too deeply", line)
    except ValueError as error:
        return bad_record(f"not JSON: {error}", line)
    if not isinstance(values, dict):
        kind = _JSON_KINDS.get(type(values), "a number")
        return bad_record(f"not a JSON object but {kind}", line)
    if columns is not None:
        return {name: values[name] for name in columns if name in values}
    return values


def json_chunks(
    stream: BinaryIO, *, columns: Sequence[str] | None, row_start: int, byte_start: int
) -> Generator[Chunk]:
    """The rows of a JSON lines stream that stands at `byte_start`, where row `row_start` begins."""
    lines: list[bytes] = []
    held_bytes = 0
    for _, line in iter_json_lines(stream, byte_start):
        lines.append(line)
        held_bytes += len(line)
        if len(lines) == CHUNK_ROWS or held_bytes >= CHUNK_BYTES:
            yield _json_chunk(lines, row_start, columns)
            row_start += len(lines)
            lines, held_bytes = [], 0
    if lines:
        yield _json_chunk(lines, row_start, columns)


def _json_chunk(lines: list[bytes], row_start: int, columns: Sequence[str] | None) -> Chunk:
    return Chunk(
        row_start=row_start,
        num_rows=len(lines),
        decode=lambda positions: [parse_json_line(lines[i], columns) for i in positions],
    )
