"""The real command, told to stop by signals and by the metadata servers of clouds.

It ends in time with exit code 75, says what it saved, and the next run goes on from there: the
output is that of a run which was never stopped.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from email.utils import format_datetime
from pathlib import Path

import pytest
from e2e_jobs import ROOT, make_rows, read_output, write_job, write_jsonl

from batchgen.dataset.storage import Storage
from batchgen.job.loading import load_job
from batchgen.runner import run_job
from tests.unit.monitor.cloud_metadata import CloudMetadata, azure_event

LEAD_S = 20.0
SAVED = re.compile(
    r"error: preempted \((?P<who>[^)]*)\), (?P<seconds>[\d.]+) s after the notice; saved: "
    r"(?P<rows>[\d,]+) rows that this run finished, and (?P<tokens>[\d,]+) output tokens of "
    r"(?P<unfinished>[\d,]+) rows that it did not"
)


@dataclass(frozen=True)
class Stop:
    """How one life ended."""

    who: str
    seconds: float  # from the notice to the end of the process, as seen from outside
    said_s: float
    rows: int
    tokens: int
    unfinished: int


def stop_one_life(job: Path, uri: Path, source: str, cloud: CloudMetadata) -> Stop:
    """Starts the command, gives notice once it has finished rows, and waits for its end."""
    ledger = Storage.open(f"{uri}/.batchgen")
    before = set(ledger.list("partials")) | set(ledger.list("commits"))
    command = [sys.executable, "-m", "batchgen", "run", str(job), "-o", f"output.uri={uri}"]
    for name in ("aws", "gcp", "azure"):
        command += ["-o", f"preemption.endpoints.{name}={cloud.endpoint}"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": ROOT}
    )
    while process.poll() is None and not (
        (set(ledger.list("partials")) | set(ledger.list("commits"))) - before
    ):
        time.sleep(0.02)
    assert process.poll() is None, "the job is too short"
    started = time.monotonic()
    if source.startswith("sig"):
        process.send_signal(signal.Signals[source.upper()])
    else:
        cloud.preempt(source)
    _, stderr = process.communicate(timeout=120)
    seconds = time.monotonic() - started
    assert process.returncode == 75, stderr
    said = SAVED.search(stderr)
    assert said is not None, stderr
    numbers = {name: int(said[name].replace(",", "")) for name in ("rows", "tokens", "unfinished")}
    return Stop(who=said["who"], seconds=seconds, said_s=float(said["seconds"]), **numbers)


def azure_events_that_are_no_notice() -> list[dict[str, object]]:
    """Of another machine, and of this one, that it comes back from."""
    soon = format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30), usegmt=True)
    return [azure_event(soon, machines=("spot-vm_4",)), azure_event(soon, kind="Freeze")]


def run_to_its_end(job: Path, uri: Path, *more: str) -> str:
    """In this process, many rows at a time; the summary."""
    faster = [f"output.uri={uri}", "engine.max_num_seqs=32", *more]
    return run_job(load_job(job, faster)).summary


@pytest.mark.parametrize(
    ("sources", "num_rows", "sampling"),
    [
        # AWS is asked every five seconds: the job must last.
        (("sigterm", "aws"), 80, {"ignore_eos": True, "frequency_penalty": 0.2}),
        (("sigusr1", "gcp", "azure"), 20, {"n": 3, "temperature": 0.9, "min_tokens": 4}),
    ],
    ids=["greedy", "samples"],
)
def test_a_run_that_is_stopped_again_and_again_equals_one_that_was_not(
    tmp_path: Path,
    tiny_model: Path,
    sources: tuple[str, ...],
    num_rows: int,
    sampling: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_jsonl(tmp_path / "data.jsonl", make_rows(num_rows))
    job = write_job(
        tmp_path,
        tiny_model,
        sampling={"max_tokens": 300, **sampling},
        engine={"device": "cpu", "max_num_seqs": 3, "num_gpu_blocks": 400},
        checkpoint={"unit_rows": 8, "flush_interval": 0.2},
        preemption={"watch": ["sigterm", "sigusr1", "aws", "gcp", "azure"], "lead_time": LEAD_S},
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    stops = []
    for source in sources:
        with CloudMetadata() as cloud:
            cloud.events = azure_events_that_are_no_notice()
            stops.append(stop_one_life(job, stopped, source, cloud))
            assert any("/scheduledevents" in request for request in cloud.requests)
            assert not any(request.startswith("POST") for request in cloud.requests)
    for source, stop in zip(sources, stops, strict=True):
        sys.stdout.write(f"{source}: {stop}\n")  # shown by pytest -rP
        assert stop.who.lower().startswith(source)
        margin_s = LEAD_S / 5
        assert stop.said_s <= stop.seconds < LEAD_S - margin_s
        assert stop.rows > 0
        assert stop.tokens > 0
        assert 0 < stop.unfinished <= 3 * len(stops)  # some may wait since the life before
    ledger = Storage.open(f"{stopped}/.batchgen")
    assert len(ledger.list("unfinished")) == 1

    never = run_to_its_end(job, whole, "preemption.watch=auto")
    gone = f"preemption.endpoints.aws={cloud.endpoint}"  # no server is there any more
    last = run_to_its_end(job, stopped, "preemption.watch=[aws]", gone)
    assert caplog.text.count("the metadata server of aws gave no answer") == 1
    assert f"{stops[-1].tokens:,} more of stopped runs" in last
    assert "stopped runs" not in never
    assert f"rows: {num_rows} = {num_rows} ok" in last
    assert read_output(stopped) == read_output(whole)
    assert not ledger.list("unfinished")
