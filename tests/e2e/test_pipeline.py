"""The threads of a run: order, bounds, and an end that never hangs, whatever stage fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from batchgen.errors import (
    BatchgenError,
    BudgetReached,
    EngineError,
    ErrorRateExceeded,
    Preempted,
    StorageError,
)
from batchgen.monitor.failure_gate import FailureGate
from batchgen.monitor.watchdog import Watchdog
from batchgen.pipeline import Channel, Engine, Pipeline, Stages
from batchgen.records import (
    Completion,
    EngineStats,
    InputRow,
    OutputRow,
    Prompt,
    PromptSource,
    RowFailure,
    RowKey,
    RowResult,
    SampleOutput,
    SampleProgress,
    UnfinishedRow,
    Unit,
)
from batchgen.units import FinishedUnit, UnitBoard

HANG_S = 20.0
ANSWER = SampleOutput(token_ids=[2], finish_reason="stop", seed=0)


def make_units(num_units: int, num_rows: int) -> list[Unit]:
    return [
        Unit(unit_id=i, file_index=0, row_start=i * num_rows, num_rows=num_rows)
        for i in range(num_units)
    ]


def read_unit(unit: Unit, wanted: set[int] | None) -> Iterator[InputRow]:
    for index in range(unit.num_rows):
        if wanted is None or index in wanted:
            number = unit.row_start + index
            key = RowKey(unit_id=unit.unit_id, index=index)
            yield InputRow(key=key, address=f"f:{number}", values={"n": number, "text": "x"})


def make_prompts(rows: Sequence[InputRow]) -> list[Prompt | RowFailure]:
    return [Prompt(key=row.key, token_ids=[1], max_tokens=1, seeds=(0,)) for row in rows]


def failure(row: InputRow) -> RowFailure:
    return RowFailure(key=row.key, address=row.address, kind="template_error", message="bad")


def output(key: RowKey, n: object = None) -> OutputRow:
    return OutputRow(
        key=key, address="", rows=({"n": n},), num_prompt_tokens=1, num_output_tokens=1
    )


@dataclass
class ReversingEngine:
    """Finishes each batch of prompts back to front."""

    batch: int = 50
    delay_s: float = 0.0
    most_taken: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        while not self.stopped.is_set() and (prompts := source.take(self.batch, wait=True)):
            self.most_taken = max(self.most_taken, len(prompts))
            self.stopped.wait(self.delay_s)
            yield [
                Completion(key=p.key, outputs=(ANSWER,), num_prompt_tokens=1)
                for p in reversed(prompts)
            ]

    def stats(self) -> EngineStats:
        return EngineStats()

    def stop(self) -> None:
        self.stopped.set()

    def unfinished(self) -> list[UnfinishedRow]:
        return []


@dataclass
class ListSaver:
    """Keeps everything in lists."""

    committed: list[FinishedUnit] = field(default_factory=list)
    kept: list[RowResult] = field(default_factory=list)
    flushed: list[RowResult] = field(default_factory=list)
    unfinished: list[UnfinishedRow] = field(default_factory=list)

    def finish(
        self, completions: Sequence[Completion], rows: Sequence[InputRow]
    ) -> list[OutputRow]:
        return [output(row.key, row.values["n"]) for row in rows]

    def keep(self, results: Sequence[RowResult]) -> None:
        self.kept.extend(results)

    def commit(self, finished: FinishedUnit) -> None:
        self.committed.append(finished)

    def flush(self) -> None:
        self.flushed.extend(self.kept)
        self.kept.clear()

    def save_unfinished(self, rows: Sequence[UnfinishedRow]) -> None:
        self.unfinished.extend(rows)


def make_stages(**changes: object) -> Stages:
    defaults: dict[str, object] = {
        "read_unit": read_unit,
        "make_prompts": make_prompts,
        "kept_columns": ("n",),
        "engine": ReversingEngine(),
        "saver": ListSaver(),
        "gate": FailureGate(fail_on_first=False, max_error_rate=1.0, window=10),
        "given": lambda _: None,
        "charge": lambda _: None,
        "watch": lambda: None,
        "watchdog": Watchdog(None),
        "abandon": lambda _: None,
    }
    return Stages(**{**defaults, **changes})  # type: ignore[arg-type]


def run_bounded(work: Callable[[], None]) -> None:
    """Run `work` in a thread that may not hang; raise what it raised."""
    raised: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive(), "the pipeline hangs"
    if raised:
        raise raised[0]


def run_pipeline(
    stages: Stages,
    units: Sequence[Unit],
    recovered: dict[int, list[RowResult]] | None = None,
    *,
    max_rows: int = 1000,
    flush_interval_s: float = 60.0,
) -> None:
    pipeline = Pipeline(stages, max_rows=max_rows, flush_interval_s=flush_interval_s)
    run_bounded(lambda: pipeline.run(units, recovered or {}))


def test_every_row_is_committed_once_and_in_order_within_its_unit() -> None:
    saver = ListSaver()
    run_pipeline(make_stages(saver=saver), make_units(7, 90))
    assert sorted(f.unit.unit_id for f in saver.committed) == list(range(7))
    for finished in saver.committed:
        numbers = [r.rows[0]["n"] for r in finished.results if isinstance(r, OutputRow)]
        assert numbers == [finished.unit.row_start + i for i in range(90)]
        assert finished.wall_s >= 0


def test_no_units_is_a_run_without_rows() -> None:
    run_pipeline(make_stages(), [])


def test_recovered_rows_are_not_read_again() -> None:
    seen: list[int] = []
    saver = ListSaver()
    unit = make_units(1, 10)[0]
    done: list[RowResult] = [output(RowKey(unit_id=0, index=i), -1) for i in (0, 3, 9)]

    def read(unit: Unit, wanted: set[int] | None) -> Iterator[InputRow]:
        for row in read_unit(unit, wanted):
            seen.append(row.key.index)
            yield row

    run_pipeline(make_stages(read_unit=read, saver=saver), [unit], {0: done})
    assert seen == [1, 2, 4, 5, 6, 7, 8]
    values = [r.rows[0]["n"] for r in saver.committed[0].results if isinstance(r, OutputRow)]
    assert values == [-1, 1, 2, -1, 4, 5, 6, 7, 8, -1]
    assert len(saver.kept) + len(saver.flushed) == 7


def test_rows_that_fail_end_beside_those_that_succeed() -> None:
    saver = ListSaver()

    def make(rows: Sequence[InputRow]) -> list[Prompt | RowFailure]:
        return [
            failure(row) if row.key.index % 3 == 0 else prompt
            for row, prompt in zip(rows, make_prompts(rows), strict=True)
        ]

    run_pipeline(make_stages(make_prompts=make, saver=saver), make_units(2, 30))
    for finished in saver.committed:
        kinds = [isinstance(result, RowFailure) for result in finished.results]
        assert kinds == [index % 3 == 0 for index in range(30)]


def test_rows_in_flight_stay_within_the_window() -> None:
    lock = threading.Lock()
    flying = {"now": 0, "most": 0}

    def read(unit: Unit, wanted: set[int] | None) -> Iterator[InputRow]:
        with lock:
            flying["now"] += unit.num_rows
            flying["most"] = max(flying["most"], flying["now"])
        yield from read_unit(unit, wanted)

    class SlowSaver(ListSaver):
        def commit(self, finished: FinishedUnit) -> None:
            with lock:
                flying["now"] -= finished.unit.num_rows

    run_pipeline(make_stages(read_unit=read, saver=SlowSaver()), make_units(40, 25), max_rows=100)
    assert 50 <= flying["most"] <= 100


def test_a_unit_larger_than_the_window_runs_alone() -> None:
    saver = ListSaver()
    run_pipeline(make_stages(saver=saver), make_units(3, 50), max_rows=10)
    assert len(saver.committed) == 3


def test_flushes_come_every_interval() -> None:
    saver = ListSaver()
    stages = make_stages(saver=saver, engine=ReversingEngine(batch=5, delay_s=0.05))
    flushes: list[int] = []
    saver.flush = lambda: flushes.append(len(saver.kept))  # type: ignore[method-assign]
    run_pipeline(stages, make_units(1, 100), flush_interval_s=0.2)
    assert len(flushes) >= 4
    assert flushes == sorted(flushes)


class BoomError(Exception):
    pass


def boom(*_: object) -> object:
    raise BoomError


def failing_engine(after: int) -> Engine:
    class FailingEngine(ReversingEngine):
        def run(self, source: PromptSource) -> Iterator[list[Completion]]:
            for number, batch in enumerate(super().run(source)):
                if number == after:
                    raise BoomError
                yield batch

    return FailingEngine()


@pytest.mark.parametrize("stage", ["read_unit", "make_prompts", "watch"])
def test_an_error_in_a_thread_is_raised_by_run(stage: str) -> None:
    engine = ReversingEngine(batch=1, delay_s=0.001)
    with pytest.raises(BoomError):
        run_pipeline(make_stages(engine=engine, **{stage: boom}), make_units(200, 90))


@pytest.mark.parametrize("method", ["finish", "keep", "commit", "flush"])
def test_a_failed_save_fails_the_run(method: str) -> None:
    saver = ListSaver()
    setattr(saver, method, boom)
    with pytest.raises(BoomError):
        run_pipeline(make_stages(saver=saver), make_units(200, 90), flush_interval_s=0.01)


@pytest.mark.parametrize("after", [0, 3])
def test_what_had_finished_is_flushed_when_the_engine_fails(after: int) -> None:
    saver = ListSaver()
    with pytest.raises(EngineError, match="the engine failed: BoomError") as caught:
        run_pipeline(make_stages(engine=failing_engine(after), saver=saver), make_units(4, 500))
    assert isinstance(caught.value.__cause__, BoomError)
    assert len(saver.flushed) == after * 50
    assert not saver.kept


@pytest.mark.parametrize(
    ("num_rows", "message"), [(100, "units unfinished"), (50_000, "prompts were left")]
)
def test_an_engine_that_returns_early_is_an_error(num_rows: int, message: str) -> None:
    class LazyEngine(ReversingEngine):
        def run(self, source: PromptSource) -> Iterator[list[Completion]]:
            time.sleep(0.1)  # the prompts of 100 rows are all there by then
            yield next(ReversingEngine.run(self, source))
            source.take(50, wait=True)

    saver = ListSaver()
    with pytest.raises(BatchgenError, match=message):
        run_pipeline(make_stages(engine=LazyEngine(), saver=saver), make_units(1, num_rows))
    assert len(saver.flushed) == 50


def test_a_stop_from_the_watch_saves_what_has_finished() -> None:
    saver = ListSaver()
    started = time.monotonic()

    def watch() -> BatchgenError | None:
        return Preempted("preempted") if time.monotonic() - started > 0.5 else None

    engine = ReversingEngine(batch=10, delay_s=0.02)
    with pytest.raises(Preempted):
        run_pipeline(make_stages(engine=engine, saver=saver, watch=watch), make_units(1, 90_000))
    assert saver.flushed


def test_a_stop_from_a_charge_saves_the_rows_that_were_charged_and_no_others() -> None:
    saver = ListSaver()
    charged: list[RowKey] = []

    def charge(completions: Sequence[Completion]) -> BatchgenError | None:
        charged.extend(completion.key for completion in completions)
        return BudgetReached("enough") if len(charged) >= 120 else None

    engine = ReversingEngine(batch=50, delay_s=0.05)
    with pytest.raises(BudgetReached):
        run_pipeline(make_stages(engine=engine, saver=saver, charge=charge), make_units(4, 500))
    assert {result.key for result in saver.flushed} == set(charged)
    assert 120 <= len(saver.flushed) == len(charged) < 170


@pytest.mark.parametrize("method", ["commit", "flush"])
def test_a_stop_whose_rows_could_not_be_saved_does_not_say_that_they_were(method: str) -> None:
    reasons: list[BatchgenError] = []
    is_stopping = threading.Event()

    def charge(completions: Sequence[Completion]) -> BatchgenError | None:
        reasons.append(BudgetReached("enough; finished rows are saved"))
        return reasons[-1]

    class LateSaver(ListSaver):
        """Saves nothing before the run is being stopped, and then fails."""

        def finish(
            self, completions: Sequence[Completion], rows: Sequence[InputRow]
        ) -> list[OutputRow]:
            assert is_stopping.wait(60)
            return super().finish(completions, rows)

    class StoppingEngine(ReversingEngine):
        def stop(self) -> None:
            super().stop()
            is_stopping.set()

    def fail(*_: object) -> None:
        raise StorageError("cannot write: the disk is full")

    saver = LateSaver()
    setattr(saver, method, fail)
    stages = make_stages(engine=StoppingEngine(batch=50), saver=saver, charge=charge)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        run_pipeline(stages, make_units(8, 25))
    assert caught.value.__cause__ is reasons[0]


class StuckEngine(ReversingEngine):
    """Yields one batch; its next step ends when `finish` is set, whatever `stop` says."""

    def __init__(self) -> None:
        super().__init__()
        self.finish = threading.Event()

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        prompts = source.take(20, wait=True)
        for half in (prompts[:10], prompts[10:]):
            yield [Completion(key=p.key, outputs=(ANSWER,), num_prompt_tokens=1) for p in half]
            self.finish.wait(HANG_S)

    def unfinished(self) -> list[UnfinishedRow]:
        sample = SampleProgress(token_ids=(5, 6), finish_reason=None)
        return [UnfinishedRow(key=RowKey(unit_id=0, index=20), samples=(sample,))]


def test_a_stop_saves_at_once_then_what_the_last_step_has_then_what_is_unfinished() -> None:
    engine, saver = StuckEngine(), ListSaver()
    flushed_while_stuck: list[int] = []
    started = time.monotonic()

    def watch() -> BatchgenError | None:
        if saver.flushed and not engine.finish.is_set():
            flushed_while_stuck.append(len(saver.flushed))
            engine.finish.set()
        return Preempted("preempted") if time.monotonic() - started > 0.3 else None

    with pytest.raises(Preempted):
        run_pipeline(
            make_stages(engine=engine, saver=saver, watch=watch),
            make_units(1, 1000),
            flush_interval_s=3600.0,
        )
    assert flushed_while_stuck == [10]
    assert len(saver.flushed) == 20
    assert saver.unfinished == engine.unfinished()


def gate_and_make(bad: Callable[[int], bool]) -> Callable[[Sequence[InputRow]], list[object]]:
    def make(rows: Sequence[InputRow]) -> list[object]:
        return [
            failure(row) if bad(int(row.address[2:])) else prompt
            for row, prompt in zip(rows, make_prompts(rows), strict=True)
        ]

    return make


def test_too_many_failures_within_the_window_end_the_run() -> None:
    saver = ListSaver()
    stages = make_stages(
        saver=saver,
        make_prompts=gate_and_make(lambda n: n >= 300 and n % 10 == 0),
        gate=FailureGate(fail_on_first=False, max_error_rate=0.05, window=100),
    )
    with pytest.raises(ErrorRateExceeded, match="6 of the last 100 rows"):
        run_pipeline(stages, make_units(10, 100))
    assert saver.flushed or saver.committed


def test_a_few_failures_are_dead_letters_even_if_the_engine_is_slow() -> None:
    saver = ListSaver()
    stages = make_stages(
        saver=saver,
        make_prompts=gate_and_make(lambda n: n % 50 == 0),
        engine=ReversingEngine(batch=500, delay_s=0.2),
        gate=FailureGate(fail_on_first=False, max_error_rate=0.05, window=10),
    )
    # 2% fail and a window of 10 rows has at most one of them: 10% is above the limit.
    with pytest.raises(ErrorRateExceeded):
        run_pipeline(stages, make_units(10, 100))
    stages = make_stages(
        saver=ListSaver(),
        make_prompts=gate_and_make(lambda n: n % 50 == 0),
        engine=ReversingEngine(batch=500, delay_s=0.2),
        gate=FailureGate(fail_on_first=False, max_error_rate=0.05, window=100),
    )
    run_pipeline(stages, make_units(10, 100))


def test_on_error_fail_ends_at_the_first_failure_and_leaves_the_row_to_the_next_run() -> None:
    saver = ListSaver()
    stages = make_stages(
        saver=saver,
        make_prompts=gate_and_make(lambda n: n == 77),
        gate=FailureGate(fail_on_first=True, max_error_rate=1.0, window=10),
    )
    with pytest.raises(BatchgenError, match="f:77") as caught:
        run_pipeline(stages, make_units(3, 50))
    assert caught.value.exit_code == 1
    assert not any(isinstance(result, RowFailure) for result in saver.flushed)


def test_a_closed_channel_wakes_both_ends() -> None:
    channel: Channel[int] = Channel(2)
    channel.put([1, 2])
    results: list[object] = []
    putter = threading.Thread(target=lambda: results.append(channel.put([3])))
    putter.start()
    time.sleep(0.05)
    channel.close(discard=True)
    putter.join(HANG_S)
    assert results == [False]
    assert channel.get(5) == []
    assert channel.is_drained()


def test_the_board_refuses_admission_after_a_stop() -> None:
    board = UnitBoard(10)
    first, second = make_units(2, 10)
    assert board.admit(first, [])
    threading.Timer(0.05, board.stop).start()
    assert not board.admit(second, [])
