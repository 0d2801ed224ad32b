"""Beams through to what `datasets` reads: the best outputs of a row, their scores, best first."""

from __future__ import annotations

import itertools
from pathlib import Path

from e2e_jobs import batchgen, make_rows, read_output, write_job, write_jsonl

NUM_ROWS = 12
PER_BEAM = ("response", "finish_reason", "output_tokens", "seed", "beam_score")


def run(
    tmp_path: Path, model: Path, name: str, n: int, **output: object
) -> list[dict[str, object]]:
    write_jsonl(tmp_path / "data.jsonl", make_rows(NUM_ROWS))
    job = write_job(
        tmp_path,
        model,
        sampling={"beam_width": 4, "n": n, "max_tokens": 10, "length_penalty": 0.5, "seed": 0},
        output={"uri": str(tmp_path / name), **output},
        engine={"device": "cpu", "num_gpu_blocks": 200, "max_num_seqs": 16},
    )
    done = batchgen("run", job, "-o", "model.max_model_len=512")
    assert done.returncode == 0, done.stderr
    assert f"rows: {NUM_ROWS} = {NUM_ROWS} ok" in done.stderr
    assert "saved by sharing" in done.stderr
    return read_output(tmp_path / name)


def test_the_command_writes_the_best_beams_in_all_layouts(tmp_path: Path, tiny_model: Path) -> None:
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
        assert isinstance(scores, list)
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1
        assert all(score < 0 for score in scores)


def test_beams_bind_a_ledger(tmp_path: Path, tiny_model: Path) -> None:
    run(tmp_path, tiny_model, "out", 1)
    job = tmp_path / "job.yaml"
    changed = batchgen("run", job, "-o", "sampling.early_stopping=true")
    assert changed.returncode == 5
    assert "sampling.early_stopping: False -> True" in changed.stderr


def test_only_jobs_with_beams_have_scores(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(2))
    job = write_job(tmp_path, tiny_model)
    options = ("-o", "sampling.seed=0", "-o", "sampling.beam_width=2")
    assert "beam_score" not in batchgen("plan", job).stdout
    assert '"beam_score": "double"' in batchgen("plan", job, *options).stdout
