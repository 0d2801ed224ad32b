"""How much KV the sequences at hand will need at their peak. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def forecast_peak(kv_tokens: Floats, remaining_tokens: Floats) -> float:
    """The largest KV, in tokens, if every sequence grows one token a step and then leaves.

    Sorted by what remains, longest first, the KV just before sequence j leaves is that of the
    first j + 1 sequences, each grown by remaining[j]: the peak is the largest of these.
    """
    if len(kv_tokens) == 0:
        return 0.0
    order = np.argsort(-remaining_tokens, kind="stable")
    remaining = remaining_tokens[order]
    alive = np.arange(1, len(remaining) + 1)
    return float(np.max(np.cumsum(kv_tokens[order]) + remaining * alive))


class OutputLengths:
    """Learns how long outputs are while the job runs: a survival curve.

    The rows that end first are the short ones, so their mean alone says too little. A row that
    still runs, or that max_tokens cut off, counts as longer than what it has.
    Source: Kaplan and Meier, 1958.
    """

    MIN_SAMPLES = 32

    def __init__(self) -> None:
        self._num_ended = 0
        self._ended = np.zeros(256)  # rows that ended by themselves, by length
        self._cut = np.zeros(256)  # rows that max_tokens ended

    def add(self, num_tokens: int, *, is_cut: bool) -> None:
        if num_tokens >= len(self._ended):
            more = np.zeros(num_tokens)
            self._ended, self._cut = (np.append(a, more) for a in (self._ended, self._cut))
        if is_cut:
            self._cut[num_tokens] += 1
        else:
            self._ended[num_tokens] += 1
            self._num_ended += 1

    def expected_remaining(
        self, generated: Floats, max_tokens: Floats, exact: NDArray[np.bool_]
    ) -> Floats:
        """Tokens still to come, per sequence. `exact` marks those that cannot stop early."""
        left = max_tokens - generated
        if self._num_ended < self.MIN_SAMPLES or exact.all():
            return np.where(exact, left, left * 0.5)
        open_ended = ~exact
        survival = self._survival(generated[open_ended], int(max_tokens[open_ended].max()))
        area = np.concatenate([[0.0], np.cumsum(survival)])
        begin = np.minimum(generated, len(survival) - 1).astype(np.int64)
        end = np.minimum(max_tokens, len(survival)).astype(np.int64)
        expected = np.minimum((area[end] - area[begin]) / survival[begin], left)
        return np.where(exact, left, expected)

    def _survival(self, running: Floats, length: int) -> Floats:
        """[length]: the share of outputs with more than t tokens, over 0 everywhere.

        Beyond the longest that was seen, tokens end an output as often as on the whole.
        """
        size = len(self._ended)
        running_at = np.bincount(np.minimum(running, size - 1).astype(np.int64), minlength=size)
        at_risk = np.cumsum((self._ended + self._cut + running_at)[::-1])[::-1]
        mean_hazard = self._num_ended / at_risk[1:].sum()
        hazard = np.full(max(length, size), mean_hazard)
        hazard[0] = 0.0
        seen = np.flatnonzero(at_risk[1:]) + 1
        hazard[seen] = self._ended[seen] / at_risk[seen]
        # Where all that were seen have ended, one more would not end for sure.
        hazard = np.minimum(hazard, min(max(0.5, mean_hazard), 1 - 1e-9))
        survival: Floats = np.exp(np.cumsum(np.log1p(-hazard)))[:length]
        return np.maximum(survival, 1e-12)
