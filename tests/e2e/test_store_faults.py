"""The whole runner on a store that fails: killed at every request, in turn and at random.

Each trial is a job of 23 rows in 5 units on an in-memory store that speaks as s3fs does, with the
stand-in engine: a few milliseconds. At its end the store must hold the very bytes that a run
without faults leaves there, in `data/`, the dead letters and the dataset's own files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fault_trials import (
    BAD_ROWS,
    NUM_ROWS,
    RecordingEngine,
    TextSide,
    input_files,
    trial_job,
)
from faulty_store import FAULTS_OF, Fault, FaultyFileSystem, Killed, Life, Moment, World
from fsspec.registry import _registry
from trial_counts import Trials

from batchgen import generating, retries, runner
from batchgen.dataset.storage import Storage
from batchgen.errors import BatchgenError
from batchgen.job.spec import JobSpec
from batchgen.ledger import read_job, read_status
from batchgen.ledger.commits import read_commits
from batchgen.ledger.partials import read_partials
from batchgen.records import RowKey

OUT = "bucket/out"
LEDGER = f"{OUT}/.batchgen"
NUM_RANDOM_KILLS = 500
NUM_FAULTY_JOBS = 300
NUM_PAUSES = 100


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobSpec:
    return trial_job(tmp_path_factory.mktemp("job"), tiny_model, "s3://bucket")


@pytest.fixture(scope="module")
def text_side(spec: JobSpec) -> TextSide:
    return TextSide(spec)


@pytest.fixture(autouse=True)
def faulty_store(monkeypatch: pytest.MonkeyPatch, text_side: TextSide) -> None:
    """The faulty store stands under s3://, and nothing in a trial takes time."""
    monkeypatch.setitem(_registry, "s3", FaultyFileSystem)
    text_side.load_at_once(monkeypatch)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)


def live(spec: JobSpec, life: Life, engine: RecordingEngine | None = None) -> list[RowKey]:
    """Run the job in this life; the rows that were generated. Raises what ends it."""
    FaultyFileSystem.life = life
    engine = engine or RecordingEngine()
    runner.run_job(spec, make_engine=lambda *_: engine)
    return engine.keys


def result_of(world: World) -> dict[str, bytes]:
    """All that the job has left but what differs between runs: the card and commits have times."""
    runs = (f"{LEDGER}/commits/", f"{LEDGER}/runs/", f"{LEDGER}/probe")
    different = (f"{OUT}/README.md", *runs)
    return {path: data for path, data in world.below(OUT).items() if not path.startswith(different)}


def without_garbage(world: World) -> World:
    """The world without what a late listing may have hidden from those who clean up."""
    named = {f"{OUT}/{part['filename']}" for part in read_state(world)["_data_files"]}
    late = (f"{LEDGER}/partials/", f"{LEDGER}/claims/", f"{OUT}/data/")
    return World(
        objects={
            path: data
            for path, data in world.objects.items()
            if path in named or not path.startswith(late)
        }
    )


def read_state(world: World) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(world.objects[f"{OUT}/state.json"])
    return state


@pytest.fixture(scope="module")
def expected(spec: JobSpec, text_side: TextSide) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(_registry, "s3", FaultyFileSystem)
        world = World(objects=input_files("bucket/in"))
        assert len(live(spec, Life(world))) == NUM_ROWS - len(BAD_ROWS)
        return result_of(world)


def check_result(
    trials: Trials, world: World, expected: dict[str, bytes], *, was_hit: bool
) -> None:
    trials.compare(result_of(world), expected, was_hit=was_hit)
    FaultyFileSystem.life = Life(world)
    ledger = Storage.open(f"s3://{LEDGER}")
    status = read_status(ledger)
    num_failed = len(BAD_ROWS)
    ended = {"ok": NUM_ROWS - num_failed, "failed": num_failed, "skipped": 0}
    assert status["state"] == "done"
    assert status["rows"] == {"total": NUM_ROWS, **ended}


def saved_rows(world: World) -> set[RowKey]:
    """The rows that are on the store, in partials and in commits."""
    FaultyFileSystem.life = Life(world)
    ledger = Storage.open(f"s3://{LEDGER}")
    job = read_job(ledger)
    if job is None:
        return set()
    units = read_commits(ledger, job)
    committed = {
        RowKey(unit_id=unit.unit_id, index=index)
        for unit in job.plan.units
        for index in range(unit.num_rows)
        if unit.unit_id in units
    }
    return committed | {row.key for _, rows in read_partials(ledger, job) for row in rows}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_request_in_turn(
    spec: JobSpec, expected: dict[str, bytes], trials: Trials, moment: Moment
) -> None:
    killed_in: Counter[str] = Counter()
    for kill_at in itertools.count(1):
        world = World(objects=input_files("bucket/in"))
        life = Life(world, kill_at=kill_at, moment=moment)
        try:
            live(spec, life)
        except Killed:
            killed_in[life.killed_in.split()[0]] += 1
        saved = saved_rows(world)
        generated = live(spec, Life(world))
        assert saved.isdisjoint(generated), "a row that had been saved was generated again"
        check_result(trials, world, expected, was_hit=life.is_dead)
        if not life.is_dead:
            break
    assert killed_in.keys() == FAULTS_OF.keys()


