"""The moving part of a run: four threads, bounded channels, and the board of units in flight.

    reader ─rows─▶ prompter ─prompts─▶ engine (calling thread) ─ended─▶ saver
       └───────────── admitted by the UnitBoard ◀── released by a commit ──┘

Every channel is bounded, and a unit is read only when the rows in flight leave room for it, so
memory is bounded by the planning window and never by the dataset. Whatever ends a run early (an
error in any thread, a signal, the error rate, the budget) goes through `Pipeline.stop`: nothing new
is admitted, what has finished is saved, and the first reason is raised on the calling thread, or
the error that kept it from being saved. Nothing waits for a thread that may be gone: closing a
channel wakes both its ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from batchgen.errors import BatchgenError, EngineError, ErrorRateExceeded
from batchgen.garbage import rare_collections
from batchgen.monitor.failure_gate import FailureGate
from batchgen.monitor.watchdog import Watchdog, thread_report
from batchgen.records import (
    Completion,
    EngineStats,
    InputRow,
    OutputRow,
    Prompt,
    PromptSource,
    RowFailure,
    RowResult,
    RowSkip,
    UnfinishedRow,
    Unit,
)
from batchgen.redaction import environment_secrets, redact_message
from batchgen.units import FinishedUnit, UnitBoard

PLANNING_WINDOW_ROWS = 65536
_CHANNEL_ROWS = 4096
_BATCH_ROWS = 1024
_WATCH_INTERVAL_S = 0.2
_JOIN_TIMEOUT_S = 3.0
_ABANDON_S = 15.0  # that a run which hangs is given to end and to save, each

T = TypeVar("T")
Ended = Completion | RowFailure | RowSkip


class Engine(Protocol):
    """What the pipeline asks of an engine."""

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        """Pull prompts until there are no more; yield completions as they finish, in any order."""
        ...

    def stats(self) -> EngineStats:
        """Counters, from any thread."""
        ...

    def stop(self) -> None:
        """From any thread: `run` returns soon."""
        ...

    def unfinished(self) -> list[UnfinishedRow]:
        """The rows that `stop` has cut off; once `run` has returned."""
        ...


class Channel(Generic[T]):
    """A bounded queue of rows between two threads. Closing it wakes both."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, items: Sequence[T]) -> bool:
        """Add all of `items`, waiting for room; False if the channel is closed, dropping them."""
        with self._changed:
            while not self._is_closed and self._items and self._overflows(len(items)):
                self._changed.wait()
            if self._is_closed:
                return False
            self._items.extend(items)
            self._changed.notify_all()
            return True

    def get(self, max_items: int, timeout_s: float | None = None) -> list[T]:
        """Up to `max_items`, waiting for the first; empty when closed or out of time."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closed, timeout_s)
            taken = [self._items.popleft() for _ in range(min(max_items, len(self._items)))]
            self._changed.notify_all()
            return taken

    def close(self, *, discard: bool = False) -> None:
        """Accept nothing more; what is inside can still be taken unless it is discarded."""
        with self._changed:
            self._is_closed = True
            if discard:
                self._items.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._items)

    def is_drained(self) -> bool:
        """Closed, and nothing is left to take."""
        with self._changed:
            return self._is_closed and not self._items

    def _overflows(self, num_items: int) -> bool:
        return len(self._items) + num_items > self._capacity


class PromptChannel(Channel[Prompt]):
    """The channel that the engine pulls from: a `records.PromptSource`."""

    def __init__(self, capacity: int, on_take: Callable[[Sequence[Prompt]], None]) -> None:
        """`on_take` is told of prompts before the engine gets them."""
        super().__init__(capacity)
        self._on_take = on_take

    def take(self, max_prompts: int, *, wait: bool) -> list[Prompt]:
        prompts = self.get(max_prompts, None if wait else 0.0)
        self._on_take(prompts)
        return prompts


class Saver(Protocol):
    """Where finished rows go (implemented by `units.UnitSaver`)."""

    def finish(
        self, completions: Sequence[Completion], rows: Sequence[InputRow]
    ) -> list[OutputRow]:
        """Turn completions and the rows they belong to into rows of output."""
        ...

    def keep(self, results: Sequence[RowResult]) -> None:
        """Remember results for the next flush."""
        ...

    def commit(self, finished: FinishedUnit) -> None:
        """Write a complete unit's parts and commit it."""
        ...

    def flush(self) -> None:
        """Write what was kept and is not committed, so that a kill does not lose it."""
        ...

    def save_unfinished(self, rows: Sequence[UnfinishedRow]) -> None:
        """Write what there is of rows that a stop cut off."""
        ...


