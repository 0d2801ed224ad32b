"""Signals that come when no worker watches for them, at each such moment, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Arguments: when a worker waits to be ended, and the notices. Exits as the command does.
SUPERVISED = """
import os, signal, sys
from types import SimpleNamespace
from batchgen.errors import BatchgenError
from batchgen.records import RowKey
from batchgen.supervision import supervise, supervisor

moment, *notices = sys.argv[1:]
parent = os.getpid()

def work(worker):
    is_restart = worker.assignment.is_restart
    print("worker", os.getpid(), is_restart, flush=True)
    if is_restart or moment == "first":
        signal.pause()
    worker.given([SimpleNamespace(key=RowKey(unit_id=0, index=0))])
    os.kill(os.getpid(), signal.SIGSEGV)

if moment.startswith("SIG"):  # when the parent has looked at the first worker's end
    supervisor._say = lambda *_: os.kill(parent, signal.Signals[moment])
try:
    code = supervise(work, frozenset(signal.Signals[name] for name in notices))
except BatchgenError as error:
    print(error, file=sys.stderr, flush=True)
    code = error.exit_code
os._exit(code)
"""
NOTICES = ("SIGTERM", "SIGUSR1")
ENDS = [
    ("SIGTERM", NOTICES, 75),
    ("SIGUSR1", NOTICES, 75),
    ("SIGINT", NOTICES, 130),
    ("SIGTERM", ("SIGUSR1",), -signal.SIGTERM),
    ("SIGUSR1", ("SIGTERM",), -signal.SIGUSR1),
    ("SIGINT", (), 130),
]


def start(moment: str, notices: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISED, moment, *notices],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def worker_of(process: subprocess.Popen[str], *, is_restart: bool) -> int:
    """Its process id, once it is at work."""
    assert process.stdout is not None
    for line in process.stdout:
        _, pid, restarted = line.split()
        if restarted == str(is_restart):
            return int(pid)
    pytest.fail("there was no such worker")


def check_end(process: subprocess.Popen[str], number: str, code: int) -> None:
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "worker" not in out, "another one was started"
    if code > 0:
        what = {75: "preempted", 130: "interrupted"}[code]
        said = f"{what} ({number}); what was flushed is saved; run the same command again to go on"
        assert err.splitlines()[-1] == said


@pytest.mark.parametrize(("number", "notices", "code"), ENDS)
@pytest.mark.parametrize("moment", ["first", "restarted"])
def test_while_a_worker_starts(
    moment: str, number: str, notices: tuple[str, ...], code: int
) -> None:
    process = start(moment, notices)
    worker_of(process, is_restart=moment == "restarted")
    process.send_signal(signal.Signals[number])
    check_end(process, number, code)


@pytest.mark.parametrize(("number", "notices", "code"), ENDS)
def test_between_two_workers(number: str, notices: tuple[str, ...], code: int) -> None:
    process = start(number, notices)
    worker_of(process, is_restart=False)
    check_end(process, number, code)


@pytest.mark.parametrize(("number", "notices", "code"), ENDS)
def test_that_only_the_worker_got(number: str, notices: tuple[str, ...], code: int) -> None:
    """As where systemd sends one to each process, and the worker's comes first."""
    process = start("restarted", notices)
    os.kill(worker_of(process, is_restart=True), signal.Signals[number])
    check_end(process, number, code)
