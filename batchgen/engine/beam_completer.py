"""From what the device has run of a `BeamScheduler`'s plans to completions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchgen.engine.beam_runner import BeamCounts, BeamResult, BeamRunner
from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.beam_search import Hypothesis
from batchgen.engine.completer import Pending, completions_of, nan_error
from batchgen.engine.step_plan import StepPlan
from batchgen.records import Completion, SampleOutput, UnfinishedRow


class BeamCompleter:
    """Implements `Completer`: a prompt's outputs are the best hypotheses of its beam group."""

    def __init__(
        self, *, scheduler: BeamScheduler, runner: BeamRunner, end_token_ids: Sequence[int]
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._end_token_ids = frozenset(end_token_ids)
        self._seen = BeamCounts(copied_blocks=0, distinct_blocks=0, beam_blocks=0)
        self.num_finished = 0
        self.output_tokens = 0

    def launch(self, plan: StepPlan) -> Pending:
        """Queues the step; what it returns waits for it and takes out the groups that ended."""
        result = self._runner.launch(plan)
        return lambda: self._collect(plan, result)

    def unfinished(self) -> list[UnfinishedRow]:
        """None: beams begin anew."""
        return []

    def _collect(self, plan: StepPlan, result: BeamResult) -> list[Completion]:
        window = result.wait()
        table = self._scheduler.table
        # A group may have ended, and even found a new occupant, after this step was launched.
        current = table.sequence_id_R[plan.rows] == plan.sequence_ids
        goes_on = current & window.active_G
        ended = current & ~window.active_G
        completions: list[Completion] = []
        if ended.any():
            found = self._runner.hypotheses(plan.rows[ended].tolist())
            ends = zip(plan.rows[ended].tolist(), window.num_outputs_G[ended].tolist(), strict=True)
            for (group, num_steps), hypotheses in zip(ends, found, strict=True):
                completions += self._complete(group, num_steps, hypotheses)
        if plan.beams is not None:
            groups = plan.rows[goes_on].astype(np.intp)
            kv_lens = table.prompt_len_R[groups] + window.num_outputs_G[goes_on] - 1
            saved = self._share_saved(window.counts, plan.beams.num_steps)
            self._scheduler.read_window(groups, kv_lens, window.table_GWX[goes_on], saved)
        return completions

    def _share_saved(self, counts: BeamCounts, num_steps: int) -> float:
        """Of the blocks that the beams of the last window would hold if they shared none; notes
        what else the device has counted in it."""
        counters, seen = self._scheduler.counters, self._seen
        self._seen = counts
        counters.copied_blocks = counts.copied_blocks
        beam_blocks = counts.beam_blocks - seen.beam_blocks
        saved = beam_blocks - (counts.distinct_blocks - seen.distinct_blocks)
        counters.peak_saved_blocks = max(counters.peak_saved_blocks, saved // num_steps)
        return saved / max(beam_blocks, 1)

    def _complete(
        self, group: int, num_steps: int, hypotheses: Sequence[Hypothesis]
    ) -> list[Completion]:
        """Takes the group out: a completion for each prompt that it stands for."""
        if not hypotheses:
            raise nan_error()
        item = self._scheduler.finish(group, num_steps)
        seeds = item.prompt.seeds
        outputs = tuple(
            SampleOutput(
                token_ids=hypothesis.token_ids,
                finish_reason="stop"
                if hypothesis.token_ids[-1] in self._end_token_ids
                else "length",
                seed=seed,
                beam_score=hypothesis.score,
            )
            for seed, hypothesis in zip(seeds, hypotheses[: len(seeds)], strict=True)
        )
        completions = completions_of(item, outputs)
        self.num_finished += len(completions)
        self.output_tokens += sum(completion.num_output_tokens for completion in completions)
        return completions
