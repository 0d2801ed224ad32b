"""Samples of one prompt: what they share, when it is copied, and how it is swapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine import kv_memory
from batchgen.engine.kv_cache import KVCache
from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.step_plan import BlockCopies
from batchgen.models.config import parse_config
from tests.benchmarks.workloads import LLAMA_8B
from tests.unit.engine.test_scheduler import config, output_key, prompt, run

NUM_SAMPLES = 6
NUM_BLOCKS = 12


def keys(num_prompts: int, num_samples: int = NUM_SAMPLES) -> list[int]:
    return [output_key(i, sample) for i in range(num_prompts) for sample in range(num_samples)]


@pytest.mark.parametrize(
    ("prompt_len", "shared_blocks", "copies"), [(32, 8, 0), (33, 8, 5), (35, 8, 5)]
)
def test_full_blocks_are_shared_and_the_last_one_is_copied(
    prompt_len: int, shared_blocks: int, copies: int
) -> None:
    scheduler = Scheduler(config())
    prompts = [prompt(0, list(range(prompt_len)), 12, n=NUM_SAMPLES)]
    lengths = {key: 2 + key // 1000 for key in keys(1)}
    assert run(scheduler, prompts, lengths) == lengths
    counters = scheduler.counters
    assert counters.prompt_tokens == prompt_len
    assert counters.copied_blocks == copies
    assert counters.peak_saved_blocks == shared_blocks * (NUM_SAMPLES - 1)


def test_the_prompt_of_samples_is_prefilled_once_in_chunks() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=16, enable_prefix_caching=False))
    lengths = {key: 3 for key in keys(2)}
    prompts = [prompt(i, [i] * 50, 3, n=NUM_SAMPLES) for i in range(2)]
    assert run(scheduler, prompts, lengths) == lengths
    assert scheduler.counters.prefill_steps == 8
    assert scheduler.counters.prompt_tokens == 100


def test_samples_that_end_with_their_first_token() -> None:
    scheduler = Scheduler(config())
    lengths = {key: 1 for key in keys(5)}
    prompts = [prompt(i, [i] * 7, 1, n=NUM_SAMPLES) for i in range(5)]
    assert run(scheduler, prompts, lengths) == lengths
    assert scheduler.counters.copied_blocks == 0


def test_more_samples_than_rows_are_free_wait() -> None:
    scheduler = Scheduler(config(max_num_seqs=NUM_SAMPLES + 1))
    lengths = {key: 9 for key in keys(4)}
    prompts = [prompt(i, [i] * 7, 9, n=NUM_SAMPLES) for i in range(4)]
    assert run(scheduler, prompts, lengths) == lengths


def test_known_lengths_of_samples_are_admitted_without_any_swap() -> None:
    prompts = [prompt(i, [i] * 20, 40, ignore_eos=True, n=4) for i in range(6)]
    scheduler = Scheduler(config(gpu_blocks=50, cpu_blocks=200))
    lengths = {key: 40 for key in keys(6, 4)}
    assert run(scheduler, prompts, lengths) == lengths
    assert scheduler.counters.swapped_out_blocks == 0


def test_samples_are_swapped_and_come_back() -> None:
    prompts = [prompt(i, [i] * 21, 40, n=4) for i in range(6)]
    scheduler = Scheduler(config(gpu_blocks=24, cpu_blocks=100))
    lengths = {key: 40 for key in keys(6, 4)}
    assert run(scheduler, prompts, lengths) == lengths
    assert scheduler.counters.swapped_out_blocks > 0
    assert scheduler.counters.prompt_tokens == 6 * 21


def forked_cache(num_rows: int) -> KVCache:
    """Row 0 with 10 tokens in 3 blocks, shared by all other rows."""
    kv = KVCache(num_rows=num_rows, max_blocks=4, block_size=4, gpu_blocks=16, cpu_blocks=16)
    kv.admit(0, 10, np.empty(0, dtype=np.int32))
    kv.fork(0, range(1, num_rows))
    kv.check_integrity()
    return kv


def launch_swaps(kv: KVCache) -> None:
    """What the scheduler does with a plan, and the next step."""
    kv.take_swap_out()
    kv.take_swap_in()
    kv.begin_step()


def lengths_of(num_rows: int) -> np.ndarray:
    return np.full(num_rows, 10)


def test_the_last_holder_keeps_the_block() -> None:
    kv = forked_cache(4)
    rows = np.arange(4)
    shared = int(kv.table_RX[0, 2])
    assert kv.copy_on_write(rows[:2], lengths_of(2)) == 2
    assert kv.copy_on_write(rows[2:], lengths_of(2)) == 1
    assert kv.copy_on_write(rows, lengths_of(4)) == 0
    kv.check_integrity()
    assert kv.gpu.num_used == 2 + 4
    assert [int(kv.table_RX[row, 2]) for row in rows].count(shared) == 1
    copies = kv.take_copies()
    assert copies is not None
    assert copies.source.tolist() == [shared] * 3
    assert kv.saved_blocks() == 2 * 3


def test_shared_blocks_are_swapped_once_and_with_their_last_row() -> None:
    kv = forked_cache(3)
    kv.copy_on_write(np.arange(3), lengths_of(3))
    moved = []
    for row in (2, 1, 0):
        moved.append(kv.swap_out(row))
        kv.check_integrity()
        launch_swaps(kv)
        assert kv.gpu.num_used + kv.cpu.num_used == 5
    assert moved == [1, 1, 3]
    for row, num_moved in ((1, 3), (0, 1), (2, 1)):
        assert kv.swap_in(row, ()) == num_moved
        launch_swaps(kv)
        kv.check_integrity()
        assert kv.gpu.num_used + kv.cpu.num_used == 5
    assert np.array_equal(kv.table_RX[1, :2], kv.table_RX[2, :2])


def test_what_only_swapped_rows_hold_can_be_moved_alone() -> None:
    kv = forked_cache(3)
    for row in (2, 1):
        assert kv.swap_out(row) == 0
    assert kv.swap_out_idle(10) == 0
    kv.release(0)
    assert kv.gpu.num_used == 3
    assert kv.swap_out_idle(10, keep=1) == 0
    assert kv.swap_out_idle(2) == 2
    kv.check_integrity()
    assert kv.swapped_blocks(1) == kv.swapped_blocks(2) == 2
    assert kv.swap_in(2, ()) == 2
    launch_swaps(kv)
    kv.release(1)
    kv.release(2)
    kv.check_integrity()
    assert kv.gpu.num_used == kv.cpu.num_used == 0


def test_blocks_that_leave_are_free_with_the_next_step_or_by_waiting() -> None:
    kv = forked_cache(2)
    kv.release(1)
    held = kv.gpu.num_used
    kv.swap_out(0)
    assert kv.gpu.num_used == held
    assert kv.num_free == kv.gpu.num_blocks
    kv.check_integrity()
    launch_swaps(kv)
    kv.check_integrity()
    assert kv.gpu.num_used == 0
    assert not kv.take_wait()
    kv.swap_in(0, ())
    launch_swaps(kv)
    kv.swap_out(0)
    kv.gpu.allocate(kv.gpu.num_free)
    kv.admit(1, 1, np.empty(0, dtype=np.int32))
    assert kv.take_wait()
    assert not kv.take_wait()


@settings(max_examples=30, deadline=None)
@given(
    st.permutations(range(NUM_BLOCKS)),
    st.lists(st.integers(0, NUM_BLOCKS // 2 - 1), min_size=1, max_size=NUM_BLOCKS // 2),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float8_e4m3fn]),
)
def test_blocks_are_copied_within_the_device(
    order: list[int], picks: list[int], chunk_blocks: int, dtype: torch.dtype
) -> None:
    """Sources may repeat, targets may not, and none is both."""
    tiny = LLAMA_8B | {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    }
    memory = KVMemory(
        parse_config(tiny, source="test"),
        num_blocks=NUM_BLOCKS,
        block_size=2,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    rows = memory.block_rows
    rows.copy_(torch.randn(rows.shape))
    expected = rows.float()
    source = np.array([order[pick] for pick in picks], dtype=np.int32)
    target = np.array(order[NUM_BLOCKS // 2 :][: len(picks)], dtype=np.int32)
    for i, j in zip(source.tolist(), target.tolist(), strict=True):
        expected[j] = expected[i]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_memory, "_COPY_BYTES", chunk_blocks * rows[0].nbytes)
        memory.copy(BlockCopies(source=source, target=target))
    assert torch.equal(rows.float(), expected)
