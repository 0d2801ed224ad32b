"""What the scheduler keeps of a sequence, and what it is told and counts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from batchgen.engine.step_plan import Int32
from batchgen.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine. `gpu_blocks` must hold at least one sequence of `max_model_len`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    decode_window: int  # decode steps between two looks of the host
    block_size: int
    gpu_blocks: int
    cpu_blocks: int
    enable_prefix_caching: bool


class State(IntEnum):
    """What a row of the slot table does."""

    FREE = 0
    PREFILL = 1
    DECODE = 2
    SWAPPED = 3


@dataclass(slots=True, kw_only=True, eq=False)
class QueuedPrompt:
    """A prompt from its arrival to the end of its prefill."""

    prompt: Prompt
    token_ids: Int32
    hashes: Sequence[bytes]
    num_computed: int = 0  # of its tokens, by the steps planned so far; the cached prefix included

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def max_tokens(self) -> int:
        return self.prompt.max_tokens


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    stalled: int = 0
    waste_sum: float = 0.0
    waste_samples: int = 0


@dataclass(slots=True)
class Chunks:
    """A prefill step being put together."""

    token_ids: list[Int32] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    is_last: list[bool] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    num_tokens: int = 0
