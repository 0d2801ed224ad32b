"""A supervised run whose engine dies of poisoned rows, in real processes.

Its arguments are JOB LOG [--poison ROW:HOW ...] [--once HOW] [--at-start HOW] [--wait-in WORKER]
[--retry] [-o ...]. HOW is a signal's name, `raise` or `hang`. LOG gets a line for each worker that
has started. With --once, the first worker dies when it has some rows done; with --at-start, before
its engine has a row. With --wait-in, the worker of this number waits before it does anything.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from standin import StandInEngine

from batchgen import pipeline
from batchgen.commands.run import run_supervised
from batchgen.errors import BatchgenError
from batchgen.job.loading import load_job
from batchgen.records import Completion, Prompt, PromptSource
from batchgen.retry import Retry
from batchgen.runner import RunReport, run_job
from batchgen.supervision import Worker


class OutOfMemory(RuntimeError):
    """As torch's: an error of the engine that batchgen does not raise."""


def die(how: str) -> None:
    if how == "raise":
        raise OutOfMemory("CUDA out of memory")
    if how == "hang":
        threading.Event().wait()
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(60)


class DyingEngine(StandInEngine):
    """Dies when it has a poisoned row, as a batch does in which one row is too much."""

    def __init__(self, poison: Mapping[int, str], once: str | None, unit_rows: int) -> None:
        super().__init__(pool=16)
        self._poison = poison
        self._once = once
        self._unit_rows = unit_rows

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        for completions in super().run(_Inspected(source, self)):
            yield completions
            if self._once is not None and self._num_finished > 40:
                die(self._once)

    def look_at(self, prompt: Prompt) -> None:
        row = prompt.key.unit_id * self._unit_rows + prompt.key.index
        if row in self._poison:
            time.sleep(0.1)
            die(self._poison[row])


class _Inspected:
    def __init__(self, source: PromptSource, engine: DyingEngine) -> None:
        self._source = source
        self._engine = engine

    def take(self, max_prompts: int, *, wait: bool) -> list[Prompt]:
        prompts = self._source.take(max_prompts, wait=wait)
        for prompt in prompts:
            self._engine.look_at(prompt)
        return prompts


def run_dying(arguments: Sequence[str], errors: str) -> NoReturn:
    """What a process of a test runs. Its stderr, and that of its workers, goes to a file."""
    pipeline._ABANDON_S = 1.0
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        code = _run(_parse(arguments))
    except BatchgenError as error:
        os.write(2, f"error: {error}\n".encode())
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("log", type=Path)
    parser.add_argument("--poison", action="append", default=[])
    parser.add_argument("--once")
    parser.add_argument("--at-start")
    parser.add_argument("--wait-in", type=int)
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    spec = load_job(options.job, options.overrides)
    poison = {int(row): how for row, how in (each.split(":") for each in options.poison)}
    retry = Retry(retry_id=secrets.token_hex(8), only=None) if options.retry else None

    def work(worker: Worker | None) -> RunReport:
        is_first = not options.log.exists()
        rows = None if worker is None else worker.assignment.only
        with options.log.open("a") as log:
            log.write(f"{os.getpid()} {'all' if rows is None else len(rows)}\n")
        if options.log.read_text().count("\n") == options.wait_in:
            signal.pause()

        def make_engine(*_: object) -> StandInEngine:
            if options.at_start:
                die(options.at_start)
            if options.delay_ms:
                return StandInEngine(delay_s=options.delay_ms / 1e3, pool=16)
            once = options.once if is_first else None
            return DyingEngine(poison, once, spec.checkpoint.unit_rows)

        return run_job(spec, make_engine=make_engine, worker=worker, retry=retry)

    return run_supervised(spec, work, allow_errors=False)
