"""A run of a finished job: what makes it a dataset is mended where it is wrong, else left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_jobs import make_rows, write_job, write_jsonl
from retry_jobs import run_with_engine_errors
from verify_outputs import Output

from batchgen import publishing
from batchgen.job.loading import load_job
from batchgen.runner import run_job

KINDS = [("arrow", "zstd"), ("parquet", "zstd"), ("jsonl", None)]


def no_engine(*_: object) -> Any:
    raise AssertionError("the model was loaded")


def run_again(output: Output) -> None:
    run_job(load_job(output.job, output.overrides), make_engine=no_engine)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_make_it_a_dataset_are_written_again(
    tmp_path: Path, make_output: Callable[..., Output], kind: tuple[str, str | None]
) -> None:
    output = make_output(tmp_path, kind)
    names = {path for path in output.storage.list() if "/" not in path}
    assert "README.md" in names
    assert ("state.json" in names) == ("arrow" in kind)
    for name in names:
        for wrong in (None, b"", b"{}"):
            if wrong is None:
                output.storage.delete([name])
            else:
                output.storage.put(name, wrong)
            assert not output.verify().is_right
            run_again(output)
            assert output.verify().is_right


@pytest.mark.parametrize("kind", KINDS)
def test_what_people_have_added_to_the_card_stays(
    tmp_path: Path, make_output: Callable[..., Output], kind: tuple[str, str | None]
) -> None:
    output = make_output(tmp_path, kind)
    card = output.storage.read("README.md").decode()
    edited = card.replace("---\n", "---\nlicense: mit\n", 1) + "\nOurs.\n"
    output.storage.put("README.md", edited.encode())
    run_again(output)
    assert output.storage.read("README.md").decode() == edited


def test_a_finished_dataset_without_rows_is_left_alone(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(2))
    spec = load_job(write_job(tmp_path, tiny_model))
    run_with_engine_errors(spec, (0, 1))

    def refuse(*_: object) -> Any:
        raise AssertionError("it is published again")

    monkeypatch.setattr(publishing, "publish", refuse)
    assert run_job(spec, make_engine=no_engine).counts.failed == 2
