"""Which errors pass by themselves, how long they are given, and reads that break off."""

from __future__ import annotations

import errno
import io
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)
from s3fs.errors import translate_boto_error

from batchgen import retries
from batchgen.dataset.formats import readable
from batchgen.dataset.inputs import open_input
from batchgen.dataset.object_reader import ObjectReader
from batchgen.errors import StorageError
from batchgen.records import InputFile
from batchgen.retries import TruncatedReadError, is_transient, retrying


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    return waited


def s3_error(code: str, status: int) -> Exception:
    """What s3fs raises when S3 answers so."""
    error: Exception = translate_boto_error(
        ClientError(
            {
                "Error": {"Code": code, "Message": "no"},
                "ResponseMetadata": {"HTTPStatusCode": status},  # type: ignore[typeddict-item]
            },
            "PutObject",
        )
    )
    return error


def http_error(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


class GcsError(Exception):
    """As gcsfs.retry.HttpError, whose `code` may be text."""

    def __init__(self, code: int | str) -> None:
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        s3_error("SlowDown", 503),
        s3_error("InternalError", 500),
        s3_error("TooManyRequests", 429),
        s3_error("RequestTimeout", 400),
        s3_error("ConditionalRequestConflict", 409),
        ReadTimeoutError(endpoint_url="https://x"),
        EndpointConnectionError(endpoint_url="https://x"),
        http_error(502),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError(),
        GcsError(429),
        GcsError("503"),
        TimeoutError(),
        ConnectionResetError(),
        TruncatedReadError(),
    ],
    ids=repr,
)
def test_what_passes_by_itself(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        s3_error("AccessDenied", 403),
        s3_error("NoSuchBucket", 404),
        s3_error("PreconditionFailed", 412),
        s3_error("BucketAlreadyExists", 409),
        s3_error("NotImplemented", 501),
        http_error(404),
        GcsError(401),
        NoCredentialsError(),
        FileNotFoundError(),
        FileExistsError(),
        PermissionError(),
        OSError(errno.ENOSPC, "full"),
        OSError("HTTP 503 SlowDown"),  # a text decides nothing
    ],
    ids=repr,
)
def test_what_does_not(error: Exception) -> None:
    assert not is_transient(error)


def fail(error: Exception) -> None:
    raise error


def test_a_store_that_stays_away_is_given_half_a_minute(
    waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    error = s3_error("SlowDown", 503)
    with pytest.raises(OSError, match="no") as caught:
        retrying(lambda: fail(error), (OSError,), lambda _: "cannot write s3://b/x")
    assert caught.value is error
    assert len(waits) == retries.NUM_ATTEMPTS - 1 == len(caplog.records)
    assert 15 < sum(waits) < 35
    assert all(later > earlier for earlier, later in zip(waits, waits[2:], strict=False))
    assert caplog.messages[0].startswith("cannot write s3://b/x; trying again in 0.")
    assert caplog.records[0].levelno == logging.WARNING


def test_an_error_that_does_not_pass_is_raised_at_once(waits: list[float]) -> None:
    with pytest.raises(PermissionError):
        retrying(lambda: fail(PermissionError()), (OSError,), str)
    with pytest.raises(TimeoutError):  # not one of the store's
        retrying(lambda: fail(TimeoutError()), (FileNotFoundError,), str)
    assert waits == []


class BreakingFile(io.BytesIO):
    """Ends early at every second read, and breaks off at every third."""

    num_reads: ClassVar[int] = 0

    def read(self, size: int | None = -1) -> bytes:
        type(self).num_reads += 1
        if self.num_reads % 2 == 0:
            return b""
        if self.num_reads % 3 == 0:
            raise ConnectionResetError
        return super().read(min(size or -1, 7))


def test_an_object_is_read_to_its_end(waits: list[float]) -> None:
    data = bytes(range(256))
    reader = io.BufferedReader(
        ObjectReader(
            lambda: BreakingFile(data), uri="s3://b/x", size_bytes=len(data), errors=(OSError,)
        ),
        buffer_size=16,
    )
    assert reader.read(100) == data[:100]
    assert reader.seek(-56, io.SEEK_END) == 200
    assert reader.read() == data[200:]
    assert reader.seek(3) == 3
    assert reader.read(2) == data[3:5]
    assert reader.seek(1, io.SEEK_CUR) == 6
    assert reader.read(1000) == data[6:]
    assert waits


def test_an_object_that_is_shorter_than_planned_is_an_error(waits: list[float]) -> None:
    reader = ObjectReader(
        lambda: io.BytesIO(b"short"), uri="s3://b/x", size_bytes=9, errors=(OSError,)
    )
    with pytest.raises(TruncatedReadError, match="ends at byte 5 of 9"):
        io.BufferedReader(reader).read(9)


class FlakyHandler(BaseHTTPRequestHandler):
    """Every second answer is 503, or breaks off in the middle."""

    data: ClassVar[bytes] = b'{"text": "a"}\n' * 1000
    answers: ClassVar[Iterator[str]]

    def do_HEAD(self) -> None:
        self._answer(0, len(self.data), "good")

    def do_GET(self) -> None:
        start, _, end = (self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")
        stop = min(int(end) + 1 if end else len(self.data), len(self.data))
        self._answer(int(start), stop, next(self.answers))

    def _answer(self, start: int, stop: int, kind: str) -> None:
        self.send_response(503 if kind == "busy" else 206)
        self.send_header("Content-Length", "0" if kind == "busy" else str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET" and kind != "busy":
            self.wfile.write(self.data[start : stop if kind == "good" else (start + stop) // 2])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def flaky_file() -> Iterator[InputFile]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FlakyHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl"
        yield InputFile(uri=uri, size_bytes=len(FlakyHandler.data), etag="")
        server.shutdown()
        thread.join()


def test_a_web_server_that_is_busy_and_breaks_off(
    flaky_file: InputFile, waits: list[float]
) -> None:
    FlakyHandler.answers = iter(["busy", "broken", "busy", "good"])
    with readable(flaky_file), open_input(flaky_file) as stream:
        assert stream.read() == FlakyHandler.data
    assert len(waits) == 3


def test_a_web_server_that_stays_busy(flaky_file: InputFile, waits: list[float]) -> None:
    FlakyHandler.answers = iter(["busy"] * 100)
    with (
        pytest.raises(StorageError, match="cannot read http://"),
        readable(flaky_file),
        open_input(flaky_file) as stream,
    ):
        stream.read()
    assert len(waits) == retries.NUM_ATTEMPTS - 1
