"""20,000 hostile inputs of each kind's share; `fuzz.py` runs any number of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import SHARES, Fuzzer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = 20_000
CASES_PER_EXAMPLE = 20


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", SHARES)
def test_only_errors_of_the_package_come_out(name: str, fuzzer: Fuzzer) -> None:
    feed = getattr(fuzzer, name)

    @settings(
        max_examples=round(CASES * SHARES[name] / CASES_PER_EXAMPLE),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**63))
    def run(seed: int) -> None:
        for case in range(CASES_PER_EXAMPLE):
            feed(random.Random(f"{seed}/{case}"))

    run()


def test_what_is_fed_is_not_all_refused(tmp_path: Path) -> None:
    """A fuzzer whose cases never get past the first check finds nothing."""
    fuzzer = Fuzzer(tmp_path)
    assert fuzzer.accepted == 0
    for name in SHARES:
        before = fuzzer.accepted
        for case in range(300):
            getattr(fuzzer, name)(random.Random(case))
        assert 10 < fuzzer.accepted - before < 290, name
