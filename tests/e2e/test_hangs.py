"""A run in which a stage hangs ends, says where, and keeps what had finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from test_pipeline import HANG_S, ListSaver, ReversingEngine, make_stages, make_units, run_pipeline

from batchgen import pipeline as pipeline_module
from batchgen.errors import NoProgressError
from batchgen.monitor.watchdog import Watchdog
from batchgen.pipeline import Pipeline
from batchgen.records import Completion, EngineStats, InputRow, OutputRow, PromptSource


def hang(*_: object) -> Iterator[object]:
    HANGING.wait()
    yield


HANGING = threading.Event()


class HangingEngine(ReversingEngine):
    """Completes a batch, and then hangs in a way that nothing ends."""

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        yield next(super().run(source))
        HANGING.wait()


class HangingSaver(ListSaver):
    def finish(
        self, completions: Sequence[Completion], rows: Sequence[InputRow]
    ) -> list[OutputRow]:
        HANGING.wait()
        return []


@pytest.mark.parametrize(
    ("stage", "change", "frame"),
    [
        ("read", {"read_unit": hang}, "hang (e2e/test_hangs.py"),
        ("prompt", {"make_prompts": lambda _: list(hang())}, "hang (e2e/test_hangs.py"),
        ("engine", {"engine": HangingEngine()}, "run (e2e/test_hangs.py"),
        ("save", {"saver": HangingSaver()}, "finish (e2e/test_hangs.py"),
    ],
)
def test_a_watchdog_ends_a_run_in_which_a_stage_hangs(
    monkeypatch: pytest.MonkeyPatch, stage: str, change: dict[str, object], frame: str
) -> None:
    monkeypatch.setattr(pipeline_module, "_ABANDON_S", 0.5)
    monkeypatch.setattr(pipeline_module, "_JOIN_TIMEOUT_S", 0.1)
    abandoned = threading.Event()
    reasons: list[BaseException] = []
    saver = ListSaver()

    def abandon(reason: BaseException) -> None:
        reasons.append(reason)
        abandoned.set()

    defaults = {"saver": saver, "watchdog": Watchdog(0.6), "abandon": abandon}
    stages = make_stages(**{**defaults, **change})

    def run() -> None:
        try:
            Pipeline(stages, max_rows=1000, flush_interval_s=60.0).run(make_units(3, 100), {})
        except NoProgressError as reason:
            abandon(reason)

    HANGING.clear()
    threading.Thread(target=run, daemon=True).start()
    try:
        assert abandoned.wait(HANG_S)
    finally:
        HANGING.set()
    report = str(reasons[0])
    lines = {line.split(":")[0].strip(): line for line in report.splitlines()}
    assert frame in lines[stage]
    assert {"read", "prompt", "engine", "save"} <= lines.keys()
    assert "units in flight" in lines["between them"]
    if stage == "engine":  # what it had completed is saved before the process ends
        assert len(saver.flushed) == 50


def test_a_watchdog_leaves_a_slow_run_alone() -> None:
    """Steps of the engine are progress, though no row ends for longer than the limit."""

    class SlowEngine(ReversingEngine):
        steps = 0

        def run(self, source: PromptSource) -> Iterator[list[Completion]]:
            for _ in range(10):
                time.sleep(0.2)
                self.steps += 1
            yield from super().run(source)

        def stats(self) -> EngineStats:
            return EngineStats(prefill_steps=self.steps)

    saver = ListSaver()
    stages = make_stages(saver=saver, engine=SlowEngine(), watchdog=Watchdog(0.9))
    run_pipeline(stages, make_units(1, 50))
    assert len(saver.committed) == 1
