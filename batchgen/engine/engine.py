"""The engine: pulls prompts, plans steps, keeps the device busy, gives completions back.

While the device runs one step, the host plans and launches the next one and reads the tokens of
the one before. The host touches a sequence when it enters and when it ends; in between, a window
of decode steps costs it a few array operations over all of them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator

import numpy as np

from batchgen.engine.model_runner import ModelRunner, StepResult
from batchgen.engine.outputs import OutputBuffer
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.step_plan import StepPlan
from batchgen.engine.stopping import StopStrings
from batchgen.errors import BatchgenError
from batchgen.kernels.reference import NAN_TOKEN
from batchgen.records import (
    Completion,
    EngineStats,
    Prompt,
    PromptSource,
    SampleOutput,
    SampleProgress,
    UnfinishedRow,
)

PLANNING_WINDOW = 65536  # prompts that are ordered together


class Engine:
    """Completes prompts. `run` belongs to one thread; `stats` and `stop` to any."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        stop_token_ids: frozenset[int],
        eos_token_ids: frozenset[int],
        stop_strings: StopStrings | None,
        min_tokens: int,
        lookahead: int,
        prefill_lookahead: int,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._stop_token_ids = stop_token_ids
        self._eos_token_ids = eos_token_ids
        self._stop_strings = stop_strings
        self._min_tokens = min_tokens
        self._lookahead = lookahead
        self._prefill_lookahead = prefill_lookahead
        self._outputs = OutputBuffer(scheduler.config.max_num_seqs)
        self._stopped = False
        self._num_finished = 0
        self._output_tokens = 0

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its output together, at most."""
        return self._scheduler.config.max_model_len

    def stop(self) -> None:
        """Makes `run` return soon; what is unfinished then, `unfinished` has."""
        self._stopped = True

    def run(self, source: PromptSource) -> Iterator[list[Completion]]:
        """Completes all prompts of `source`; yields them in batches, in the order they end."""
        scheduler = self._scheduler
        in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        exhausted = False
        while not self._stopped:
            if not exhausted and len(scheduler.admission.waiting) < scheduler.config.max_num_seqs:
                idle = not scheduler.admission.waiting and not scheduler.num_live
                prompts = source.take(PLANNING_WINDOW, wait=idle)
                exhausted = idle and not prompts
                scheduler.add(prompts)
            plan = scheduler.schedule(in_flight=bool(in_flight))
            if plan is not None:
                self._begin_resumed(plan)
                in_flight.append((plan, self._runner.launch(plan)))
            elif exhausted and not in_flight:
                assert not scheduler.num_live, "sequences are left and none can run"
                return
            while in_flight and (plan is None or self._is_far_ahead(in_flight)):
                finished = self._collect(*in_flight.popleft())
                if finished:
                    yield finished
                if plan is None:
                    break
        for launched in in_flight:  # stopped, and the device ends them anyway
            if finished := self._collect(*launched):
                yield finished

    def unfinished(self) -> list[UnfinishedRow]:
        """The rows that `stop` has cut off, with the tokens that they have; once `run` is over.

        A row that has no tokens is left out: nothing of it would be saved.
        """
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

    def _is_far_ahead(self, in_flight: Collection[tuple[StepPlan, StepResult]]) -> bool:
        """Whether the oldest result should be read before more is launched.

        Reading late costs idle rows while sequences decode, but nothing while prompts are
        prefilled: there steps of few long prompts give the host time for those of many short ones.
        """
        is_prefill = all(plan.decode is None for plan, _ in in_flight)
        return len(in_flight) > (self._prefill_lookahead if is_prefill else self._lookahead)

    def _collect(self, plan: StepPlan, result: StepResult) -> list[Completion]:
        """Reads a step's tokens and takes out the sequences that have ended."""
        tokens_Bk, active_B = result.wait()
        # A row may have ended, and even found a new occupant, after this step was launched.
        current = self._scheduler.table.sequence_id_R[plan.rows] == plan.sequence_ids
        rows, tokens_Bk, active_B = plan.rows[current], tokens_Bk[current], active_B[current]
        if (tokens_Bk == NAN_TOKEN).any():
            raise BatchgenError(
                "the model's logits are NaN: its numbers do not fit model.dtype, or its weights "
                "are damaged; try model.dtype=bfloat16 or float32"
            )
        added_B = self._outputs.append(rows, tokens_Bk)
        self._output_tokens += int(added_B.sum())
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
        self._output_tokens += (len(tokens) - len(item.resumed)) * len(item.duplicates)
        last = int(tokens[-1])
        ends = last in self._stop_token_ids or (
            last in self._eos_token_ids and not item.prompt.ignore_eos
        )
        item.outputs[sample] = SampleOutput(
            token_ids=tokens.tolist(),
            finish_reason="stop" if ends or count is not None else "length",
            seed=item.prompt.seeds[sample],
        )
        if len(item.outputs) < len(item.prompt.seeds):
            return []
        self._num_finished += 1 + len(item.duplicates)
        outputs = tuple(item.outputs[index] for index in range(len(item.prompt.seeds)))
        completion = Completion(
            key=item.prompt.key, outputs=outputs, num_prompt_tokens=len(item.prompt.token_ids)
        )
        return [completion, *(_for_duplicate(completion, other) for other in item.duplicates)]

    def stats(self) -> EngineStats:
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStats(
            num_waiting=len(scheduler.admission.waiting),
            num_running=scheduler.num_live - scheduler.num_swapped,
            num_swapped=scheduler.num_swapped,
            num_finished=self._num_finished,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            merged_prompts=counters.merged_prompts,
            output_tokens=self._output_tokens,
            resumed_tokens=counters.resumed_tokens,
            prefill_steps=counters.prefill_steps,
            decode_steps=counters.decode_steps,
            blocks_total=scheduler.config.gpu_blocks,
            blocks_used=scheduler.kv.gpu.num_used,
            kv_waste=counters.waste_sum / max(counters.waste_samples, 1),
            kv_saved=counters.saved_sum / max(counters.waste_samples, 1),
            peak_saved_blocks=counters.peak_saved_blocks,
            copied_blocks=counters.copied_blocks,
            prefix_blocks_saved=counters.prefix_blocks_saved,
            prefill_blocks_saved=counters.prefill_blocks_saved,
            swapped_out_blocks=counters.swapped_out_blocks,
            swapped_in_blocks=counters.swapped_in_blocks,
            stalled_sequences=counters.stalled,
        )


def _for_duplicate(completion: Completion, prompt: Prompt) -> Completion:
    """The same outputs, as those of an equal prompt."""
    pairs = zip(completion.outputs, prompt.seeds, strict=True)
    outputs = tuple(dataclasses.replace(output, seed=seed) for output, seed in pairs)
    return dataclasses.replace(completion, key=prompt.key, outputs=outputs)
