"""Half a million rows through everything but the engine, as tests/benchmarks/load.py runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = Path(__file__).parents[1] / "benchmarks" / "load.py"


@pytest.mark.slow
def test_half_a_million_rows_at_speed_in_flat_memory() -> None:
    done = subprocess.run(
        [sys.executable, str(LOAD), "--rows", "500000"], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    assert figures["rows"] == 500_000
    # Of CPU time, start included: the other tests share the machine. The benchmark tells the rate.
    assert figures["rows_per_cpu_s"] >= 10_000, figures
    assert figures["mib_rest"] - figures["mib_first_fifth"] < 25, figures
    assert figures["open_cpu_s"] < 5, figures
