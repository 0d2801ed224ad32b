"""The engine's loop with a stand-in for the device: what it reads when, and every key once."""

from __future__ import annotations

import random
from array import array
from typing import Any, cast

import numpy as np
import pytest

from batchgen.engine.bench import RequestList
from batchgen.engine.completer import SampleCompleter
from batchgen.engine.engine import Engine
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import SchedulerConfig
from batchgen.engine.step_plan import StepPlan
from batchgen.records import Prompt, RowKey

TOKEN = 5
WINDOW = 4


class StandInResult:
    def __init__(
        self, runner: StandInRunner, plan: StepPlan, tokens_Bk: Any, active_B: Any
    ) -> None:
        self._runner, self._plan = runner, plan
        self._values = tokens_Bk, active_B

    def wait(self) -> tuple[Any, Any]:
        self._runner.unread.remove(self._plan)
        return self._values


class StandInRunner:
    """Every sequence makes TOKEN, `length_of[prompt length]` times or until its limit."""

    def __init__(self, scheduler: Scheduler, length_of: dict[int, int]) -> None:
        self._scheduler = scheduler
        self._length_of = length_of
        self._made: dict[int, int] = {}
        self.unread: list[StepPlan] = []
        self.most_unread_decodes = 0
        self.most_unread = 0

    def launch(self, plan: StepPlan) -> StandInResult:
        scheduler = self._scheduler
        num_steps = 1 if plan.decode is None else plan.decode.num_steps
        prompts = scheduler.table.prompt_len_R[plan.rows]
        ends = np.array([self._length_of[int(length)] for length in prompts])
        ends = np.minimum(ends, scheduler.table.stop_len_R[plan.rows] - prompts)
        ids = plan.sequence_ids.tolist()
        made = np.array([self._made.get(i, 0) for i in ids])
        new = np.clip(ends - made, 0, num_steps)
        self._made.update(zip(ids, (made + new).tolist(), strict=True))
        tokens = np.where(np.arange(num_steps) < new[:, None], TOKEN, -1).astype(np.int32)
        self.unread.append(plan)
        self.most_unread = max(self.most_unread, len(self.unread))
        unread_decodes = sum(unread.decode is not None for unread in self.unread)
        self.most_unread_decodes = max(self.most_unread_decodes, unread_decodes)
        return StandInResult(self, plan, tokens, made + new < ends)


def make(*, merge: bool, prefill_lookahead: int) -> tuple[Engine, StandInRunner]:
    rng = random.Random(1)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=64,
            max_num_batched_tokens=64,
            max_model_len=128,
            decode_window=WINDOW,
            block_size=4,
            gpu_blocks=600,
            cpu_blocks=200,
            enable_prefix_caching=True,
            merge_duplicates=merge,
            min_prefix_saving=None,
            prefill_tile_tokens=64,
        )
    )
    runner = StandInRunner(scheduler, {length: rng.randint(1, 40) for length in range(1, 65)})
    engine = Engine(
        scheduler=scheduler,
        completer=SampleCompleter(
            scheduler=scheduler,
            runner=cast(Any, runner),
            stop_token_ids=frozenset(),
            eos_token_ids=frozenset(),
            stop_strings=None,
            min_tokens=0,
        ),
        lookahead=1,
        prefill_lookahead=prefill_lookahead,
    )
    return engine, runner


def random_prompts(count: int, distinct: int) -> list[Prompt]:
    rng = random.Random(2)
    texts = [[rng.randrange(9) for _ in range(rng.randint(1, 40))] for _ in range(distinct)]
    return [
        Prompt(
            key=RowKey(unit_id=0, index=index),
            token_ids=array("i", rng.choice(texts)),
            max_tokens=50,
            seeds=(index,),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("prefill_lookahead", [0, 1, 4])
def test_every_key_ends_once(merge: bool, prefill_lookahead: int) -> None:
    engine, runner = make(merge=merge, prefill_lookahead=prefill_lookahead)
    prompts = random_prompts(300, distinct=100)
    completions = [c for batch in engine.run(RequestList(prompts)) for c in batch]
    assert sorted(c.key.index for c in completions) == list(range(300))
    assert runner.unread == []
    stats = engine.stats()
    assert stats.num_finished == 300
    assert stats.output_tokens == sum(c.num_output_tokens for c in completions)
    assert stats.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
    distinct = len({tuple(prompt.token_ids) for prompt in prompts})
    assert stats.merged_prompts == (300 - distinct if merge else 0)


def test_the_host_works_ahead_in_prefill_and_not_in_decode() -> None:
    engine, runner = make(merge=False, prefill_lookahead=4)
    for _ in engine.run(RequestList(random_prompts(300, distinct=300))):
        pass
    assert runner.most_unread == 5, "the host never worked ahead"
    assert runner.most_unread_decodes <= 2, "windows are read late: rows that ended still run"
