"""Finds the rows that end the engine's process, by halving those that it had.

A whole run is tried first. When its process dies, the rows that the engine had are suspects: they
are run alone, half of them, then half of what is left of that half, until a row is alone and the
process dies again. That row is a culprit. The whole run then goes on without it. Rows that end on
the way are finished, and no work is lost. With n suspects, a culprit is found in at most
2 log2(n) + 2 restarts.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchgen.errors import BatchgenError
from batchgen.records import RowKey
from batchgen.supervision.line import Assignment

# Deaths of the whole run, one after the other, that no row repeats alone.
_MAX_UNEXPLAINED = 8
# Culprits, one after the other, without a row that the engine completes: it is not the rows then.
# Rows come in the input's order, so a few bad neighbours can meet in an engine that holds few rows.
_MAX_CULPRITS_IN_A_ROW = 8


class Hunt:
    """What the next worker is to do, given how the last ones ended."""

    def __init__(self) -> None:
        self._groups: list[tuple[RowKey, ...]] = []  # to be run alone; the next one last
        self._culprits: dict[RowKey, str] = {}  # not set aside yet
        self._num_in_a_row = 0
        self._num_unexplained = 0

    def next(self) -> Assignment:
        """What to do now; it must be told how that ended."""
        if self._groups:
            return Assignment(only=self._groups[-1])
        culprits, self._culprits = self._culprits, {}
        return Assignment(culprits=culprits)

    def ended(self) -> None:
        """The group that was run alone is finished: none of it is a culprit."""
        self._groups.pop()
        self._num_in_a_row = 0

    def died(self, why: str, suspects: Sequence[RowKey], *, num_ended: int) -> None:
        """The worker died with these rows in its engine, after `num_ended` were completed.

        Raises BatchgenError where no row can be the reason.
        """
        if num_ended:
            self._num_in_a_row = 0
        if not suspects:
            raise BatchgenError(
                f"{why}, while it had no row, so no row is the reason. Finished rows are saved: "
                "run the same command again to go on"
            )
        if not self._groups:
            self._begin(why, suspects)
            return
        group = self._groups.pop()
        if len(group) > 1:
            self._split(suspects)
            return
        self._num_in_a_row += 1
        if self._num_in_a_row > _MAX_CULPRITS_IN_A_ROW:
            raise BatchgenError(
                f"{why}, with each of {self._num_in_a_row} rows alone, and completed none between "
                "them: the model, the engine or the device fails, and not the rows. Finished rows "
                "are saved: run the same command again to go on"
            )
        self._culprits[group[0]] = why
        self._groups.clear()  # others, if there are any, are found when the whole run meets them
        self._num_unexplained = 0

    def _begin(self, why: str, suspects: Sequence[RowKey]) -> None:
        self._num_unexplained += 1
        if self._num_unexplained > _MAX_UNEXPLAINED:
            raise BatchgenError(
                f"{why}, for the {self._num_unexplained}th time, and no row alone is the reason; "
                "if memory is short, lower engine.gpu_memory_utilization, engine.max_num_seqs or "
                "engine.max_num_batched_tokens. Finished rows are saved: run the same command "
                "again to go on"
            )
        self._split(suspects)

    def _split(self, suspects: Sequence[RowKey]) -> None:
        half = len(suspects) // 2
        halves = (suspects[half:], suspects[:half])
        self._groups += [tuple(rows) for rows in halves if rows]
