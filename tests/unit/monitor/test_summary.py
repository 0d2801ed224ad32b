"""The closing summary: its counts add up."""

from __future__ import annotations

import pytest

from batchgen.monitor.summary import RunSummary, summary_text
from batchgen.records import EngineStats


def test_the_summary_of_a_run() -> None:
    run = RunSummary(
        uri="out/translate",
        total_rows=1200,
        ok_rows=1190,
        failed_rows=7,
        skipped_rows=3,
        earlier_rows=200,
        wall_s=100.0,
        engine=EngineStats(
            prompt_tokens=90_000,
            cached_prompt_tokens=60_000,
            output_tokens=50_000,
            kv_waste=0.021,
            kv_saved=0.314,
            peak_saved_blocks=5000,
            copied_blocks=70,
            prefix_blocks_saved=4000,
            swapped_out_blocks=1200,
            swapped_in_blocks=1100,
        ),
        dead_letters={"too_long": 5, "empty_prompt": 2},
        dead_letters_uri="out/translate/.batchgen/dead",
        budget="50,000 of 80,000 output tokens",
    )
    assert summary_text(run).splitlines() == [
        "rows: 1,200 = 1,190 ok + 7 failed + 3 skipped (200 done before this run)",
        "time: 1:40, 10.0 rows/s, 90,000 prompt tokens (900/s), 50,000 output tokens (500/s)",
        "KV: 2.1% wasted, 67% of prompt tokens from the prefix cache, "
        "31.4% saved by sharing (5,000 blocks at the peak, 70 copied), "
        "4,000 reads of shared prefix blocks saved, "
        "1,200 blocks swapped out and 1,100 in",
        "budget: 50,000 of 80,000 output tokens",
        "dead letters: 2 empty_prompt, 5 too_long, in out/translate/.batchgen/dead",
        "dataset: out/translate",
    ]


def test_the_summary_of_a_run_that_was_done_already() -> None:
    run = RunSummary(
        uri="out",
        total_rows=3,
        ok_rows=3,
        failed_rows=0,
        skipped_rows=0,
        earlier_rows=3,
        wall_s=0.1,
    )
    assert summary_text(run).splitlines() == [
        "rows: 3 = 3 ok + 0 failed + 0 skipped (all done before this run)",
        "dataset: out",
    ]


def test_the_summary_after_a_restart_counts_the_whole_command() -> None:
    run = RunSummary(
        uri="out",
        total_rows=60,
        ok_rows=60,
        failed_rows=0,
        skipped_rows=0,
        wall_s=30.0,
        engine=EngineStats(prompt_tokens=200, output_tokens=20),
        tokens=(6000, 900),
    )
    assert summary_text(run).splitlines()[1:3] == [
        "time: 0:30, 2.0 rows/s, 6,000 prompt tokens (200/s), 900 output tokens (30/s)",
        "since the last start, KV: 0.0% wasted, 0% of prompt tokens from the prefix cache, "
        "0 blocks swapped out and 0 in",
    ]


def test_counts_that_do_not_add_up_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="3 rows ended of 4"):
        RunSummary(uri="o", total_rows=4, ok_rows=3, failed_rows=0, skipped_rows=0, wall_s=1.0)
