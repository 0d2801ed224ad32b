"""How much KV the sequences at hand will need, and how long their outputs will be. No torch.

Legend: N sequences, K steps of the forecast, each of some decode steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_MAX_STEPS = 64


def forecast_step(longest: int, window: int) -> int:
    """Decode steps between two looks of a forecast: whole windows, at most 64 looks."""
    return max(1, -(-longest // (_MAX_STEPS * window))) * window


def forecast_kv(
    kv_tokens_N: Ints,
    generated_N: Ints,
    left_N: Ints,
    exact_N: NDArray[np.bool_],
    survival: Floats,
    *,
    lag: int,
    step: int,
    num_steps: int,
) -> Floats:
    """[N, K]: the KV, in tokens, that each sequence is expected to hold at most during each step.

    A sequence has kv_tokens_N now, of which generated_N are output, and makes at most left_N more:
    exactly so many where exact_N says so, else it goes on as `survival` has it (see
    OutputLengths.survival). What ends within a step holds its KV to the step's end, and for `lag`
    decode steps more if its end was not known before: the host has to read it first.
    """
    starts_K = np.arange(num_steps) * step
    tokens_NK = kv_tokens_N[:, None] + np.minimum(left_N[:, None], starts_K + step)
    alive_NK = (left_N[:, None] > starts_K).astype(np.float64)
    is_open = ~exact_N
    last = len(survival) - 1
    now_N = np.minimum(generated_N[is_open], last)
    then_NK = np.minimum(now_N[:, None] + np.maximum(starts_K - lag, 0), last)
    alive_NK[is_open] *= survival[then_NK] / survival[now_N][:, None]
    expected_NK: Floats = tokens_NK * alive_NK
    return expected_NK


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

    def survival(self, running: Ints, length: int) -> Floats:
        """[length]: the share of outputs that have more than t tokens, over 0 everywhere.

        `running`: how many tokens the outputs have that have not ended. Before enough have ended,
        a length is taken for as likely as it is long: to admit too much costs more than to wait.
        """
        if self._num_ended < self.MIN_SAMPLES:
            return 1.0 - (np.arange(length) / length) ** 2
        return self._learned(running, length)

    def _learned(self, running: Ints, length: int) -> Floats:
        """Beyond the longest that was seen, tokens end an output as often as on the whole."""
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
