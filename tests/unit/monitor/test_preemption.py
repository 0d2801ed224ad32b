"""Signals, sent to this process and to a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from batchgen.monitor.preemption import SignalWatch

WAIT = """
import sys, time
from batchgen.monitor.preemption import SignalWatch
with SignalWatch() as watch:
    print("ready", flush=True)
    while watch.reason is None:
        time.sleep(0.01)
    print(watch.reason, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGTERM, "preempted"),
        (signal.SIGUSR1, "preempted"),
        (signal.SIGINT, "interrupted"),
    ],
)
def test_reasons_and_restored_handlers(number: signal.Signals, reason: str) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with SignalWatch() as watch:
        assert watch.reason is None
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while watch.reason is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert watch.reason == reason
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert after == before


def test_the_first_reason_stays() -> None:
    with SignalWatch() as watch:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert watch.reason == "preempted"


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
