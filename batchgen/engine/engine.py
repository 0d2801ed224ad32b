"""The engine: pulls prompts, plans steps, keeps the device busy, gives completions back.

While the device runs one step, the host plans and launches the next one and reads the tokens of
the one before. The host touches a sequence when it enters and when it ends; in between, a window
of decode steps costs it a few array operations over all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.completer import Completer, Pending
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.step_plan import StepPlan
from batchgen.records import Completion, EngineStats, PromptSource, UnfinishedRow

PLANNING_WINDOW = 65536  # prompts that are ordered together


class Engine:
    """Completes prompts. `run` belongs to one thread; `stats` and `stop` to any."""

    def __init__(
        self,
        *,
        scheduler: Scheduler | BeamScheduler,
        completer: Completer,
        lookahead: int,
        prefill_lookahead: int,
    ) -> None:
        self._scheduler = scheduler
        self._completer = completer
        self._lookahead = lookahead
        self._prefill_lookahead = prefill_lookahead
        self._stopped = False

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
        in_flight: deque[tuple[StepPlan, Pending]] = deque()
        exhausted = False
        while not self._stopped:
            if not exhausted and len(scheduler.admission.waiting) < scheduler.config.max_num_seqs:
                idle = not scheduler.admission.waiting and not scheduler.num_live
                prompts = source.take(PLANNING_WINDOW, wait=idle)
                exhausted = idle and not prompts
                scheduler.add(prompts)
            plan = scheduler.schedule(in_flight=bool(in_flight))
            if plan is not None:
                in_flight.append((plan, self._completer.launch(plan)))
            elif exhausted and not in_flight:
                assert not scheduler.num_live, "sequences are left and none can run"
                return
            while in_flight and (plan is None or self._is_far_ahead(in_flight)):
                _, collect = in_flight.popleft()
                finished = collect()
                if finished:
                    yield finished
                if plan is None:
                    break
        for _, collect in in_flight:  # stopped, and the device ends them anyway
            if finished := collect():
                yield finished

    def unfinished(self) -> list[UnfinishedRow]:
        """The rows that `stop` has cut off, with the tokens that they have; once `run` is over."""
        return self._completer.unfinished()

    def _is_far_ahead(self, in_flight: Collection[tuple[StepPlan, Pending]]) -> bool:
        """Whether the oldest result should be read before more is launched.

        Reading late costs idle rows while sequences decode, but nothing while prompts are
        prefilled: there steps of few long prompts give the host time for those of many short ones.
        """
        is_prefill = all(plan.prefill is not None for plan, _ in in_flight)
        return len(in_flight) > (self._prefill_lookahead if is_prefill else self._lookahead)

    def stats(self) -> EngineStats:
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStats(
            num_waiting=len(scheduler.admission.waiting),
            num_running=scheduler.num_live - scheduler.num_swapped,
            num_swapped=scheduler.num_swapped,
            num_finished=self._completer.num_finished,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            merged_prompts=counters.merged_prompts,
            output_tokens=self._completer.output_tokens,
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
