"""An engine that generates nothing: its tokens follow from the prompt and the seed alone.

    python standin.py JOB [--delay-ms N] [--max-rows N] [-o KEY=VALUE ...]

runs a job with it in a process of its own, and prints the process' peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import threading
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence

from batchgen.job.loading import load_job
from batchgen.records import (
    Completion,
    EngineStats,
    Prompt,
    PromptSource,
    SampleOutput,
    UnfinishedRow,
)
from batchgen.runner import run_job

FIRST_TOKEN_ID, NUM_TOKEN_IDS = 3, 300  # ordinary tokens of the tiny tokenizer
POOL = 96


def generate(token_ids: Sequence[int], seed: int, max_tokens: int) -> list[int]:
    """The stand-in's answer to a prompt."""
    state = zlib.crc32(array("i", token_ids).tobytes(), seed & 0xFFFFFFFF)
    count = 1 + state % max_tokens
    return [FIRST_TOKEN_ID + (state >> shift % 24) % NUM_TOKEN_IDS for shift in range(count)]


class StandInEngine:
    """Keeps a pool of prompts and finishes half of it at a time, in no useful order."""

    def __init__(self, *, delay_s: float = 0.0, pool: int = POOL) -> None:
        self._delay_s = delay_s
        self._pool = pool
        self._stopped = threading.Event()
        self._num_finished = 0

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        pool: list[Prompt] = []
        while not self._stopped.is_set():
            pool += source.take(self._pool - len(pool), wait=not pool)
            if not pool:
                return
            pool.sort(key=lambda prompt: prompt.seeds)
            half = (len(pool) + 1) // 2
            finished, pool = pool[:half], pool[half:]
            if self._delay_s:
                self._stopped.wait(self._delay_s)
            self._num_finished += half
            yield [self._complete(prompt) for prompt in finished]

    def _complete(self, prompt: Prompt) -> Completion:
        return Completion(
            key=prompt.key,
            outputs=tuple(
                SampleOutput(
                    token_ids=generate(prompt.token_ids, seed, prompt.max_tokens),
                    finish_reason="length",
                    seed=seed,
                )
                for seed in prompt.seeds
            ),
            num_prompt_tokens=len(prompt.token_ids),
        )

    def stats(self) -> EngineStats:
        return EngineStats(num_finished=self._num_finished)

    def stop(self) -> None:
        self._stopped.set()

    def unfinished(self) -> list[UnfinishedRow]:
        return []


def run_job_file(job: str, environment: Mapping[str, str], delay_s: float, max_rows: int) -> None:
    """What a process that will be killed runs."""
    os.environ.update(environment)
    run_job(load_job(job), make_engine=lambda *_: StandInEngine(delay_s=delay_s), max_rows=max_rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--max-rows", type=int, default=65536)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    spec = load_job(options.job, options.overrides)
    report = run_job(
        spec,
        make_engine=lambda *_: StandInEngine(delay_s=options.delay_ms / 1e3, pool=options.pool),
        max_rows=options.max_rows,
    )
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(json.dumps({"ok": report.counts.ok, "peak_mib": peak_kib / 1024}))


if __name__ == "__main__":
    main()
