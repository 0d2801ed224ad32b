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
        # Of these, those in blocks that were there: a cached prefix, another sample's prompt.
        self.cached_len_R = np.zeros(num_rows, dtype=np.int64)
        # Tokens of the prompt; not those of its output that an earlier run has generated.
        self.prompt_len_R = np.zeros(num_rows, dtype=np.int64)
        self.stop_len_R = np.zeros(num_rows, dtype=np.int64)  # prompt and output end here at last
        self.exact_R = np.zeros(num_rows, dtype=np.bool_)  # ends at stop_len, not before
        self.sequence_id_R = np.zeros(num_rows, dtype=np.int64)  # grows with age: oldest is least
        self.sample_R = np.zeros(num_rows, dtype=np.int32)  # which of its prompt's samples
        self.occupants: dict[int, QueuedPrompt] = {}  # by row; a prompt has a row for each sample
        self._pending: dict[int, list[int]] = {}  # by the row that prefills their prompt
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._next_id = 1

    @property
    def num_free(self) -> int:
        return len(self._free_rows)

    def enter(self, item: QueuedPrompt, shared_len: int) -> list[int]:
        """Gives each sample of the prompt a row (all of its beams one); as many must be free.

        The first one prefills the prompt, of which `item.num_computed` tokens are cached. The
        others wait for it, to share `shared_len` tokens.
        """
        rows = [self._free_rows.pop() for _ in range(item.num_rows)]
        for sample, row in zip(item.samples, rows, strict=False):  # the beams have one row
            self.occupants[row] = item
            self.sample_R[row] = sample
            self.sequence_id_R[row] = self._next_id
            self._next_id += 1
        self.state_R[rows] = State.PENDING
        self.state_R[rows[0]] = State.PREFILL
        self.prompt_len_R[rows] = len(item.prompt.token_ids)
        self.stop_len_R[rows] = item.num_prompt_tokens + item.max_tokens
        self.exact_R[rows] = item.prompt.ignore_eos
        self.kv_len_R[rows] = 0
        self.cached_len_R[rows] = shared_len
        self.kv_len_R[rows[0]] = self.cached_len_R[rows[0]] = item.num_computed
        self._pending[rows[0]] = rows[1:]
        return rows

    def begin_decode(self, row: int) -> list[int]:
        """The row's prompt is prefilled: the rows of all of its samples, this one first."""
        rows = [row, *self._pending.pop(row)]
        self.state_R[rows] = State.DECODE
        self.kv_len_R[rows] = self.occupants[row].num_prompt_tokens
        return rows

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
        pending = [row for rows in self._pending.values() for row in rows]
        assert sorted(pending) == np.flatnonzero(self.state_R == State.PENDING).tolist()
        assert set(self._pending) == set(np.flatnonzero(self.state_R == State.PREFILL).tolist())
