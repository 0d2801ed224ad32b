"""Pollers against a server on loopback that speaks their clouds' protocols."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from cloud_metadata import CloudMetadata, Reply, azure_event

from batchgen.monitor.metadata import AwsPoller, AzurePoller, GcpPoller, MetadataError, Poller

POLLERS: dict[str, Callable[[str], Poller]] = {
    "aws": AwsPoller,
    "gcp": GcpPoller,
    "azure": AzurePoller,
}
AZURE_DELETIONS = ("Preempt", "Terminate")


@pytest.fixture
def cloud() -> Iterator[CloudMetadata]:
    with CloudMetadata() as server:
        yield server


@pytest.mark.parametrize("name", POLLERS)
def test_no_notice_then_one(
    cloud: CloudMetadata, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GcpPoller, "hang_s", 1)
    poller = POLLERS[name](cloud.endpoint)
    assert [poller.poll() for _ in range(3)] == [None, None, None]
    cloud.preempt(name)
    found = poller.poll()
    assert found is not None
    assert name.upper() in found.text.upper()


def test_aws_gives_the_time_and_one_token_serves_until_it_expires(cloud: CloudMetadata) -> None:
    poller = AwsPoller(cloud.endpoint)
    for _ in range(3):
        assert poller.poll() is None
    assert cloud.requests.count("PUT /latest/api/token") == 1
    cloud.tokens.clear()
    for _ in range(2):
        assert poller.poll() is None
    assert cloud.requests.count("PUT /latest/api/token") == 2
    cloud.tokens.clear()
    cloud.action = {"action": "stop", "time": "2026-01-02T03:04:05Z"}
    found = poller.poll()
    assert found is not None
    assert found.text == "AWS: stop at 03:04:05 UTC"
    assert found.at == dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def test_aws_whose_new_token_is_refused_is_off(cloud: CloudMetadata) -> None:
    poller = AwsPoller(cloud.endpoint)
    poller.poll()
    cloud.fault = Reply(401)
    with pytest.raises(MetadataError, match="status 401"):
        poller.poll()


def test_gcp_hangs_until_the_change(cloud: CloudMetadata) -> None:
    poller = GcpPoller(cloud.endpoint)
    assert poller.poll() is None
    timer = threading.Timer(0.5, cloud.preempt, ["gcp"])
    timer.start()
    started = time.monotonic()
    assert poller.poll() is not None
    assert 0.3 < time.monotonic() - started < 5.0
    assert "wait_for_change=true&timeout_sec=60&last_etag=0" in cloud.requests[-1]
    timer.join()


def test_gcp_misses_no_change_between_two_requests(cloud: CloudMetadata) -> None:
    poller = GcpPoller(cloud.endpoint)
    assert poller.poll() is None
    cloud.preempt("gcp")
    started = time.monotonic()
    assert poller.poll() is not None
    assert time.monotonic() - started < 5.0


def test_azure_heeds_deletions_of_its_own_machine_only(cloud: CloudMetadata) -> None:
    poller = AzurePoller(cloud.endpoint)
    when = "Mon, 19 Sep 2016 18:29:47 GMT"
    others = [azure_event(when, kind=kind) for kind in ("Freeze", "Reboot", "Redeploy")]
    others += [azure_event(when, kind=kind, machines=("spot-vm_4",)) for kind in AZURE_DELETIONS]
    cloud.events = others.copy()
    assert poller.poll() is None
    cloud.events.append(azure_event(when, machines=("spot-vm_4", "SPOT-VM_3")))
    found = poller.poll()
    assert found is not None
    assert found.at == dt.datetime(2016, 9, 19, 18, 29, 47, tzinfo=dt.UTC)
    cloud.events = [azure_event("")]
    begun = poller.poll()
    assert begun is not None
    assert begun.at is None
    for kind in AZURE_DELETIONS:
        cloud.events = [*others, azure_event(when, kind=kind)]
        found = poller.poll()
        assert found is not None
        assert found.text == f"Azure: {kind}, {when}"
    assert sum("compute/name" in request for request in cloud.requests) == 1


BAD = {
    "error": Reply(500),
    "nothing": Reply(200),
    "html": Reply(200, b"<html>Sign in</html>"),
    "other json": Reply(200, b'{"Events": 3, "action": "stop"}'),
    "control characters": Reply(200, b"\x00\r\n\xff"),
    "deep": Reply(200, b"[" * 100_000),
    "redirect": Reply(302, b"", (("Location", "http://127.0.0.1:1/"),)),
}


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", POLLERS)
@pytest.mark.parametrize("is_known", [False, True])
def test_malformed_answers(cloud: CloudMetadata, name: str, reply: Reply, is_known: bool) -> None:
    """At the first request, and once a token, an etag or a name is known; then it recovers."""
    poller = POLLERS[name](cloud.endpoint)
    if is_known:
        assert poller.poll() is None
    cloud.fault = reply
    for _ in range(2):
        try:
            assert poller.poll() is None, "a notice where there was none"
        except MetadataError:
            continue
        pytest.fail("the answer was taken for a good one")
    cloud.fault = None
    cloud.preempt(name)
    assert poller.poll() is not None


@pytest.mark.parametrize("name", POLLERS)
def test_slow_answers(cloud: CloudMetadata, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLLERS[name], "timeout_s", 0.3)
    poller = POLLERS[name](cloud.endpoint)
    cloud.delay_s = 1.5
    started = time.monotonic()
    with pytest.raises(MetadataError, match=r"gave no answer \(TimeoutError"):
        poller.poll()
    assert time.monotonic() - started < 1.4
    cloud.delay_s = 0.0
    assert poller.poll() is None


def test_the_first_events_of_azure_may_be_slow(
    cloud: CloudMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AzurePoller, "timeout_s", 0.3)
    poller = AzurePoller(cloud.endpoint)
    poller._ask_name = lambda: "spot-vm_3"  # type: ignore[method-assign]
    cloud.delay_s = 1.0
    assert poller.poll() is None
    with pytest.raises(MetadataError, match="gave no answer"):
        poller.poll()


@pytest.mark.parametrize("name", POLLERS)
def test_no_server(name: str) -> None:
    with CloudMetadata() as gone:
        endpoint = gone.endpoint
    with pytest.raises(MetadataError, match=r"gave no answer \(ConnectionRefusedError"):
        POLLERS[name](endpoint).poll()
