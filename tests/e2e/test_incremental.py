"""`input.incremental`: files that come to the input later are processed, and nothing else is."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from e2e_jobs import batchgen, expected_rows, make_rows, read_output, write_job, write_jsonl
from standin import StandInEngine

from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError, InputError, JobChangedError, JobFileError, UsageError
from batchgen.job.loading import load_job
from batchgen.ledger import read_status
from batchgen.publishing import publish_job
from batchgen.records import Completion, Prompt, PromptSource
from batchgen.retry import Retry
from batchgen.runner import RunReport, run_job
from batchgen.startup import open_job, open_ledger_storage
from batchgen.verify import verify_job

ROWS = {name: make_rows(30, start=100 * i) for i, name in enumerate("abcde")}
OLD, NEW = "bd", "ace"  # some new files sort before old ones


def add(folder: Path, names: str) -> None:
    for name in names:
        write_jsonl(folder / f"in/{name}.jsonl", ROWS[name])


def make_job(folder: Path, model: Path, **output: Any) -> Path:
    add(folder, OLD)
    return write_job(
        folder,
        model,
        input={"uri": str(folder / "in/*.jsonl"), "incremental": True},
        output={"max_shard_rows": 8, **output},
        checkpoint={"unit_rows": 12, "flush_interval": 0.01},
    )


class CountingEngine(StandInEngine):
    def __init__(self, prompted: list[Prompt]) -> None:
        super().__init__(pool=8)
        self._prompted = prompted

    def _complete(self, prompt: Prompt) -> Completion:
        self._prompted.append(prompt)
        return super()._complete(prompt)


def no_engine(*_: object) -> Any:
    raise AssertionError("the model was loaded")


def run(job: Path, *overrides: str, prompted: list[Prompt] | None = None) -> RunReport:
    noted: list[Prompt] = [] if prompted is None else prompted
    return run_job(load_job(job, overrides), make_engine=lambda *_: CountingEngine(noted))


def expected(folder: Path, names: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a run that had all of these files from its start, in the order of their names."""
    return [
        row
        for name in sorted(names)
        for row in expected_rows(ROWS[name], str(folder / f"in/{name}.jsonl"), tokenizer)
    ]


def check(job: Path, names: str, tokenizer: Any, output_format: str = "arrow") -> None:
    """The output is that of one run over these files, and its ledger is sound."""
    folder = job.parent
    spec = load_job(job)
    assert read_output(folder / "out", output_format) == expected(folder, names, tokenizer)
    receipt = verify_job(spec, open_ledger_storage(spec))
    assert receipt.differences == []
    assert receipt.fingerprint.differences == []
    assert (receipt.state, receipt.leftovers) == ("done", [])
    assert [Path(file.uri).stem for file in receipt.files] == sorted(names)
    assert {file.rows.ok for file in receipt.files} == {30}


@pytest.mark.parametrize("output_format", ["arrow", "parquet", "jsonl"])
def test_a_second_run_processes_only_the_files_that_were_added(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, output_format: str
) -> None:
    job = make_job(tmp_path, tiny_model, format=output_format)
    run(job)
    check(job, OLD, tokenizer, output_format)
    parts = {path: path.stat() for path in (tmp_path / "out/data").iterdir()}
    ledger = {path: path.read_bytes() for path in (tmp_path / "out/.batchgen").rglob("0*.json")}
    job_json = (tmp_path / "out/.batchgen/job.json").read_bytes()

    add(tmp_path, NEW)
    prompted: list[Prompt] = []
    report = run(job, prompted=prompted)
    assert len(prompted) == 90
    assert report.counts.ok == report.counts.total == 150
    assert "(60 done before this run)" in report.summary
    check(job, OLD + NEW, tokenizer, output_format)
    for path, stat in parts.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert all(path.read_bytes() == data for path, data in ledger.items())
    assert (tmp_path / "out/.batchgen/job.json").read_bytes() == job_json
    # A night without new files ends at once.
    report = run_job(load_job(job), make_engine=no_engine)
    assert report.counts.ok == 150


