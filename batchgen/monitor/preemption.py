"""Signals that ask a run to stop: of a machine that goes away, or of its user."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Literal, Self

StopReason = Literal["preempted", "interrupted"]

_REASONS: dict[int, StopReason] = {
    signal.SIGTERM: "preempted",
    signal.SIGUSR1: "preempted",
    signal.SIGINT: "interrupted",
}


class SignalWatch:
    """While entered, SIGTERM and SIGUSR1 mean "preempted" and SIGINT "interrupted".

    `reason` is the first one's, None before, and may be read from any thread. It is polled: a
    handler runs in the main thread, which may hold the very locks that stopping a run takes.
    A second SIGINT ends the process at once. Enter it on the main thread; what handled the
    signals before does so again afterwards.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self._num_interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _REASONS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
        if self.reason is None:
            self.reason = _REASONS[number]
