"""What the scheduler keeps of a sequence, and what it is told and counts. No torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import chain

import numpy as np

from batchgen.engine.kv_cache import block_hashes
from batchgen.engine.step_plan import Int32
from batchgen.records import Prompt, SampleOutput, SampleProgress


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
    merge_duplicates: bool  # a completion is a function of the prompt alone
    # Blocks whose reading a decode step must save for shared prefixes to be read apart; None: never
    # (for a prefill step: see prefill_groups)
    min_prefix_saving: int | None
    prefill_tile_tokens: int  # query tokens that prefill attention works on together
    beam_width: int | None = None  # then max_num_seqs is a multiple of it


class State(IntEnum):
    """What a row of the slot table does."""

    FREE = 0
    PREFILL = 1
    DECODE = 2
    SWAPPED = 3
    ENDING = 4  # its last token is planned: it needs no KV any more
    PENDING = 5  # a sample whose prompt is prefilled in another row


class QueuedPrompt:
    """A prompt from its arrival to its end, with those that have the same completion.

    What an earlier run has generated of its output is prefilled like the prompt: it is part of
    `token_ids` and counts in `num_prompt_tokens`. Samples that are resumed have little in common,
    so that each of them is queued alone (`split_resumed`).

    A window of prompts arrives at once, and the device waits for the first of them: hashes are made
    when the prompt's turn comes, while the device is busy.
    """

    def __init__(
        self, prompt: Prompt, hash_block_size: int | None, *, has_beams: bool = False
    ) -> None:
        """`hash_block_size` is None where prefixes are not cached."""
        self.prompt = prompt
        self.duplicates: list[Prompt] = []
        self.samples = tuple(range(len(prompt.seeds)))  # those that are generated here
        self.resumed: tuple[int, ...] = ()  # output tokens of an earlier run
        self.num_prompt_tokens = len(prompt.token_ids)
        self.outputs: dict[int, SampleOutput] = {}  # of the prompt's samples that have ended
        self.num_shared = 0  # leading tokens that the prompt before it in the plan has, too
        self.num_computed = 0  # tokens, by the steps planned so far; the cached prefix included
        self._has_beams = has_beams
        self._hash_block_size = hash_block_size
        self._hashes: Sequence[bytes] | None = None

    def split_resumed(self) -> list[QueuedPrompt]:
        """An item for each sample that goes on where an earlier run left it; this one itself
        where nothing is resumed."""
        if not self.prompt.resumed:
            return [self]
        items = []
        for sample, progress in enumerate(self.prompt.resumed):
            if progress.finish_reason is not None:
                self.outputs[sample] = SampleOutput(
                    token_ids=list(progress.token_ids),
                    finish_reason=progress.finish_reason,
                    seed=self.prompt.seeds[sample],
                )
                continue
            item = QueuedPrompt(self.prompt, self._hash_block_size)
            item.duplicates, item.outputs = self.duplicates, self.outputs
            item.samples, item.resumed = (sample,), progress.token_ids
            item.num_prompt_tokens += len(progress.token_ids)
            assert item.max_tokens > 0, "a sample is resumed that has ended"
            items.append(item)
        return items

    def progress(self) -> list[SampleProgress]:
        """Of all samples of the prompt, as far as they have ended or were resumed."""
        nothing = SampleProgress(token_ids=(), finish_reason=None)
        samples = list(self.prompt.resumed) or [nothing] * len(self.prompt.seeds)
        for sample, output in self.outputs.items():
            samples[sample] = SampleProgress(
                token_ids=tuple(output.token_ids), finish_reason=output.finish_reason
            )
        return samples

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def num_rows(self) -> int:
        """One for each sample, or one for the beam group."""
        return 1 if self._has_beams else self.num_samples

    @property
    def max_tokens(self) -> int:
        """That each of its samples may still generate."""
        return self.prompt.max_tokens - len(self.resumed)

    @property
    def bucket(self) -> tuple[object, ...]:
        """The same for equal prompts, and cheap; most others have another one."""
        ids = self.prompt.token_ids
        few = ids[:: max(1, len(ids) // 16)]
        prompt = self.prompt
        return (
            *(len(ids), self.max_tokens, self.num_samples, prompt.ignore_eos, prompt.resumed),
            *(*few, ids[-1]),
        )

    @cached_property
    def token_ids(self) -> Int32:
        ids = self.prompt.token_ids
        if isinstance(ids, array) and ids.typecode == "i" and not self.resumed:
            return np.frombuffer(ids, np.int32)
        return np.fromiter(chain(ids, self.resumed), np.int32, self.num_prompt_tokens)

    @property
    def hashes(self) -> Sequence[bytes]:
        """Of each full block (see block_hashes), once `make_hashes` was called."""
        assert self._hashes is not None, "hashes are asked for before they are made"
        return self._hashes

    def make_hashes(self, like: QueuedPrompt | None) -> None:
        """`like` is the prompt before this one, which often begins alike."""
        if self._hashes is not None:
            return
        if self._hash_block_size is None:
            self._hashes = ()
            return
        other = None if like is None else (like.token_ids, like.hashes)
        self._hashes = block_hashes(self.token_ids, self._hash_block_size, other)


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    merged_prompts: int = 0
    resumed_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    stalled: int = 0
    prefix_blocks_saved: int = 0  # not read by decode steps, because a group's prefix is read once
    prefill_blocks_saved: int = 0  # the same for prefill steps, by tile of query tokens
    copied_blocks: int = 0  # on write
    peak_saved_blocks: int = 0  # that the rows would hold more if they shared none
    saved_sum: float = 0.0  # of all blocks that they would hold; as many samples as of the waste
    waste_sum: float = 0.0
    waste_samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admissible:
    """How many waiting prompts may enter now, with how many samples, and how many of their tokens
    are to be computed."""

    count: int
    num_rows: int
    num_tokens: int


@dataclass(slots=True)
class Chunks:
    """A prefill step being put together."""

    token_ids: list[Int32] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    is_last: list[bool] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)  # rows, for each prompt that ends
    new: list[int] = field(default_factory=list)
    num_tokens: int = 0
