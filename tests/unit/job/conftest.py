"""A small valid job file to change, and loading a text as a job file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen.job.loading import load_job
from batchgen.job.spec import JobSpec

LoadText = Callable[..., JobSpec]


@pytest.fixture
def load_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadText:
    """Writes a text (or bytes) to job.yaml and loads it from there: load_text(text, -o, -p)."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, overrides: list[str] = (), params: list[str] = ()) -> JobSpec:
        data = text if isinstance(text, bytes) else text.encode()
        Path("job.yaml").write_bytes(data)
        return load_job("job.yaml", overrides, params)

    return load


@pytest.fixture
def minimal() -> str:
    """The shortest job file: four lines, so that what a test adds starts at line 5."""
    return (
        "input: {uri: data/*.jsonl}\n"
        "prompt: {template: 'English: {{ text }}'}\n"
        "model: {name_or_path: some/model}\n"
        "output: {uri: out/x}\n"
    )
