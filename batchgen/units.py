"""Units on their way: which are open, what their rows have come to, and how they are saved."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.dataset.schema import SAMPLE_INDEX
from batchgen.dataset.storage import Storage
from batchgen.dataset.writer import build_parts
from batchgen.job.spec import JobSpec
from batchgen.ledger import Ledger
from batchgen.monitor.progress import RunProgress
from batchgen.monitor.summary import SavedWork
from batchgen.prompts.detokenize import detokenize
from batchgen.records import (
    Completion,
    EngineStats,
    InputRow,
    OutputRow,
    RowFailure,
    RowKey,
    RowResult,
    RowSkip,
    SampleOutput,
    UnfinishedRow,
    Unit,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedUnit:
    """A unit of which every row has ended."""

    unit: Unit
    results: Sequence[RowResult]  # in row order
    wall_s: float  # since it was admitted


@dataclass(slots=True)
class _OpenUnit:
    unit: Unit
    results: dict[int, RowResult]
    running: dict[int, InputRow] = field(default_factory=dict)
    admitted_at: float = field(default_factory=time.monotonic)


def units_to_do(ledger: Ledger, units: Iterable[Unit]) -> Iterator[Unit]:
    """These units but for those that other runners commit meanwhile; first what nobody has begun.

    What a dead runner had begun comes last, and so does what a live one is at work on, if it is
    still not done by then: whoever commits first wins. For the thread that reads.
    """
    begun = []
    for unit in units:
        if not ledger.claims.take(unit):
            begun.append(unit)
        elif not ledger.has_commit(unit):
            yield unit
    for unit in begun:
        if not ledger.has_commit(unit):
            yield unit


class UnitBoard:
    """The units that have been admitted and are not committed yet, with their rows.

    Invariant: the rows of all open units are at most `max_rows`, or one unit is open alone.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._num_rows = 0
        self._open: dict[int, _OpenUnit] = {}
        self._is_stopped = False
        self._changed = threading.Condition()

    def admit(self, unit: Unit, results: Sequence[RowResult]) -> bool:
        """Open a unit with the results it already has, waiting for room; False when stopped."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._is_stopped
                    or not self._open
                    or self._num_rows + unit.num_rows <= self._max_rows
                )
            )
            if self._is_stopped:
                return False
            self._num_rows += unit.num_rows
            self._open[unit.unit_id] = _OpenUnit(unit, {r.key.index: r for r in results})
            return True

    def start(self, rows: Iterable[InputRow]) -> None:
        """Note the rows that go to the engine."""
        with self._changed:
            for row in rows:
                self._open[row.key.unit_id].running[row.key.index] = row

    def claim(self, keys: Iterable[RowKey]) -> list[InputRow]:
        """The rows that the engine has finished; each can be claimed once."""
        with self._changed:
            return [self._open[key.unit_id].running.pop(key.index) for key in keys]

    def settle(self, results: Iterable[RowResult]) -> list[FinishedUnit]:
        """Note how rows ended; the units that are complete by that, in unit order."""
        touched = set()
        with self._changed:
            for result in results:
                self._open[result.key.unit_id].results[result.key.index] = result
                touched.add(result.key.unit_id)
            opened = [self._open[unit_id] for unit_id in sorted(touched)]
        now = time.monotonic()
        return [
            FinishedUnit(
                unit=each.unit,
                results=[each.results[index] for index in range(each.unit.num_rows)],
                wall_s=now - each.admitted_at,
            )
            for each in opened
            if len(each.results) == each.unit.num_rows
        ]

    def close(self, unit: Unit) -> None:
        """Forget a committed unit, which makes room for others."""
        with self._changed:
            del self._open[unit.unit_id]
            self._num_rows -= unit.num_rows
            self._changed.notify_all()

    def num_open(self) -> int:
        with self._changed:
            return len(self._open)

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


class UnitSaver:
    """Turns completions into rows of output, and finished units into parts and commits.

    Belongs to one thread, but for `progress`. `_unsaved` are results neither committed nor flushed.
    """

    def __init__(
        self,
        *,
        spec: JobSpec,
        schema: pa.Schema,
        storage: Storage,
        ledger: Ledger,
        tokenizer: PreTrainedTokenizerFast,
        stop_token_ids: Collection[int],
    ) -> None:
        """`stop_token_ids` are all tokens that may end an output; they are taken off its text."""
        self._spec = spec
        self._schema = schema
        self._storage = storage
        self._ledger = ledger
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._unsaved: dict[int, list[RowResult]] = {}
        self._engine_stats: Callable[[], EngineStats] | None = None
        self._followed_at = 0.0
        self._earlier = ledger.counts()
        self._num_ended: Counter[type[RowResult]] = Counter()  # in this run
        self._num_unfinished = self._unfinished_tokens = 0  # that are saved

    def finish(
        self, completions: Sequence[Completion], rows: Sequence[InputRow]
    ) -> list[OutputRow]:
        """The rows of output of these completions; `rows` are theirs, in the same order."""
        outputs = [output for completion in completions for output in completion.outputs]
        texts = iter(
            detokenize(self._tokenizer, outputs, self._spec.sampling.stop, self._stop_token_ids)
        )
        return [
            OutputRow(
                key=row.key,
                address=row.address,
                rows=self._rows(completion, row, list(islice(texts, len(completion.outputs)))),
                num_prompt_tokens=completion.num_prompt_tokens,
                num_output_tokens=completion.num_output_tokens,
            )
            for completion, row in zip(completions, rows, strict=True)
        ]

    def follow(self, engine_stats: Callable[[], EngineStats]) -> None:
        """From now on, keep the engine's counters with every flush."""
        self._engine_stats = engine_stats
        self._followed_at = time.monotonic()

    def keep(self, results: Sequence[RowResult]) -> None:
        """Remember results for the next flush."""
        for result in results:
            self._unsaved.setdefault(result.key.unit_id, []).append(result)
            self._num_ended[type(result)] += 1

    def progress(self, engine: EngineStats, budget_share: float | None) -> RunProgress:
        """Where the run is, from any thread."""
        earlier, ended = self._earlier, self._num_ended
        return RunProgress(
            total_rows=earlier.total,
            ok_rows=earlier.ok + ended[OutputRow],
            failed_rows=earlier.failed + ended[RowFailure],
            skipped_rows=earlier.skipped + ended[RowSkip],
            engine=engine,
            budget_share=budget_share,
        )

    def commit(self, finished: FinishedUnit) -> None:
        """Write a unit's parts and then its commit, without which they do not exist."""
        unit = finished.unit
        rows = [result for result in finished.results if isinstance(result, OutputRow)]
        generation = self._ledger.generation(unit.unit_id)
        built = build_parts(
            self._spec.output, self._schema, unit.unit_id, rows, generation=generation
        )
        for part, data in built:
            self._storage.put(part.path, data)
        parts = [part for part, _ in built]
        self._ledger.commit(unit, parts, finished.results, wall_s=finished.wall_s)
        self._unsaved.pop(unit.unit_id, None)

    def flush(self) -> None:
        """Write what is neither committed nor flushed, so that a kill does not lose it.

        What commits have made superfluous among earlier flushes is deleted.
        """
        self._ledger.flush_partial([row for rows in self._unsaved.values() for row in rows])
        self._unsaved.clear()
        self._ledger.clean()
        if self._engine_stats is not None:
            wall_s = time.monotonic() - self._followed_at
            self._ledger.record_run(self._engine_stats(), wall_s=wall_s)

    def save_unfinished(self, rows: Sequence[UnfinishedRow]) -> None:
        """Write the tokens of rows that a stop cut off."""
        self._ledger.save_unfinished(rows)
        self._num_unfinished = len(rows)
        self._unfinished_tokens = sum(row.num_output_tokens for row in rows)

    def saved(self) -> SavedWork:
        """What of this run is safe by now, from any thread."""
        num_unsaved = sum(map(len, list(self._unsaved.values())))
        return SavedWork(
            finished_rows=sum(self._num_ended.values()) - num_unsaved,
            unfinished_rows=self._num_unfinished,
            unfinished_tokens=self._unfinished_tokens,
        )

    def _rows(
        self, completion: Completion, row: InputRow, texts: Sequence[str]
    ) -> tuple[dict[str, object], ...]:
        """The row's rows of output. `texts` are those of the completion's outputs."""
        samples = [
            self._sample_values(output, text)
            for output, text in zip(completion.outputs, texts, strict=True)
        ]
        common = dict(row.values)
        if self._spec.output.columns.meta:
            common |= {
                "prompt_tokens": completion.num_prompt_tokens,
                "row_address": row.address,
            }
        if self._spec.output.n_layout == "explode":
            if self._spec.output.columns.meta:
                samples = [{**sample, SAMPLE_INDEX: i} for i, sample in enumerate(samples)]
            return tuple({**common, **sample} for sample in samples)
        if self._spec.sampling.n == 1:
            return ({**common, **samples[0]},)
        return ({**common, **{name: [s[name] for s in samples] for name in samples[0]}},)

    def _sample_values(self, output: SampleOutput, text: str) -> dict[str, object]:
        columns = self._spec.output.columns
        values: dict[str, object] = {columns.response: text}
        if columns.meta:
            values |= {
                "finish_reason": output.finish_reason,
                "output_tokens": len(output.token_ids),
                "seed": output.seed,
            }
            if output.beam_score is not None:
                values["beam_score"] = output.beam_score
        return values
