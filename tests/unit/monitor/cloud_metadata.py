"""A server on loopback that speaks the metadata protocols of AWS, GCP and Azure, and their faults.

with CloudMetadata() as cloud:
    cloud.endpoint               "http://127.0.0.1:port"
    cloud.preempt("aws")         from now on there is a notice
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
import threading
import time
from dataclasses import dataclass
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

MACHINE = "spot-vm_3"
AZURE_VERSIONS = ("2017-11-01", "2019-01-01", "2019-04-01", "2019-08-01", "2020-07-01")
TOKEN_TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class CloudMetadata:
    """All three clouds at one endpoint. `requests` are the method and path of each one so far."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.action: dict[str, object] | None = None
        self.preempted = b"FALSE"
        self.events: list[dict[str, object]] = []
        self.fault: Reply | None = None  # instead of every answer
        self.delay_s = 0.0
        self._etag = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(cloud.get)

            def do_PUT(self) -> None:
                self._answer(cloud.put)

            def do_POST(self) -> None:  # Azure's approval of an event, which ends its notice
                self._answer(lambda path, headers: Reply(200))

            def _answer(self, respond: object) -> None:
                cloud.requests.append(f"{self.command} {self.path}")
                time.sleep(cloud.delay_s)
                reply = cloud.fault or respond(self.path, self.headers)  # type: ignore[operator]
                self.send_response(reply.status)
                for name, value in reply.headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that did not wait

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def preempt(self, name: str, after_s: float = 600.0) -> None:
        """Gives notice that the machine is taken in `after_s`."""
        at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=after_s)
        with self._changed:
            if name == "aws":
                self.action = {"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}
            elif name == "gcp":
                self.preempted = b"TRUE"
                self._etag += 1
            else:
                self.events.append(azure_event(format_datetime(at, usegmt=True)))
            self._changed.notify_all()

    def put(self, path: str, headers: dict[str, str]) -> Reply:
        if path != "/latest/api/token":
            return Reply(404)
        if not 1 <= int(headers.get(TOKEN_TTL) or 0) <= 21600:
            return Reply(400)
        token = secrets.token_urlsafe(40) + "=="
        self.tokens.add(token)
        return Reply(200, token.encode())

    def get(self, path: str, headers: dict[str, str]) -> Reply:
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/latest/meta-data/spot/instance-action":
            return self._aws(headers)
        if parts.path == "/computeMetadata/v1/instance/preempted":
            return self._gcp(query, headers)
        return self._azure(parts.path, query, headers)

    def _aws(self, headers: dict[str, str]) -> Reply:
        if headers.get(TOKEN) not in self.tokens:
            return Reply(401)
        if self.action is None:
            return Reply(404, b"<html>404 - Not Found</html>")
        return Reply(200, json.dumps(self.action).encode())

    def _gcp(self, query: dict[str, str], headers: dict[str, str]) -> Reply:
        if headers.get("Metadata-Flavor") != "Google":
            return Reply(403)
        with self._changed:
            if query.get("wait_for_change") == "true":
                seen = query.get("last_etag", str(self._etag))
                self._changed.wait_for(
                    lambda: str(self._etag) != seen, float(query.get("timeout_sec", 3600))
                )
            shown = (("Metadata-Flavor", "Google"), ("ETag", str(self._etag)))
            return Reply(200, self.preempted, shown)

    def _azure(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        if headers.get("Metadata") != "true" or "api-version" not in query:
            return Reply(400)
        if path == "/metadata/instance/compute/name":
            return Reply(200, MACHINE.encode() if query.get("format") == "text" else b"{}")
        if path != "/metadata/scheduledevents":
            return Reply(404)
        if query["api-version"] not in AZURE_VERSIONS:
            return Reply(400)
        document = {"DocumentIncarnation": 1 + len(self.events), "Events": self.events}
        return Reply(200, json.dumps(document).encode())


def azure_event(
    not_before: str, *, kind: str = "Preempt", machines: tuple[str, ...] = (MACHINE.upper(),)
) -> dict[str, object]:
    return {
        "EventId": "A123BC45-1234-5678-AB90-ABCDEF123456",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(machines),
        "EventStatus": "Scheduled",
        "NotBefore": not_before,
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }
