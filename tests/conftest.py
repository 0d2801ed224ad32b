"""For every test: the interpreter or the GPU, and a real S3 server on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_START_TIMEOUT_S = 60

HAS_GPU = Path("/dev/nvidiactl").exists()
REQUIRES_GPU = os.environ.get("BATCHGEN_REQUIRE_GPU") == "1"

# Triton reads this when it is first imported, which transformers does, too.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    if REQUIRES_GPU and not HAS_GPU:
        raise pytest.UsageError("BATCHGEN_REQUIRE_GPU=1, but there is no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is one."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server; `environment` is what a user would export to reach it."""

    endpoint_url: str
    storage_options: dict[str, object]
    environment: dict[str, str]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto's S3 server in a process of its own, for the whole session."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint_url = f"http://127.0.0.1:{port}"
    log: Path = tmp_path_factory.mktemp("s3") / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_it_answers(process, endpoint_url, log)
        yield S3Server(
            endpoint_url=endpoint_url,
            storage_options={"endpoint_url": endpoint_url, "key": "test", "secret": "test"},
            environment={
                "AWS_ENDPOINT_URL": endpoint_url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The uri of a new bucket, reached through the environment alone (no storage options)."""
    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(**s3_server.storage_options).mkdir(bucket)
    return f"s3://{bucket}"


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}")
