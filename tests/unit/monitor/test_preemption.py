"""Notices: signals, sent to this process and to a process of their own, and clouds' pollers."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import pytest
from cloud_metadata import CloudMetadata

from batchgen.job.spec import PreemptionEndpoints, PreemptionSpec
from batchgen.monitor import preemption
from batchgen.monitor.metadata import AwsPoller, CloudNotice, MetadataError
from batchgen.monitor.preemption import StopNotice, StopWatch, stop_error, watch_for
from batchgen.monitor.summary import SavedWork

WAIT = """
import sys, time
from batchgen.monitor.preemption import StopWatch
with StopWatch() as watch:
    print("ready", flush=True)
    while watch.notice is None:
        time.sleep(0.01)
    print(watch.notice.reason, flush=True)
    time.sleep(60)
"""
LATE = """
import hashlib, os, signal, sys
from batchgen.monitor.preemption import StopWatch
with StopWatch(lead_time_s=0.5, on_deadline=lambda notice: print(notice.text, flush=True)):
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour in C, without the GIL
"""
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def notice_of(watch: StopWatch) -> StopNotice:
    wait_for(lambda: watch.notice is not None)
    assert watch.notice is not None
    return watch.notice


def seconds_given(notice: StopNotice) -> float:
    assert notice.deadline_s is not None
    return notice.deadline_s - notice.received_s


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGTERM, "preempted"),
        (signal.SIGUSR1, "preempted"),
        (signal.SIGINT, "interrupted"),
    ],
)
def test_reasons_and_restored_handlers(
    number: signal.Signals, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(n) for n in WATCHED]
    with StopWatch() as watch:
        assert watch.notice is None
        os.kill(os.getpid(), number)
        notice = notice_of(watch)
        assert notice.reason == reason
        assert notice.text == number.name
        assert (notice.deadline_s is None) == (reason == "interrupted")
    assert [signal.getsignal(n) for n in WATCHED] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert ("a second Ctrl-C ends it at once" in caplog.text) == (reason == "interrupted")


def test_only_the_signals_asked_for_are_watched() -> None:
    term, usr1, _ = (signal.getsignal(n) for n in WATCHED)
    with StopWatch(sources=["sigusr1", "aws"]):
        assert signal.getsignal(signal.SIGTERM) == term
        assert signal.getsignal(signal.SIGUSR1) != usr1


def test_the_first_reason_stays_and_the_earliest_deadline_counts() -> None:
    with StopWatch() as watch:
        watch._note(StopNotice.preempted("AWS", 120.0))
        first = notice_of(watch)
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: watch.notice is not first)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        notice = notice_of(watch)
        assert (notice.reason, notice.text) == ("preempted", "AWS")
        assert seconds_given(first) == pytest.approx(110.0)
        assert 23.9 < seconds_given(notice) < 34.0  # 30 s from the signal, less the margin


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_a_signal_is_heard_while_the_main_thread_computes() -> None:
    """Python's own handlers wait for it, which would move the deadline by as long."""
    started = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
    per_s = 200_000 / (time.monotonic() - started)
    with StopWatch() as watch:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(1.5 * per_s))  # one call, in C
        ended = time.monotonic()
        assert notice_of(watch).received_s < ended - 0.3


def test_a_process_that_is_late_is_ended_with_the_exit_code_of_a_preemption() -> None:
    started = time.monotonic()
    late = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60, check=False
    )
    assert late.returncode == 75, late.stderr
    assert late.stdout == "SIGTERM\n"
    assert time.monotonic() - started < 30


def test_nobody_is_ended_before_the_deadline_or_after_the_run() -> None:
    ended: list[int] = []
    with StopWatch(lead_time_s=1.0, end_process=ended.append) as watch:
        signal.raise_signal(signal.SIGTERM)
        deadline_s = notice_of(watch).deadline_s
        assert deadline_s is not None
        wait_for(lambda: bool(ended) or time.monotonic() > deadline_s - 0.2)
        assert ended == []
        wait_for(lambda: bool(ended))
        assert time.monotonic() >= deadline_s
    assert ended == [75]
    with StopWatch(lead_time_s=0.5, end_process=ended.append) as watch:
        signal.raise_signal(signal.SIGTERM)
        notice_of(watch)
    time.sleep(0.6)
    assert ended == [75]


class FlakyPoller:
    """Away at first, then without and then with a notice."""

    name: ClassVar[str] = "aws"
    interval_s: ClassVar[float] = 0.01

    def __init__(self, found: CloudNotice) -> None:
        self._found = found
        self.num_polls = 0

    def poll(self) -> CloudNotice | None:
        self.num_polls += 1
        if self.num_polls < 5:
            raise MetadataError("is away")
        return self._found if self.num_polls > 8 else None


def test_a_server_that_is_away_is_said_once_and_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preemption, "_RETRY_S", 0.01)
    poller = FlakyPoller(CloudNotice(text="AWS: terminate"))
    with caplog.at_level(logging.WARNING), StopWatch(pollers=[poller]) as watch:
        notice = notice_of(watch)
    assert notice.text == "AWS: terminate"
    assert seconds_given(notice) == pytest.approx(110.0)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "the metadata server of aws is away; the run goes on" in messages[0]


@pytest.mark.parametrize(
    ("lead_time_s", "after_s", "lowest", "highest"),
    [
        (None, 40.0, 30.0, 32.0),  # a notice that came late: 40 s, less a margin of a fifth
        (None, 600.0, 110.0, 110.0),
        (None, -30.0, 4.0, 4.0),  # a clock that differs
        (20.0, 600.0, 16.0, 16.0),
    ],
)
def test_a_cloud_may_say_how_much_time_there_is(
    lead_time_s: float | None, after_s: float, lowest: float, highest: float
) -> None:
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=after_s)
    poller = FlakyPoller(CloudNotice(text="AWS", at=at))
    poller.num_polls = 8
    with StopWatch(lead_time_s=lead_time_s, pollers=[poller]) as watch:
        assert lowest - 1e-3 <= seconds_given(notice_of(watch)) <= highest + 1e-3


def test_the_watch_of_a_job_asks_the_clouds_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AwsPoller, "interval_s", 0.05)
    with CloudMetadata() as aws, CloudMetadata() as others:
        spec = PreemptionSpec(
            watch=("aws", "azure"),
            endpoints=PreemptionEndpoints(
                aws=aws.endpoint, gcp=others.endpoint, azure=others.endpoint
            ),
        )
        with watch_for(spec, lambda notice: None) as watch:
            wait_for(lambda: len(aws.requests) > 3 and len(others.requests) > 1)
            assert watch.notice is None
            aws.preempt("aws")
            assert notice_of(watch).text.startswith("AWS: terminate at ")
        assert all("/metadata/" in request for request in others.requests)


def test_what_a_stopped_run_says() -> None:
    notice = StopNotice.preempted("SIGTERM", 30.0)
    saved = SavedWork(finished_rows=1200, unfinished_rows=32, unfinished_tokens=4567)
    error = stop_error(notice, saved)
    assert error.exit_code == 75
    assert str(error) == (
        "preempted (SIGTERM), 0.0 s after the notice; saved: 1,200 rows that this run finished, "
        "and 4,567 output tokens of 32 rows that it did not; run the same command again to go on"
    )
