"""A command whose stderr nobody reads any more ends as it would otherwise."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TALKS = """
import sys
from batchgen.commands.stderr import keep_stderr
keep_stderr()
print("read", file=sys.stderr)
sys.stdin.readline()
for _ in range(3):
    print("not read", file=sys.stderr)
    sys.stderr.flush()
print(sys.stderr.encoding, sys.stderr.errors)
"""


def run(arguments: list[str], stderr: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_what_nobody_reads_is_dropped(kind: str) -> None:
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    process = run(["-c", TALKS], theirs)
    os.close(theirs)
    assert os.read(ours, 100).split() == [b"read"]
    os.close(ours)
    out, _ = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out) == (0, "utf-8 backslashreplace\n")


def test_the_exit_code_stays() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = run(["-m", "batchgen", "run", "there-is-no-such-job.yaml"], theirs)
    os.close(theirs)
    process.communicate(timeout=60)
    assert process.returncode == 2
