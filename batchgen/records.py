"""What crosses the rooms: plain frozen records. Imports nothing heavier than the standard library.

InputFile, Unit        how the input is cut          reader  → ledger, runner
InputRow               one row of input              reader  → prompts
Prompt                 token ids for the engine      prompts → engine
SampleProgress         a sample that is not complete engine  → ledger → engine, in another run
UnfinishedRow          what a stop cut off           engine  → ledger
Completion             token ids from the engine     engine  → runner
OutputRow              how a row succeeded           runner  → ledger, writer
RowFailure, RowSkip    how a row ended otherwise     any     → ledger
Part                   one output file               writer  → ledger
EngineStats            counters for people           engine  → monitor
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length"]
FailureKind = Literal[
    "bad_record",  # cannot be read, or a kept value does not fit its column
    "template_error",
    "too_long",
    "empty_prompt",
    "engine_error",  # ended the engine's process
    "invalid_structure",  # cut off before it was what `structured` asks for
]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file of input as it was when the job began."""

    uri: str
    size_bytes: int
    etag: str  # the store's etag or checksum; for local files, size and mtime in nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A contiguous range of rows of one input file: what a commit covers.

    `byte_start` and `byte_end` bound the rows of a plain JSONL file, so that a reader seeks
    there; they are None for formats that are addressed by row.
    """

    unit_id: int  # position in input order, from 0
    file_index: int
    row_start: int  # within the file
    num_rows: int
    byte_start: int | None = None
    byte_end: int | None = None


class RowKey(NamedTuple):
    """Which row: its unit, and its position within the unit (from 0).

    A tuple, because it is made, hashed and compared for every row at every stage.
    """

    unit_id: int
    index: int  # type: ignore[assignment]  # not the method of tuples


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """One row of input. `address` is `<file uri>:<row in file>`, the row's lasting name."""

    key: RowKey
    address: str
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """How far a run came with one sample of a row that it could not complete."""

    token_ids: tuple[int, ...]  # generated so far
    finish_reason: FinishReason | None  # None: the sample has not ended


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedRow:
    """A row that was being generated when its run was stopped."""

    key: RowKey
    samples: tuple[SampleProgress, ...]  # in the order of the prompt's seeds; one has tokens

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the engine is to complete.

    `resumed`, from an earlier run with the same prompt and seeds, is where it goes on: one a
    sample, of which one at least has not ended; empty where nothing is known.
    """

    key: RowKey
    token_ids: Sequence[int]  # at least one
    max_tokens: int  # of each sample, at least one
    seeds: tuple[int, ...]  # one a sample, 63 bits, from row_seed()
    ignore_eos: bool = False
    resumed: tuple[SampleProgress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """One sample of a prompt.

    `token_ids` holds every generated token up to and with the one that ended it (a stop token or
    the token in which a stop string was completed); taking those off the text is the runner's.
    """

    token_ids: Sequence[int]
    finish_reason: FinishReason
    seed: int
    beam_score: float | None = None  # of a beam: log-probability over length ** length_penalty


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine generated for one prompt."""

    key: RowKey
    outputs: tuple[SampleOutput, ...]  # in the order of the prompt's seeds; beams: best first
    num_prompt_tokens: int

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(len(output.token_ids) for output in self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRow:
    """What a row of input that succeeded has come to.

    `rows` are its rows of output, values by column, of the output schema's types: one, or with
    `n_layout: explode` one for each sample.
    """

    key: RowKey
    address: str
    rows: tuple[Mapping[str, object], ...]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFailure:
    """A row that ended in an error: a dead letter."""

    key: RowKey
    address: str
    kind: FailureKind
    message: str
    excerpt: str = ""  # the start of the prompt, or of the record, if there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSkip:
    """A row that was left out because the job says so."""

    key: RowKey
    address: str
    reason: str


RowResult = OutputRow | RowFailure | RowSkip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One output file, named by its content."""

    path: str  # relative to the output folder
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine started. Cheap to take; safe from another thread."""

    num_waiting: int = 0
    num_running: int = 0
    num_swapped: int = 0
    num_finished: int = 0
    prompt_tokens: int = 0  # of admitted prompts, cached and resumed ones included
    cached_prompt_tokens: int = 0  # found in the prefix cache, not computed
    merged_prompts: int = 0  # the same as another one of their window, and not computed
    output_tokens: int = 0
    resumed_tokens: int = 0  # generated by an earlier run, and taken over
    prefill_steps: int = 0
    decode_steps: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    kv_waste: float = 0.0  # mean over the run: 1 - tokens stored / slots allocated
    kv_saved: float = 0.0  # mean over the run: 1 - blocks held / held if rows shared none
    peak_saved_blocks: int = 0  # by sharing
    copied_blocks: int = 0  # shared ones, copied for a row to write on
    prefix_blocks_saved: int = 0  # not read by decode steps: a group's shared prefix is read once
    prefill_blocks_saved: int = 0  # the same for prefill steps, by tile of query tokens
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    stalled_sequences: int = 0  # sequence-windows that waited in place for KV room


class PromptSource(Protocol):
    """Where the engine pulls prompts from; bounded, filled by other threads."""

    def take(self, max_prompts: int, *, wait: bool) -> list[Prompt]:
        """Up to `max_prompts` prompts. With `wait`, an empty list means that none will come."""
        ...


def row_seed(job_seed: int, address: str, sample_index: int = 0) -> int:
    """A row's 63-bit seed: the same on any worker and after any restart."""
    text = f"{job_seed}\x1f{address}\x1f{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
