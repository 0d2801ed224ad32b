"""What the engine did in each run is kept and summed, and a damaged record harms nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ledger_factories import commit_all, local_storage, make_plan, open_ledger

from batchgen.ledger import read_status
from batchgen.monitor.summary import kv_text
from batchgen.records import EngineStats


def runs_of(storage: Any) -> dict[str, Any]:
    runs: dict[str, Any] = read_status(storage)["runs"]  # type: ignore[assignment]
    return runs


def test_counters_are_summed_means_weighted_and_peaks_kept(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    first = open_ledger(storage)
    early = EngineStats(decode_steps=1, swapped_out_blocks=1)
    first.record_run(early, wall_s=0.5)
    assert runs_of(storage)["count"] == 1
    first.record_run(
        EngineStats(
            decode_steps=30,
            swapped_out_blocks=7,
            kv_saved=0.4,
            kv_waste=0.02,
            peak_saved_blocks=50,
            copied_blocks=3,
            cached_prompt_tokens=11,
            blocks_used=9,
        ),
        wall_s=2.0,
    )
    second = open_ledger(storage)
    second.record_run(
        EngineStats(
            decode_steps=10,
            swapped_out_blocks=2,
            swapped_in_blocks=9,
            kv_saved=0.8,
            kv_waste=0.06,
            peak_saved_blocks=20,
            cached_prompt_tokens=4,
        ),
        wall_s=1.0,
    )
    runs = runs_of(storage)
    assert (runs["count"], runs["wall_s"]) == (2, 3.0)
    engine = runs["engine"]
    assert engine["kv_saved"] == pytest.approx(0.5)
    assert engine["kv_waste"] == pytest.approx(0.03)
    assert engine["peak_saved_blocks"] == 50
    assert engine["swapped_out_blocks"] == 9
    assert engine["swapped_in_blocks"] == 9
    assert engine["cached_prompt_tokens"] == 15
    assert engine["copied_blocks"] == 3
    assert not {"blocks_used", "num_running", "blocks_total"} & engine.keys()
    assert "50.0% saved by sharing (50 blocks at the peak, 3 copied)" in kv_text(
        EngineStats(**engine)
    )


def test_a_record_is_written_when_its_counters_have_changed(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    ledger = open_ledger(storage)
    wrote = []
    for tokens, wall_s in ((0, 1.0), (0, 2.0), (5, 3.0), (5, 4.0), (5, 5.0), (6, 6.0), (6, 7.0)):
        storage.delete(storage.list("runs"))
        ledger.record_run(EngineStats(output_tokens=tokens), wall_s=wall_s)
        runs = runs_of(storage)
        if runs["count"]:
            wrote.append((runs["engine"]["output_tokens"], runs["wall_s"]))
    assert wrote == [(0, 1.0), (5, 3.0), (6, 6.0)]


def test_a_run_without_steps_is_counted(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    open_ledger(storage).record_run(EngineStats(), wall_s=0.1)
    assert runs_of(storage)["engine"]["kv_waste"] == 0.0


def test_damaged_and_foreign_records_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, other = local_storage(tmp_path / "a"), local_storage(tmp_path / "b")
    ledger = open_ledger(storage)
    ledger.record_run(EngineStats(output_tokens=5), wall_s=1.0)
    open_ledger(other, make_plan(1)).record_run(EngineStats(output_tokens=7), wall_s=1.0)
    [foreign] = other.list("runs")
    storage.put(foreign, other.read(foreign))
    for number, data in enumerate((b"", b"{}", b"[" * 10_000, b'{"job_id": 1}', b"\xff")):
        storage.put(f"runs/{number}.json", data)
    runs = runs_of(storage)
    assert (runs["count"], runs["engine"]["output_tokens"]) == (1, 5)
    assert len(caplog.records) == 5
    for unit_id in range(2):
        commit_all(ledger, unit_id)
    ledger.finish()
    assert open_ledger(storage).is_published()
    assert runs_of(storage)["count"] == 1
