"""`verify` over several samples of each row, in both layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verify_outputs import Output, commit_path, run_stand_in, write_verify_job

from batchgen.dataset.storage import Storage
from batchgen.errors import JobChangedError

NUM_SAMPLES = 3
Change = Callable[[list[dict[str, Any]]], Any]


def make(folder: Path, model: Path, *overrides: str) -> Output:
    job = write_verify_job(folder, model)
    options = [f"sampling.n={NUM_SAMPLES}", "sampling.temperature=1.0", *overrides]
    run_stand_in(job, *options)
    return Output(job=job, overrides=options, storage=Storage.open(str(folder / "out")))


@pytest.fixture
def exploded(tmp_path: Path, tiny_model: Path) -> Output:
    return make(tmp_path, tiny_model, "output.n_layout=explode")


@pytest.fixture
def listed(tmp_path: Path, tiny_model: Path) -> Output:
    return make(tmp_path, tiny_model)


@pytest.mark.parametrize("layout", ["list", "explode"])
@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
@pytest.mark.parametrize("meta", ["true", "false"])
def test_rows_of_input_are_counted_not_samples(
    tmp_path: Path, tiny_model: Path, layout: str, output_format: str, meta: str
) -> None:
    output = make(
        tmp_path,
        tiny_model,
        f"output.n_layout={layout}",
        f"output.format={output_format}",
        f"output.columns.meta={meta}",
    )
    receipt = output.verify()
    assert receipt.differences == []
    assert [file.rows.ok for file in receipt.files] == [98, 50]
    num_rows = sum(part.num_rows for part in receipt.parts)
    assert num_rows == 148 * (NUM_SAMPLES if layout == "explode" else 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows[7].update(sample_index=2), "holds sample 2 of the row"),
        (lambda rows: rows.insert(4, rows[4]), "where sample 2 of row 1 should be"),
        (lambda rows: rows.insert(3, rows.pop(5)), "holds sample 2 of the row"),
        (lambda rows: rows.__setitem__(slice(6, 9), rows[0:3]), "a second time"),
        (lambda rows: rows[4].update(row_address=rows[1]["row_address"]), "of row 1 should be"),
    ],
)
def test_samples_that_are_not_those_of_their_row(
    exploded: Output, change: Change, problem: str
) -> None:
    path = exploded.forge(2, change)
    assert problem in exploded.problems()[path]


def test_a_sample_that_is_missing_at_the_end_of_a_unit(exploded: Output) -> None:
    parts = exploded.commit(2)["parts"]
    exploded.put_commit(2, parts=parts[:-1])  # 120 of 150 rows: 40 whole rows of input
    assert "says 50 ok, " in exploded.problems()[commit_path(2)]
    exploded.put_commit(2, parts=parts)
    exploded.forge(1, lambda rows: rows)
    parts = exploded.commit(1)["parts"]
    assert [part["num_rows"] for part in parts] == [40, 40, 22]
    exploded.put_commit(1, parts=parts[:1])
    found = exploded.problems()[commit_path(1)]
    assert found == ("names parts of 40 rows, though every row of input that succeeds has 3")


def test_a_list_that_lacks_a_sample(listed: Output) -> None:
    path = listed.forge(2, lambda rows: rows[5]["output_tokens"].pop())
    assert "1.jsonl:5 with 2 samples, not 3" in listed.problems()[path]


@pytest.mark.parametrize("layout", ["list", "explode"])
def test_the_tokens_of_every_sample_are_summed(
    tmp_path: Path, tiny_model: Path, layout: str
) -> None:
    output = make(tmp_path, tiny_model, f"output.n_layout={layout}")
    counts = output.commit(0)["counts"]
    for name in ("prompt_tokens", "output_tokens"):
        output.put_commit(0, counts={**counts, name: 5})
        told = f"says 5 {name}; its files have {counts[name]} {name}"
        assert output.problems() == {commit_path(0): told}


def test_another_number_of_samples_is_a_changed_job(listed: Output) -> None:
    with pytest.raises(JobChangedError, match=r"sampling\.n: 3 -> 4"):
        listed.verify("sampling.n=4")
    ledger = Storage.open(f"{listed.storage.uri}/.batchgen")
    job = json.loads(ledger.read("job.json"))
    ledger.put("job.json", json.dumps({**job, "fingerprint": {"sampling": 3}}).encode())
    with pytest.raises(JobChangedError):
        listed.verify()
