"""Who waits, in what order, and how many may enter now. No torch.

A prompt enters while the forecast KV peak of all sequences, it included, fits the device's KV:
lengths are known, or learned from the rows that have finished.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from batchgen.engine.forecast import OutputLengths, forecast_kv, forecast_step
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.prefix_plan import plan_window
from batchgen.engine.sequence_table import SequenceTable
from batchgen.engine.sequences import (
    Admissible,
    QueuedPrompt,
    SchedulerConfig,
    SchedulerCounters,
    State,
)
from batchgen.records import Prompt


class Admission:
    """Owns the queue of waiting prompts."""

    def __init__(
        self,
        config: SchedulerConfig,
        table: SequenceTable,
        kv: KVCache,
        counters: SchedulerCounters,
    ) -> None:
        self._config = config
        self._table = table
        self._kv = kv
        self._counters = counters
        self._last_hashed: QueuedPrompt | None = None
        self.output_lengths = OutputLengths()
        self.waiting: deque[QueuedPrompt] = deque()

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Queues one window of prompts, in the order of the prefix plan."""
        config = self._config
        block_size = config.block_size if config.enable_prefix_caching else None
        has_beams = config.beam_width is not None
        window = [QueuedPrompt(prompt, block_size, has_beams=has_beams) for prompt in prompts]
        self._counters.resumed_tokens += sum(
            len(sample.token_ids) for item in window for sample in item.prompt.resumed
        )
        if config.merge_duplicates:
            window = self._merge_duplicates(window)
        window = [each for item in window for each in item.split_resumed()]
        self.waiting.extend(self._in_order(window))

    def learn(self, item: QueuedPrompt, num_output_tokens: int) -> None:
        """Notes how long an output came to be, where it could have ended early."""
        if not item.prompt.ignore_eos:
            is_cut = num_output_tokens >= item.prompt.max_tokens
            self.output_lengths.add(num_output_tokens, is_cut=is_cut)

    def admissible(self) -> Admissible:
        """How many waiting prompts fit under the forecast KV peak, at most a step's worth."""
        table = self._table
        is_swapped = bool((table.state_R == State.SWAPPED).any())
        if not self.waiting or not table.num_free or is_swapped:
            return Admissible(count=0, num_rows=0, num_tokens=0)
        candidates, new_own = self.candidates()
        if not candidates:
            return Admissible(count=0, num_rows=0, num_tokens=0)
        rows = table.live_rows(State.PREFILL, State.PENDING, State.DECODE)
        block = self._config.block_size
        # The prompt of a row that is prefilled in part has all of its blocks.
        kv_len = np.maximum(table.kv_len_R[rows], table.prompt_len_R[rows])
        held = np.maximum(self._kv.num_blocks_R[rows] - table.cached_len_R[rows] // block, 0)
        shared = max(self._kv.gpu.num_used - int(held.sum()), 0)
        capacity = float((self._config.gpu_blocks - shared) * block)
        num_samples = np.array([item.num_samples for item in candidates])
        ends = np.cumsum(num_samples)
        # Of its prompt, every further sample has a copy of the last, partly filled block.
        new_tails = np.array([item.num_prompt_tokens % block for item in candidates])
        new_tokens = np.repeat(new_tails, num_samples)
        new_tokens[ends - num_samples] = new_own
        tokens = np.concatenate([kv_len - table.cached_len_R[rows], new_tokens])
        samples = [item for item in candidates for _ in range(item.num_samples)]
        generated = kv_len - table.prompt_len_R[rows]
        peaks = self.forecast_peaks(rows, generated, samples, tokens)[ends - 1]
        count = int(np.searchsorted(peaks, capacity, side="right"))
        # The last of the queue would decode late and alone: better to swap a few for a while.
        is_rest = count < len(candidates) == len(self.waiting)
        if is_rest and peaks[-1] <= capacity + self._overcommitment():
            count = len(candidates)
        return Admissible(
            count=count,
            num_rows=int(num_samples[:count].sum()),
            num_tokens=int(new_own[:count].sum()),
        )

    def forecast_peaks(
        self,
        rows: NDArray[np.intp],
        generated: NDArray[np.int64],
        candidates: list[QueuedPrompt],
        tokens: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """The KV peak, in tokens, with the first 1, 2, ... candidates beside `rows`.

        `tokens`: what `rows` and then `candidates` hold of their own.
        """
        table, config = self._table, self._config
        new_max = np.array([item.prompt.max_tokens for item in candidates])
        new_exact = np.array([item.prompt.ignore_eos for item in candidates], dtype=np.bool_)
        resumed = np.array([len(item.resumed) for item in candidates])
        generated = np.concatenate([generated, resumed])
        max_tokens = np.concatenate([table.stop_len_R[rows] - table.prompt_len_R[rows], new_max])
        exact = np.concatenate([table.exact_R[rows], new_exact])
        left = max_tokens - generated
        open_ended = generated[: len(rows)][~exact[: len(rows)]]
        step = forecast_step(int(left.max()), config.decode_window)
        kv = forecast_kv(
            tokens + config.block_size // 2,  # the last, partly filled blocks
            generated,
            left,
            exact,
            self.output_lengths.survival(open_ended, int(max_tokens.max())),
            lag=config.decode_window,
            step=step,
            num_steps=-(-int(left.max()) // step),
        )
        running_K = kv[: len(rows)].sum(axis=0)
        peaks: NDArray[np.float64] = (running_K + np.cumsum(kv[len(rows) :], axis=0)).max(axis=1)
        return peaks

    def _overcommitment(self) -> float:
        """Tokens by which the forecast may exceed the device's KV, to be swapped at the peak."""
        if not self._kv.can_swap:
            return 0.0
        blocks = min(self._kv.cpu.num_free / 2, self._config.gpu_blocks / 10)
        return self._config.block_size * blocks

    def candidates(self) -> tuple[list[QueuedPrompt], NDArray[np.int64]]:
        """The next prompts, at most what a step or the free KV holds, and the tokens of each that
        are not cached."""
        block = self._config.block_size
        room = min(self._config.max_num_batched_tokens, self._kv.gpu.num_free * block)
        candidates, own, total = [], [], 0
        free_rows = self._table.num_free
        for item in self.waiting:
            free_rows -= item.num_rows
            if free_rows < 0:
                break
            item.make_hashes(self._last_hashed)
            self._last_hashed = item
            cached = len(self._kv.cached_blocks(item.hashes)) * block
            candidates.append(item)
            own.append(item.num_prompt_tokens - cached)
            total += own[-1]
            if total >= room:
                break
        return candidates, np.array(own, dtype=np.int64)

    def _in_order(self, window: list[QueuedPrompt]) -> list[QueuedPrompt]:
        """In the order of the prefix plan; without prefix caching nothing counts as shared."""
        caches = self._config.enable_prefix_caching
        nothing = np.empty(0, dtype=np.int32)
        plan = plan_window(
            [item.token_ids if caches else nothing for item in window],
            [item.num_prompt_tokens + item.max_tokens for item in window],
        )
        ordered = [window[index] for index in plan.order.tolist()]
        for item, num_shared in zip(ordered, plan.shared_lens.tolist(), strict=True):
            item.num_shared = num_shared
        return ordered

    def _merge_duplicates(self, window: list[QueuedPrompt]) -> list[QueuedPrompt]:
        """The first of each set of equal prompts, with the others attached to it."""
        alike: defaultdict[tuple[object, ...], list[QueuedPrompt]] = defaultdict(list)
        for item in window:
            alike[item.bucket].append(item)
        kept: list[QueuedPrompt] = []
        for items in alike.values():
            first: dict[int, QueuedPrompt] = {}
            for item in items:
                ids = item.prompt.token_ids
                other = first.setdefault(hash(tuple(ids)), item) if len(items) > 1 else item
                if other is item or other.prompt.token_ids != ids:
                    kept.append(item)
                else:
                    other.duplicates.append(item.prompt)
        self._counters.merged_prompts += len(window) - len(kept)
        return kept
