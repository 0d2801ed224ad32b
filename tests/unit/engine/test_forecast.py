"""The KV forecast against simulations, and learned lengths against what they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from batchgen.engine.forecast import OutputLengths, forecast_kv, forecast_step

WINDOW = 4
NEVER = np.ones(1)


def test_the_kv_of_known_lengths_equals_a_simulation_in_windows() -> None:
    rng = np.random.default_rng(0)
    kv, left = rng.integers(1, 50, 40), rng.integers(1, 60, 40)
    exact = np.ones(40, dtype=np.bool_)
    forecast = forecast_kv(
        kv, np.zeros_like(kv), left, exact, NEVER, lag=WINDOW, step=WINDOW, num_steps=15
    )
    for index in range(15):
        running = left > index * WINDOW
        grown = np.minimum(left, (index + 1) * WINDOW)
        assert forecast[:, index].sum() == (kv + grown)[running].sum()


def test_the_kv_of_unknown_lengths_is_the_mean_of_many_simulations() -> None:
    rng = np.random.default_rng(1)
    survival = np.linspace(1.0, 0.0, 100, endpoint=False)  # lengths 1 to 100, all as likely
    generated = np.array([0, 20, 70])
    kv, left = generated + 10, 100 - generated
    forecast = forecast_kv(
        kv, generated, left, np.zeros(3, np.bool_), survival, lag=8, step=WINDOW, num_steps=25
    )
    for row in range(3):
        lengths = rng.integers(generated[row] + 1, 101, 40_000) - generated[row]
        for index in range(25):
            holds = lengths > max(index * WINDOW - 8, 0)
            holds &= left[row] > index * WINDOW
            size = kv[row] + min(left[row], (index + 1) * WINDOW)
            assert forecast[row, index] == pytest.approx(holds.mean() * size, rel=0.05, abs=0.3)


@pytest.mark.parametrize("longest", [1, 16, 1024, 1025, 100_000])
def test_a_forecast_looks_at_whole_windows_and_seldom(longest: int) -> None:
    step = forecast_step(longest, 16)
    assert step % 16 == 0
    assert -(-longest // step) <= 64


def expected(learned: OutputLengths, running: list[int], generated: int, limit: int) -> float:
    """Tokens that a row with `generated` ones is expected to make yet."""
    survival = learned.survival(np.array(running, dtype=np.int64), 200)
    return float(survival[generated:limit].sum() / survival[generated])


def outputs_seen_until(
    step: int, lengths: np.ndarray, limit: int
) -> tuple[OutputLengths, list[int]]:
    """What is known of rows that all began at step 0: those that ended, and those that run."""
    learned = OutputLengths()
    for length in lengths[lengths <= step]:
        learned.add(int(min(length, limit)), is_cut=bool(length >= limit))
    return learned, [step] * int((lengths > step).sum())


@pytest.mark.parametrize("step", [30, 60, 100])
def test_lengths_are_learned_from_rows_that_still_run(step: int) -> None:
    """Half of the outputs have about 20 tokens, half 100: the short ones end first."""
    rng = np.random.default_rng(0)
    short, long = rng.integers(10, 30, 2000), rng.integers(80, 120, 2000)
    lengths = rng.permutation(np.concatenate([short, long]))
    learned, running = outputs_seen_until(step, lengths, limit=200)
    got = expected(learned, running, 0, 200)
    ended = lengths[lengths <= step].mean()
    assert got > (ended + lengths.mean()) / 2, "a new row is taken for one of those that ended"
    assert got < 1.3 * lengths.mean()
    if step == 100:
        assert got == pytest.approx(lengths.mean(), rel=0.2)


def test_rows_that_max_tokens_cuts_off_are_longer_than_that() -> None:
    learned = OutputLengths()
    for index in range(400):
        is_cut = index % 2 == 0
        learned.add(50 if is_cut else 10, is_cut=is_cut)
    assert expected(learned, [], 0, 50) == pytest.approx(30, rel=0.05)
    assert expected(learned, [], 0, 30) == pytest.approx(20, rel=0.05)
    assert expected(learned, [], 20, 50) == pytest.approx(30, rel=0.05)


def test_rows_that_all_end_with_their_first_token() -> None:
    learned = OutputLengths()
    for _ in range(40):
        learned.add(1, is_cut=False)
    assert expected(learned, [], 0, 50) == pytest.approx(1, abs=0.01)


def test_before_rows_have_ended_outputs_are_expected_to_be_long() -> None:
    learned = OutputLengths()
    survival = learned.survival(np.array([3, 4]), 100)
    assert survival[0] == 1.0
    assert (np.diff(survival) < 0).all()
    assert 0.5 < survival.mean() < 0.8
