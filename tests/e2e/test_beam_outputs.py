"""Beams through to what `datasets` reads: the best outputs of a row, their scores, best first."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from e2e_jobs import batchgen, make_rows, read_output, write_job, write_jsonl

from batchgen.errors import BatchgenError
from batchgen.job.loading import load_job
from batchgen.runner import run_job

NUM_ROWS = 12
SHORT = "model.max_model_len=512"
PER_BEAM = ("response", "finish_reason", "output_tokens", "seed", "beam_score")


def run(tmp_path: Path, model: Path, name: str, n: int, **output: object) -> list[dict[str, Any]]:
    write_jsonl(tmp_path / "data.jsonl", make_rows(NUM_ROWS))
    job = write_job(
        tmp_path,
        model,
        sampling={"beam_width": 4, "n": n, "max_tokens": 10, "length_penalty": 0.5, "seed": 0},
        output={"uri": str(tmp_path / name), **output},
        engine={"device": "cpu", "num_gpu_blocks": 200, "max_num_seqs": 16},
    )
    report = run_job(load_job(job, overrides=[SHORT]))
    assert report.counts.ok == report.counts.total == NUM_ROWS
    assert "saved by sharing" in report.summary
    return read_output(tmp_path / name)


def test_the_best_beams_in_all_layouts(tmp_path: Path, tiny_model: Path) -> None:
    lists = run(tmp_path, tiny_model, "list", 3)
    exploded = run(tmp_path, tiny_model, "explode", 3, n_layout="explode")
    best = run(tmp_path, tiny_model, "best", 1)
    grouped = itertools.groupby(exploded, key=lambda row: row["row_address"])
    beams = [list(group) for _, group in grouped]
    assert [[beam["sample_index"] for beam in each] for each in beams] == [[0, 1, 2]] * NUM_ROWS
    for row, each, first in zip(lists, beams, best, strict=True):
        for name in PER_BEAM:
            assert row[name] == [beam[name] for beam in each]
            assert first[name] == each[0][name]
        scores = row["beam_score"]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1
        assert all(score < 0 for score in scores)
    changed = load_job(tmp_path / "job.yaml", overrides=[SHORT, "sampling.early_stopping=true"])
    with pytest.raises(BatchgenError, match=r"sampling\.early_stopping: False -> True") as refused:
        run_job(changed)
    assert refused.value.exit_code == 5


def test_only_jobs_with_beams_have_scores(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(2))
    job = write_job(tmp_path, tiny_model)
    options = ("-o", "sampling.seed=0", "-o", "sampling.beam_width=2")
    assert "beam_score" not in batchgen("plan", job).stdout
    assert '"beam_score": "double"' in batchgen("plan", job, *options).stdout
