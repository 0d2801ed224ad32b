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
    """Learns how long outputs are from the rows that finished."""

    MIN_SAMPLES = 32

    def __init__(self) -> None:
        self._count = 0
        self._tokens = 0

    def add(self, num_tokens: int) -> None:
        self._count += 1
        self._tokens += num_tokens

    def expected_remaining(
        self, generated: Floats, max_tokens: Floats, exact: NDArray[np.bool_]
    ) -> Floats:
        """Tokens still to come, per sequence. `exact` marks those that cannot stop early."""
        left = max_tokens - generated
        if self._count < self.MIN_SAMPLES:
            expected = left * 0.5
        else:
            mean = self._tokens / self._count
            expected = np.minimum(np.maximum(mean - generated, 0.25 * mean), left)
        return np.where(exact, left, expected)
