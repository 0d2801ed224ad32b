"""The whole runner on a local disk, ended at every system call that changes the disk."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fault_trials import RecordingEngine, TextSide, input_files, trial_job
from faulty_store import Killed, Moment
from trial_counts import Trials

from batchgen import runner
from batchgen.dataset import storage
from batchgen.errors import StorageError
from batchgen.job.spec import JobSpec

CALLS = frozenset({"open", "fsync", "link", "replace", "unlink", "mkdir"})


class FaultyOs:
    """Stands for the module `os`: its `fail_at`-th call (from 1) does not come back as it should.

    After a kill no call has an effect any more; after another error they work again. Nothing is
    synced in truth: that matters when the machine dies, and takes most of a trial's time.
    """

    def __init__(
        self, fail_at: int = 0, moment: Moment = "before", error: BaseException | None = None
    ) -> None:
        self._fail_at = fail_at
        self._moment = moment
        self._error = error
        self._lock = threading.Lock()
        self.num_calls = 0
        self.failed_call = ""

    def __getattr__(self, name: str) -> Any:
        function = (lambda _: None) if name == "fsync" else getattr(os, name)
        if name not in CALLS:
            return function

        def call(*arguments: Any) -> Any:
            with self._lock:
                self.num_calls += 1
                number = self.num_calls
            if isinstance(self._error, Killed) and 0 < self._fail_at < number:
                raise self._error
            if number != self._fail_at:
                return function(*arguments)
            self.failed_call = name
            if self._moment == "after":
                result = function(*arguments)
                if name == "open":
                    os.close(result)
            assert self._error is not None
            raise self._error

        return call


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobSpec:
    folder = tmp_path_factory.mktemp("disk")
    (folder / "in").mkdir()
    for path, data in input_files(str(folder / "in")).items():
        Path(path).write_bytes(data)
    return trial_job(folder, tiny_model, str(folder))


@pytest.fixture(scope="module")
def text_side(spec: JobSpec) -> TextSide:
    return TextSide(spec)


def run(spec: JobSpec, monkeypatch: pytest.MonkeyPatch, faulty_os: Any) -> None:
    monkeypatch.setattr(storage, "os", faulty_os)
    runner.run_job(spec, make_engine=lambda *_: RecordingEngine())


def result_of(folder: Path) -> dict[str, bytes]:
    """All files but those with times in them or of one run, and temporary ones of killed writes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in ("README.md", "probe")
        and path.parent.name not in ("commits", "runs")
        and not path.name.startswith(".tmp-")
    }


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "error",
    [Killed(), OSError(errno.ENOSPC, "No space left on device")],
    ids=["killed", "full"],
)
def test_ended_at_every_system_call(
    spec: JobSpec,
    text_side: TextSide,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    moment: Moment,
    trials: Trials,
) -> None:
    text_side.load_at_once(monkeypatch)

    def job(name: str) -> JobSpec:
        output = spec.output.model_copy(update={"uri": str(tmp_path / name)})
        return spec.model_copy(update={"output": output})

    run(job("whole"), monkeypatch, FaultyOs())
    expected = result_of(tmp_path / "whole")
    ended_in: Counter[str] = Counter()
    for number in itertools.count(1):
        faulty_os = FaultyOs(number, moment, error)
        try:
            run(job(str(number)), monkeypatch, faulty_os)
        except (Killed, StorageError):
            ended_in[faulty_os.failed_call] += 1
        run(job(str(number)), monkeypatch, FaultyOs())
        was_hit = faulty_os.failed_call != ""
        trials.compare(result_of(tmp_path / str(number)), expected, was_hit=was_hit)
        if faulty_os.num_calls < number:
            break
    assert ended_in.keys() == CALLS
