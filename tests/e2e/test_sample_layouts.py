"""Several samples of each row, through to what `datasets` reads: lists in a row, or a row each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from e2e_jobs import (
    batchgen,
    expected_rows,
    make_rows,
    read_output,
    write_job,
    write_jsonl,
)
from standin import StandInEngine

from batchgen.errors import Preempted
from batchgen.job.loading import load_job
from batchgen.ledger import read_status
from batchgen.runner import run_job
from batchgen.startup import open_ledger_storage

NUM_ROWS = 150
NUM_SAMPLES = 3
PER_SAMPLE = ("response", "finish_reason", "output_tokens", "seed")
SAMPLING = {"n": NUM_SAMPLES, "temperature": 1.0, "max_tokens": 12, "seed": 7}


def expected_samples(rows: list[dict[str, Any]], uri: Path, tokenizer: Any) -> list[Any]:
    """For each row, what each of its samples comes to in a row of its own."""
    by_sample = [expected_rows(rows, str(uri), tokenizer, sample=i) for i in range(NUM_SAMPLES)]
    return [list(samples) for samples in zip(*by_sample, strict=True)]


def as_lists(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return samples[0] | {name: [s[name] for s in samples] for name in PER_SAMPLE}


def exploded(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample | {"sample_index": i} for i, sample in enumerate(samples)]


def laid_out(samples: list[Any], layout: str) -> list[dict[str, Any]]:
    if layout == "list":
        return [as_lists(each) for each in samples]
    return list(itertools.chain.from_iterable(exploded(each) for each in samples))


@pytest.mark.parametrize("layout", ["list", "explode"])
@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
def test_every_sample_of_every_row_in_order(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, output_format: str, layout: str
) -> None:
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    output = {"format": output_format, "n_layout": layout, "max_shard_rows": 100}
    job = write_job(tmp_path, tiny_model, sampling=SAMPLING, output=output)
    report = run_job(load_job(job), make_engine=lambda *_: StandInEngine())
    assert report.counts.ok == report.counts.total == NUM_ROWS
    expected = laid_out(expected_samples(rows, uri, tokenizer), layout)
    assert read_output(tmp_path / "out", output_format) == expected
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| rows read | {NUM_ROWS} |" in card
    assert f"| rows in this dataset | {len(expected)} |" in card


@pytest.mark.parametrize("index", [77, "first"])
def test_a_kept_column_named_sample_index_is_kept(
    tmp_path: Path, tiny_model: Path, index: object
) -> None:
    """As in the output of an earlier job: without meta nothing else has that name."""
    rows = [row | {"sample_index": index} for row in make_rows(4)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    columns = {"keep": ["id", "sample_index"], "meta": False}
    output = {"uri": str(tmp_path / "out"), "n_layout": "explode", "columns": columns}
    job = write_job(tmp_path, tiny_model, sampling=SAMPLING, output=output)
    run_job(load_job(job), make_engine=lambda *_: StandInEngine())
    found = read_output(tmp_path / "out", "arrow")
    assert [row["sample_index"] for row in found] == [index] * 4 * NUM_SAMPLES


class PreemptedEngine(StandInEngine):
    """Ends the run after a few batches."""

    def run(self, source: Any) -> Any:
        yield from itertools.islice(super().run(source), 2)
        raise Preempted("preempted")


@pytest.mark.parametrize("layout", ["list", "explode"])
def test_samples_survive_in_partials(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, layout: str
) -> None:
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    job = write_job(tmp_path, tiny_model, sampling=SAMPLING, output={"n_layout": layout})
    spec = load_job(job)
    with pytest.raises(Preempted):
        run_job(spec, make_engine=lambda *_: PreemptedEngine())
    counts = read_status(open_ledger_storage(spec))["rows"]
    assert isinstance(counts, dict)
    assert 0 < counts["ok"] < NUM_ROWS
    run_job(spec, make_engine=lambda *_: StandInEngine())
    expected = laid_out(expected_samples(rows, uri, tokenizer), layout)
    assert read_output(tmp_path / "out") == expected


def test_the_command_gives_the_same_samples_in_both_layouts(
    tmp_path: Path, tiny_model: Path
) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(20))
    seen = {}
    for layout in ("list", "explode"):
        output = {"uri": str(tmp_path / layout), "n_layout": layout}
        engine = {"device": "cpu", "num_gpu_blocks": 200, "max_num_seqs": 16}
        job = write_job(tmp_path, tiny_model, sampling=SAMPLING, output=output, engine=engine)
        done = batchgen("run", job, "-o", "model.max_model_len=512")
        assert done.returncode == 0, done.stderr
        assert "rows: 20 = 20 ok" in done.stderr
        assert "saved by sharing" in done.stderr
        [kv] = [line for line in done.stderr.splitlines() if line.startswith("KV: ")]
        assert kv in batchgen("status", job).stdout.splitlines()
        runs = json.loads(batchgen("status", "--json", job).stdout)["runs"]
        assert runs["count"] == 1
        assert runs["engine"]["peak_saved_blocks"] > 0
        assert runs["engine"]["swapped_out_blocks"] == 0
        seen[layout] = read_output(tmp_path / layout)
    grouped = itertools.groupby(seen["explode"], key=lambda row: row["row_address"])
    samples = [list(group) for _, group in grouped]
    assert [[s["sample_index"] for s in each] for each in samples] == [[0, 1, 2]] * 20
    for each in samples:
        for sample in each:
            del sample["sample_index"]
    assert [as_lists(each) for each in samples] == seen["list"]
    assert any(len(set(row["response"])) > 1 for row in seen["list"])


def test_a_plan_shows_the_columns_of_samples(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(3))
    job = write_job(tmp_path, tiny_model, sampling=SAMPLING)
    assert '"response": "list<item: string>"' in batchgen("plan", job).stdout
    planned = batchgen("plan", job, "-o", "output.n_layout=explode").stdout
    assert '"response": "string"' in planned
    assert '"sample_index": "int32"' in planned
