"""What asks a run to stop: a signal, the notice of a cloud that takes the machine, or its user.

Who has notice has little time. The run saves what it can and ends with exit code 75; should it not
have ended when the time is all but over, whatever it waits for, the process ends then.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType, MappingProxyType, TracebackType
from typing import Any, Literal, Self

from batchgen.errors import Interrupted, Preempted
from batchgen.job.spec import PreemptionSpec
from batchgen.monitor.metadata import (
    AwsPoller,
    AzurePoller,
    CloudNotice,
    GcpPoller,
    MetadataError,
    Poller,
)
from batchgen.monitor.summary import SavedWork, stopped_text

StopReason = Literal["preempted", "interrupted"]

# From the notice to the end of the machine. For signals: what Kubernetes and Slurm wait by default.
LEAD_TIMES_S: Mapping[str, float] = MappingProxyType(
    {"sigterm": 30.0, "sigusr1": 30.0, "aws": 120.0, "gcp": 30.0, "azure": 30.0}
)
DEFAULT_SOURCES = ("sigterm", "sigusr1")
_SIGNALS: Mapping[str, signal.Signals] = MappingProxyType(
    {"sigterm": signal.SIGTERM, "sigusr1": signal.SIGUSR1}
)
_SHORTEST_LEAD_S = 5.0  # even if the clocks differ, or the notice was late
_LONGEST_MARGIN_S = 10.0
_RETRY_S = 10.0  # where a metadata server does not answer
_LOOK_S = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopNotice:
    """The first notice, and the earliest deadline of all. Times are those of time.monotonic."""

    reason: StopReason
    text: str  # who gave it, for people
    received_s: float
    deadline_s: float | None  # the process has ended by then; None: it may take its time

    @classmethod
    def preempted(cls, text: str, lead_time_s: float) -> StopNotice:
        """The machine is gone in `lead_time_s`; of these, a margin is kept."""
        now_s = time.monotonic()
        margin_s = min(_LONGEST_MARGIN_S, lead_time_s / 5)
        return cls(
            reason="preempted",
            text=text,
            received_s=now_s,
            deadline_s=now_s + lead_time_s - margin_s,
        )


class StopWatch:
    """While entered, watches for the first notice; `notice` is None before it.

    A thread of its own hears of signals through a file descriptor, at once: Python's handlers run
    when the main thread comes back from what it computes, which may take seconds. SIGINT is always
    watched, and a second one ends the process at once. Enter it on the main thread; what handled
    the signals before does so again afterwards.
    """

    def __init__(
        self,
        *,
        sources: Sequence[str] = DEFAULT_SOURCES,
        lead_time_s: float | None = None,
        pollers: Sequence[Poller] = (),
        on_deadline: Callable[[StopNotice], None] = lambda notice: None,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        """`sources` are keys of LEAD_TIMES_S; `lead_time_s` takes the place of their times.

        `on_deadline` is called, on the watch's thread, before the process is ended for being
        late.
        """
        self.notice: StopNotice | None = None
        self._lead_time_s = lead_time_s
        self._names = {_SIGNALS[name]: name for name in sources if name in _SIGNALS}
        self._pollers = pollers
        self._on_deadline = on_deadline
        self._end_process = end_process
        self._num_interrupts = 0
        self._previous: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        self._inlet, self._outlet = socket.socketpair()
        for end in (self._inlet, self._outlet):
            end.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, *self._names):
            self._previous[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, name="batchgen-notice", daemon=True)
        self._thread.start()
        for poller in self._pollers:  # not waited for at the end: they may hang in a request
            name = f"batchgen-notice-{poller.name}"
            threading.Thread(target=self._poll, args=(poller,), name=name, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._is_over.set()
        with contextlib.suppress(BlockingIOError):  # full, and so it wakes anyway
            self._inlet.send(b"\0")  # no signal has this number
        self._thread.join()
        self._inlet.close()
        self._outlet.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)

    def _watch(self) -> None:
        while not self._is_over.is_set():
            if select.select([self._outlet], [], [], _LOOK_S)[0]:
                for number in self._outlet.recv(64):
                    self._note_signal(number)
            deadline_s = None if self.notice is None else self.notice.deadline_s
            if deadline_s is not None and time.monotonic() >= deadline_s:
                assert self.notice is not None
                self._on_deadline(self.notice)
                self._end_process(Preempted.exit_code)
                return

    def _note_signal(self, number: int) -> None:
        if number == signal.SIGINT:
            is_first = self.notice is None
            now_s = time.monotonic()
            self._note(
                StopNotice(reason="interrupted", text="SIGINT", received_s=now_s, deadline_s=None)
            )
            if is_first:  # what comes now may take as long as loading the model
                _log.warning("interrupted: saving what there is; a second Ctrl-C ends it at once")
        elif number in self._names:  # others have handlers of their own
            name = self._names[signal.Signals(number)]
            lead_time_s = self._lead_time_s or LEAD_TIMES_S[name]
            self._note(StopNotice.preempted(name.upper(), lead_time_s))

    def _poll(self, poller: Poller) -> None:
        is_off = False
        while not self._is_over.is_set():
            try:
                found = poller.poll()
            except MetadataError as error:
                if not is_off:
                    _log.warning(
                        "preemption.watch: the metadata server of %s %s; the run goes on and asks "
                        "again, but is not told when the machine is taken",
                        poller.name,
                        error,
                    )
                is_off = True
                self._is_over.wait(_RETRY_S)
                continue
            if found is not None:
                self._note(StopNotice.preempted(found.text, self._lead_time(poller.name, found)))
                return
            self._is_over.wait(poller.interval_s)

    def _lead_time(self, name: str, found: CloudNotice) -> float:
        """Seconds that the cloud leaves, or less if its notice says so."""
        lead_time_s = self._lead_time_s or LEAD_TIMES_S[name]
        if found.at is None:
            return lead_time_s
        left_s = (found.at - dt.datetime.now(dt.UTC)).total_seconds()
        return min(lead_time_s, max(left_s, _SHORTEST_LEAD_S))

    def _note(self, notice: StopNotice) -> None:
        with self._lock:
            first = self.notice or notice
            # A cloud's notice may be followed by a signal that leaves less time.
            deadlines = [each.deadline_s for each in (first, notice) if each.deadline_s is not None]
            self.notice = replace(first, deadline_s=min(deadlines, default=None))


def stop_error(notice: StopNotice, saved: SavedWork) -> Preempted | Interrupted:
    """The error of a run that was told to stop, with what is saved by now."""
    text = stopped_text(notice.reason, notice.text, time.monotonic() - notice.received_s, saved)
    return Preempted(text) if notice.reason == "preempted" else Interrupted(text)


def watched_signals(spec: PreemptionSpec) -> frozenset[signal.Signals]:
    """The signals that are a job's notices of preemption."""
    return frozenset(_SIGNALS[name] for name in _sources(spec) if name in _SIGNALS)


def _sources(spec: PreemptionSpec) -> Sequence[str]:
    return DEFAULT_SOURCES if spec.watch == "auto" else spec.watch


def watch_for(spec: PreemptionSpec, on_deadline: Callable[[StopNotice], None]) -> StopWatch:
    """The watch that a job asks for."""
    sources = _sources(spec)
    pollers: Mapping[str, Callable[[], Poller]] = {
        "aws": lambda: AwsPoller(spec.endpoints.aws),
        "gcp": lambda: GcpPoller(spec.endpoints.gcp),
        "azure": lambda: AzurePoller(spec.endpoints.azure),
    }
    return StopWatch(
        sources=sources,
        lead_time_s=None if spec.lead_time == "auto" else spec.lead_time,
        pollers=[pollers[name]() for name in sources if name in pollers],
        on_deadline=on_deadline,
    )
