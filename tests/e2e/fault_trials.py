"""A job that runs in milliseconds, for tests that run it a thousand times."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from standin import StandInEngine

from batchgen import generating, pipeline, startup
from batchgen.job.loading import load_job
from batchgen.job.spec import JobSpec
from batchgen.records import Prompt, RowKey

NUM_ROWS, UNIT_ROWS, POOL = 23, 6, 5
BAD_ROWS = {3, 9}


def input_files(folder: str) -> dict[str, bytes]:
    """Two files by their names, of which some lines are no rows."""
    lines = [
        b"{broken\n"
        if i in BAD_ROWS
        else json.dumps({"id": i, "text": f"Row {i}"}).encode() + b"\n"
        for i in range(NUM_ROWS)
    ]
    return {f"{folder}/a.jsonl": b"".join(lines[:14]), f"{folder}/b.jsonl": b"".join(lines[14:])}


def trial_job(folder: Path, model: Path, store: str) -> JobSpec:
    """A job from `store`/in to `store`/out that flushes all the time; its file is in `folder`."""
    job = {
        "input": {"uri": f"{store}/in/*.jsonl"},
        "prompt": {"messages": [{"role": "user", "content": "{{ text }}"}]},
        "model": {"name_or_path": str(model)},
        "sampling": {"max_tokens": 4, "seed": 7},
        "output": {"uri": f"{store}/out", "columns": {"keep": ["id"]}},
        "checkpoint": {"unit_rows": UNIT_ROWS, "flush_interval": 1e-6},
        "errors": {"max_error_rate": 1.0},
        "observability": {"progress": "none"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_job(str(path))


class TextSide:
    """The model's files, tokenizer and templates, loaded once: that takes longer than a trial."""

    def __init__(self, spec: JobSpec) -> None:
        self._files = startup.resolve_model(spec.model)
        self._text_model = startup.load_text_model(spec, self._files)

    def load_at_once(self, patches: pytest.MonkeyPatch) -> None:
        """Let runs take them from here, and collect no garbage, which takes longer, too."""
        patches.setattr(pipeline, "rare_collections", contextlib.nullcontext)
        patches.setattr(startup, "resolve_model", lambda _: self._files)
        for module in (startup, generating):
            patches.setattr(module, "load_text_model", lambda *_: self._text_model)


class RecordingEngine(StandInEngine):
    """Notes for which rows it was asked."""

    def __init__(self) -> None:
        super().__init__(delay_s=0.0005, pool=POOL)  # slow enough for flushes of partials
        self.keys: list[RowKey] = []

    def _complete(self, prompt: Prompt) -> Any:
        self.keys.append(prompt.key)
        return super()._complete(prompt)
