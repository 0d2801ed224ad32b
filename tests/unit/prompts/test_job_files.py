"""The jobs that are shipped: they load, fit their data, and editors find their schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from prompt_factories import make_row

from batchgen.job.loading import load_job
from batchgen.job.schema import job_json_schema
from batchgen.job.spec import JobSpec
from batchgen.prompts.builder import PromptBuilder
from batchgen.prompts.checks import check_columns, check_first_row
from batchgen.records import Prompt

ROOT = Path(__file__).parents[3]
JOBS = ROOT / "jobs"
NAMES = ["sentiment", "summarize", "translate"]


def read_table(spec: JobSpec) -> pa.Table:
    path = ROOT / str(spec.input.uri)
    return pq.read_table(path) if path.suffix == ".parquet" else pyarrow.json.read_json(path)


def test_these_are_all() -> None:
    assert sorted(path.stem for path in JOBS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_job(name: str, tokenizer: Any) -> None:
    path = JOBS / f"{name}.yaml"
    assert path.read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")
    spec = load_job(path)
    table = read_table(spec)
    assert table.num_rows >= 50
    assert len(set(table["text"].to_pylist())) == table.num_rows
    assert set(spec.output.columns.keep) <= set(table.column_names)
    check_columns(spec.prompt, table.column_names)
    rows = [make_row(index, **values) for index, values in enumerate(table.to_pylist())]
    check_first_row(spec.prompt, rows[0])
    prompts = PromptBuilder(spec.prompt, spec.sampling, tokenizer, 8192).build(rows)
    assert all(isinstance(prompt, Prompt) for prompt in prompts)


def test_articles_are_articles() -> None:
    table = read_table(load_job(JOBS / "summarize.yaml"))
    assert all(120 <= len(text.split()) <= 250 for text in table["text"].to_pylist())


def test_the_committed_schema_is_current() -> None:
    committed = json.loads((JOBS / "job.schema.json").read_text())
    assert committed == job_json_schema(), "write it anew: batchgen schema > jobs/job.schema.json"
