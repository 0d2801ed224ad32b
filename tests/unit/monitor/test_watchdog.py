from __future__ import annotations

import threading

import pytest

from batchgen.errors import NoProgressError
from batchgen.monitor import watchdog
from batchgen.monitor.watchdog import Watchdog, thread_report


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def look(
    dog: Watchdog, clock: Clock, progress: object, *, for_s: int, report: str = ""
) -> NoProgressError | None:
    """Looks every second; what the last look gives."""
    error = None
    for _ in range(for_s):
        clock.now_s += 1.0
        error = dog.check(progress, lambda: report)
    return error


def test_any_change_is_progress(clock: Clock) -> None:
    dog = Watchdog(900.0)
    for number in range(3):
        assert look(dog, clock, (0, number), for_s=890) is None
    assert look(dog, clock, (0, 2), for_s=10) is None
    error = look(dog, clock, (0, 2), for_s=1, report="  read: waits")
    assert isinstance(error, NoProgressError)
    assert error.exit_code == 1
    assert "no progress for 15:00" in str(error)
    assert "\n  read: waits\n" in str(error)
    assert look(dog, clock, (0, 2), for_s=1000) is None  # once


def test_time_in_which_the_process_was_stopped_does_not_count(clock: Clock) -> None:
    dog = Watchdog(900.0)
    assert look(dog, clock, 0, for_s=800) is None
    clock.now_s += 100_000.0
    assert look(dog, clock, 0, for_s=899) is None
    assert look(dog, clock, 0, for_s=2) is not None


def test_without_a_limit_it_sleeps(clock: Clock) -> None:
    dog = Watchdog(None)
    dog.check(0, lambda: "")
    clock.now_s += 1e9
    assert dog.check(0, lambda: "") is None


def test_the_report_names_the_innermost_frames() -> None:
    go_on = threading.Event()

    def wait_for_the_reader() -> None:
        go_on.wait()

    waiting = threading.Thread(target=wait_for_the_reader)
    ended = threading.Thread(target=lambda: None)
    for thread in (waiting, ended):
        thread.start()
    ended.join()
    lines = thread_report({"prompt": waiting, "read": ended}).splitlines()
    go_on.set()
    waiting.join()
    assert lines[0].startswith("  prompt: wait (")
    assert "wait_for_the_reader (monitor/test_watchdog.py:" in lines[0]
    assert lines[1] == "  read: has ended"
