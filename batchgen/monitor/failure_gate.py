"""When rows that fail end the run: `errors.on_error` and `errors.max_error_rate`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from batchgen.errors import BatchgenError, ErrorRateExceeded
from batchgen.records import RowFailure


class FailureGate:
    """Decides when rows that fail end the run: `on_error: fail`, or too many in a window.

    Rows are judged in input order as they leave the prompt stage, where every failure of a row
    happens. Judged by the order in which rows end, the failures, which end at once, would run far
    ahead of the rows that take the engine's time, and a rate of 1% would look like 100%.
    """

    def __init__(
        self,
        *,
        fail_on_first: bool,
        max_error_rate: float,
        window: int,
        earlier: Iterable[RowFailure | None] = (),
    ) -> None:
        """`earlier` are the last rows that earlier runs have judged, in input order: without
        them, a job that is started again and again would get past the limit."""
        self._fail_on_first = fail_on_first
        self._max_error_rate = max_error_rate
        self._window: deque[bool] = deque(maxlen=window)
        self._num_failed = 0
        self._last_failure: RowFailure | None = None
        for failure in earlier:
            self._count(failure)

    def judge(self, failure: RowFailure | None) -> BatchgenError | None:
        """Count one row that was made ready, skipped (None) or has failed; why to stop, if so."""
        if failure is not None and self._fail_on_first:
            return BatchgenError(
                f"row {failure.address} failed ({failure.kind}: {failure.message}) and "
                "errors.on_error is fail; mend the row, or set errors.on_error=dead_letter"
            )
        self._count(failure)
        window = self._window
        if len(window) < (window.maxlen or 0):
            return None
        if self._num_failed <= self._max_error_rate * len(window):
            return None
        last = self._last_failure
        assert last is not None
        return ErrorRateExceeded(
            f"{self._num_failed} of the last {len(window)} rows failed, more than "
            f"errors.max_error_rate={self._max_error_rate:g} allows; the last: {last.address}: "
            f"{last.kind}: {last.message}. Finished rows are saved: run again with a higher "
            "limit, or mend the input and write to a new output"
        )

    def _count(self, failure: RowFailure | None) -> None:
        self._last_failure = failure or self._last_failure
        if len(self._window) == self._window.maxlen:
            self._num_failed -= self._window[0]
        self._window.append(failure is not None)
        self._num_failed += failure is not None
