"""A run's parent process: starts workers, passes signals on, and goes on when one dies.

The worker is forked before anything heavy is imported or any thread is started, so the parent
stays small, and a worker after a death is as clean as the first. It has a process group of its
own: a terminal's Ctrl-C goes to the parent alone, which passes it on once. A worker whose parent
is gone ends at once.

Until a worker watches for signals, and when it no longer does, they end it: it has nothing to
save then. The parent makes of that what the command promises.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import NoReturn

from batchgen.errors import Interrupted, Preempted
from batchgen.supervision.hunt import Hunt
from batchgen.supervision.line import Assignment, Worker, WorkerReport

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CRASHES = frozenset(
    (
        signal.SIGKILL,  # also what a system that is out of memory sends
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGTRAP,
        signal.SIGSYS,
    )
)
_EXIT_FAILED = 1
_POLL_S = 0.5
_READ_BYTES = 1 << 16

Work = Callable[[Worker], int]


def supervise(work: Work, notices: Container[signal.Signals]) -> int:
    """Run `work` in a process of its own until it has ended; its exit code.

    It returns in the worker, too, with what `work` returns: the caller ends either process with
    that code. What `work` raises passes through in the worker. In the parent, raises BatchgenError
    where workers die again and again, Preempted where one of `notices` has ended the run, and
    Interrupted where SIGINT has. Call it on the main thread, without others.
    """
    hunt = Hunt()
    assignment = hunt.next()
    with _Signals(notices) as signals:
        while True:
            end = _run_worker(assignment, signals)
            if isinstance(end, Worker):
                break
            is_group_done = end.code == 0 and assignment.only is not None
            if not end.is_death and not is_group_done:
                if end.number is not None:
                    signals.end_by(end.number)
                return end.code
            if signals.last is not None:
                signals.end_by(signals.last)
            if is_group_done:
                hunt.ended()
            else:
                report = end.report
                hunt.died(end.why, report.suspects, num_ended=report.num_ended)
            earlier = assignment.earlier or end.report.earlier
            assignment = replace(hunt.next(), is_restart=True, earlier=earlier)
            _say(end, assignment)
    return work(end)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WorkerEnd:
    """How a worker has ended."""

    code: int
    number: signal.Signals | None  # that ended it
    report: WorkerReport

    @property
    def is_death(self) -> bool:
        """Whether the engine may have ended it, and not a user or batchgen."""
        return self.number in _CRASHES or (
            self.code == _EXIT_FAILED and self.report.failure is not None
        )

    @property
    def why(self) -> str:
        if self.report.failure is not None:
            return f"the engine failed ({self.report.failure})"
        return f"the engine's process was ended by {self.number.name if self.number else self.code}"


def _run_worker(assignment: Assignment, signals: _Signals) -> _WorkerEnd | Worker:
    """How a new worker has ended; in the worker itself, its end of the pipe."""
    told, tell = os.pipe()
    alive, hold = os.pipe()  # closed by the end of the parent, whatever ends it
    sys.stdout.flush()
    sys.stderr.flush()
    with signals.held():
        if signals.last is not None:  # it came when there was no worker
            number = signals.last
            return _WorkerEnd(code=-number, number=number, report=WorkerReport())
        pid = os.fork()
        if pid == 0:
            signals.restore()
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                # A KeyboardInterrupt amid imports may be lost, or come out as another error.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.close(told)
            os.close(hold)
            os.setpgid(0, 0)
            # A terminal that is set to stop background output must not stop the progress bar.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        else:
            signals.worker = pid
    if pid == 0:
        threading.Thread(target=_end_with, args=(alive,), name="lifeline", daemon=True).start()
        return Worker(assignment, tell)
    os.close(tell)
    os.close(alive)
    try:
        return _follow(pid, told)
    finally:
        signals.worker = None
        os.close(told)
        os.close(hold)


def _follow(pid: int, told: int) -> _WorkerEnd:
    """Take in what the worker tells until it has ended."""
    report = WorkerReport()
    status: int | None = None
    while True:
        # Something that the worker has started may hold its end of the pipe open.
        ready, _, _ = select.select([told], [], [], _POLL_S if status is None else 0.0)
        data = os.read(told, _READ_BYTES) if ready else b""
        report.feed(data)
        if data:
            continue
        if status is not None:
            break
        ended, found = os.waitpid(pid, 0 if ready else os.WNOHANG)
        status = found if ended else None
    code = os.waitstatus_to_exitcode(status)
    number = signal.Signals(-code) if code < 0 else None
    return _WorkerEnd(code=code, number=number, report=report)


def _end_with(alive: int) -> None:
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _say(end: _WorkerEnd, assignment: Assignment) -> None:
    """What comes after a worker's end."""
    rows, num_suspects = assignment.only, len(end.report.suspects)
    if end.is_death and rows is not None:
        text = (
            f"{end.why}; to find the row that did it, {len(rows)} of its {num_suspects} run alone"
        )
    elif end.is_death:
        text = f"{end.why}; the row that it had alone becomes a dead letter, and the run goes on"
    elif rows is not None:
        text = f"these rows did not do it; the next {len(rows)} run alone"
    else:
        text = "no row did it alone; the run goes on with all"
    sys.stderr.write(f"warning: {text}\n")


class _Signals:
    """While entered, signals that ask a run to stop go to the worker."""

    def __init__(self, notices: Container[signal.Signals]) -> None:
        self._notices = notices
        self.worker: int | None = None
        self.last: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        for number in _PASSED_ON:
            self._previous[number] = signal.signal(number, self._pass_on)
        # A job control stop of a shell's that ignores it, as of a script's, stays ignored.
        if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Back to what handled the signals before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait meanwhile."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_PASSED_ON, signal.SIGTSTP))

    def end_by(self, number: signal.Signals) -> NoReturn:
        """End the run by a signal that has ended the worker, or came when there was none.

        Raises Preempted or Interrupted; any other signal ends this process, too.
        """
        saved = f"({number.name}); what was flushed is saved; run the same command again to go on"
        if number == signal.SIGINT:
            raise Interrupted(f"interrupted {saved}")
        if number in self._notices:
            raise Preempted(f"preempted {saved}")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # process 1 of a container, which no signal ends by default

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.last = signal.Signals(number)
        self._send(number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGSTOP)
        # Not SIGSTOP: where no shell could let it go on, the system ignores this one.
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # until SIGCONT
        signal.signal(signal.SIGTSTP, handler)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        if self.worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker, number)
