from __future__ import annotations

from batchgen.dataset.card import CardFacts, dataset_card


def test_a_card_states_the_run_and_no_secrets() -> None:
    card = dataset_card(
        CardFacts(
            job_name="translate",
            model="org/model",
            model_revision="abc123",
            input_uris=["https://me:hunter2@host/a.jsonl?token=hunter2", *["b.jsonl"] * 30],
            output_uri="out/translate",
            output_format="parquet",
            sampling={"temperature": 0.8, "max_tokens": 256},
            columns={"id": "int64", "translation": "string"},
            rows_total=1_000_000,
            rows_written=999_990,
            rows_failed=7,
            rows_skipped=3,
            prompt_tokens=90_000_000,
            output_tokens=64_000_000,
            wall_s=3725.0,
            version="0.1.0",
        )
    )
    assert "hunter2" not in card
    assert "`https://host/a.jsonl`" in card
    assert "and 11 more files" in card
    assert "datasets.load_dataset('out/translate')" in card
    for stated in ("org/model", "abc123", "1,000,000", "999,990", "90,000,000", "1 h 2 min"):
        assert stated in card
    assert "temperature 0.8, max_tokens 256" in card
    assert "- `translation`: string" in card
