"""A job with secrets: none of them is in anything that it writes or prints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import s3fs
from e2e_jobs import make_rows, write_job
from standin import StandInEngine

from batchgen.cli import _run_command
from batchgen.commands import run
from batchgen.job.loading import load_job
from batchgen.runner import run_job

KEY, SECRET, TOKEN = "AKIAINPUTKEY12345", "input-secret-Zm9v", "input-token-YmFy"
OUTPUT_SECRET = "output-secret-cXV4"
SECRETS = [KEY, SECRET, TOKEN, OUTPUT_SECRET]


def leaks(data: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret.encode() in data]


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, s3_bucket: str, s3_server: Any, monkeypatch: Any) -> Path:
    """A job from S3 to S3, with secrets of its own for each."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", OUTPUT_SECRET)
    store = s3fs.S3FileSystem(**s3_server.storage_options)
    rows = [*make_rows(20), {"id": 20, "text": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "not json\n"
    store.pipe_file(f"{s3_bucket}/in/data.jsonl", lines.encode())
    return write_job(
        tmp_path,
        tiny_model,
        input={
            "uri": f"{s3_bucket}/in/*.jsonl",
            "storage_options": {
                "key": KEY,
                "secret": SECRET,
                "token": TOKEN,
                "client_kwargs": {"endpoint_url": s3_server.endpoint_url},
            },
        },
        output={"uri": f"{s3_bucket}/out"},
        errors={"max_error_rate": 1.0},
    )


def test_nothing_that_a_run_writes_or_prints_holds_a_secret(
    job: Path, s3_bucket: str, s3_server: Any, caplog: Any, capfd: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        report = run_job(load_job(job), make_engine=lambda *_: StandInEngine())
    assert (report.counts.ok, report.counts.failed) == (20, 2)
    for command in ("plan", "status", "validate", "preview"):
        assert _run_command([command, str(job)]) == 0
    printed = "".join(capfd.readouterr()) + caplog.text + report.summary
    assert leaks(printed.encode()) == []
    store = s3fs.S3FileSystem(**s3_server.storage_options, use_listings_cache=False)
    written = store.find(f"{s3_bucket}/out")
    names = {name.rpartition("/out/")[2].split("/")[0] for name in written}
    assert names >= {".batchgen", "data", "README.md", "state.json"}
    assert {name.split(".batchgen/")[-1].split("/")[0] for name in written} >= {"commits", "dead"}
    for name in written:
        data = store.cat_file(name)
        assert leaks(data) == [], name
        assert leaks(name.encode()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["input.storage_options.client_kwargs.endpoint_url=http://{key}:{secret}@127.0.0.1:9/x"],
        ["input.storage_options.client_kwargs.endpoint_url={secret}"],
        ["input.storage_options.client_kwargs.verify={secret}"],
        ["input.storage_options.no_such_option={secret}"],
        ["input.storage_options.config_kwargs.secret={secret}"],
        ["input.uri=https://me:{secret}@127.0.0.1:9/a.jsonl"],
        ["input.uri=https://127.0.0.1:9/a.jsonl?sig={secret}"],
        ["output.uri=s3://{key}:{secret}@b/out"],
        ["checkpoint.uri=s3://{key}:{secret}@b/out"],
        ["model.name_or_path=https://me:{secret}@127.0.0.1:9/model"],
    ],
)
def test_no_error_shows_a_secret(
    job: Path, options: list[str], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker would be a fork of this very process.
    monkeypatch.setattr(run, "supervise", lambda work: work(None))
    overrides = [text.format(key=KEY, secret=SECRET) for text in options]
    arguments = [part for text in overrides for part in ("-o", text)]
    code = _run_command(["run", str(job), *arguments])
    printed = "".join(capfd.readouterr())
    assert code in (1, 2), printed
    assert "error: " in printed
    assert leaks(printed.encode()) == []
