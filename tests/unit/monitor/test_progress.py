"""The bar in a real terminal, the log lines elsewhere, the rates of both."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
import uuid
from pathlib import Path

import pytest

from batchgen.monitor.progress import (
    Progress,
    RateMeter,
    Rates,
    RunProgress,
    format_duration,
    progress_text,
)
from batchgen.records import EngineStats

DRAW = """
import sys, time
from batchgen.monitor.progress import Progress, RunProgress
from batchgen.records import EngineStats
with Progress(sys.argv[1]) as progress:
    for step in range(1, 8):
        progress.update(RunProgress(
            total_rows=200, ok_rows=100 + 10 * step, failed_rows=step,
            engine=EngineStats(prompt_tokens=1000 * step, output_tokens=100 * step,
                               blocks_total=100, blocks_used=45)))
        time.sleep(0.25)
"""


def at(rows: int, tokens: int = 0, total: int = 1000) -> RunProgress:
    return RunProgress(
        total_rows=total,
        ok_rows=rows,
        engine=EngineStats(prompt_tokens=10 * tokens, output_tokens=tokens),
    )


def test_rates_are_of_the_last_seconds_and_of_this_run() -> None:
    meter = RateMeter(window_s=10)
    meter.add(at(500), 0.0)
    assert meter.add(at(520, 100), 2.0) == Rates(rows=10, prompt_tokens=500, output_tokens=50)
    for second in range(3, 31):
        rates = meter.add(at(520 + 2 * second, 100 + 7 * second), float(second))
    assert rates == Rates(rows=2, prompt_tokens=70, output_tokens=7)


def test_the_text() -> None:
    progress = RunProgress(
        total_rows=1000,
        ok_rows=90,
        failed_rows=8,
        skipped_rows=2,
        engine=EngineStats(blocks_total=200, blocks_used=90),
    )
    rates = Rates(rows=2.5, prompt_tokens=12_345, output_tokens=678)
    assert progress_text(progress, rates) == (
        "2.5 rows/s, 12.3k in/s, 678 out/s, KV 45%, 8 failed, 6:00 left"
    )
    spending = dataclasses.replace(progress, budget_share=0.424)
    assert progress_text(spending, rates).endswith("KV 45%, 8 failed, budget 42%, 6:00 left")
    idle = Rates(rows=0, prompt_tokens=0, output_tokens=0)
    assert progress_text(RunProgress(total_rows=0), idle).endswith("KV 0%, 0 failed, ? left")
    assert [format_duration(s) for s in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


def test_log_lines() -> None:
    stream = io.StringIO()
    with Progress("auto", stream, log_interval_s=0.05) as progress:
        started = time.monotonic()
        while time.monotonic() < started + 0.3:
            progress.update(at(250))
            time.sleep(0.005)
        progress.update(at(1000))
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 7
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d 250/1000 rows \(25%\), 0\.0 rows/s, .*, 0 failed, \? left", lines[0]
    )
    assert " 1000/1000 rows (100%)" in lines[-1]


def test_a_log_line_every_ten_seconds() -> None:
    stream = io.StringIO()
    progress = Progress("log", stream)
    progress.update(at(1))
    progress.update(at(2))
    assert stream.getvalue() == ""


def test_none_shows_nothing() -> None:
    stream = io.StringIO()
    with Progress("none", stream, log_interval_s=0.0) as progress:
        progress.update(at(1))
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("mode", "columns"), [("auto", 120), ("bar", 120), ("auto", 0)])
def test_the_bar_on_a_pseudo_terminal(mode: str, columns: int) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", DRAW, mode],
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            read = os.read(leader, 65536)
        except OSError:  # Linux tells the end of a pseudo-terminal like this
            break
        if not read:
            break
        shown += read
    os.close(leader)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, b"")
    frames = shown.decode().replace("\n", "").split("\r")
    frames = [frame for frame in frames if frame.strip()]
    assert len(frames) >= 4
    assert "111/200 rows" in frames[0]
    assert "177/200 rows" in frames[-1]
    assert re.search(r"\d+ rows/s, .*k in/s, \d+ out/s, KV 45%, 7 failed, 0:0\d left", frames[-1])


def test_log_lines_where_stderr_is_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRAW, "auto"], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "177/200 rows (88%)" in line
    assert "\r" not in line


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_the_bar_in_a_real_terminal(tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(DRAW + "sys.stderr.write('the end\\n')\ntime.sleep(60)\n")
    server = f"test-{uuid.uuid4().hex[:8]}"

    def tmux(*words: str) -> str:
        return subprocess.run(
            ["tmux", "-L", server, *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout

    command = shlex.join([sys.executable, str(script), "auto"])
    tmux("-f", "/dev/null", "new-session", "-d", "-s", "s", "-x", "100", "-y", "12", command)
    try:
        deadline = time.monotonic() + 30
        while "the end" not in (screen := tmux("capture-pane", "-p", "-t", "s")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)
    finally:
        tmux("kill-server")
    lines = [line for line in screen.splitlines() if line.strip()]
    assert len(lines) == 2, screen  # one line that was drawn over and over, and the text after it
    assert re.match(r" 88%\|.*\| 177/200 rows, .* rows/s, .*, 7 failed, 0:0\d left", lines[0])
