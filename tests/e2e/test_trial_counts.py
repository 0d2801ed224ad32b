"""CI makes a thousand trials of the whole runner in which it is killed."""

from __future__ import annotations

import re
import subprocess
import sys

from e2e_jobs import ROOT, TIMEOUT_S
from trial_counts import KILLED, LEAST_TRIALS

FILES = ("tests/e2e/test_store_faults.py", "tests/e2e/test_disk_faults.py")


def test_a_thousand_trials_are_announced_and_every_announced_test_runs() -> None:
    """A test that is gone, skipped, or does not count is not in pytest's plan with its counter."""
    plan = subprocess.run(
        [sys.executable, "-m", "pytest", "--setup-plan", "-p", "no:cacheprovider", *FILES],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        check=False,
    )
    counting = re.findall(r"::(\S+) \(fixtures used: .*\btrials\b", plan.stdout)
    assert set(counting) == LEAST_TRIALS.keys(), plan.stdout + plan.stderr
    assert sum(KILLED.values()) >= 1000
