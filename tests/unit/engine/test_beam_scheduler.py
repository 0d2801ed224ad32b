"""Beam groups with a device that forks at random: every block accounted for, at every step."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.beam_blocks import most_blocks
from batchgen.engine.beam_completer import BeamCompleter
from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.bench import RequestList
from batchgen.engine.engine import Engine
from batchgen.engine.sequences import SchedulerConfig
from batchgen.records import Completion, EngineStats, Prompt, RowKey
from tests.unit.engine.beam_device import BeamDevice, admit_all
from tests.unit.engine.test_scheduler import config as scheduler_config

WIDTH = 4


def config(**changes: int | bool | None) -> SchedulerConfig:
    values: dict[str, int | bool | None] = {"beam_width": WIDTH, "max_num_seqs": 16}
    return scheduler_config(**(values | changes))


def prompt(index: int, tokens: list[int], max_tokens: int, *, ignore_eos: bool = False) -> Prompt:
    return Prompt(
        key=RowKey(unit_id=0, index=index),
        token_ids=tokens,
        max_tokens=max_tokens,
        seeds=(index,),
        ignore_eos=ignore_eos,
    )


def run(
    settings: SchedulerConfig,
    prompts: list[Prompt],
    lengths: dict[tuple[int, ...], int],
    *,
    lookahead: int = 0,
    seed: int = 0,
    forks: float = 0.5,
    admits_all: bool = False,
) -> tuple[dict[int, Completion], EngineStats, BeamDevice]:
    """Completes the prompts; the output of each is as long as `lengths` says, or its max_tokens."""
    scheduler = BeamScheduler(settings)
    if admits_all:
        admit_all(scheduler)
    device = BeamDevice(scheduler, lengths, seed, forks)
    completer = BeamCompleter(scheduler=scheduler, runner=cast(Any, device), end_token_ids=())
    engine = Engine(
        scheduler=scheduler,
        completer=completer,
        lookahead=lookahead,
        prefill_lookahead=2 * lookahead,
    )
    ended = [c for batch in engine.run(RequestList(prompts)) for c in batch]
    completions = {completion.key.index: completion for completion in ended}
    assert len(completions) == len(ended) == len(prompts)
    for each in prompts:
        length = min(lengths[tuple(each.token_ids)], each.max_tokens)
        assert completions[each.key.index].num_output_tokens == length
    scheduler.check_integrity()
    scheduler.kv.gpu.check_integrity([])
    assert scheduler.kv.gpu.num_used == 0
    return completions, engine.stats(), device


def prompts_of(token_lists: list[list[int]], max_tokens: int) -> list[Prompt]:
    return [prompt(i, tokens, max_tokens) for i, tokens in enumerate(token_lists)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_block_is_leaked_or_doubly_owned(data: st.DataObject) -> None:
    """Any widths, pools, prompts with common beginnings, windows read late or at once."""
    draw = data.draw
    width = draw(st.sampled_from([2, 3, 4, 6]), label="width")
    block_size = draw(st.sampled_from([1, 2, 4, 8]), label="block_size")
    max_tokens = draw(st.integers(1, 24), label="max_tokens")
    shared = list(range(draw(st.integers(0, 13), label="shared")))
    tails = st.lists(st.integers(50, 52), min_size=1, max_size=14)
    token_lists = [
        shared * draw(st.booleans()) + draw(tails) for _ in range(draw(st.integers(1, 14)))
    ]
    shortest = draw(st.sampled_from([1, 24]), label="shortest output")
    lengths = {tuple(tokens): draw(st.integers(shortest, 24)) for tokens in token_lists}
    prompt_lens = np.array([len(tokens) for tokens in token_lists])
    needed = most_blocks(prompt_lens, prompt_lens + max_tokens, width=width, block_size=block_size)
    pool = int(needed.max()) + draw(st.integers(0, 40), label="spare blocks")
    run(
        config(
            beam_width=width,
            max_num_seqs=width * draw(st.integers(1, 6), label="groups"),
            block_size=block_size,
            gpu_blocks=pool,
            decode_window=draw(st.sampled_from([1, 3, 7]), label="window"),
            max_num_batched_tokens=draw(st.sampled_from([5, 64]), label="step"),
            enable_prefix_caching=draw(st.booleans(), label="caching"),
            merge_duplicates=draw(st.booleans(), label="merge"),
            min_prefix_saving=draw(st.sampled_from([None, 1]), label="min_saving"),
        ),
        prompts_of(token_lists, max_tokens),
        lengths,
        lookahead=draw(st.integers(0, 2), label="lookahead"),
        seed=draw(st.integers(0, 99), label="seed"),
        forks=draw(st.sampled_from([0.0, 0.5]), label="forks"),
        admits_all=draw(st.booleans(), label="admits_all"),
    )


@pytest.mark.parametrize("seed", range(4))
def test_beams_that_share_nothing_end_in_the_smallest_pool(seed: int) -> None:
    """Each output takes all the blocks that it may: no group can count on what others give back."""
    rng = np.random.default_rng(seed)
    token_lists = [rng.integers(50, 99, rng.integers(1, 14)).tolist() for _ in range(10)]
    prompt_lens = np.array([len(tokens) for tokens in token_lists])
    size = int(rng.choice([1, 2, 4]))
    needed = most_blocks(prompt_lens, prompt_lens + 20, width=WIDTH, block_size=size)
    _, stats, _ = run(
        config(max_num_seqs=24, block_size=size, gpu_blocks=int(needed.max()) + 4 * seed),
        prompts_of(token_lists, 20),
        {tuple(tokens): 20 for tokens in token_lists},
        forks=0.0,
        admits_all=True,
    )
    assert stats.copied_blocks <= len(token_lists) * (WIDTH - 1)  # when their prompts end


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_long_run_in_a_pool_with_room_for_three_groups(lookahead: int) -> None:
    """Thousands of steps; groups wait in place, and the oldest always ends."""
    rng = np.random.default_rng(0)
    token_lists = [
        [*range(10), *rng.integers(50, 99, rng.integers(1, 20)).tolist()] for _ in range(220)
    ]
    lengths = {tuple(tokens): int(rng.integers(1, 35)) for tokens in token_lists}
    most = int(most_blocks(np.array([29]), np.array([59]), width=WIDTH, block_size=4)[0])
    _, stats, device = run(
        config(gpu_blocks=3 * most, max_num_seqs=32),
        prompts_of(token_lists, 30),
        lengths,
        lookahead=lookahead,
        admits_all=True,
    )
    assert device.num_steps > 1000
    assert stats.stalled_sequences > 0
    assert stats.copied_blocks > 0
    assert 0 < stats.kv_saved < 1
    assert stats.peak_saved_blocks > 0
    assert stats.cached_prompt_tokens > 0
    assert 0 < stats.kv_waste < 0.5


def test_lost_blocks_come_back_while_the_group_runs() -> None:
    """The pool is the most that a group without any sharing may need; six run in it at once."""
    token_lists = [[i] * 9 for i in range(12)]
    lengths = {tuple(tokens): 40 for tokens in token_lists}
    most = int(most_blocks(np.array([9]), np.array([49]), width=WIDTH, block_size=4)[0])
    _, stats, device = run(
        config(gpu_blocks=3 * most, max_num_seqs=24), prompts_of(token_lists, 40), lengths
    )
    assert stats.kv_saved > 0.4
    assert device.num_steps < 12 * 40 / 3, "fewer than three groups ran at once"


def test_equal_prompts_are_computed_once() -> None:
    token_lists = [[1, 2, 3], [4, 5], [1, 2, 3], [1, 2, 3]]
    lengths = {(1, 2, 3): 5, (4, 5): 3}
    completions, stats, _ = run(config(merge_duplicates=True), prompts_of(token_lists, 8), lengths)
    assert stats.merged_prompts == 2
    assert [completions[i].outputs[0].seed for i in range(4)] == [0, 1, 2, 3]
    assert stats.output_tokens == 3 * 5 + 3


def test_a_shared_prefix_is_computed_once_and_read_once_by_all_beams() -> None:
    token_lists = [[*range(16), 100 + i] for i in range(4)]
    lengths = {tuple(tokens): 6 for tokens in token_lists}
    _, stats, _ = run(config(max_num_batched_tokens=256), prompts_of(token_lists, 6), lengths)
    assert stats.cached_prompt_tokens == 3 * 16
    assert stats.prefill_steps == 1
    assert stats.prefix_blocks_saved == 5 * (4 * WIDTH - 1) * 4


def test_known_lengths_fill_the_pool_and_seldom_wait() -> None:
    """What beams share is foreseen: without that, four groups would run at once."""
    prompts = [prompt(i, [i] * 8, 24, ignore_eos=True) for i in range(40)]
    lengths = {tuple(p.token_ids): 24 for p in prompts}
    settings = config(gpu_blocks=120, max_num_seqs=64)
    _, stats, device = run(settings, prompts, lengths)
    num_windows = len(prompts) * 24 / settings.decode_window
    assert stats.stalled_sequences < 0.1 * num_windows
    assert device.num_steps < len(prompts) * 24 / 5


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_most_blocks_is_the_sum_over_columns(block_size: int) -> None:
    for prompt_len in range(1, 40):
        for max_tokens in range(1, 40):
            columns = -(-max(prompt_len + max_tokens - 1, prompt_len) // block_size)
            expected = sum(
                1 if (column + 1) * block_size <= prompt_len else WIDTH for column in range(columns)
            )
            lens = np.array([prompt_len]), np.array([prompt_len + max_tokens])
            [actual] = most_blocks(*lens, width=WIDTH, block_size=block_size)
            assert actual == expected