def test_killed_at_random_again_and_again(
    spec: JobSpec, expected: dict[str, bytes], trials: Trials
) -> None:
    num_kills: Counter[int] = Counter()
    for seed in range(NUM_RANDOM_KILLS):
        moments = random.Random(seed)
        world = World(objects=input_files("bucket/in"))
        for number in itertools.count():
            kill_at = moments.randrange(1, 30) if number < 5 else None
            moment: Moment = moments.choice(("before", "after"))
            saved = saved_rows(world)
            engine = RecordingEngine()
            try:
                live(spec, Life(world, kill_at=kill_at, moment=moment), engine)
                break
            except Killed:
                continue
            finally:
                assert saved.isdisjoint(engine.keys)
        num_kills[number] += 1
        check_result(trials, world, expected, was_hit=number > 0)
    assert num_kills[5] > NUM_RANDOM_KILLS / 10


@pytest.mark.parametrize("fault", ["refused", "lost_reply", "repeated", "truncated"])
def test_one_fault_anywhere_does_not_end_a_run(
    spec: JobSpec, expected: dict[str, bytes], trials: Trials, fault: Fault
) -> None:
    injected: Counter[tuple[str, Fault]] = Counter()
    for number in itertools.count(1):
        world = World(objects=input_files("bucket/in"))
        life = Life(world, fault_at=number, faults=(fault,), seed=number)
        live(spec, life)
        injected += life.injected
        check_result(trials, world, expected, was_hit=bool(life.injected))
        if life.num_operations < number:
            break
    assert injected.keys() == {
        (kind, fault) for kind, faults in FAULTS_OF.items() if fault in faults
    }


def live_until_done(spec: JobSpec, lives: Iterable[Life]) -> Counter[type[BaseException]]:
    """Run the job in one life after the other until one ends well; how the others ended."""
    ends: Counter[type[BaseException]] = Counter()
    for life in lives:
        try:
            live(spec, life)
            return ends
        except Killed:
            ends[Killed] += 1
        except BatchgenError as error:
            if error.exit_code != 1:
                raise
            ends[type(error)] += 1
    raise AssertionError(f"not done after {ends}")


def test_faults_kills_and_late_listings_at_random(
    spec: JobSpec, expected: dict[str, bytes], trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few attempts, so that the store's errors end lives, too.
    monkeypatch.setattr(retries, "NUM_ATTEMPTS", 3)
    injected: Counter[tuple[str, Fault]] = Counter()
    ends: Counter[type[BaseException]] = Counter()
    for seed in range(NUM_FAULTY_JOBS):
        moments = random.Random(seed)
        world = World(objects=input_files("bucket/in"))
        lives = [
            Life(
                world,
                kill_at=moments.choice((None, moments.randrange(1, 60))) if number < 5 else None,
                moment=moments.choice(("before", "after")),
                fault_rate=0.3 / (1 + number),
                listings_lag=True,
                seed=1000 * seed + number,
            )
            for number in range(50)
        ]
        ends += live_until_done(spec, lives)
        was_killed = any(life.is_dead for life in lives)
        check_result(trials, without_garbage(world), expected, was_hit=was_killed)
        for life in lives:
            injected += life.injected
    assert injected.keys() == {(kind, f) for kind, faults in FAULTS_OF.items() for f in faults}
    assert ends[Killed] > NUM_FAULTY_JOBS / 2
    assert ends.total() - ends[Killed] > NUM_FAULTY_JOBS / 10


class NoSignals:
    """For a run inside a run, which may be on another thread."""

    notice = None

    def __enter__(self) -> NoSignals:
        return self

    def __exit__(self, *_: object) -> None:
        return


@pytest.mark.parametrize("moment", ["before", "after"])
def test_paused_at_every_request_while_another_runs_to_the_end(
    spec: JobSpec,
    expected: dict[str, bytes],
    trials: Trials,
    monkeypatch: pytest.MonkeyPatch,
    moment: Moment,
) -> None:
    monkeypatch.setattr(generating, "watch_for", lambda *_: NoSignals())
    for pause_at in itertools.count(1):
        world = World(objects=input_files("bucket/in"))
        paused = Life(
            world,
            moment=moment,
            pause_at=pause_at,
            while_paused=lambda world=world: live(spec, Life(world)),
        )
        live(spec, paused)
        was_paused = paused.num_operations >= pause_at
        check_result(trials, world, expected, was_hit=was_paused)
        if not was_paused:
            break


def test_paused_at_random_while_another_is_killed(
    spec: JobSpec, expected: dict[str, bytes], trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "watch_for", lambda *_: NoSignals())
    for seed in range(NUM_PAUSES):
        moments = random.Random(seed)
        world = World(objects=input_files("bucket/in"))

        def other(world: World = world, moments: random.Random = moments) -> None:
            with contextlib.suppress(Killed):
                live(spec, Life(world, kill_at=moments.randrange(1, 60), moment="after"))

        paused = Life(
            world,
            moment=moments.choice(("before", "after")),
            pause_at=moments.randrange(1, 60),
            while_paused=other,
        )
        live(spec, paused)
        was_paused = paused.pause_at is not None and paused.num_operations >= paused.pause_at
        check_result(trials, world, expected, was_hit=was_paused)
