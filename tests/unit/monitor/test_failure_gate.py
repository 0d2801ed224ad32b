from __future__ import annotations

from batchgen.errors import ErrorRateExceeded
from batchgen.monitor.failure_gate import FailureGate
from batchgen.records import RowFailure, RowKey

FAILURE = RowFailure(
    key=RowKey(unit_id=0, index=0), address="f:0", kind="template_error", message="bad"
)


def make_gate(earlier: list[RowFailure | None]) -> FailureGate:
    return FailureGate(fail_on_first=False, max_error_rate=0.1, window=20, earlier=earlier)


def test_the_window_goes_on_where_earlier_runs_have_left_it() -> None:
    gate = make_gate([FAILURE, None, FAILURE])
    reasons = [gate.judge(None) for _ in range(16)]
    assert reasons == [None] * 16  # not full yet
    reason = gate.judge(FAILURE)
    assert isinstance(reason, ErrorRateExceeded)
    assert "3 of the last 20 rows" in str(reason)


def test_earlier_rows_leave_the_window_as_others_do() -> None:
    gate = make_gate([FAILURE, FAILURE, *[None] * 30])
    assert all(gate.judge(failure) is None for failure in (FAILURE, None, FAILURE))
    assert gate.judge(FAILURE) is not None


def test_a_run_that_was_stopped_stops_again_at_its_next_row() -> None:
    gate = make_gate([*[None] * 17, FAILURE, FAILURE, FAILURE])
    assert isinstance(gate.judge(None), ErrorRateExceeded)
