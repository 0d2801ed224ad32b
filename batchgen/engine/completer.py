"""From what the device has run of a plan to completions: the part of the engine that knows what a
row's outputs are. Here for sampled rows, in `beam_completer` for beams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from batchgen.engine.model_runner import ModelRunner, StepResult
from batchgen.engine.outputs import OutputBuffer
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import QueuedPrompt
from batchgen.engine.step_plan import StepPlan
from batchgen.engine.stopping import StopStrings
from batchgen.errors import BatchgenError
from batchgen.kernels.reference import NAN_TOKEN
from batchgen.records import Completion, Prompt, SampleOutput, SampleProgress, UnfinishedRow

Pending = Callable[[], list[Completion]]


class Completer(Protocol):
    """Launches plans and reads what comes of them."""

    num_finished: int  # prompts
    output_tokens: int

    def launch(self, plan: StepPlan) -> Pending:
        """Queues the step on the device. What it returns, called once, in the order of launches,
        waits for the step, and gives the completions that it brought."""
        ...

    def unfinished(self) -> list[UnfinishedRow]:
        """Rows that have not ended but have tokens to go on with, once all results are read."""
        ...


class SampleCompleter:
    """Implements `Completer`: owns the tokens of live rows."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        stop_token_ids: frozenset[int],
        eos_token_ids: frozenset[int],
        stop_strings: StopStrings | None,
        min_tokens: int,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._stop_token_ids = stop_token_ids
        self._eos_token_ids = eos_token_ids
        self._stop_strings = stop_strings
        self._min_tokens = min_tokens
        self._outputs = OutputBuffer(scheduler.config.max_num_seqs)
        self.num_finished = 0
        self.output_tokens = 0

    def launch(self, plan: StepPlan) -> Pending:
        """Queues the step; what it returns waits for it and takes out the rows that have ended."""
        self._begin_resumed(plan)
        result = self._runner.launch(plan)
        return lambda: self._collect(plan, result)

    def unfinished(self) -> list[UnfinishedRow]:
        """A row that has no tokens is left out: nothing of it would be saved."""
        table = self._scheduler.table
        queued = [*table.occupants.values(), *self._scheduler.admission.waiting]
        items = {item.prompt.key: item for item in queued}  # one for all samples of a prompt
        progress = {key: item.progress() for key, item in items.items()}
        for row, item in table.occupants.items():
            tokens = self._outputs.tokens_RW[row, : self._outputs.counts_R[row]]
            progress[item.prompt.key][int(table.sample_R[row])] = SampleProgress(
                token_ids=tuple(tokens.tolist()), finish_reason=None
            )
        return [
            UnfinishedRow(key=prompt.key, samples=tuple(samples))
            for key, samples in progress.items()
            if any(sample.token_ids for sample in samples)
            for prompt in (items[key].prompt, *items[key].duplicates)
        ]

    def _begin_resumed(self, plan: StepPlan) -> None:
        """Notes what the rows that enter with this step have generated in an earlier run."""
        if plan.prefill is None or not plan.prefill.new.outputs:
            return
        new = plan.prefill.new
        for row, token_ids in zip(new.rows.tolist(), new.outputs, strict=True):
            if len(token_ids):
                self._outputs.begin(row, token_ids)

    def _collect(self, plan: StepPlan, result: StepResult) -> list[Completion]:
        """Reads a step's tokens and takes out the sequences that have ended."""
        tokens_Bk, active_B = result.wait()
        # A row may have ended, and even found a new occupant, after this step was launched.
        current = self._scheduler.table.sequence_id_R[plan.rows] == plan.sequence_ids
        rows, tokens_Bk, active_B = plan.rows[current], tokens_Bk[current], active_B[current]
        if (tokens_Bk == NAN_TOKEN).any():
            raise nan_error()
        added_B = self._outputs.append(rows, tokens_Bk)
        self.output_tokens += int(added_B.sum())
        kept: dict[int, int | None] = dict.fromkeys(rows[~active_B].tolist())
        if self._stop_strings is not None and len(rows):
            kept |= self._stopped_by_strings(self._stop_strings, rows, added_B)
        return [c for row, count in kept.items() for c in self._complete(row, count)]

    def _stopped_by_strings(
        self, stop_strings: StopStrings, rows: np.ndarray, added_B: np.ndarray
    ) -> dict[int, int | None]:
        """Rows in whose new tokens a stop string ends, and how many tokens they keep."""
        outputs = self._outputs
        tokens = [outputs.tokens_RW[row, : outputs.counts_R[row]] for row in rows]
        counts = stop_strings.find(tokens, added_B.tolist(), self._min_tokens)
        pairs = zip(rows.tolist(), counts, strict=True)
        return {row: count for row, count in pairs if count is not None}

    def _complete(self, row: int, count: int | None) -> list[Completion]:
        """Takes the row's sample out. With the last one of its prompt: a completion for each prompt
        that it stands for.

        `count`: the tokens kept of a row that a stop string ended, None for all others.
        """
        tokens = self._outputs.take(row, count)
        sample = int(self._scheduler.table.sample_R[row])
        item = self._scheduler.finish(row, len(tokens))
        self.output_tokens += (len(tokens) - len(item.resumed)) * len(item.duplicates)
        last = int(tokens[-1])
        ends = last in self._stop_token_ids or (
            last in self._eos_token_ids and not item.prompt.ignore_eos
        )
        item.outputs[sample] = SampleOutput(
            token_ids=tokens.tolist(),
            finish_reason="stop" if ends or count is not None else "length",
            seed=item.prompt.seeds[sample],
        )
        num_samples = len(item.prompt.seeds)
        if len(item.outputs) < num_samples:
            return []
        completions = completions_of(
            item, tuple(item.outputs[index] for index in range(num_samples))
        )
        self.num_finished += len(completions)
        return completions


def nan_error() -> BatchgenError:
    return BatchgenError(
        "the model's logits are NaN: its numbers do not fit model.dtype, or its weights "
        "are damaged; try model.dtype=bfloat16 or float32"
    )


def completions_of(item: QueuedPrompt, outputs: tuple[SampleOutput, ...]) -> list[Completion]:
    """A completion for the prompt and one for each that it stands for."""
    completion = Completion(
        key=item.prompt.key, outputs=outputs, num_prompt_tokens=len(item.prompt.token_ids)
    )
    return [completion, *(_for_duplicate(completion, other) for other in item.duplicates)]


def _for_duplicate(completion: Completion, prompt: Prompt) -> Completion:
    """The same outputs, as those of an equal prompt."""
    pairs = zip(completion.outputs, prompt.seeds, strict=True)
    outputs = tuple(dataclasses.replace(output, seed=seed) for output, seed in pairs)
    return dataclasses.replace(completion, key=prompt.key, outputs=outputs)
