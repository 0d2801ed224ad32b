"""The slot table of the host: who sits in which row, and how far each is planned. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.sequences import QueuedPrompt, State


class SequenceTable:
    """One entry a row, the twin of what the device keeps. Lengths are upper bounds, exact for
    every sequence that has not ended."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.state_R = np.full(num_rows, State.FREE, dtype=np.int8)
        self.kv_len_R = np.zeros(num_rows, dtype=np.int64)  # tokens with KV after all planned steps
        self.cached_len_R = np.zeros(num_rows, dtype=np.int64)  # of these, from the prefix cache
        self.prompt_len_R = np.zeros(num_rows, dtype=np.int64)
        self.stop_len_R = np.zeros(num_rows, dtype=np.int64)  # prompt and output end here at last
        self.exact_R = np.zeros(num_rows, dtype=np.bool_)  # ends at stop_len, not before
        self.sequence_id_R = np.zeros(num_rows, dtype=np.int64)  # grows with age: oldest is least
        self.occupants: dict[int, QueuedPrompt] = {}  # by row
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._next_id = 1

    @property
    def num_free(self) -> int:
        return len(self._free_rows)

    def enter(self, item: QueuedPrompt) -> int:
        """Gives the prompt a row, with `item.num_computed` tokens cached. A row must be free."""
        row = self._free_rows.pop()
        self.occupants[row] = item
        self.state_R[row] = State.PREFILL
        self.sequence_id_R[row] = self._next_id
        self._next_id += 1
        self.prompt_len_R[row] = item.num_prompt_tokens
        self.stop_len_R[row] = item.num_prompt_tokens + item.max_tokens
        self.exact_R[row] = item.prompt.ignore_eos
        self.kv_len_R[row] = self.cached_len_R[row] = item.num_computed
        return row

    def leave(self, row: int) -> QueuedPrompt:
        """Frees the row; returns who sat there."""
        self.state_R[row] = State.FREE
        self.sequence_id_R[row] = 0
        self._free_rows.append(row)
        return self.occupants.pop(row)

    def live_rows(self, *states: State) -> NDArray[np.intp]:
        """Rows in one of these states, oldest first."""
        rows = np.flatnonzero(np.isin(self.state_R, states))
        return rows[np.argsort(self.sequence_id_R[rows])]

    def decodable(self) -> NDArray[np.intp]:
        """Rows with decode steps left to plan, oldest first."""
        rows = self.live_rows(State.DECODE)
        return rows[self.kv_len_R[rows] < self.stop_len_R[rows] - 1]

    def longest_live(self) -> int:
        """Tokens that the longest sequence may come to."""
        return int(self.stop_len_R[self.state_R != State.FREE].max(initial=0))

    def check_integrity(self) -> None:
        """Asserts that states, occupants and free rows agree."""
        live = set(np.flatnonzero(self.state_R != State.FREE).tolist())
        assert live == set(self.occupants), "states and sequences differ"
        assert live.isdisjoint(self._free_rows), "a live row is free"
        assert len(live) + len(self._free_rows) == self.num_rows, "a row is lost"
