"""Processes that run a job, to be killed or paused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

import pytest
from e2e_jobs import ROOT
from standin import run_job_file

from batchgen.pipeline import PLANNING_WINDOW_ROWS


class Life(Protocol):
    """A process that runs a job."""

    def kill(self) -> None: ...

    def wait(self) -> int | None:
        """Its exit code, once it has ended."""
        ...

    def is_alive(self) -> bool: ...


def let_fork_server_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server is not told of sys.path before CPython 3.13."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")


@dataclass
class ForkedLife:
    """A run with the stand-in engine, forked from a server that has imported everything.

    The kill is as real as any; only the seconds of importing are not spent again and again.
    """

    process: ForkServerProcess

    @classmethod
    def start(
        cls, job: Path, environment: Mapping[str, str], max_rows: int = PLANNING_WINDOW_ROWS
    ) -> ForkedLife:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["standin", "transformers.models.llama.configuration_llama"])
        process = context.Process(target=run_job_file, args=(str(job), environment, 0.3, max_rows))
        process.start()
        return cls(process)

    def kill(self) -> None:
        self.process.kill()

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def is_alive(self) -> bool:
        return self.process.is_alive()


@dataclass
class CommandLife:
    """The real command."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, *arguments: str) -> CommandLife:
        command = [sys.executable, "-m", "batchgen", *arguments]
        return cls(subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def wait(self) -> int | None:
        return self.process.wait()

    def is_alive(self) -> bool:
        return self.process.poll() is None