def test_the_card_names_the_parts_in_input_order(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    """As a reader that knows nothing of `datasets` finds them."""
    job = make_job(tmp_path, tiny_model, format="parquet")
    run(job)
    add(tmp_path, NEW)
    run(job)
    front = yaml.safe_load((tmp_path / "out/README.md").read_text(encoding="utf-8").split("---")[1])
    paths = front["configs"][0]["data_files"][0]["path"]
    assert sorted(paths) != paths
    table = pa.concat_tables([pq.read_table(tmp_path / "out" / path) for path in paths])
    assert table.to_pylist() == expected(tmp_path, OLD + NEW, tokenizer)


def test_files_are_added_night_after_night(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    job = make_job(tmp_path, tiny_model)
    names = OLD
    for name in ["", *NEW]:
        names += name
        add(tmp_path, name)
        run(job)
        check(job, names, tokenizer)
    added = sorted(path.name for path in (tmp_path / "out/.batchgen/added").iterdir())
    assert added == ["000001.json", "000002.json", "000003.json"]
    # Without the key, what is there is the job.
    run_job(load_job(job, ["input.incremental=false"]), make_engine=no_engine)


def test_without_the_key_an_added_file_is_a_changed_input(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path, tiny_model)
    run(job)
    add(tmp_path, "a")
    with pytest.raises(JobChangedError, match=r"input\.files: 1 added \(.*a\.jsonl\)"):
        run(job, "input.incremental=false")
    with pytest.raises(UsageError, match="resume is `never`"):
        run(job, "checkpoint.resume=never")
    assert not (tmp_path / "out/.batchgen/added").exists()


@pytest.mark.parametrize("is_grown", [False, True])
def test_changed_and_removed_files_are_an_error_by_name(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, is_grown: bool
) -> None:
    job = make_job(tmp_path, tiny_model)
    run(job)
    names = OLD
    if is_grown:
        names += "c"
        add(tmp_path, "c")
        run(job)
    add(tmp_path, "ae")
    for name in names:
        path = tmp_path / f"in/{name}.jsonl"
        aside = path.rename(tmp_path / "aside")
        with pytest.raises(JobChangedError, match=rf"input\.files: 1 removed \({path}\)\n"):
            run(job)
        write_jsonl(path, ROWS[name][:-1])
        with pytest.raises(JobChangedError, match=rf"input\.files: 1 changed \({path}\)\n"):
            run(job)
        aside.rename(path)
    with pytest.raises(JobChangedError, match=r"sampling\.temperature"):
        run(job, "sampling.temperature=0.5")
    assert len(list((tmp_path / "out/.batchgen").glob("added/*"))) == is_grown
    run(job)
    check(job, names + "ae", tokenizer)


def test_new_files_that_do_not_fit_are_refused_before_they_are_taken_in(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    job = make_job(tmp_path, tiny_model)
    run(job)
    path = write_jsonl(tmp_path / "in/c.jsonl", [{"id": 1, "txt": "x"}])
    with pytest.raises(UsageError, match="uses column 'text'"):
        run(job)
    write_jsonl(path, [{"id": "one", "text": "x"}])
    with pytest.raises(InputError, match="'id' is string in the files that were added"):
        run(job)
    assert read_status(open_ledger_storage(load_job(job)))["state"] == "done"
    write_jsonl(path, ROWS["c"])
    run(job)
    check(job, OLD + "c", tokenizer)


def test_a_new_file_without_rows_is_taken_in(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    job = make_job(tmp_path, tiny_model)
    run(job)
    (tmp_path / "in/c.jsonl").touch()
    run_job(load_job(job), make_engine=no_engine)
    assert read_output(tmp_path / "out") == expected(tmp_path, OLD, tokenizer)
    spec = load_job(job)
    receipt = verify_job(spec, open_ledger_storage(spec))
    assert receipt.is_right
    assert [file.rows.total for file in receipt.files] == [30, 0, 30]


def test_a_limit_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path, tiny_model)
    with pytest.raises(JobFileError, match="incremental and limit do not go together"):
        load_job(job, ["input.limit=3"])


def test_verify_leaves_files_that_came_since_to_the_next_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    job = make_job(tmp_path, tiny_model)
    run(job)
    add(tmp_path, "a")
    spec = load_job(job)
    receipt = verify_job(spec, open_ledger_storage(spec))
    assert (receipt.is_right, receipt.fingerprint.differences) == (True, [])
    write_jsonl(tmp_path / "in/b.jsonl", ROWS["b"][:3])
    receipt = verify_job(spec, open_ledger_storage(spec))
    assert "1 changed" in receipt.fingerprint.differences[0]


class HookedEngine(StandInEngine):
    """Calls a hook when its first rows are finished."""

    def __init__(self, hook: Callable[[], object]) -> None:
        super().__init__(pool=8)
        self._hook = hook

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        for number, completions in enumerate(super().run(source)):
            if number == 1:
                self._hook()
            yield completions


def test_files_are_added_to_a_job_that_is_not_finished(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    job = make_job(tmp_path, tiny_model)

    def end() -> None:
        raise BatchgenError("gone")

    for names in ("", "c", "ae"):
        add(tmp_path, names)
        with pytest.raises(BatchgenError, match="gone"):
            run_job(load_job(job), make_engine=lambda *_: HookedEngine(end))
        spec = load_job(job)
        assert verify_job(spec, open_ledger_storage(spec)).is_right
    run(job)
    check(job, OLD + NEW, tokenizer)


def test_another_run_takes_in_files_while_this_one_generates(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    job = make_job(tmp_path, tiny_model)

    def other() -> None:
        add(tmp_path, NEW)
        run(job)
        check(job, OLD + NEW, tokenizer)

    run_job(load_job(job), make_engine=lambda *_: HookedEngine(other))
    check(job, OLD + NEW, tokenizer)


def test_a_retry_leaves_new_files_to_a_run(
    tmp_path: Path, tiny_model: Path, tokenizer: Any
) -> None:
    job = make_job(tmp_path, tiny_model)
    bad = {**ROWS["b"][3], "text": None}
    rows = [*ROWS["b"][:3], bad, *ROWS["b"][4:]]
    write_jsonl(tmp_path / "in/b.jsonl", rows)
    allowed = "errors.max_error_rate=1.0"
    assert run(job, allowed).counts.failed == 1
    add(tmp_path, NEW)
    spec = load_job(job, [allowed])
    retry = Retry(retry_id="again", only=None)
    report = run_job(spec, make_engine=lambda *_: CountingEngine([]), retry=retry)
    assert report.counts.total == 60
    ledger = open_ledger_storage(spec)
    assert ledger.list("added") == []
    assert read_status(ledger)["state"] == "done"
    assert run(job, allowed).counts.total == 150


def test_a_run_that_was_paused_before_it_published_damages_nothing(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchgen import publishing

    job = make_job(tmp_path, tiny_model)
    publish = publishing.publish
    calls = itertools.count()

    def late(*arguments: Any, **options: Any) -> None:
        if next(calls) == 0:
            add(tmp_path, NEW)
            run(job)
            check(job, OLD + NEW, tokenizer)
        publish(*arguments, **options)

    monkeypatch.setattr(publishing, "publish", late)
    assert run(job).counts.ok == 150
    assert next(calls) == 3
    check(job, OLD + NEW, tokenizer)


class Killed(BaseException):
    """The process is gone."""


def kill_at(monkeypatch: pytest.MonkeyPatch, at: int | None, moment: str) -> Callable[[], int]:
    """Every store operation from the `at`-th on fails; how many there were."""
    counter = itertools.count(1)
    seen = [0]

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*arguments: Any) -> Any:
            seen[0] = number = next(counter)
            if at is not None and (number > at or (number == at and moment == "before")):
                raise Killed
            result = method(*arguments)
            if number == at:
                raise Killed
            return result

        return wrapped

    for name in ("read", "exists", "list", "create", "put", "delete"):
        monkeypatch.setattr(Storage, name, wrap(getattr(Storage, name)))
    return lambda: seen[0]


def test_a_run_mends_what_a_late_publisher_left_that_was_killed(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knew of the old files only, ended after each request of its own."""
    job = make_job(tmp_path, tiny_model)
    run(job)
    spec = load_job(job)
    late = [open_job(spec) for _ in range(8)]
    add(tmp_path, NEW)
    run(job)
    num_wrong = 0
    for number, stale in enumerate(late):
        # Paused after it has looked whether the job has grown.
        looks = iter([False])
        monkeypatch.setattr(stale.ledger, "has_grown", lambda looks=looks: next(looks, True))
        with monkeypatch.context() as patch:
            kill_at(patch, 1 + number, "after")
            with contextlib.suppress(Killed):
                publish_job(stale, 1.0)
        num_wrong += not verify_job(spec, open_ledger_storage(spec)).is_right
        assert run_job(spec, make_engine=no_engine).counts.ok == 150
        check(job, OLD + NEW, tokenizer)
    assert num_wrong > 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_every_step_of_the_second_night(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    job = make_job(tmp_path, tiny_model)
    run(job)
    add(tmp_path, "a")
    shutil.copytree(tmp_path / "out", tmp_path / "first")
    wanted = expected(tmp_path, OLD + "a", tokenizer)
    num_killed = 0
    is_grown = set()
    for at in range(1, 200):
        with monkeypatch.context() as patch:
            kill_at(patch, at, moment)
            try:
                run(job, "checkpoint.flush_interval=60")
            except Killed:
                num_killed += 1
            else:
                break
        is_grown.add((tmp_path / "out/.batchgen/added").exists())
        run(job)
        assert read_output(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "first", tmp_path / "out")
    assert num_killed > 25
    assert is_grown == {False, True}
    check(job, OLD + "a", tokenizer)


def test_the_real_command_night_after_night(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path, tiny_model)
    options = ("-o", "engine.num_gpu_blocks=200", "-o", "model.max_model_len=512")
    assert batchgen("run", job, *options).returncode == 0
    add(tmp_path, "c")
    done = batchgen("run", job, *options)
    assert done.returncode == 0, done.stderr
    assert "rows: 90 = 90 ok + 0 failed + 0 skipped (60 done before this run)" in done.stderr
    (tmp_path / "in/b.jsonl").unlink()
    changed = batchgen("run", job, *options)
    assert changed.returncode == 5
    assert f"input.files: 1 removed ({tmp_path / 'in/b.jsonl'})" in changed.stderr
    status = json.loads(batchgen("status", "--json", job).stdout)
    assert status["state"] == "done"
    assert status["rows"]["ok"] == 90
    assert status["runs"]["count"] == 2
