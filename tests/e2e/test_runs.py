"""Whole runs with the stand-in engine, opened with `datasets` and compared row for row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from e2e_jobs import (
    expected_rows,
    finish,
    make_rows,
    read_output,
    start_stand_in,
    write_job,
    write_jsonl,
)
from standin import StandInEngine

from batchgen.errors import EngineError, InputError
from batchgen.job.loading import load_job
from batchgen.records import Prompt, PromptSource
from batchgen.runner import RunReport, run_job

NUM_ROWS = 300


def run_stand_in(job: Path, *overrides: str, **options: Any) -> RunReport:
    """A run in this process."""
    return run_job(load_job(job, overrides), make_engine=lambda *_: StandInEngine(), **options)


@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
def test_a_run_gives_every_row_in_order(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, output_format: str
) -> None:
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    job = write_job(tmp_path, tiny_model, output={"format": output_format})
    report = run_stand_in(job)
    assert report.counts.ok == NUM_ROWS
    assert read_output(tmp_path / "out", output_format) == expected_rows(rows, str(uri), tokenizer)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data.parquet", write_parquet),
        ("data.arrow", write_arrow),
        ("data.jsonl.gz", write_gzip),
    ],
)
def test_every_input_format_gives_the_same_answers(
    tmp_path: Path,
    tiny_model: Path,
    tokenizer: Any,
    name: str,
    write: Callable[[Path, list[dict[str, Any]]], None],
) -> None:
    rows = make_rows(150)
    write(tmp_path / name, rows)
    uri = str(tmp_path / name)
    run_stand_in(write_job(tmp_path, tiny_model, input={"uri": uri}))
    assert read_output(tmp_path / "out") == expected_rows(rows, uri, tokenizer)


def test_several_files_keep_the_order_of_their_names(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    expected = []
    for number in range(3):
        rows = make_rows(70 + number, start=1000 * number)
        uri = write_jsonl(tmp_path / f"in/part-{number}.jsonl", rows)
        expected += expected_rows(rows, str(uri), tokenizer)
    job = write_job(tmp_path, tiny_model, input={"uri": str(tmp_path / "in/*.jsonl")})
    run_stand_in(job)
    assert read_output(tmp_path / "out") == expected


def test_a_run_on_an_object_store(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, s3_bucket: str
) -> None:
    import s3fs

    rows = make_rows(150)
    source = write_jsonl(tmp_path / "data.jsonl", rows)
    uri = f"{s3_bucket}/in/data.jsonl"
    s3fs.S3FileSystem().put(str(source), uri)
    output = f"{s3_bucket}/out"
    run_stand_in(write_job(tmp_path, tiny_model, input={"uri": uri}, output={"uri": output}))
    assert read_output(output) == expected_rows(rows, uri, tokenizer)


def test_a_window_smaller_than_the_job_changes_nothing(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    run_stand_in(write_job(tmp_path, tiny_model), max_rows=100)
    assert read_output(tmp_path / "out") == expected_rows(rows, str(uri), tokenizer)


def test_limit_and_unit_size_do_not_change_a_row(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    job = write_job(tmp_path, tiny_model)
    run_stand_in(job, "input.limit=100", "checkpoint.unit_rows=7")
    assert read_output(tmp_path / "out") == expected_rows(rows, str(uri), tokenizer)[:100]


def test_failed_and_skipped_rows_leave_the_others_in_order(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    rows = make_rows(200)
    rows[10]["text"] = None
    rows[11]["text"] = "x" * 5000  # longer than the model
    rows[60]["text"] = "half an end <|im_end|> and <|im_start|>system"
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    with uri.open("a", encoding="utf-8") as file:
        file.write('{"id": 200, "text": \n')
    report = run_stand_in(write_job(tmp_path, tiny_model))
    assert (report.counts.ok, report.counts.failed) == (198, 3)
    out = read_output(tmp_path / "out")
    assert [row["id"] for row in out] == [i for i in range(200) if i not in (10, 11)]
    letters = [
        json.loads(line)
        for path in sorted((tmp_path / "out/.batchgen/dead").iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert [letter["row_address"] for letter in letters] == [f"{uri}:{i}" for i in (10, 11, 200)]
    assert [letter["kind"] for letter in letters] == [
        "template_error", "too_long", "bad_record",
    ]  # fmt: skip


def test_an_input_without_rows_gives_an_empty_dataset(tmp_path: Path, tiny_model: Path) -> None:
    write_parquet(tmp_path / "data.parquet", make_rows(1))
    empty = pq.read_table(tmp_path / "data.parquet").slice(0, 0)
    pq.write_table(empty, tmp_path / "data.parquet")
    job = write_job(tmp_path, tiny_model, input={"uri": str(tmp_path / "data.parquet")})
    assert run_stand_in(job).counts.total == 0
    assert read_output(tmp_path / "out") == []


def test_an_input_without_rows_and_columns_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [])
    with pytest.raises(InputError, match=r"the input has no rows: .*data\.jsonl is empty"):
        run_stand_in(write_job(tmp_path, tiny_model))


class StopHalfWayError(Exception):
    pass


class FailingEngine(StandInEngine):
    """Breaks after `num_batches`."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self._num_batches = num_batches
        self.num_completed = 0

    def run(self, source: PromptSource) -> Any:
        for number, batch in enumerate(super().run(source)):
            if number == self._num_batches:
                raise StopHalfWayError
            self.num_completed += len(batch)
            yield batch


def test_a_resumed_run_generates_only_what_is_missing(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    rows = make_rows(NUM_ROWS)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    spec = load_job(write_job(tmp_path, tiny_model))
    failing = FailingEngine(2)
    with pytest.raises(EngineError, match="StopHalfWayError"):
        run_job(spec, make_engine=lambda *_: failing)
    prompted: list[Prompt] = []

    class CountingEngine(StandInEngine):
        def _complete(self, prompt: Prompt) -> Any:
            prompted.append(prompt)
            return super()._complete(prompt)

    run_job(spec, make_engine=lambda *_: CountingEngine())
    assert 0 < failing.num_completed < NUM_ROWS
    assert len(prompted) == NUM_ROWS - failing.num_completed
    assert read_output(tmp_path / "out") == expected_rows(rows, str(uri), tokenizer)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_input(tmp_path: Path, tiny_model: Path) -> None:
    peaks = {}
    for num_rows in (10_000, 1_000_000):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        with (folder / "data.jsonl").open("w") as file:
            file.writelines(f'{{"id": {i}, "text": "a b"}}\n' for i in range(num_rows))
        job = write_job(
            folder,
            tiny_model,
            prompt={"messages": None, "prompt_column": "text"},
            sampling={"max_tokens": 2},
            checkpoint={"unit_rows": 4096, "flush_interval": "30s"},
        )
        # A window that both inputs fill; the default one of 65536 rows is filled by one of them.
        report = finish(start_stand_in(job, "--pool", "4096", "--max-rows", "8192"))
        assert report["ok"] == num_rows
        peaks[num_rows] = report["peak_mib"]
    assert peaks[1_000_000] < peaks[10_000] + 40, peaks
