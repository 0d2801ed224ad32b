"""What a job may use: the wall time of a run, and the output tokens of all its finished rows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from batchgen.errors import BudgetReached
from batchgen.job.spec import BudgetSpec
from batchgen.monitor.progress import format_duration
from batchgen.records import Completion


class Budget:
    """Counts what is used, and decides when that is all that the job allows.

    Tokens are counted as the ledger counts them, by finished row, and not as they are generated:
    those of rows that a stop drops would be charged again by every run, and a budget smaller than
    what the engine has in flight would be used up without a row to show for it.

    `charge` is for one thread, everything else for any.
    """

    def __init__(self, limits: BudgetSpec, *, started_s: float, output_tokens: int) -> None:
        """`started_s` is when the run began, by time.monotonic(); `output_tokens` are those of the
        rows that earlier runs have finished."""
        self._limits = limits
        self._started_s = started_s
        self._output_tokens = output_tokens

    def charge(self, completions: Sequence[Completion]) -> BudgetReached | None:
        """Count rows that the engine has finished; why to stop after them, if so."""
        self._output_tokens += sum(completion.num_output_tokens for completion in completions)
        return self.reached()

    def reached(self) -> BudgetReached | None:
        """The error that names the key to raise; None while there is something left."""
        max_tokens, max_wall_s = self._limits.max_output_tokens, self._limits.max_wall_time
        if max_tokens is not None and self._output_tokens >= max_tokens:
            return BudgetReached(
                f"budget.max_output_tokens={max_tokens} is used up: the finished rows have "
                f"{self._output_tokens} output tokens. They are saved: run again with a higher "
                f"limit to go on, such as -o budget.max_output_tokens={2 * max_tokens}"
            )
        wall_s = time.monotonic() - self._started_s
        if max_wall_s is not None and wall_s >= max_wall_s:
            return BudgetReached(
                f"budget.max_wall_time is used up: {format_duration(wall_s)} of "
                f"{format_duration(max_wall_s)}. Finished rows are saved: run the same command "
                "again to go on, or raise budget.max_wall_time for longer runs"
            )
        return None

    def used_share(self) -> float | None:
        """What is used of the limit that is nearest, from 0 to a little above 1; None if there is
        no limit."""
        limits = self._limits
        shares = []
        if limits.max_output_tokens is not None:
            shares.append(self._output_tokens / limits.max_output_tokens)
        if limits.max_wall_time is not None:
            shares.append((time.monotonic() - self._started_s) / limits.max_wall_time)
        return max(shares, default=None)


def budget_text(limits: BudgetSpec, *, output_tokens: int, wall_s: float) -> str:
    """What is used of each limit, for people; empty if there is none."""
    texts = []
    if limits.max_output_tokens is not None:
        texts.append(f"{output_tokens:,} of {limits.max_output_tokens:,} output tokens")
    if limits.max_wall_time is not None:
        texts.append(f"{format_duration(wall_s)} of {format_duration(limits.max_wall_time)}")
    return ", ".join(texts)
