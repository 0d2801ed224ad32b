"""What is counted, when it is used up, and which key is named then."""

from __future__ import annotations

import time

import pytest

from batchgen.job.spec import BudgetSpec
from batchgen.monitor.budget import Budget, budget_text
from batchgen.records import Completion, RowKey, SampleOutput


def make_budget(
    *, ago_s: float = 0.0, output_tokens: int = 0, **limits: float | str | None
) -> Budget:
    """The budget of a run that began `ago_s` ago."""
    spec = BudgetSpec.model_validate(limits)
    return Budget(spec, started_s=time.monotonic() - ago_s, output_tokens=output_tokens)


def completions(*lengths: int, num_samples: int = 1) -> list[Completion]:
    return [
        Completion(
            key=RowKey(unit_id=0, index=index),
            outputs=(SampleOutput(token_ids=[5] * length, finish_reason="stop", seed=0),)
            * num_samples,
            num_prompt_tokens=1000,
        )
        for index, length in enumerate(lengths)
    ]


def test_no_limit_is_never_reached() -> None:
    budget = make_budget(ago_s=1e9, output_tokens=10**12)
    assert budget.charge(completions(5)) is None
    assert budget.reached() is None
    assert budget.used_share() is None


def test_output_tokens_of_earlier_runs_and_of_this_one_are_counted() -> None:
    budget = make_budget(max_output_tokens=100, output_tokens=60)
    assert budget.reached() is None
    assert budget.used_share() == pytest.approx(0.6)
    assert budget.charge(completions(20, 19)) is None
    assert budget.used_share() == pytest.approx(0.99)
    reached = budget.charge(completions(1))  # exactly at the limit
    assert reached is not None
    assert reached.exit_code == 7
    assert str(reached) == (
        "budget.max_output_tokens=100 is used up: the finished rows have 100 output tokens. "
        "They are saved: run again with a higher limit to go on, such as "
        "-o budget.max_output_tokens=200"
    )
    budget.charge(completions(50))
    assert budget.used_share() == pytest.approx(1.5)


def test_the_tokens_of_every_sample_are_counted() -> None:
    budget = make_budget(max_output_tokens=100)
    assert budget.charge(completions(11, 22, num_samples=3)) is None
    assert budget.used_share() == pytest.approx(0.99)


def test_tokens_that_were_used_up_before_are_told_at_once() -> None:
    assert make_budget(max_output_tokens=100, output_tokens=100).reached() is not None
    assert make_budget(max_output_tokens=100, output_tokens=99).reached() is None


def test_wall_time_is_counted_from_the_start_of_the_run() -> None:
    assert make_budget(max_wall_time="8h", ago_s=8 * 3600 - 60).reached() is None
    reached = make_budget(max_wall_time="8h", ago_s=8 * 3600 + 1).reached()
    assert reached is not None
    assert reached.exit_code == 7
    assert "budget.max_wall_time is used up: 8:00:01 of 8:00:00" in str(reached)
    short = make_budget(max_wall_time=0.05)
    assert short.charge(completions(10**3)) is None
    time.sleep(0.06)
    assert short.reached() is not None


def test_the_share_is_of_the_limit_that_is_nearest() -> None:
    limits = {"max_wall_time": 1000, "max_output_tokens": 100}
    assert make_budget(**limits, output_tokens=70, ago_s=500).used_share() == pytest.approx(0.7)
    mostly_time = make_budget(**limits, output_tokens=30, ago_s=500).used_share()
    assert mostly_time == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({}, ""),
        ({"max_output_tokens": 5000}, "1,119 of 5,000 output tokens"),
        ({"max_wall_time": "8h"}, "0:30 of 8:00:00"),
        (
            {"max_wall_time": "45m", "max_output_tokens": 5000},
            "1,119 of 5,000 output tokens, 0:30 of 45:00",
        ),
    ],
)
def test_the_text(limits: dict[str, object], text: str) -> None:
    spec = BudgetSpec.model_validate(limits)
    assert budget_text(spec, output_tokens=1119, wall_s=30.2) == text
