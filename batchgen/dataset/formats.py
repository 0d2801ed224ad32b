"""What an input file is: its format by name or content, and its compression by content."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import pyarrow as pa

from batchgen.dataset.storage import protocol_of, redact, refusal, store_errors
from batchgen.errors import InputError, StorageError
from batchgen.records import InputFile
from batchgen.redaction import redact_message

Format = Literal["parquet", "jsonl", "arrow", "csv"]
Codec = Literal["gzip", "zstd"]

_FORMAT_OF_EXTENSION: dict[str, Format] = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "jsonlines": "jsonl",
    "json": "jsonl",
    "arrow": "arrow",
    "arrows": "arrow",
    "feather": "arrow",
    "ipc": "arrow",
    "csv": "csv",
}
_CODEC_EXTENSIONS = (".gz", ".gzip", ".zst", ".zstd")
_UNREAD_CODECS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"\x80\x02": "pickle",
    b"\x80\x03": "pickle",
    b"\x80\x04": "pickle",
    b"\x80\x05": "pickle",
}
_CODEC_OF_MAGIC: dict[bytes, Codec] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FORMAT_OF_MAGIC: dict[bytes, Format] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # the stream format begins with a continuation marker
}
# Text that repeats itself shrinks a hundredfold; bombs, with zstd, by ten thousand and more.
MAX_EXPANSION = 500
MAX_PLAIN_BYTES = 4 << 30
_MAGIC_BYTES = 8
_SNIFF_BYTES = 4096
_KNOWN = "parquet, jsonl, arrow or csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """How the bytes of a file are to be read."""

    format: Format
    codec: Codec | None


def format_of_name(name: str) -> Format | None:
    """The format that a file's name promises, whatever its compression; None if it does not say."""
    name = name.lower()
    for extension in _CODEC_EXTENSIONS:
        name = name.removesuffix(extension)
    return _FORMAT_OF_EXTENSION.get(name.rpartition(".")[2])


def detect_content(file: InputFile, stream: BinaryIO, declared: str) -> Content:
    """What the file is; `declared` is the job's `input.format`. Leaves the stream at its start.

    Raises InputError when the content contradicts the format, or when nothing tells the format.
    """
    head = stream.read(_MAGIC_BYTES)
    stream.seek(0)
    codec = next((c for magic, c in _CODEC_OF_MAGIC.items() if head.startswith(magic)), None)
    found = next((f for magic, f in _FORMAT_OF_MAGIC.items() if head.startswith(magic)), None)
    if unread := next(
        (name for magic, name in _UNREAD_CODECS.items() if head.startswith(magic)), None
    ):
        raise InputError(
            f"{redact(file.uri)} is a {unread} file, which is not read; write it as {_KNOWN}, "
            "plain or compressed with gzip or zstd"
        )
    named = format_of_name(file.uri) if declared == "auto" else cast(Format, declared)
    if named is None:
        named = found or _sniffed(stream, codec)
    if named is None:
        raise InputError(
            f"{redact(file.uri)}: neither its name nor its content tells its format; "
            f"set input.format to {_KNOWN}"
        )
    if named in {"parquet", "arrow"} and found != named:
        state = f"compressed as a whole ({codec})" if codec else f"empty or no {named} file"
        raise InputError(
            f"{redact(file.uri)} is {state}: it begins with {head!r}, not with the mark of "
            f"{named}; write it again, or set input.format to what it is"
        )
    if named in {"jsonl", "csv"} and found is not None:
        raise InputError(f"{redact(file.uri)} is a {found} file, not {named}; set input.format")
    return Content(format=named, codec=codec)


def decompressed(file: InputFile, stream: BinaryIO, codec: Codec | None) -> BinaryIO:
    """The stream of the file's plain bytes; concatenated gzip members and zstd frames are one."""
    if codec is None:
        return stream
    return cast(BinaryIO, _Decompressed(file, stream, codec))


class _Decompressed:
    """A decompressed stream that is not a bomb: `read` raises InputError when it looks like one."""

    def __init__(self, file: InputFile, stream: BinaryIO, codec: Codec) -> None:
        source = pa.PythonFile(cast(io.IOBase, stream), mode="r")
        self._stream = pa.CompressedInputStream(source, codec)
        self._file = file
        self._num_bytes = 0
        self._max_bytes = max(MAX_PLAIN_BYTES, MAX_EXPANSION * file.size_bytes)

    def read(self, num_bytes: int) -> bytes:
        data: bytes = self._stream.read(num_bytes)
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise InputError(
                f"{redact(self._file.uri)} has {self._file.size_bytes:,} bytes and decompresses "
                f"to more than {self._max_bytes:,} (the limit is {MAX_EXPANSION} times its size, "
                f"or {MAX_PLAIN_BYTES >> 30} GiB); if it is no bomb, decompress it first"
            )
        return data


def _sniffed(stream: BinaryIO, codec: Codec | None) -> Format | None:
    head = stream.read(_SNIFF_BYTES)
    stream.seek(0)
    with contextlib.suppress(OSError):
        plain = head
        if codec is not None:
            plain = pa.CompressedInputStream(io.BytesIO(head), codec).read(_MAGIC_BYTES)
        return "jsonl" if plain.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else None
    return None


@contextlib.contextmanager
def readable(file: InputFile, options: Mapping[str, object] | None = None) -> Iterator[None]:
    """Turns what readers and stores raise into InputError (the file) or StorageError (the store).

    A plain OSError without a number comes from a decoder, not from a disk or a network.
    """
    decoding = (pa.ArrowException, UnicodeDecodeError, OverflowError)  # names, too, are bytes
    errors: tuple[type[Exception], ...] = (*decoding, *store_errors(protocol_of(file.uri)))
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{redact(file.uri)} is not there any more; restore it") from error
    except errors as error:
        from_decoder = type(error) is OSError and error.errno is None and error.__cause__ is None
        if not from_decoder and not isinstance(error, decoding):
            raise StorageError(refusal("read", file.uri, error, options)) from error
        why = redact_message(" ".join(str(error).split()), options).rstrip(".")
        raise InputError(
            f"{redact(file.uri)} cannot be read, it is truncated or damaged: {why}; "
            "write it again, or leave it out of input.uri"
        ) from error
