"""Notices of preemption from the metadata servers of clouds, each by its documented protocol.

A poller is asked again and again, in a thread of its own. It says that there is a notice, that
there is none, or that the server does not answer as documented (`MetadataError`).

Sources: Amazon EC2 user guide, "Spot Instance interruption notices" and "Use IMDSv2"; Google
Compute Engine, "Preemptible VM instances" and "Query VM metadata"; Azure, "Scheduled Events for
Linux VMs" and "Azure Instance Metadata Service".
"""

from __future__ import annotations

import datetime as dt
import email.utils
import http.client
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, Field, ValidationError

_MAX_BODY_BYTES = 1 << 18
_AWS_TOKEN = re.compile(r"[!-~]{1,1024}")
_AZURE_NAME = re.compile(r"[\w.-]{1,128}")


class MetadataError(Exception):
    """The server is away, or answers something else than its protocol says. For people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudNotice:
    """What a cloud has announced."""

    text: str  # for people
    at: dt.datetime | None = None  # when it will happen, where the cloud says so; aware


class Poller(Protocol):
    """Asks one metadata server."""

    name: ClassVar[str]
    interval_s: ClassVar[float]  # between two questions

    def poll(self) -> CloudNotice | None:
        """The notice, or None while there is none. Raises MetadataError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def expect(self, status: int) -> _Answer:
        if self.status != status:
            raise MetadataError(f"answered with status {self.status}")
        return self


def _ask(
    endpoint: str,
    path: str,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    timeout_s: float,
) -> _Answer:
    """One request. No proxy and no redirect: the server is a link-local address.

    `timeout_s` bounds each wait for the server. Raises MetadataError if it does not answer.
    """
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=timeout_s)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        body = response.read(_MAX_BODY_BYTES)
        return _Answer(status=response.status, headers=response.headers, body=body)
    except (OSError, http.client.HTTPException) as error:
        raise MetadataError(f"gave no answer ({type(error).__name__}: {error})") from None
    finally:
        connection.close()


class _AwsAction(BaseModel):
    action: str
    time: dt.datetime


class AwsPoller:
    """EC2: `spot/instance-action` is 404 until the instance is to be interrupted.

    IMDSv2 asks for a session token, which expires: 401 says that a new one is needed.
    """

    name: ClassVar[str] = "aws"
    interval_s: ClassVar[float] = 5.0  # what the guide recommends
    timeout_s: ClassVar[float] = 5.0

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._token: str | None = None

    def poll(self) -> CloudNotice | None:
        answer = self._ask_action(self._token or self._new_token())
        if answer.status == 401:
            answer = self._ask_action(self._new_token())
        if answer.status == 404:
            return None
        try:
            found = _AwsAction.model_validate_json(answer.expect(200).body)
        except ValidationError:
            raise MetadataError("answered with what is no instance-action") from None
        at = found.time if found.time.tzinfo else found.time.replace(tzinfo=dt.UTC)
        return CloudNotice(text=f"AWS: {found.action} at {at:%H:%M:%S} UTC", at=at)

    def _ask_action(self, token: str) -> _Answer:
        headers = {"X-aws-ec2-metadata-token": token}
        path = "/latest/meta-data/spot/instance-action"
        return _ask(self._endpoint, path, headers, timeout_s=self.timeout_s)

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        path = "/latest/api/token"
        answer = _ask(self._endpoint, path, headers, method="PUT", timeout_s=self.timeout_s)
        token = answer.expect(200).body.decode("latin-1").strip()
        if not _AWS_TOKEN.fullmatch(token):
            raise MetadataError("answered with what is no token")
        self._token = token
        return token


class GcpPoller:
    """Compute Engine: `instance/preempted` turns TRUE. The request hangs until it changes.

    With the etag of the last answer, a change between two requests is not missed.
    """

    name: ClassVar[str] = "gcp"
    interval_s: ClassVar[float] = 1.0  # after a request that hung, or should have
    hang_s: ClassVar[int] = 60
    timeout_s: ClassVar[float] = 5.0  # beyond the time that the server was asked to hang

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._etag: str | None = None

    def poll(self) -> CloudNotice | None:
        path, timeout_s = "/computeMetadata/v1/instance/preempted", self.timeout_s
        if self._etag is not None:
            etag = quote(self._etag, safe="")
            path += f"?wait_for_change=true&timeout_sec={self.hang_s}&last_etag={etag}"
            timeout_s += self.hang_s
        self._etag = None  # should this request fail, the next one does not hang
        answer = _ask(self._endpoint, path, {"Metadata-Flavor": "Google"}, timeout_s=timeout_s)
        value = answer.expect(200).body.strip()
        if answer.headers.get("Metadata-Flavor") != "Google" or value not in (b"TRUE", b"FALSE"):
            raise MetadataError("answered with what is no `instance/preempted`")
        self._etag = answer.headers.get("ETag")
        return CloudNotice(text="GCP: instance/preempted") if value == b"TRUE" else None


class _AzureEvent(BaseModel):
    event_type: str = Field(alias="EventType")
    resources: list[str] = Field(alias="Resources")
    not_before: str = Field(default="", alias="NotBefore")  # empty once it has begun


class _AzureEvents(BaseModel):
    events: list[_AzureEvent] = Field(alias="Events")


class AzurePoller:
    """Azure: a scheduled event that deletes this machine.

    Preempt evicts a spot machine, Terminate deletes one of a scale set that asks to be told. After
    Freeze, Reboot and Redeploy the machine is back, and they may be announced days ahead. Events
    name the machines that they are for, because all of a scale set or availability set hear of
    them. They are not approved (POST StartRequests): that would only let them begin sooner.
    """

    name: ClassVar[str] = "azure"
    interval_s: ClassVar[float] = 1.0  # what the documentation recommends
    timeout_s: ClassVar[float] = 5.0
    first_timeout_s: ClassVar[float] = 150.0  # the first events may take two minutes
    deletions: ClassVar[frozenset[str]] = frozenset(("Preempt", "Terminate"))

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._machine: str | None = None
        self._is_warm = False

    def poll(self) -> CloudNotice | None:
        machine = self._machine = self._machine or self._ask_name()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        timeout_s = self.timeout_s if self._is_warm else self.first_timeout_s
        answer = _ask(self._endpoint, path, {"Metadata": "true"}, timeout_s=timeout_s)
        try:
            events = _AzureEvents.model_validate_json(answer.expect(200).body).events
        except ValidationError:
            raise MetadataError("answered with what are no scheduled events") from None
        self._is_warm = True
        for event in events:
            names = [name.casefold() for name in event.resources]
            if event.event_type in self.deletions and machine.casefold() in names:
                text = f"Azure: {event.event_type}, {event.not_before or 'now'}"
                return CloudNotice(text=text, at=_http_date(event.not_before))
        return None

    def _ask_name(self) -> str:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        headers = {"Metadata": "true"}
        answer = _ask(self._endpoint, path, headers, timeout_s=self.timeout_s).expect(200)
        name = answer.body.decode("utf-8", "replace").strip()
        if not _AZURE_NAME.fullmatch(name):
            raise MetadataError("answered with what is no machine's name")
        return name


def _http_date(text: str) -> dt.datetime | None:
    """Such as "Mon, 19 Sep 2016 18:29:47 GMT"; None for anything else."""
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=dt.UTC)