ReadUnit = Callable[[Unit, set[int] | None], Iterator[InputRow | RowFailure | RowSkip]]
MakePrompts = Callable[[Sequence[InputRow]], list[Prompt | RowFailure]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """What the threads of a pipeline do, stage by stage."""

    read_unit: ReadUnit
    make_prompts: MakePrompts
    kept_columns: Sequence[str]  # of a row, what its output needs
    engine: Engine
    saver: Saver
    gate: FailureGate
    given: Callable[[Sequence[Prompt]], None]  # told of what the engine gets, before it does
    charge: Callable[[Sequence[Completion]], BatchgenError | None]  # why to stop after these rows
    watch: Callable[[], BatchgenError | None]  # called often: shows progress, says why to stop
    watchdog: Watchdog
    abandon: Callable[[BaseException], None]  # ends the process of a run that hangs


class Pipeline:
    """Runs units through the stages; used once."""

    def __init__(self, stages: Stages, *, max_rows: int, flush_interval_s: float) -> None:
        self._stages = stages
        self._flush_interval_s = flush_interval_s
        self._board = UnitBoard(max_rows)
        self._rows: Channel[InputRow | RowFailure | RowSkip] = Channel(_CHANNEL_ROWS)
        # The engine plans over all that it is given.
        self._prompts = PromptChannel(max_rows, stages.given)
        self._ended: Channel[Ended] = Channel(_CHANNEL_ROWS)
        self._unfinished: list[UnfinishedRow] = []
        self._reason: BaseException | None = None
        self._reason_lock = threading.Lock()
        self._save_error: BaseException | None = None
        self._is_over = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._num_moved = [0, 0, 0, 0]  # rows read, prompted, generated, saved: by one thread each

    def run(
        self,
        units: Iterable[Unit],
        recovered: Mapping[int, Sequence[RowResult]],
        only: Mapping[int, Container[int]] | None = None,
    ) -> None:
        """Run every unit to its commit.

        `recovered` holds results of earlier runs by unit id; only the other rows are read. With
        `only`, the indices of rows by unit, no others are, and units may stay uncommitted.
        Raises the first reason that stopped the run, after saving what had finished. Where that
        could not be saved, raises the error of saving, whose cause is the first reason.
        """
        with rare_collections():
            self._run(units, recovered, only)

    def _run(
        self,
        units: Iterable[Unit],
        recovered: Mapping[int, Sequence[RowResult]],
        only: Mapping[int, Container[int]] | None,
    ) -> None:
        watcher = self._start("watch", self._watch)
        feeders = [
            self._start("read", lambda: self._read(units, recovered, only)),
            self._start("prompt", self._prompt),
        ]
        saver = self._start("save", self._save)
        self._threads["engine"] = threading.current_thread()
        self._guard(self._generate)
        if not self._prompts.is_drained():
            self.stop(BatchgenError("the engine returned while prompts were left"))
        for thread in feeders:
            # A read that hangs on a network must not hold up a run that is being stopped.
            thread.join(None if self._reason is None else _JOIN_TIMEOUT_S)
        self._ended.close()
        saver.join()
        self._is_over.set()
        watcher.join()
        if self._save_error is not None and self._save_error is not self._reason:
            raise self._save_error from self._reason
        if self._reason is not None:
            raise self._reason
        if only is None and self._board.num_open():
            raise BatchgenError(
                f"the engine returned with {self._board.num_open()} units unfinished"
            )

    def stop(self, reason: BaseException) -> None:
        """End the run early, from any thread; the first reason wins."""
        with self._reason_lock:
            if self._reason is None:
                self._reason = reason
        self._board.stop()
        self._rows.close(discard=True)
        self._prompts.close(discard=True)
        self._stages.engine.stop()

    def _start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(
            target=self._guard, args=(work,), name=f"batchgen-{name}", daemon=True
        )
        self._threads[name] = thread
        thread.start()
        return thread

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by run() on the calling thread
            self.stop(error)

    def _read(
        self,
        units: Iterable[Unit],
        recovered: Mapping[int, Sequence[RowResult]],
        only: Mapping[int, Container[int]] | None,
    ) -> None:
        for unit in units:
            done = recovered.get(unit.unit_id, ())
            if not self._board.admit(unit, done):
                return
            wanted = set(range(unit.num_rows)) - {r.key.index for r in done} if done else None
            if only is not None:
                left = range(unit.num_rows) if wanted is None else wanted
                wanted = {index for index in left if index in only[unit.unit_id]}
            batch: list[InputRow | RowFailure | RowSkip] = []
            for row in self._stages.read_unit(unit, wanted):
                batch.append(row)
                self._num_moved[0] += 1
                if len(batch) == _BATCH_ROWS:
                    if not self._rows.put(batch):
                        return
                    batch = []
            if not self._rows.put(batch):
                return
        self._rows.close()

    def _prompt(self) -> None:
        while batch := self._rows.get(_BATCH_ROWS):
            rows = [row for row in batch if isinstance(row, InputRow)]
            made = iter(self._stages.make_prompts(rows))
            outcomes = [next(made) if isinstance(row, InputRow) else row for row in batch]
            self._num_moved[1] += len(batch)
            reason = self._judge(outcomes)
            if reason is None or isinstance(reason, ErrorRateExceeded):
                self._ended.put([x for x in outcomes if not isinstance(x, Prompt)])
            if reason is not None:  # under `on_error: fail`, the row is tried again by the next run
                self.stop(reason)
                return
            started = [
                (row, outcome)
                for row, outcome in zip(batch, outcomes, strict=True)
                if isinstance(row, InputRow) and isinstance(outcome, Prompt)
            ]
            prompts = [prompt for _, prompt in started]
            self._board.start([self._strip(row) for row, _ in started])
            self._prompts.put(prompts)
        self._prompts.close()

    def _judge(self, outcomes: Sequence[Prompt | RowFailure | RowSkip]) -> BatchgenError | None:
        for outcome in outcomes:
            reason = self._stages.gate.judge(outcome if isinstance(outcome, RowFailure) else None)
            if reason is not None:
                return reason
        return None

    def _strip(self, row: InputRow) -> InputRow:
        values = {name: row.values.get(name) for name in self._stages.kept_columns}
        return InputRow(key=row.key, address=row.address, values=values)

    def _generate(self) -> None:
        for completions in self._completions():
            self._num_moved[2] += len(completions)
            if not self._ended.put(completions):
                return
            reason = self._stages.charge(completions)
            if reason is not None:
                self.stop(reason)
        if self._reason is not None:
            self._unfinished = self._stages.engine.unfinished()

    def _completions(self) -> Iterator[list[Completion]]:
        """What the engine completes. Raises EngineError for what it raises, unless it meant to."""
        try:
            yield from self._stages.engine.run(self._prompts)
        except BatchgenError:
            raise
        except Exception as error:
            why = redact_message(str(error), environment_secrets())
            raise EngineError(
                f"the engine failed: {type(error).__name__}: {why}. Finished rows are saved: "
                "run the same command again to go on"
            ) from error

    def _save(self) -> None:
        try:
            self._save_until_drained()
        except BaseException as error:
            self._save_error = error
            raise
        finally:
            self._ended.close(discard=True)

    def _save_until_drained(self) -> None:
        saver = self._stages.saver
        next_flush = time.monotonic() + self._flush_interval_s
        is_stopping = False
        while not self._ended.is_drained():
            if self._reason is not None and not is_stopping:
                # At once: the engine's last step may take longer than the machine has.
                is_stopping, next_flush = True, 0.0
            wait_s = min(_WATCH_INTERVAL_S, max(0.0, next_flush - time.monotonic()))
            ended = self._ended.get(_CHANNEL_ROWS, wait_s)
            completions = [item for item in ended if isinstance(item, Completion)]
            results: list[RowResult] = [x for x in ended if not isinstance(x, Completion)]
            if completions:
                rows = self._board.claim(completion.key for completion in completions)
                results.extend(saver.finish(completions, rows))
            saver.keep(results)
            for finished in self._board.settle(results):
                saver.commit(finished)
                self._board.close(finished.unit)
            self._num_moved[3] += len(results)
            if time.monotonic() >= next_flush:
                saver.flush()
                next_flush = time.monotonic() + self._flush_interval_s
        saver.flush()
        if self._unfinished:
            saver.save_unfinished(self._unfinished)

    def _watch(self) -> None:
        while not self._is_over.wait(_WATCH_INTERVAL_S):
            reason = self._stages.watch()
            if reason is not None:
                self.stop(reason)
            progress = (*self._num_moved, self._stages.engine.stats())
            hang = self._stages.watchdog.check(progress, self._describe)
            if hang is not None:
                self.stop(hang)
                self._abandon(hang)

    def _describe(self) -> str:
        """What every stage is doing, and what lies between them."""
        stats = self._stages.engine.stats()
        return (
            f"{thread_report(self._threads)}\n"
            f"  between them: {len(self._rows)} rows read, {len(self._prompts)} prompts, "
            f"{len(self._ended)} ended rows to save, {self._board.num_open()} units in flight\n"
            f"  in the engine: {stats.num_running} sequences run, {stats.num_waiting} prompts "
            f"wait, {stats.num_swapped} are swapped out; {stats.num_finished} are completed, in "
            f"{stats.prefill_steps} prefill and {stats.decode_steps} decode steps"
        )

    def _abandon(self, reason: BaseException) -> None:
        """Save what has finished, if the saver can, and end the process if a stage still hangs."""
        if self._is_over.wait(_ABANDON_S):
            return
        self._ended.close()
        self._threads["save"].join(_ABANDON_S)
        self._stages.abandon(reason)
