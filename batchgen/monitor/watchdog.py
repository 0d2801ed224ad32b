"""Notices a run that makes no progress, and says what every stage is waiting for."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from threading import Thread

from batchgen.errors import NoProgressError
from batchgen.monitor.progress import format_duration

_NUM_FRAMES = 4  # of a stack, the innermost
_PAUSE_S = 5.0  # between two looks, which are 0.2 s apart: the process itself was stopped


class Watchdog:
    """Barks once, when what it is shown has not changed for long. For one thread.

    It is made when the model is loaded, so that loading and warming up never count.
    """

    def __init__(self, limit_s: float | None) -> None:
        """`limit_s` is None for a watchdog that sleeps."""
        self._limit_s = limit_s
        self._last: object = None
        self._changed_s = self._looked_s = time.monotonic()

    def check(self, progress: object, describe: Callable[[], str]) -> NoProgressError | None:
        """Look at the counters of a run, all of them; why to end it, if so.

        `describe` is called for the error's message only.
        """
        now_s = time.monotonic()
        if progress != self._last or now_s - self._looked_s > _PAUSE_S:
            self._last, self._changed_s = progress, now_s
        self._looked_s = now_s
        if self._limit_s is None or now_s - self._changed_s < self._limit_s:
            return None
        error = NoProgressError(
            f"no progress for {format_duration(now_s - self._changed_s)}: no row was read, "
            f"prompted, generated or saved. What every stage is at:\n{describe()}\n"
            "Run the same command again to go on; if it was only slow, raise errors.watchdog"
        )
        self._limit_s = None
        return error


def thread_report(threads: Mapping[str, Thread]) -> str:
    """The innermost frames of each of these threads, a line each, innermost first."""
    frames = sys._current_frames()
    lines = []
    for name, thread in threads.items():
        frame = frames.get(thread.ident or 0)
        if frame is None:
            lines.append(f"  {name}: has ended")
            continue
        stack = traceback.extract_stack(frame)[: -_NUM_FRAMES - 1 : -1]
        calls = " < ".join(f"{call.name} ({_short(call.filename)}:{call.lineno})" for call in stack)
        lines.append(f"  {name}: {calls}")
    return "\n".join(lines)


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])
