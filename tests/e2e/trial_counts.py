"""How many trials of the whole runner CI makes.

A trial is a job that is hit (killed, failed or paused), brought to its end by as many runs as that
takes, and found equal to one that nothing has hit, byte for byte. Tests run in several processes
(pytest-xdist), none of which sees all trials: so each test counts its own, and fails where they
are fewer than its number here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Of jobs that were killed, once or more often. Tests that hit a job at every request or system call
# in turn usually make a third more: how often it flushes depends on its threads.
KILLED: Mapping[str, int] = MappingProxyType(
    {
        "test_killed_at_every_request_in_turn[before]": 70,
        "test_killed_at_every_request_in_turn[after]": 70,
        "test_killed_at_random_again_and_again": 500,
        "test_faults_kills_and_late_listings_at_random": 140,
        "test_ended_at_every_system_call[killed-before]": 160,
        "test_ended_at_every_system_call[killed-after]": 150,
    }
)
# Of jobs that met one error, or were paused while another run went on.
HIT_OTHERWISE: Mapping[str, int] = MappingProxyType(
    {
        "test_one_fault_anywhere_does_not_end_a_run[refused]": 70,
        "test_one_fault_anywhere_does_not_end_a_run[lost_reply]": 70,
        "test_one_fault_anywhere_does_not_end_a_run[repeated]": 10,
        "test_one_fault_anywhere_does_not_end_a_run[truncated]": 10,
        "test_paused_at_every_request_while_another_runs_to_the_end[before]": 70,
        "test_paused_at_every_request_while_another_runs_to_the_end[after]": 70,
        "test_paused_at_random_while_another_is_killed": 80,
        "test_ended_at_every_system_call[full-before]": 150,
        "test_ended_at_every_system_call[full-after]": 150,
    }
)
LEAST_TRIALS: Mapping[str, int] = MappingProxyType({**KILLED, **HIT_OTHERWISE})


class Trials:
    """Counts the trials of one test."""

    def __init__(self) -> None:
        self.num_compared = 0

    def compare(self, found: object, expected: object, *, was_hit: bool) -> None:
        """A trial's result with that of a job that was not hit; counted if the trial's job was."""
        assert found == expected
        self.num_compared += was_hit
