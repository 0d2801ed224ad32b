"""`batchgen verify`: its receipt, its exit codes, and the outputs that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from e2e_jobs import make_rows, write_job
from standin import StandInEngine
from verify_outputs import (
    Output,
    commit_path,
    flip,
    run_stand_in,
    write_verify_job,
)

from batchgen.cli import main
from batchgen.dataset.storage import Storage
from batchgen.errors import EngineError, JobChangedError, StorageError, UsageError
from batchgen.job.loading import load_job
from batchgen.records import PromptSource
from batchgen.runner import run_job
from batchgen.verify import verdict


def test_the_receipt_counts_every_input_file(output: Output) -> None:
    receipt = output.verify()
    counts = [(file.rows.total, file.rows.ok, file.rows.failed, file.rows.skipped)
              for file in receipt.files]  # fmt: skip
    assert counts == [(100, 98, 1, 1), (50, 50, 0, 0)]
    assert [Path(file.uri).name for file in receipt.files] == ["0.jsonl", "1.jsonl"]
    assert (receipt.rows.total, receipt.rows.ok) == (150, 148)
    assert [part.num_rows for part in receipt.parts] == [40, 24, 34, 40, 10]


def test_the_command_prints_and_keeps_a_receipt(output: Output) -> None:
    before = {path: output.storage.read(path) for path in output.storage.list()}
    done = output.command("--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    kept = output.ledger.list("receipts")
    assert len(kept) == 1
    assert json.loads(output.ledger.read(kept[0])) == printed
    assert printed["state"] == "done"
    assert printed["is_right"] is True
    assert printed["rows"]["ok"] == 148
    assert {path: output.storage.read(path) for path in before} == before
    done = output.command()
    assert (done.returncode, done.stdout) == (0, "")
    assert "right: done, 3 of 3 units committed, 5 parts" in done.stderr
    assert len(output.ledger.list("receipts")) == 2
    run_stand_in(output.job, *output.overrides)  # receipts are no hindrance


def test_the_command_ends_with_6_and_names_the_difference(output: Output) -> None:
    path = output.parts()[3]["path"]
    flip(output.storage, path, 100)
    done = output.command()
    assert (done.returncode, done.stdout) == (6, "")
    assert f"difference: {path}: has other bytes" in done.stderr
    assert "Traceback" not in done.stderr
    done = output.command("--json")
    assert done.returncode == 6
    assert [each["path"] for each in json.loads(done.stdout)["differences"]] == [path]
    assert len(output.ledger.list("receipts")) == 2


@pytest.mark.parametrize("kind", [("arrow", "zstd"), ("parquet", None), ("jsonl", None)])
def test_without_meta_columns_counts_are_what_is_checked(
    tmp_path: Path, tiny_model: Path, kind: tuple[str, str | None]
) -> None:
    job = write_verify_job(tmp_path, tiny_model)
    overrides = [
        "output.columns.meta=false",
        f"output.format={kind[0]}",
        f"output.compression={kind[1] or 'null'}",
    ]
    run_stand_in(job, *overrides)
    storage = Storage.open(str(tmp_path / "out"))
    output = Output(job=job, overrides=overrides, storage=storage)
    assert output.problems() == {}
    commit = output.commit(0)
    output.put_commit(0, parts=commit["parts"][1:])
    assert output.problems()[commit_path(0)] == "says 64 ok; its files have 24 ok"


@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
def test_an_output_without_rows(tmp_path: Path, tiny_model: Path, output_format: str) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(make_rows(1)).slice(0, 0), path)
    job = write_job(
        tmp_path, tiny_model, input={"uri": str(path)}, output={"format": output_format}
    )
    run_stand_in(job)
    storage = Storage.open(str(tmp_path / "out"))
    output = Output(job=job, overrides=[], storage=storage)
    assert output.problems() == {}
    [part] = storage.list("data")
    storage.put(part, storage.read(part) + b"\n")
    assert "the file of an empty dataset is missing or wrong" in output.problems()["data"]


class BreakingEngine(StandInEngine):
    """Breaks after twenty batches of four."""

    def __init__(self) -> None:
        super().__init__(pool=8)

    def run(self, source: PromptSource) -> Iterator[Any]:
        for number, batch in enumerate(super().run(source)):
            if number == 20:
                raise ConnectionError("gone")
            yield batch


def test_of_an_unfinished_job_what_is_committed_is_verified(
    tmp_path: Path, tiny_model: Path
) -> None:
    job = write_verify_job(tmp_path, tiny_model)
    overrides = ["checkpoint.unit_rows=4"]
    output = Output(job=job, overrides=overrides, storage=Storage.open(str(tmp_path / "out")))
    with pytest.raises(EngineError, match="gone"):
        run_job(load_job(job, overrides), make_engine=lambda *_: BreakingEngine())
    receipt = output.verify()
    assert (receipt.state, receipt.is_right) == ("incomplete", True)
    assert 0 < receipt.num_committed < receipt.num_units == 38
    assert receipt.rows.total == 150
    assert 0 < receipt.rows.ended < 150
    assert output.command().returncode == 0
    path = receipt.parts[0].path
    flip(output.storage, path, 50)
    assert list(output.problems()) == [path]
    assert output.command().returncode == 6


def test_a_changed_job_is_told_after_the_output_was_verified(output: Output) -> None:
    done = output.command("-o", "sampling.temperature=0.5", "--json")
    assert done.returncode == 5
    assert "sampling.temperature: 0.0 -> 0.5" in done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["is_right"] is True
    assert receipt["fingerprint"]["differences"] == ["sampling.temperature: 0.0 -> 0.5"]
    flip(output.storage, output.parts()[0]["path"], 9)
    assert output.command("-o", "sampling.temperature=0.5").returncode == 6


def test_how_to_run_may_change(output: Output) -> None:
    options = ("output.compression=lz4", "output.max_shard_rows=7", "checkpoint.unit_rows=9")
    assert verdict(output.verify(*options)) is None


def test_a_job_of_another_output_is_refused(output: Output) -> None:
    for override in ("output.format=parquet", "output.columns.meta=false"):
        with pytest.raises(JobChangedError, match="nothing was verified"):
            output.verify(override)
    assert output.ledger.list("receipts") == []


def test_an_output_is_verified_after_its_input_and_its_model_are_gone(output: Output) -> None:
    for gone in ("input.uri=/absent/*.jsonl", "model.name_or_path=/absent/model"):
        receipt = output.verify(gone)
        assert receipt.is_right
        assert "/absent" in str(receipt.fingerprint.not_compared)
        assert isinstance(verdict(receipt), UsageError)
    done = output.command("-o", "input.uri=/absent/*.jsonl")
    assert done.returncode == 2
    assert "the output is what its ledger says, but" in done.stderr


def test_where_there_is_no_ledger_nothing_is_verified(output: Output, tmp_path: Path) -> None:
    done = output.command("-o", f"output.uri={tmp_path / 'elsewhere'}")
    assert done.returncode == 2
    assert "holds no ledger" in done.stderr
    assert not (tmp_path / "elsewhere").exists()
    flip(output.ledger, "job.json", 5)
    assert output.command().returncode == 6


def test_a_store_that_refuses_the_receipt_does_not_withhold_the_answer(
    output: Output, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("cannot write: the disk is read-only")

    monkeypatch.setattr(Storage, "put", refuse)
    arguments = ["verify", str(output.job), *(f"-o{each}" for each in output.overrides)]
    assert exit_code(arguments) == 1
    assert "right: done" in capsys.readouterr().err
    Path(output.storage.uri, output.parts()[0]["path"]).unlink()
    assert exit_code(arguments) == 6
    shown = capsys.readouterr().err
    assert "is missing" in shown
    assert "no receipt was kept: cannot write" in shown


def exit_code(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_a_ledger_elsewhere(tmp_path: Path, tiny_model: Path) -> None:
    job = write_verify_job(tmp_path, tiny_model)
    overrides = [f"checkpoint.uri={tmp_path / 'ledger'}"]
    run_stand_in(job, *overrides)
    output = Output(job=job, overrides=overrides, storage=Storage.open(str(tmp_path / "out")))
    assert output.problems() == {}
    assert output.command().returncode == 0
    assert len(list((tmp_path / "ledger/receipts").iterdir())) == 1
    with pytest.raises(JobChangedError, match=r"output\.uri"):
        output.verify(f"output.uri={tmp_path / 'other'}")


@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
def test_an_output_on_an_object_store(
    tmp_path: Path, tiny_model: Path, s3_bucket: str, output_format: str
) -> None:
    job = write_verify_job(tmp_path, tiny_model)
    overrides = [f"output.uri={s3_bucket}/out", f"output.format={output_format}"]
    run_stand_in(job, *overrides)
    output = Output(job=job, overrides=overrides, storage=Storage.open(f"{s3_bucket}/out"))
    done = output.command("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["ok"] == 148
    assert len(output.ledger.list("receipts")) == 1
    for part in output.parts():
        data = flip(output.storage, part["path"], part["size_bytes"] // 2)
        assert list(output.problems()) == [part["path"]]
        output.storage.put(part["path"], data)
    path = output.parts()[0]["path"]
    output.storage.delete([path])
    output.storage.put("data/stray", b"")
    done = output.command()
    assert done.returncode == 6
    assert f"difference: {path}: is missing" in done.stderr
    assert "leftover: data/stray" in done.stderr
